"""Chat messages through a tokenizer's template. A chat that ends with the assistant is continued."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .doubts import doubt
from .text import check_text

_ASSISTANT = ("assistant", "model")
_OURS = ("conversation", "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors")
_OURS += ("tokenize", "tokenizer_kwargs", "truncation")  # they say how ids are returned
_NOT_IN_TEMPLATE = ("add_generation_prompt", "chat_template", "continue_final_message", "sanitize_control_tokens")
_BY_TEMPLATE = "transformers.tokenization_utils_base"  # the home of the method that needs a template


def check_template_kwargs(given: Any) -> None:
    """Check the option ``chat_template_kwargs``.

    Raises:
        TypeError: it is no mapping.
        ValueError: it names what is up to the library.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(f"chat_template_kwargs: expected a dict such as {{'enable_thinking': False}}, got {given!r}.")
    for name in given:
        if name in _OURS:
            raise ValueError(
                f"chat_template_kwargs: {name!r} says how ids are returned, which is up to the library; give what the "
                "template reads, such as 'tools' or 'enable_thinking'."
            )


def chat_ids(messages: Sequence[Mapping[str, Any]], tokenizer: Any, given: Mapping[str, Any] | None) -> list[int]:
    """The ids of chat messages: of a new turn of the assistant, or of its last message without an end.

    Args:
        given: arguments of ``apply_chat_template``. With ``continue_final_message`` or ``add_generation_prompt`` among
            them, they decide how the prompt ends.

    Raises:
        ValueError: there is no template, it refuses the messages, or the assistant's last message holds no text.
    """
    given = dict(given or {})
    template = getattr(tokenizer, "chat_template", None) or given.get("chat_template")
    method = getattr(type(tokenizer), "apply_chat_template", None)
    if not template and (method is None or method.__module__ == _BY_TEMPLATE):
        raise ValueError("prompt: chat messages given, but the tokenizer has no chat template; give text or ids.")
    _check_texts(messages)
    if template:  # mistral-common works without, and refuses by itself what it does not know
        _doubt_unread(given, str(_template_read(template, given)))
    if not {"continue_final_message", "add_generation_prompt"} & given.keys():
        given |= _ending(messages, bool(template))
    if given.get("continue_final_message") is True and not _has_text(messages[-1]):
        raise ValueError(
            "prompt: the last message is to be continued and holds no text; leave it out to ask for a new one."
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **given)
    except ImportError:
        raise
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise ValueError(f"prompt: the tokenizer's chat template refuses these messages: {error}") from error


def _ending(messages: Sequence[Mapping[str, Any]], has_template: bool) -> dict[str, bool]:
    """The argument that continues a last message of the assistant's, or begins one."""
    if messages[-1].get("role") in _ASSISTANT:
        return {"continue_final_message": True}
    return {"add_generation_prompt": True} if has_template else {}  # mistral-common begins one, and refuses to be told


def _check_texts(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        if isinstance(message.get("content"), str):
            check_text(message["content"], "prompt")


def _template_read(template: Any, given: Mapping[str, Any]) -> Any:
    """The template that transformers reads: a given one, the tokenizer's only one, or one of several by its name."""
    named = given.get("chat_template")
    if not isinstance(template, Mapping):
        return named or template
    if named is None:
        named = "tool_use" if given.get("tools") is not None and "tool_use" in template else "default"
    return template.get(named, named)


def _has_text(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, str):
        return bool(content.strip())
    return any(isinstance(part, Mapping) and str(part.get("text", "")).strip() for part in content or ())


def _doubt_unread(given: Mapping[str, Any], template: str) -> None:
    """Warn of arguments that the template never reads."""
    unread = [name for name in given if name not in _NOT_IN_TEMPLATE and not re.search(rf"\b{name}\b", template)]
    if unread:
        doubt(
            f"chat_template_kwargs: the tokenizer's chat template reads no {', '.join(map(repr, unread))}, so that the "
            "prompt is the same without; look at tokenizer.chat_template for the names that it reads."
        )
