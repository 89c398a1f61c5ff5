"""A drop-in for the published DePass code: the same class, calls, shapes and numbers, faster and in less memory.

Write ``from depass_fast.compat import decomposed_state_manager``. A script that says ``from DePass import
decomposed_state_manager`` runs unchanged with ``python -m depass_fast.compat SCRIPT.py ARGS``; a notebook does after
``%load_ext depass_fast.compat``, and anything after ``import depass_fast.compat.install``. These also bridge what newer
packages broke (:mod:`.bridges`). ``DePass.utils`` and published attributes are there (:mod:`.utils`, :mod:`.steps`).

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

Not reproduced, with ``corrected`` or without:

| published                                           | here                                                          |
|-----------------------------------------------------|---------------------------------------------------------------|
| ``single_compute_token`` and ``compute_num`` cut    | accepted, and change nothing                                  |
| the components into groups, and so change results   |                                                               |
| generation calls a method that does not exist, and  | generation works                                              |
| would tokenise the generated text anew              |                                                               |
| float16: a norm's scale is the square of states in  | the scale is computed in float32: right. On SmolLM2-135M      |
| float16, infinite beyond 255, so that all is zero   | 0.4 % from float32, where the published numbers are all zero  |
| negative layers read the states of other layers     | they count from the end; in the subspace methods -1 is before |
|                                                     | layer 0, as published, and others are refused                 |
| a given subspace state is changed in place          | it is left as it was                                          |
| every call takes a forward pass                     | one for a prompt, as long as the model stays as it is         |
| every layer is carried by itself                    | calls for one layer after the other carry several together    |
| single steps take any state, mask and weights       | those of the last forward pass; others are refused            |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .manager import decomposed_state_manager
    from .omni import qwenOmnimanager

__all__ = ["decomposed_state_manager", "qwenOmnimanager"]


def __getattr__(name: str) -> object:
    if name == "qwenOmnimanager":
        from .omni import qwenOmnimanager

        return qwenOmnimanager
    if name != "decomposed_state_manager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..runtime.versions import check_transformers

    check_transformers()  # before an import that an old one cannot answer
    from .manager import decomposed_state_manager

    return decomposed_state_manager


def load_ipython_extension(shell: Any) -> None:
    """Let ``import DePass`` mean this package in a notebook: ``%load_ext depass_fast.compat``."""
    from .stand_in import stand_in

    stand_in()
