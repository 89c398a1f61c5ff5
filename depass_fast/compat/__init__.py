"""A drop-in for the published DePass code: the same class, calls, shapes and numbers, faster and in less memory.

Write ``from depass_fast.compat import decomposed_state_manager``. A script that says ``from DePass import
decomposed_state_manager`` runs unchanged with ``python -m depass_fast.compat SCRIPT.py ARGS``.

The published code deviates from the method (DESIGN.md section 6). The deviations are reproduced by default, through
initial states (:mod:`.manager`) and rules (:mod:`.rules`). ``corrected=True`` leaves them out:

| published                                           | with ``corrected=True``                                       |
|-----------------------------------------------------|---------------------------------------------------------------|
| neurons: `rest` is what they lack to the state      | what they lack to the state after it, where they are: the sum |
| before the MLP                                      | is the hidden state                                           |
| biases (Qwen2's V, ...) are dropped                 | one more component, `bias`, the last                          |
| the unembedding's bias is added to every component  | to `bias` only                                                |
| modules, heads, neurons, subspaces: component 0's   | no exception                                                  |
| gate is 1.0 at position 0; the last component's     |                                                               |
| gates below 1e-5 count as zero                      |                                                               |
| `linear`, `relu`: shares may sum to less than one   | normalised                                                    |
| a subspace state is taken as it is                  | what it lacks is one more component, the first                |

Two things are not reproduced. ``single_compute_token`` and ``compute_num``, which cut the components into groups and
so changed the result, are accepted and change nothing. And generation works: the published helper called a method that
does not exist, and would have tokenised the generated text anew.
"""

from .manager import decomposed_state_manager

__all__ = ["decomposed_state_manager"]
