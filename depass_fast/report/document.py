"""A report: sheets that are written as one page."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from .fragment import fragment
from .page import write_page
from .sheet import Sheet


@dataclass(eq=False)
class Report:
    """Everything about one prompt, as :meth:`depass_fast.DePass.report` returns it: a sheet for each target.

    ``text`` is what ``print`` shows. Notebooks show a small picture of the first sheet.
    """

    sheets: list[Sheet]
    text: str

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that works without a network (docs/report.md).

        Raises:
            ImportError: a package of the extra ``report`` is not installed.
            OSError: there is no such folder (FileNotFoundError), or the file cannot be written.
        """
        write_page(self.sheets, path)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        names = "; ".join(sheet.headline for sheet in self.sheets[:3])
        return f"Report({len(self.sheets)} sheet{'s' if len(self.sheets) != 1 else ''}: {names})"

    def _repr_html_(self) -> str | None:
        with contextlib.suppress(Exception):  # a repr never fails
            return fragment(self.sheets[:1], len(self.sheets) - 1)
        return None
