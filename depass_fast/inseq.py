"""DePass as an attribution method of inseq, by the name "depass"; importing this module registers it.

    import inseq, depass_fast.inseq

    model = inseq.load_model(hf_model, "depass", tokenizer=tokenizer)
    model.attribute("The capital of France is", "The capital of France is Paris").show()

Every generated token gets the shares of all tokens before it in its logit; inseq's default, its probability, is no sum
over tokens and becomes the logit. The constants' share, `bias`, is no token's.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from inseq.attr import STEP_SCORES_MAP
from inseq.attr.feat import FeatureAttribution
from inseq.data import CoarseFeatureAttributionStepOutput

from .components.model import Tokens
from .engine import DePass
from .options import Options


class DePassAttribution(FeatureAttribution):
    """Token attributions by decomposed forward passes.

    ``layer`` (of :class:`depass_fast.Tokens`) and the options of :class:`depass_fast.Options` are given to
    `inseq.load_model` as defaults, to `attribute` as overrides.
    """

    method_name = "depass"

    def __init__(self, attribution_model: Any, layer: int | str = 0, **options: Any) -> None:
        super().__init__(attribution_model)
        self.attribute_batch_ids, self.forward_batch_embeds = True, False
        self.layer = layer
        self.engine = DePass(attribution_model.model, attribution_model.tokenizer, **options)

    def prepare_and_attribute(self, *args: Any, attributed_fn: Any = None, **kwargs: Any) -> Any:
        """Raises ValueError where something else than the logit is to be attributed; probabilities are the default."""
        model, logit = self.attribution_model, STEP_SCORES_MAP["logit"]
        chosen = model.get_attributed_fn(attributed_fn)
        if chosen not in (logit, model.get_attributed_fn(None)):
            name = getattr(chosen, "__name__", chosen)
            raise ValueError(f"attributed_fn: {name} is no logit, and no other function is a sum over the tokens.")
        return super().prepare_and_attribute(*args, attributed_fn=logit, **kwargs)

    def get_attribution_args(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of `attribute` that are this method's, and the others."""
        own = {"layer", *(field.name for field in fields(Options))}
        return {k: v for k, v in kwargs.items() if k in own}, {k: v for k, v in kwargs.items() if k not in own}

    def attribute_step(
        self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
    ) -> CoarseFeatureAttributionStepOutput:
        """The shares (B, N) in the logits of the next tokens of a batch; 0 at padding."""
        ids, targets, _, mask, *_ = attribute_fn_main_args["additional_forward_args"]
        mask, options = mask.bool(), dict(attribution_args or {})
        kind = Tokens(options.pop("layer", self.layer))
        prompts = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        results = self.engine.attribute(prompts, kind, targets=targets.flatten().tolist(), **options)
        scores = torch.zeros(ids.shape, dtype=results[0].scores.dtype, device="cpu")
        for row, keep, result in zip(scores, mask.cpu(), results, strict=True):
            row[keep] = result.scores[: len(result.tokens)]
        return CoarseFeatureAttributionStepOutput(target_attributions=scores)
