"""A small Llama that knows indirect objects, invented facts in three languages, and true from false.

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

DEFAULT_COUNT = 500  # indirect-object sentences, which are drawn


def demo_path() -> Path:
    """Return the folder of the shipped model: config.json, model.safetensors, tokenizer files, figures.json."""
    return Path(__file__).resolve().parent / "model"


def load_demo(
    dtype: torch.dtype | None = None, path: str | Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the model (in evaluation mode, float32 unless ``dtype`` is given) and the tokenizer from a local folder."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(path or demo_path())
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    # from_pretrained's dtype argument has another name in transformers 4. The caller's random state is kept.
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
    """Return prompts that the demo model answers; the same arguments give the same prompts.

    ``ioi`` has the splits ``train``, ``heldout_pairs``, ``heldout_templates`` and ``heldout`` (both new), and draws 500
    prompts by default. ``facts`` and ``statements`` have splits by entity: ``train`` (verdicts on its statements were
    shown in training), ``heldout`` (only its facts were shown) and ``all``. They return every prompt by default, in all
    languages or in ``language`` (``en``, ``fr``, ``de``). With ``count``, that many are drawn.
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
