"""The leading components of a sweep: as a table of text, and as a picture of bars with standard errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.extras import needed
from ..runtime.terminal import encodable

if TYPE_CHECKING:
    import pandas

_POSITIVE, _NEGATIVE = "#0072B2", "#D55E00"  # told apart by colour-blind eyes, too


def table_of(shown: pandas.DataFrame, manifest: dict[str, Any], leading: int) -> str:
    """Return the rows of :meth:`depass_fast.Sweep.leading` as text."""
    head = f"{title(manifest)}\n"
    if not len(shown):
        return head + "no component has a score yet"
    several = shown["target_number"].nunique() > 1
    rows = [["component", "mean", "standard error", "n", f"in the leading {leading}"]]
    for one in shown.to_dict("records"):
        name = f"target {one['target_number']}: {one['label']}" if several else str(one["label"])
        error = "" if one["n"] < 2 else f"{one['standard_error']:.3f}"
        rows.append([name, f"{one['mean']:+.3f}", error, f"{one['n']:,}", f"{one['top'] / one['results']:.0%}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return encodable(head + "\n".join(lines))


def title(manifest: dict[str, Any]) -> str:
    """Return a run in a line."""
    kind, data, options = manifest["components"]["kind"], manifest["data"], manifest["options"]
    target = "logits" if manifest["target_kind"] == "logit" else "log-probabilities"
    model = Path(manifest["model"]["model"] or manifest["model"]["model_class"]).name
    of = f"{data['prompts']:,} prompts of {data['name']}"
    return f"{kind} of {model} in the {target} of {of}, {options['allocation']}"


def draw_means(shown: pandas.DataFrame, manifest: dict[str, Any], path: Path) -> None:
    """Draw the leading components as bars with their standard errors, the largest on top.

    Raises:
        ImportError: matplotlib is not installed.
    """
    needed("matplotlib", "plot", "evaluate")
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `evaluate`)

    look: Any = {"font.size": 9, "svg.hashsalt": "depass_fast", "svg.fonttype": "none", "axes.spines.right": False}
    with matplotlib.rc_context(look | {"axes.spines.top": False}):
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] (the extra `evaluate`)

        figure = Figure(figsize=(6, 0.9 + 0.22 * len(shown)), layout="constrained")
        axis = figure.subplots()
        means, errors = shown["mean"].to_numpy(), shown["standard_error"].fillna(0).to_numpy()
        colours = [_POSITIVE if mean >= 0 else _NEGATIVE for mean in means]
        axis.barh(range(len(shown)), means, xerr=errors, color=colours, ecolor="#444444", height=0.7)
        axis.set_yticks(range(len(shown)), [str(label) for label in shown["label"]])
        axis.invert_yaxis()
        axis.axvline(0, color="#444444", linewidth=0.8)
        axis.set_xlabel("mean score, with its standard error")
        axis.set_title(title(manifest), fontsize=9, loc="left", wrap=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
