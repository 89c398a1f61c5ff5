"""An Attribution made of scores in host memory, with the completeness error measured on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..results.attribution import Attribution
from .targets import Directions


def assemble(
    *, scores: Tensor, logits: Tensor, layer_errors: Tensor, directions: Directions, **rest: Any
) -> Attribution:
    """Return the result of scores (K, M) and logits (K,) in host memory; a single target's axis is dropped.

    ``layer_errors`` are the completeness errors at the start and after every layer, ``rest`` the other fields of
    :class:`depass_fast.Attribution`.

    Raises:
        FloatingPointError: the scores hold NaN or inf.
    """
    on_the_way = layer_errors.tolist()
    bad = next((passed for passed, error in enumerate(on_the_way) if not math.isfinite(error)), None)
    if bad is not None or not np.isfinite(scores.numpy()).all():
        where = "at the readout" if bad is None else f"after {bad} layers"
        raise FloatingPointError(
            f"the components hold NaN or inf {where}, though the model's own activations do not: a temperature too "
            "small for the dtype, a rule of your own, or compute_dtype or state_dtype that overflow."
        )
    magnitude = torch.maximum(scores.abs().sum(1), logits.abs()).clamp_min(torch.finfo(scores.dtype).tiny)
    at_the_end = ((scores.sum(1) - logits).abs() / magnitude).tolist()
    keep = slice(None) if directions.several else 0
    return Attribution(
        scores=scores[keep].clone(),  # they are a part of what was copied at once
        target_logits=logits[keep].clone(),
        completeness_error=max(at_the_end + on_the_way),
        layer_errors=layer_errors,
        target_names=list(directions.names),
        target_ids=list(directions.ids),
        contrast_ids=list(directions.contrast_ids),
        target_kinds=list(directions.kinds),
        **rest,
    )
