"""The pictures of a ledger: one kind of components, or several kinds below each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..components.model import Tokens
from ..plots.look import WIDTHS, needs_matplotlib
from ..results.drawn import Width
from ..results.pictures import Look, chosen, draw_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports] (the extra `plot`)

KINDS = ("positions", "tokens", "modules", "heads", "neurons")


class _Book(Protocol):
    """The answers of a ledger that its pictures are drawn from."""

    _request: Any

    def _check(self, kinds: Sequence[str], prompt: int, read: int, target: int = 0) -> tuple[int, int, int]: ...

    def _results(self, kinds: Sequence[str], prompt: int, read: int) -> dict[str, Any]: ...

    def _read_off(self, components: Any, prompts: Sequence[int]) -> list[Any]: ...


_HEIGHTS = {"tokens": 1.9, "modules": 1.7, "heads": 2.6, "neurons": 2.0}  # inches of a page's panels
_TOP = 10  # neurons on a page


def draw_page(book: Any, kinds: Sequence[str], prompt: int, read: int, target: int = 0) -> Any:
    """Draw several kinds of components below each other, at a page's width; return the matplotlib Figure.

    The caption is above the first; warnings are above each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    needs_matplotlib()
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] (the extra `plot`)

    heights = [_HEIGHTS[kind] for kind in kinds]
    figure = Figure(figsize=(WIDTHS["page"], sum(heights) + 0.7), layout="constrained")
    panels = figure.subplots(len(kinds), squeeze=False, height_ratios=heights)[:, 0]
    for number, (kind, ax) in enumerate(zip(kinds, panels, strict=True)):
        which: Any = {"prompt": prompt, "read": read, "target": target, "top": _TOP}
        book.plot(ax, kind=kind, caption=number == 0, **which)
    return figure


class DrawnLedger:
    """Gives :class:`depass_fast.Ledger` its pictures."""

    def plot(
        self: _Book,
        ax: Axes | None = None,
        *,
        kind: Literal["positions", "tokens", "modules", "heads", "neurons"] = "positions",
        prompt: int = 0,
        read: int = 0,
        target: int = 0,
        top: int = 20,
        width: Width = None,
        cmap: Any = None,
        limit: float | None = None,
        caption: bool = True,
    ) -> Axes:
        """Draw the exact scores of one kind of components with matplotlib; return the Axes.

        ``kind``: "positions" is a heat map of layers by positions, what each token's state at the input of a layer is
        worth, where every row sums to the target; "tokens" are bars at the first layer, "modules" bars of all layers,
        "heads" is a heat map of layers by heads, "neurons" are the ``top`` leading ones of all layers. ``prompt``,
        ``read`` and ``target`` choose one of several. Other arguments and errors as of
        :meth:`depass_fast.Attribution.plot`; also of :meth:`depass_fast.Ledger.top`.
        """
        needs_matplotlib()
        kind_ = chosen(kind, "positions", KINDS, "a ledger")
        prompt, read, target = self._check([] if kind_ == "positions" else [kind_], prompt, read, target)
        look = Look(ax, top, width, cmap, limit, caption).checked()
        if kind_ == "positions":
            layers = range(self._request.end)
            return draw_positions([self._read_off(Tokens(n), [prompt])[0][read] for n in layers], target, look)
        return self._results([kind_], prompt, read)[kind_].plot(target=target, **look._asdict())
