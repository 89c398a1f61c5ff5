"""The model and the packages that a result was made with."""

from __future__ import annotations

from dataclasses import dataclass


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

    def __str__(self) -> str:
        at = "" if self.revision is None else f" at {self.revision[:12]}"
        adapters = f" with {', '.join(self.adapters)}" if self.adapters else ""
        return (
            f"{self.model or self.model_class}{at}{adapters}, depass_fast {self.depass_fast}, torch {self.torch}, "
            f"transformers {self.transformers}"
        )
