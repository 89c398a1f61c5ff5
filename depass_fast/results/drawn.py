"""The method ``plot`` of every result: its arguments, checked before any work. :mod:`.pictures` says what is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ..plots.look import needs_matplotlib
from .attention_pictures import draw_credit, draw_explanation
from .pictures import Look, draw_continuation, draw_layer, draw_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports] (the extra `plot`)

Width = Literal["column", "page"] | float | None


class DrawnLayer:
    """Gives :class:`depass_fast.Attribution` its pictures."""

    def plot(
        self,
        ax: Axes | None = None,
        *,
        kind: Literal["tokens", "strip", "leading", "curve", "targets"] | None = None,
        target: int = 0,
        top: int = 20,
        width: Width = None,
        cmap: Any = None,
        limit: float | None = None,
        caption: bool = True,
    ) -> Axes:
        """Draw the shares with matplotlib; return the Axes, which :func:`depass_fast.plots.save` writes.

        ``kind``: "tokens" are bars in the prompt's order (default for tokens), "strip" is the prompt as coloured text;
        "leading" are the ``top`` components, the others in one bar, `rest` and `bias` (default for all else); "curve"
        is the share of Σ|score| that the leading components hold; "targets" is a heat map of several targets.
        ``target`` chooses one of several.

        ``ax`` are Axes of your own; by default a new figure is made, ``width`` inches wide: "column" (3.3), "page"
        (6.8) or a number. ``cmap`` is a colour map for "strip" and "targets", ``limit`` the score at which colours
        are full. Without ``caption`` title, sums and completeness are left to the text of the paper; warnings stay.

        Raises:
            ImportError: matplotlib is not installed; the extra `plot` brings it.
            ValueError: this result has no such picture; ``top``, ``width`` or ``limit`` is out of range; no such map.
            IndexError: there is no such target.
            TypeError: ``ax`` is no Axes.
        """
        needs_matplotlib()
        return draw_layer(self, kind, target, Look(ax, top, width, cmap, limit, caption))


class DrawnLayers:
    """Gives :class:`depass_fast.LayeredAttribution` its pictures."""

    def plot(
        self,
        ax: Axes | None = None,
        *,
        kind: Literal["heat", "layers", "leading", "curve"] | None = None,
        target: int = 0,
        top: int = 20,
        width: Width = None,
        cmap: Any = None,
        limit: float | None = None,
        caption: bool = True,
    ) -> Axes:
        """Draw the shares of several layers with matplotlib; return the Axes.

        ``kind``: "heat" is a heat map of layers by components, completed by `rest` and `bias` (default for heads);
        "layers" is a group of bars per layer (default for up to three components, such as modules); "leading" are the
        ``top`` components of all layers, which have no sum (default for all else); "curve" is, for every layer, the
        share of Σ|score| that its leading components hold. Other arguments and errors as of :meth:`DrawnLayer.plot`.
        """
        needs_matplotlib()
        return draw_layers(self, kind, target, Look(ax, top, width, cmap, limit, caption))


class DrawnContinuation:
    """Gives :class:`depass_fast.Continuation` and :class:`depass_fast.Generation` their pictures."""

    def plot(
        self,
        ax: Axes | None = None,
        *,
        kind: Literal["heat", "sum"] | None = None,
        read: Literal["logit", "log-prob"] = "logit",
        top: int = 20,
        width: Width = None,
        cmap: Any = None,
        limit: float | None = None,
        caption: bool = True,
    ) -> Axes:
        """Draw what every token that follows drew on, with matplotlib; return the Axes.

        ``kind``: "heat" is a heat map with a row per token, of its logit or log-probability (``read``), over tokens in
        their order or the 2 · ``top`` leading components; "sum" is the picture of the sum over all tokens (default
        for several layers). Other arguments and errors as of :meth:`DrawnLayer.plot`.
        """
        needs_matplotlib()
        return draw_continuation(self, kind, read, Look(ax, top, width, cmap, limit, caption))


class DrawnExplanation:
    """Gives :class:`depass_fast.AttentionExplanation` its pictures."""

    def plot(
        self,
        ax: Axes | None = None,
        *,
        kind: Literal["keys", "leading", "probabilities"] | None = None,
        key: int | None = None,
        head: int | None = None,
        top: int = 20,
        width: Width = None,
        cmap: Any = None,
        limit: float | None = None,
        caption: bool = True,
    ) -> Axes:
        """Draw why a head looks where it looks, with matplotlib; return the Axes.

        ``kind``: "keys" is a heat map of keys by components, whose rows sum to log P plus the entropy of P (default
        where all keys were asked for); "leading" are the ``top`` components of one ``key``'s logit, by default the most
        probable one's, or of the difference of the two keys that were asked for; "probabilities" is where the head
        looks. ``head`` chooses one of several. Other arguments and errors as of :meth:`DrawnLayer.plot`.
        """
        needs_matplotlib()
        return draw_explanation(self, kind, key, head, Look(ax, top, width, cmap, limit, caption))


class DrawnCredit:
    """Gives :class:`depass_fast.AttentionCredit` its pictures."""

    def plot(
        self,
        ax: Axes | None = None,
        *,
        kind: Literal["heads", "leading"] | None = None,
        target: int = 0,
        top: int = 20,
        width: Width = None,
        cmap: Any = None,
        limit: float | None = None,
        caption: bool = True,
    ) -> Axes:
        """Draw what a target owes to where heads look, with matplotlib; return the Axes.

        ``kind``: "heads" is a heat map of layers by heads (default), "leading" are the ``top`` components over all
        heads, and the others. Other arguments and errors as of :meth:`DrawnLayer.plot`.
        """
        needs_matplotlib()
        return draw_credit(self, kind, target, Look(ax, top, width, cmap, limit, caption))
