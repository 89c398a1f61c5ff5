"""Generation by ``model.generate``: its arguments, and one prompt, checked, with a bar of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..adapters import Adapter
from ..runtime.numbers import as_index
from ..runtime.progress import ProgressBar, progress_bar

NEW_TOKENS = 20  # where no length is given
_UNSET = (None, GenerationConfig().max_length)  # a GenerationConfig's `max_length` that nobody chose


def generation_arguments(max_new_tokens: int | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of ``model.generate``: ``given`` ones, else greedy, and NEW_TOKENS where they say no length.

    A ``generation_config`` among them decides by itself what it sets.
    """
    arguments, config = dict(given or {}), (given or {}).get("generation_config")
    if config is None:
        arguments = {"do_sample": False} | arguments
    if max_new_tokens is not None:
        arguments = {"max_new_tokens": max_new_tokens} | arguments
    by_config = config is not None and (config.max_new_tokens is not None or config.max_length not in _UNSET)
    if not by_config and all(arguments.get(name) is None for name in ("max_new_tokens", "max_length")):
        arguments["max_new_tokens"] = NEW_TOKENS
    return arguments


def generate(adapter: Adapter, ids: Tensor, progress: bool = True, **arguments: Any) -> tuple[Tensor, int]:
    """Run ``model.generate`` on one prompt (N,). Returns all ids, on the CPU, and N.

    ``progress`` shows a bar of the tokens; ``arguments`` are those of ``model.generate``.

    Raises:
        ValueError: several sequences are asked for, or more tokens than fit into the model's context.
    """
    if arguments.get("num_return_sequences") not in (None, 1):
        raise ValueError("num_return_sequences must be 1: one sequence is decomposed.")
    new = _new_tokens(arguments, len(ids), adapter.context_length)
    if new is not None:  # a model's own configuration might name another number
        arguments = {k: v for k, v in arguments.items() if k != "max_length"} | {"max_new_tokens": new}
    prompt = ids[None].to(adapter.device)
    arguments = {"attention_mask": torch.ones_like(prompt)} | arguments | {"return_dict_in_generate": False}
    with progress_bar("tokens", new or 0, progress) as bar:
        if bar is not None:
            arguments["stopping_criteria"] = [*(arguments.get("stopping_criteria") or ()), _ticking(bar)]
        model: Any = adapter.model
        return model.generate(prompt, **arguments)[0].cpu(), len(ids)


def _new_tokens(arguments: Mapping[str, Any], length: int, limit: int | None) -> int | None:
    """The most tokens to be added to a prompt of ``length``; None where a configuration decides it.

    Raises:
        ValueError: there are none, or they pass the model's context of ``limit`` tokens.
    """
    name = next((n for n in ("max_new_tokens", "max_length") if arguments.get(n) is not None), None)
    if name is None:
        return None
    given = as_index(arguments[name], name)
    new = given if name == "max_new_tokens" else given - length
    if new < 1:
        raise ValueError(f"{name}: {given} leaves no new token after a prompt of {length}; raise it.")
    if limit is not None and length + new > limit:
        raise ValueError(f"{name}: {given} after a prompt of {length} tokens pass the model's context of {limit}.")
    return new


def _ticking(bar: ProgressBar) -> Callable[..., Tensor]:
    """A stopping criterion that never stops, and moves a bar at every token."""

    def tick(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        bar.finish()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return tick
