"""The prompts of a sweep, and what is read of each: from files, data sets or Python objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .encodings import is_encoding
from .tables import Row, Table, open_table
from .text import check_text, spaced

PROMPT_FIELDS = ("prompt", "messages", "input_ids")  # looked for in this order where none is named
UNNAMED = "prompts"  # what a list of them is called
_FIELDS = ("target", "contrast", "position", "id")


@dataclass(frozen=True)
class Item:
    """A prompt and what is read of it.

    id: its name in the results of a sweep. prompt: text, ids or chat messages. target, contrast, position: as of
    :meth:`depass_fast.DePass.attribute`. place: where it comes from, as errors name it.
    """

    id: str
    prompt: Any
    target: Any = None
    contrast: Any = None
    position: Any = -1
    place: str = ""


class Checked(NamedTuple):
    """The number of prompts of a set, and a hash of all that it says of them."""

    count: int
    sha256: str


class PromptSet:
    """Prompts with their targets, which can be gone through more than once: files and data sets are not held in memory.

    :meth:`read` makes one of a file or a data set, :meth:`of` one of Python objects.
    """

    def __init__(self, name: str, items: Callable[[], Iterator[Item]]) -> None:
        self.name, self._items = name, items

    def __iter__(self) -> Iterator[Item]:
        return self._items()

    def __repr__(self) -> str:
        return f"PromptSet({self.name!r})"

    @classmethod
    def read(
        cls,
        source: str | Path,
        *,
        split: str | None = None,
        prompt: str | None = None,
        target: str | None = None,
        contrast: str | None = None,
        position: str | None = None,
        id: str | None = None,
        target_space: bool = False,
    ) -> PromptSet:
        """Return the prompts of a file or a data set. Nothing but the kind of ``source`` is checked yet.

        Args:
            source, split: as of :func:`depass_fast.inputs.tables.open_table`: JSONL, JSON, CSV, TSV, Parquet, a folder
                or a name of `datasets`.
            prompt: the field of the prompt: a text, chat messages, or ids. Default: the first of "prompt", "messages"
                and "input_ids" that a record has.
            target: the field of the target: a text or an id of one token, or a list of these. Default: "target", where
                a record has it, and else the model's own next token.
            contrast, position, id: the fields of what :class:`Item` says; by default of these names, where there are
                such. Without an id a prompt is named by its number, from 0.
            target_space: put a space before a target that has none and follows a word.

        Raises:
            OSError, ValueError, ImportError: as :func:`depass_fast.inputs.tables.open_table`.
        """
        table = open_table(source, split)
        named = {"prompt": prompt, "target": target, "contrast": contrast, "position": position, "id": id}
        return cls(table.name, lambda: _items_of(table, named, target_space))

    @classmethod
    def of(
        cls,
        prompts: Iterable[Any] | PromptSet,
        *,
        targets: Sequence[Any] | None = None,
        contrasts: Sequence[Any] | None = None,
        positions: Sequence[Any] | None = None,
        ids: Sequence[str] | None = None,
    ) -> PromptSet:
        """Return prompts that Python holds: texts, ids, messages, or mappings with the fields of :meth:`read`.

        The others are lists of one for each prompt. An iterator is gone through once, and kept.

        Raises:
            TypeError: prompts are one text, or are no iterable.
            ValueError: a list of another length.
        """
        each = {"target": targets, "contrast": contrasts, "position": positions, "id": ids}
        given: dict[str, Any] = {name: values for name, values in each.items() if values is not None}
        if isinstance(prompts, PromptSet):
            if given:
                raise ValueError(f"{next(iter(given))}s: the prompts of {prompts!r} have their own; leave one out.")
            return prompts
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise TypeError(
                f"prompts: expected a list of prompts, or PromptSet.read(file), got {type(prompts).__name__}; one "
                "prompt is given to attribute()."
            )
        listed: Any = prompts
        held = listed.to_dict("records") if hasattr(prompts, "columns") else list(listed)  # of a DataFrame its rows
        for name, values in given.items():
            given[name] = _listed(f"{name}s", values)
            if len(given[name]) != len(held):
                raise ValueError(f"{name}s: expected one per prompt ({len(held)}), got {len(given[name])}.")
        return cls(UNNAMED, lambda: _items_in(held, given))

    @classmethod
    def once(cls, prompts: Iterable[Any] | PromptSet, **each: Sequence[Any] | None) -> PromptSet:
        """Return prompts as :meth:`of`. Those of an iterator are taken as they are needed, and gone through once."""
        if not isinstance(prompts, Iterator):
            return cls.of(prompts, **each)
        given = {name: _listed(name, values) for name, values in each.items() if values is not None}
        return cls(UNNAMED, lambda: _items_in(prompts, {name[:-1]: values for name, values in given.items()}))

    def checked(self) -> Checked:
        """Go through all prompts once.

        Raises:
            OSError, ValueError: a file cannot be read, a field is missing or of another type, prompts are of different
                forms, an id is there twice, there are none. The message names the place.
        """
        digest, places, form = hashlib.sha256(), {}, None
        for item in self:
            check_text(item.id, f"{item.place}: id")
            if item.id in places:
                raise ValueError(f"{item.place}: the id {item.id!r} is there twice; {places[item.id]} has it, too.")
            places[item.id] = item.place
            own = form_of(item.prompt)
            if form is not None and own != form[0]:
                raise ValueError(f"{item.place}: the prompt is {own}; that of {form[1]} is {form[0]}. Take one form.")
            form = form or (own, item.place)
            digest.update(_canonical(item).encode("utf-8", errors="surrogatepass"))
        if not places:
            raise ValueError(f"{self.name}: it holds no prompts.")
        return Checked(len(places), digest.hexdigest())


def form_of(prompt: Any) -> str:
    """Return the form of a prompt in words."""
    if isinstance(prompt, str):
        return "a text"
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
        return "chat messages"
    return "token ids"


def _canonical(item: Item) -> str:
    """Return what an item says, as a text that is the same for equal items."""
    said = [item.id, item.prompt, item.target, item.contrast, item.position]
    try:
        return json.dumps(said, sort_keys=True)
    except TypeError:  # arrays, and targets that are objects
        return json.dumps(_plain(said), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


# -- Python objects -------------------------------------------------------------------------------------------------


def _listed(name: str, values: Any) -> list[Any]:
    """Return the values for the prompts in their order, which a table's index does not change."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list with one per prompt, got {type(values).__name__}.")
    return list(values)


def _items_in(prompts: Iterable[Any], given: Mapping[str, Sequence[Any]]) -> Iterator[Item]:
    for number, prompt in enumerate(prompts):
        place = f"prompt {number}"
        if isinstance(prompt, Item):
            item = prompt if prompt.place else replace(prompt, place=place)
        elif isinstance(prompt, Mapping) and not is_encoding(prompt):
            item = _item(Row(place, prompt), number, {}, False)
        else:
            item = Item(str(number), prompt, place=place)
        for name, values in given.items():
            if number >= len(values):
                raise ValueError(f"{name}s: expected one per prompt, and there are only {len(values)}.")
        own = {name: values[number] for name, values in given.items()}
        if "id" in own:
            own["id"] = str(own["id"])
        if own.get("position", 0) is None:
            own["position"] = -1
        yield replace(item, **own)


# -- records --------------------------------------------------------------------------------------------------------


def _items_of(table: Table, named: Mapping[str, str | None], target_space: bool) -> Iterator[Item]:
    for number, row in enumerate(table.rows()):
        item = _item(row, number, named, table.is_text)
        if target_space and isinstance(item.prompt, str):
            item = replace(item, target=_spaced(item.prompt, item.target), contrast=_spaced(item.prompt, item.contrast))
        yield item


def _spaced(prompt: str, target: Any) -> Any:
    if isinstance(target, list):
        return [_spaced(prompt, one) for one in target]
    return spaced(prompt, target) if isinstance(target, str) else target


def _item(row: Row, number: int, named: Mapping[str, str | None], is_text: bool) -> Item:
    """Return the item that a record describes."""
    place, values = row
    name = named.get("prompt") or next((one for one in PROMPT_FIELDS if values.get(one) is not None), "prompt")
    prompt = _prompt(place, name, _field(place, values, name), is_text)
    own = {one: _own(place, values, one, named.get(one)) for one in _FIELDS}
    read = {
        "target": _target(place, own["target"], is_text),
        "contrast": _token(place, "contrast", own["contrast"]),
        "position": _position(place, own["position"]),
    }
    identity = own["id"] if own["id"] is not None else number
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)  # a column of numbers with gaps
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        raise ValueError(f"{place}: the id is {identity!r}; expected a text or a number.")
    return Item(str(identity), prompt, place=place, **read)


def _own(place: str, values: Mapping[str, Any], name: str, named: str | None) -> Any:
    """Return the value of a field, None where there is none and none was asked for by name."""
    if named is None:
        value = values.get(name)
        return None if value == "" else value
    return _field(place, values, named)


def _field(place: str, values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise ValueError(f"{place}: the field {name!r} is missing; there are {', '.join(map(str, values)) or 'none'}.")
    if isinstance(values[name], str) and not values[name]:
        raise ValueError(f"{place}: the field {name!r} is empty.")
    return values[name]


def _prompt(place: str, name: str, value: Any, is_text: bool) -> Any:
    """Return a prompt: a text, a list of ids or of messages. A table of texts holds lists as JSON, or ids as "1 5"."""
    if is_text and name in ("input_ids", "messages"):
        is_plain = name == "input_ids" and not value.lstrip().startswith("[")
        value = _ids_in(value) if is_plain else _json(place, name, value)
    elif is_text and value.lstrip().startswith("["):
        value = _prompt_in(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        return value
    are_ids = isinstance(value, list) and value and all(_is_id(one) for one in value)
    are_messages = isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value)
    if not (are_ids or are_messages):
        raise ValueError(
            f"{place}: the field {name!r} is no prompt; expected a text, a list of ids, or a list of chat messages."
        )
    return value


def _prompt_in(value: str) -> Any:
    """Return the ids or messages that a cell holds as JSON; any other cell is a text."""
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return value
    listed = found if isinstance(found, list) else []
    is_prompt = all(_is_id(one) or (isinstance(one, dict) and "role" in one) for one in listed)
    return listed if listed and is_prompt else value


def _ids_in(value: str) -> Any:
    items = value.replace(",", " ").split()
    return [int(one) if one.isdecimal() else one for one in items]


def _json(place: str, name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: the field {name!r} is no JSON ({error.msg} at character {error.pos}).") from None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _target(place: str, value: Any, is_text: bool) -> Any:
    """Return a target: a token, or a list of tokens, which a table of texts holds as JSON."""
    if is_text and isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value  # the token itself
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        return _token(place, "target", value)
    if not value:
        raise ValueError(f"{place}: the target is an empty list; give at least one token, or leave it out.")
    return [_token(place, "target", one) for one in value]


def _token(place: str, name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str) and not _is_id(value):
        raise ValueError(f"{place}: the {name} is {value!r}; expected a text or an id of one token.")
    return value


def _position(place: str, value: Any) -> Any:
    """Return a position or a list of positions; texts such as "3" and "3,8" are read as these."""
    if value is None:
        return -1
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts or not all(part.removeprefix("-").isdecimal() for part in parts):
            raise ValueError(f"{place}: the position is {value!r}; expected an integer, or several such as 3,8,-1.")
        numbers = [int(part) for part in parts]
        return numbers if "," in value else numbers[0]
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    if not _is_id(listed) and not (isinstance(listed, list) and listed and all(map(_is_id, listed))):
        raise ValueError(f"{place}: the position is {value!r}; expected an integer, or a list of integers.")
    return listed
