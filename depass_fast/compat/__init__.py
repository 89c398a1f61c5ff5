"""Drop-in for the published DePass code: the same class, calls, shapes and numbers; faster and in less memory.

``from depass_fast.compat import decomposed_state_manager``; or, for a script that says ``from DePass import
decomposed_state_manager`` and shall stay as it is, ``python -m depass_fast.compat SCRIPT.py ARGS``.

What the published code does beside the method (DESIGN.md section 6) is reproduced by default, by initial states
(:mod:`.manager`) and rules (:mod:`.rules`) of this package; ``corrected=True`` leaves it out:

================================================  =====================================================================
published                                         with ``corrected=True``
================================================  =====================================================================
neurons: `rest` is what the neurons lack to the   ... to the state *after* it, where they are: components sum to the
state *before* the MLP                            hidden state
biases (Qwen2's V, ...) are dropped               they are one more, last component, `bias`
modules, heads, neurons, subspaces: component 0's  no such exception
gate is 1.0 at position 0; a last component's
gate below 1e-5 counts as zero
``linear``, ``relu``: shares may sum to less      normalised
than one
a subspace state is taken as it is                what it lacks to the hidden state is `rest`, first in order
================================================  =====================================================================

One deviation is not reproduced: ``single_compute_token`` and ``compute_num``, which cut the components into groups and
so changed the result, are accepted and change nothing. And generation works: the published helper called a method that
does not exist, and would have tokenised the generated text anew.
"""

from .manager import decomposed_state_manager

__all__ = ["decomposed_state_manager"]
