"""Results of several positions in one picture. They are known by what they hold, not by their class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..labels import shown_tokens
from .frame import Caption
from .heat import Table, heat
from .look import needs_matplotlib


class Placed(Protocol):
    """Shares of the components of one prompt in a target at one position, see :class:`depass_fast.Attribution`."""

    labels: list[str]
    tokens: list[str]
    target_names: list[str]
    components: str
    position: int
    completeness_error: float
    warnings: list[str] | None

    @property
    def n_extras(self) -> int: ...

    def scores_of(self, target: int) -> Tensor: ...


def plot_positions(
    results: Sequence[Placed],
    ax: Any = None,
    *,
    target: int = 0,
    top: int = 40,
    width: str | float | None = None,
    cmap: Any = None,
) -> Any:
    """Draw the results of several positions of a prompt as a heat map, positions by components; return the Axes.

    ``results`` is what :meth:`depass_fast.DePass.attribute` returns for a list of positions. Tokens are columns in
    their order; of other components the ``top`` with the largest |share| at any position are, the others summed up.
    Every row, with `others`, `rest` and `bias`, sums to the target's logit at its position.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no result, or they are of different components.
    """
    needs_matplotlib()
    if not results:
        raise ValueError("plot_positions: there is no result.")
    first = results[0]
    if any(not hasattr(one, "n_extras") or one.labels != first.labels for one in results):
        raise ValueError("plot_positions: expected results of one call, for a list of positions of one layer.")
    table = [one.scores_of(target).tolist() for one in results]
    values, labels, extras = leading_columns(
        table, _plain(first), first.n_extras, None if first.components == "tokens" else top
    )
    read = token_labels(first.tokens)
    rows = [f"{read[one.position]} ({one.position})" for one in results]
    worst = max(one.completeness_error for one in results)
    caption = Caption(
        f"{first.target_names[target]} at {len(results)} positions",
        [f"each row sums to its logit; completeness error {worst:.1e}; attention frozen"],
        list(dict.fromkeys(text for one in results for text in one.warnings or [])),
    )
    return heat(Table(values, rows, labels, "read after", first.components, extras), "share", caption, ax, width, cmap)


def _plain(result: Placed) -> list[str]:
    if result.components != "tokens":
        return result.labels
    return [*token_labels(result.tokens), *result.labels[len(result.tokens) :]]


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Return the labels of tokens that stand in their order: their text without space around it, where any is left."""
    return [token.strip() or repr(token)[1:-1] for token in shown_tokens(tokens)]


def leading_columns(
    table: Sequence[Sequence[float]], labels: Sequence[str], extras: int, top: int | None
) -> tuple[list[list[float]], list[str], int]:
    """Return a table's ``top`` columns with the largest |score| in any row, then the sum of the others and the extras.

    Columns keep their order. None keeps them all. Returned are values, labels, and how many of them are no components.
    """
    count = len(labels) - extras
    if top is None or count <= top:
        return [list(row) for row in table], list(labels), extras
    sizes = [max(abs(row[m]) for row in table) for m in range(count)]
    kept = sorted(sorted(range(count), key=lambda m: -sizes[m])[:top])
    left = sorted(set(range(count)) - set(kept))
    values = [[*(row[m] for m in kept), sum(row[m] for m in left), *row[count:]] for row in table]
    return values, [*(labels[m] for m in kept), f"{len(left)} others", *labels[count:]], extras + 1
