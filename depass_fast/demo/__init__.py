"""A small Llama that knows something: indirect objects, invented facts in three languages, true from false.

The shipped model and its text are made by ``python -m depass_fast.demo.train``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from .text import FactPrompt, IoiPrompt, Statement, fact_prompts, ioi_prompts, statements

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["FactPrompt", "IoiPrompt", "Statement", "demo_path", "demo_prompts", "load_demo"]

DEFAULT_COUNT = 500  # indirect-object sentences are drawn, so their number must be given or defaulted


def demo_path() -> Path:
    """Folder of the shipped model: config.json, model.safetensors, tokenizer files, figures.json."""
    return Path(__file__).resolve().parent / "model"


def load_demo(
    dtype: torch.dtype | None = None, path: str | Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load model (evaluation mode, float32 unless ``dtype`` is given) and tokenizer from the local folder."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(path or demo_path())
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    # Not from_pretrained, whose dtype argument has another name in transformers 4. The caller's random state stays.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    model = model.to(dtype or torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return model.eval(), tokenizer


@overload
def demo_prompts(
    kind: Literal["ioi"], split: str = ..., *, count: int | None = ..., seed: int = ...
) -> list[IoiPrompt]: ...
@overload
def demo_prompts(
    kind: Literal["facts"], split: str = ..., *, language: str | None = ..., count: int | None = ..., seed: int = ...
) -> list[FactPrompt]: ...
@overload
def demo_prompts(
    kind: Literal["statements"],
    split: str = ...,
    *,
    language: str | None = ...,
    count: int | None = ...,
    seed: int = ...,
) -> list[Statement]: ...


def demo_prompts(
    kind: str, split: str = "heldout", *, language: str | None = None, count: int | None = None, seed: int = 1
) -> list[Any]:
    """Prompts the demo model answers, always the same ones for the same arguments.

    ``ioi``: splits ``train``, ``heldout_pairs``, ``heldout_templates``, ``heldout`` (both new); 500 by default.
    ``facts`` and ``statements``: splits by entity, ``train`` (verdicts on its statements were shown in training),
    ``heldout`` (only its facts were shown) and ``all``; every one by default, in all languages or in ``language``
    (``en``, ``fr``, ``de``). With ``count``, that many are drawn.
    """
    if kind == "ioi":
        if language not in (None, "en"):
            raise ValueError("indirect-object sentences are English only")
        return ioi_prompts(split, DEFAULT_COUNT if count is None else count, seed)
    if kind not in ("facts", "statements"):
        raise ValueError(f"unknown kind of prompts: {kind!r}")
    items: list[Any] = (fact_prompts if kind == "facts" else statements)(split, language, seed)
    if count is not None:
        import random

        items = random.Random(f"draw-{seed}").sample(items, min(count, len(items)))
    return items
