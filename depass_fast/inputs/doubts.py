"""Warnings about input that can be decomposed, and that is probably not what was meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..runtime.log import warn_user


class InputWarning(UserWarning):
    """A prompt, a chat template's argument or a tokenizer's file is probably not what was meant."""


def doubt(text: str) -> None:
    """Warn at the user's own line."""
    warn_user(text, InputWarning)


def doubt_padding(ids: Sequence[int], tokenizer: Any | None, argument: str = "prompt") -> None:
    """Warn of padding at the ends of ids that came without a mask.

    A token for padding that is also another special one, such as GPT-2's, may stand there once.
    """
    pad = _special(tokenizer, "pad_token_id")
    if pad is None:
        return
    with_mask = "input_ids with their attention_mask, or " if argument == "prompt" else ""
    shared = any(_special(tokenizer, f"{name}_token_id") == pad for name in ("bos", "eos", "unk", "sep", "cls"))
    for end, run in (("begins", ids), ("ends", ids[::-1])):
        if run and all(i == pad for i in run[: 2 if shared else 1]) and len(run) > shared:
            doubt(
                f"{argument}: it {end} with the tokenizer's padding token (id {pad}), and no mask says that it is "
                f"padding: it is decomposed like text. Give {with_mask}ids without padding."
            )
            return


def doubt_start(ids: Sequence[int], tokenizer: Any | None, advice: str) -> None:
    """Warn where a prompt begins with two BOS; ``advice`` says what to do."""
    bos = _special(tokenizer, "bos_token_id")
    if bos is not None and bos != _special(tokenizer, "pad_token_id") and list(ids[:2]) == [bos, bos]:
        doubt(f"prompt: it begins with the start token twice (id {bos}), which models were not trained on. {advice}")


def doubt_second_start(ids: Sequence[int], tokenizer: Any | None) -> None:
    """Warn where a continuation begins with BOS. One that is EOS as well may stand there alone: the text ends."""
    bos, eos = _special(tokenizer, "bos_token_id"), _special(tokenizer, "eos_token_id")
    if bos is not None and list(ids[:1]) == [bos] and (bos != eos or len(ids) > 1):
        doubt(
            f"continuation: it begins with the start token (id {bos}), which then stands behind the prompt. Leave it "
            "out of the text, or give tokenizer(text, add_special_tokens=False).input_ids."
        )


def doubt_end(text: str, ids: Sequence[int], tokenizer: Any) -> None:
    """Warn where a tokenizer ends a text with EOS: what is read there is what follows the end."""
    eos, token = _special(tokenizer, "eos_token_id"), getattr(tokenizer, "eos_token", None)
    if eos is not None and len(ids) > 1 and ids[-1] == eos and not text.rstrip().endswith(str(token)):
        doubt(
            f"prompt: the tokenizer ends the text with {token!r}, so that position -1 reads what follows the end. Set "
            "tokenizer.add_eos_token = False, or give ids without it."
        )


def doubt_first_word(prompts: Sequence[Tensor], tokenizer: Any | None) -> None:
    """Warn where the first token of a prompt (N,), which is kept out of the allocation, is no start token."""
    if not getattr(tokenizer, "all_special_ids", None):
        return  # nothing says which tokens are words
    firsts = {ids[:1].tolist()[0] for ids in prompts if len(ids) > 1}
    if all(is_special(first, tokenizer) for first in firsts):
        return
    doubt(
        "prompt: it begins with no start token. With exclude_special=True, the default, the first token takes no part "
        "in the allocation behind it, since attention rests there. Its share cannot be compared with the others'. "
        "exclude_special=False treats it like them; linear rules always do."
    )


def doubt_missing_space(text: str, before: str, argument: str) -> None:
    """Warn of a target that continues the word before it, where a word of its own has a space in front."""
    doubt(
        f"{argument}: {text!r} has no space in front of it, and continues the word before it, {before!r}. A word of "
        f"its own is {' ' + text!r}, another token."
    )


def is_special(token: int, tokenizer: Any | None) -> bool:
    """True for a token that is no text: one with a role, or one that templates put between messages."""
    if token in (getattr(tokenizer, "all_special_ids", None) or ()):
        return True
    try:
        added = getattr(tokenizer, "added_tokens_decoder", None)  # made anew every time, of thousands in some
    except NotImplementedError:
        return False
    one = added.get(token) if isinstance(added, Mapping) else None  # a method of mistral-common's, which has none
    return bool(getattr(one, "special", False))


def _special(tokenizer: Any | None, name: str) -> int | None:
    return getattr(tokenizer, name, None)
