"""The model and the packages that a result was made with."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Provenance:
    """The model and the packages that a result was made with. None stands for what the model does not say.

    model: its name on the hub, or the folder or GGUF file that it was loaded from.
    revision: the commit of the hub that it was loaded at.
    model_type, model_class: its family, and the class that computes it.
    adapters: the PEFT adapters at work in it, by their names.
    quantisation: the method that its weights are quantised by.
    depass_fast, torch, transformers: versions.
    """

    model: str | None
    revision: str | None
    model_type: str
    model_class: str
    adapters: list[str]
    quantisation: str | None
    depass_fast: str
    torch: str
    transformers: str

    @property
    def name(self) -> str | None:
        """The model's name for others: as on the hub; of a local folder or file the last part of its path."""
        if self.model is None or (_HUB.fullmatch(self.model) and not Path(self.model).exists()):
            return self.model
        return re.split(r"[\\/]", self.model.rstrip("\\/"))[-1] or self.model

    def told(self) -> str:
        """Return this in words for a file that is sent to somebody: ``str`` of it, without the names of folders."""
        return str(replace(self, model=self.name))

    def __str__(self) -> str:
        at = "" if self.revision is None else f" at {self.revision[:12]}"
        adapters = f" with {', '.join(self.adapters)}" if self.adapters else ""
        return (
            f"{self.model or self.model_class}{at}{adapters}, depass_fast {self.depass_fast}, torch {self.torch}, "
            f"transformers {self.transformers}"
        )
