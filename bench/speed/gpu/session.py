"""The facts of one run on a GPU, written to a file as they come, and what its parts share: model, rates, errors."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...core.models import Model, Shape, build_model
from ...core.results import Row, environment, write_results
from .machine import GemmRates, gemm_rates

Errors = dict[tuple[str, str, torch.dtype], float]  # of a provider, a kind of component and a dtype


@dataclass
class Session:
    """A run: where it is, what it has found, and the model that is loaded.

    ``sections`` hold facts that are no rows, by name; ``failures`` the tracebacks of parts that failed. ``rate`` is the
    FLOP/s of a large square product, the most that the machine is known to do.
    """

    device: torch.device
    tiny: bool = False
    seconds: float = 6.0
    out: Path | None = None
    began: float = field(default_factory=time.monotonic)
    rate: float = 1e11
    errors: Errors = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.place = environment(self.device.type)
        self._model: tuple[Shape, Model] | None = None
        self._rates: dict[tuple[int, ...], GemmRates] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:6.1f}] {text}", flush=True)

    def attempt(self, name: str, part: Callable[[], object]) -> bool:
        """Run one part and write the file. A failure is printed and recorded, and the run goes on: False."""
        failed = None
        try:
            part()
        except Exception:
            failed = traceback.format_exc()
        if failed is not None:  # not in the handler, where the error still holds the tensors of its frames
            self.say(f"FAILED {name}\n{failed}")
            self.failures.append({"part": name, "traceback": failed})
        self.write()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return failed is None

    def write(self) -> None:
        """Write all that is known."""
        if self.out is not None:
            facts = {"quick": self.tiny, "seconds": self.elapsed, **self.sections, "failures": self.failures}
            write_results(self.out, "gpu", self.rows, device=self.device.type, **facts)

    def model(self, shape: Shape) -> Model:
        """The model of a shape. It takes the place of the one before, which is freed first."""
        if self._model is None or self._model[0] != shape:
            self._model = None
            gc.collect()
            began = time.monotonic()
            self._model = shape, build_model(shape, self.dtype, device=self.device).requires_grad_(False)
            self.say(f"{shape.name} built in {time.monotonic() - began:.1f} s")
        return self._model[1]

    def rates(self, shape: Shape) -> GemmRates:
        """The GEMM rates at a shape's products, measured once per run."""
        widths = (shape.hidden, shape.intermediate, shape.heads, shape.kv_heads)
        if widths not in self._rates:
            found = self._rates[widths] = gemm_rates(shape, self.device, self.tiny)
            self.sections.setdefault("gemms", []).extend(found.as_dicts())
            self.say(str(found))
        return self._rates[widths]
