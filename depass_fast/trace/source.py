"""The model that a trace was made by, and whether it is still that."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..adapters.tuned import parameters_of, reparametrised, tuning
from .fingerprint import Fingerprint
from .weights import WeightSample, are_the_same, sample_weights


class TraceSource:
    """The model that a trace was made by, and the state of its weights then.

    ``sample`` of the weights is taken of traces that a user holds: a call's own trace ends before weights can change.

    In a file, it is the ``fingerprint`` of that model. A trace that was read from one belongs to no model until it is
    used with one: that model's fingerprint must be the same, and from then on it is the model of the trace.
    """

    def __init__(
        self,
        model: weakref.ref | None,
        version: tuple,
        fingerprint: Fingerprint | None = None,
        sample: WeightSample | None = None,
    ) -> None:
        self.model, self.version, self.fingerprint, self.sample = model, version, fingerprint, sample

    @staticmethod
    def of(model: nn.Module) -> TraceSource:
        return TraceSource(weakref.ref(model), _version(model))

    def sampled(self, model: nn.Module) -> TraceSource:
        """Return the same with a sample of the weights."""
        return TraceSource(self.model, self.version, self.fingerprint, sample_weights(model))

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless ``model`` is that model, with the weights that it had."""
        if self.model is None:
            assert self.fingerprint is not None
            difference = self.fingerprint.difference(Fingerprint.of(model))
            if difference is not None:
                raise ValueError(
                    f"trace: it was saved with another model, {difference}; trace the prompt with this one."
                )
            self.model, self.version, self.sample = weakref.ref(model), _version(model), sample_weights(model)
        if self.model() is not model:
            raise ValueError("trace: it was made by another model; trace the prompt with this one.")
        sample = self.sample
        if self.version != _version(model) or not (sample is None or are_the_same(sample, sample_weights(model))):
            raise ValueError("trace: the model's weights have changed since it was made; trace the prompt again.")

    def __getstate__(self) -> dict[str, Any]:
        """Return the fingerprint of the model. Raises ValueError if it is gone, or its weights have changed."""
        model = None if self.model is None else self.model()
        if model is not None:
            self.check(model)
        elif self.model is not None and self.fingerprint is None:
            raise ValueError("trace: the model that it was made by is gone; save a trace while its model is there.")
        return {"fingerprint": self.fingerprint if model is None else Fingerprint.of(model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.version, self.fingerprint, self.sample = None, (), state["fingerprint"], None

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceSource:
        return self  # a copied trace is of the same model

    def __eq__(self, other: object) -> bool:
        """True if both are of the same model with the same weights."""
        if not isinstance(other, TraceSource):
            return NotImplemented
        if self.model is None or other.model is None:
            return self.fingerprint is not None and self.fingerprint == other.fingerprint
        return self.model is other.model and self.version == other.version

    __hash__ = None  # pyright: ignore[reportAssignmentType] (it finds its model later)

    def __repr__(self) -> str:
        model = None if self.model is None else self.model()
        if model is not None:
            return f"made by {type(model).__name__}"
        return "made by a model that is gone" if self.fingerprint is None else f"made by {self.fingerprint.kind}"


def _version(model: nn.Module) -> tuple:
    """A key that changes with every in-place change of a weight, and with the active adapters.

    Inference tensors do not count their changes.
    """
    unsteady = {id(p) for p in reparametrised(model)}
    counted = (p for p in parameters_of(model) if not p.is_inference() and id(p) not in unsteady)
    return sum(p._version for p in counted), tuning(model)
