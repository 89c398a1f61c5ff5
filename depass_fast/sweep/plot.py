"""The leading components of a sweep: as a table of text, and as a picture of bars with standard errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..inputs.prompt_set import UNNAMED
from ..linear_rules import LINEAR_RULES
from ..plots import needs_matplotlib
from ..plots.bars import Bar, rows
from ..plots.frame import Caption
from ..results.render import format_scores
from ..runtime.terminal import encodable

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports] (the extra `plot`)


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
    of = f"{data['prompts']:,} prompts" + ("" if data["name"] == UNNAMED else f" of {data['name']}")
    return f"{kind} of {_model(manifest['model'])} in the {target} of {of}, {options['allocation']}"


def _model(source: dict[str, Any]) -> str:
    """Return what a model is called: the last part of its folder, but what that is part of for the demo and the hub."""
    name = source["model"]
    if not name:
        return source["model_class"]
    parts = Path(name).parts
    if parts[-3:] == ("depass_fast", "demo", "model"):
        return "the demo model"
    if len(parts) > 2 and parts[-2] == "snapshots":  # a folder of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return parts[-3].rpartition("--")[2]
    return Path(name).name


class Run(Protocol):
    """The state of a sweep, as its picture tells it."""

    @property
    def manifest(self) -> dict[str, Any]: ...

    @property
    def n_prompts(self) -> int: ...

    @property
    def n_done(self) -> int: ...

    @property
    def n_failed(self) -> int: ...

    @property
    def is_complete(self) -> bool: ...


def draw_means(shown: pandas.DataFrame, sweep: Run, ax: Axes | None = None, width: str | float = "column") -> Axes:
    """Draw rows of :meth:`depass_fast.Sweep.leading` as bars with standard errors, the first on top; return the Axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    needs_matplotlib()
    manifest = sweep.manifest
    rule, failed = manifest["options"]["allocation"], sweep.n_failed
    several = shown["target_number"].nunique() > 1
    bars = [
        Bar(
            f"{one['label']} ({one['target_number']})" if several else str(one["label"]),
            one["mean"],
            number,
            True,
            error,
        )
        for one, number, error in zip(
            shown.to_dict("records"),
            format_scores(shown["mean"].tolist()),
            shown["standard_error"].fillna(0.0).tolist(),
            strict=True,
        )
    ]
    notes = [f"mean ± standard error over the prompts that list a component; {rule} · attention frozen"]
    warnings = [] if sweep.is_complete else [f"UNFINISHED: {sweep.n_done:,} of {sweep.n_prompts:,} prompts are done"]
    warnings += [f"{failed:,} prompts failed"] if failed else []
    if rule not in LINEAR_RULES and manifest["method"] not in (None, "exact"):
        warnings = ["APPROXIMATE scores, of first order", *warnings]
    return rows(bars, "mean share", Caption(title(manifest), notes, warnings), ax, width)
