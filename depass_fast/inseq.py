"""DePass as an attribution method of inseq, by the name "depass"; importing this module registers it.

    import inseq, depass_fast.inseq

    model = inseq.load_model(hf_model, "depass", tokenizer=tokenizer)
    model.attribute("The capital of France is", "The capital of France is Paris").show()

Every generated token gets the shares of all tokens before it in its logit; inseq's default, its probability, is no sum
over tokens and becomes the logit. With ``attributed_fn="contrast_logits_diff"`` and ``contrast_targets`` it is the
logit less that of the other text's token, with "contrast_logits" that token's logit alone, each after the original
text. The constants' share, `bias`, is no token's.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from inseq.attr import STEP_SCORES_MAP
from inseq.attr.feat import FeatureAttribution
from inseq.data import CoarseFeatureAttributionStepOutput, DecoderOnlyBatch, get_batch_from_inputs
from inseq.data.batch import slice_batch_from_position
from torch import Tensor

from .components.model import Tokens
from .engine import DePass
from .options import Options

_CONTRASTS = ("contrast_logits", "contrast_logits_diff")


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

    def prepare_and_attribute(
        self, *args: Any, attributed_fn: Any = None, attributed_fn_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Attribute the logit, which stands for the default, too, or a contrast of logits.

        Raises:
            ValueError: another function, a contrast without ``contrast_targets``, or one after another text.
        """
        model, logit, given = self.attribution_model, STEP_SCORES_MAP["logit"], attributed_fn_args or {}
        chosen = model.get_attributed_fn(attributed_fn)
        if chosen in [STEP_SCORES_MAP[name] for name in _CONTRASTS]:
            _check_contrast(given)
        elif chosen in (logit, model.get_attributed_fn(None)):
            chosen = logit
        else:
            allowed = ", ".join(map(repr, ("logit", *_CONTRASTS)))
            raise ValueError(
                f"attributed_fn: {getattr(chosen, '__name__', chosen)} is no logit and no difference of logits, and so "
                f"no sum over the tokens; give one of {allowed}."
            )
        return super().prepare_and_attribute(*args, attributed_fn=chosen, attributed_fn_args=given, **kwargs)

    def get_attribution_args(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of `attribute` that are this method's, and the others."""
        own = {"layer", *(field.name for field in fields(Options))}
        return {k: v for k, v in kwargs.items() if k in own}, {k: v for k, v in kwargs.items() if k not in own}

    def attribute_step(
        self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
    ) -> CoarseFeatureAttributionStepOutput:
        """The shares (B, N) in the logits of the next tokens of a batch, or in their contrasts; 0 at padding."""
        ids, targets, chosen, mask, *rest = attribute_fn_main_args["additional_forward_args"]
        mask, options = mask.bool(), dict(attribution_args or {})
        kind = Tokens(options.pop("layer", self.layer))
        wanted: list[Any] = targets.flatten().tolist()
        if chosen in [STEP_SCORES_MAP[name] for name in _CONTRASTS]:
            others = self._contrast_ids(ids, dict(zip(rest[1], rest[2:], strict=True)))
            alone = chosen is STEP_SCORES_MAP["contrast_logits"]
            wanted = others if alone else list(zip(wanted, others, strict=True))
        prompts = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        results = self.engine.attribute(prompts, kind, targets=wanted, **options)
        scores = torch.zeros(ids.shape, dtype=results[0].scores.dtype, device="cpu")
        for row, keep, result in zip(scores, mask.cpu(), results, strict=True):
            row[keep] = result.scores[: len(result.tokens)]
        return CoarseFeatureAttributionStepOutput(target_attributions=scores)

    def _contrast_ids(self, ids: Tensor, given: dict[str, Any]) -> list[int]:
        """The tokens of the other text that inseq has aligned with the next ones after ``ids`` (B, N)."""
        skipped = given.get("skip_special_tokens", False)
        batch = get_batch_from_inputs(
            self.attribution_model, inputs=given["contrast_targets"], as_targets=False, skip_special_tokens=skipped
        )
        aligned = given.get("contrast_targets_alignments") or []
        _, others = slice_batch_from_position(DecoderOnlyBatch.from_batch(batch), ids.shape[1], aligned)
        if len(others) != len(ids):
            raise ValueError(f"contrast_targets: expected one text per prompt ({len(ids)}), got {len(others)}.")
        return others.tolist()


def _check_contrast(given: dict[str, Any]) -> None:
    """Check the arguments of a contrast."""
    if not given.get("contrast_targets"):
        raise ValueError("contrast_targets: needed for a contrast; give the text whose tokens are the others.")
    if given.get("contrast_force_inputs"):
        raise ValueError(
            "contrast_force_inputs: a contrast is decomposed after the original text only; attribute the other text by "
            "itself for the shares of its own tokens."
        )
