"""The ends of a model: its embedding, its final norm, and the way from there to the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, Path
from .head import Head
from .maps import Norm
from .paths import below
from .stored import stored_bias, stored_device, stored_shape, stored_weight
from .streams import StreamEnd
from .tuned import inside


@dataclass(frozen=True)
class ModelEnds:
    """The parts of a model that belong to no layer."""

    model: nn.Module
    family: Family

    @property
    def decoder(self) -> nn.Module:
        """The model without its unembedding."""
        return inside(self.model.base_model) if self.family.decoder is None else self._below_model(self.family.decoder)

    @property
    def config(self) -> Any:
        """The config that attention looks at: the text model's, where the model also sees."""
        return self.decoder.config

    @property
    def context_length(self) -> int | None:
        """The most positions that the model can have; None where nothing limits them (ALiBi, recurrences alone)."""
        kinds = [kind for kind in self.family.kinds or (self.family,) if kind.attention is not None]
        if all(kind.mixer is not None and not kind.mixer.attends and kind.beside is None for kind in kinds):
            return None
        names = ("max_position_embeddings", "max_seq_len")
        return next((getattr(self.config, name) for name in names if hasattr(self.config, name)), None)

    @property
    def device(self) -> torch.device:
        """The device of the embedding; `device_map` may put later layers elsewhere."""
        return self.embedding.weight.device

    @property
    def embedding(self) -> nn.Embedding:
        return self._below_model(self.family.embedding)

    @property
    def final_norm_module(self) -> nn.Module | None:
        return None if self.family.final_norm is None else self._below_model(self.family.final_norm)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def unembedding(self) -> nn.Module:
        return self._below_model(self.family.unembedding)

    @property
    def unembedding_bias(self) -> Tensor | None:
        return stored_bias(self.unembedding)

    @property
    def unembedding_device(self) -> torch.device:
        return stored_device(self.unembedding)

    @property
    def vocabulary_size(self) -> int:
        rows, known = stored_shape(self.unembedding)[0], self.family.vocabulary
        return rows if known is None else min(rows, known)

    @property
    def hidden_size(self) -> int:
        """D, the width of the residual stream."""
        return stored_shape(self._project_out or self.unembedding)[1]

    @property
    def stream_width(self) -> int:
        """The width of the residual stream where layers begin: n·D, where n streams lie side by side."""
        return self.hidden_size * (1 if self.family.streams is None else self.family.streams.count)

    def width_at(self, site: str) -> int:
        """The width of the residual stream at a site of a layer: `resid_pre`, `resid_mid` or `resid_post`."""
        streams = self.family.streams
        count = 1 if streams is None else streams.middle if site == "resid_mid" else streams.count
        return self.hidden_size * count

    def stream_end(self, read: Tensor | None) -> StreamEnd | None:
        """The way of several streams to what the final norm reads, given their weights ``read`` (T, n), if any."""
        streams = self.family.streams
        return None if streams is None or read is None else StreamEnd(read, streams.maps(self.decoder))

    def final_norm(self) -> Norm | None:
        return self._norm(self.final_norm_module)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits of normed final hidden states: (..., D) -> (..., vocabulary)."""
        weight = getattr(self.unembedding, "weight", None)
        # a weight that is not floating is quantised
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else self.dtype
        hidden = hidden.to(self.unembedding_device, dtype)
        raw = self.unembedding(self.entering_unembedding(self.projected_out(hidden))) * self.family.logit_scale
        raw = raw if self.family.vocabulary is None else raw[..., : self.vocabulary_size]
        cap = self.family.logit_cap
        return raw if cap is None else cap * torch.tanh(raw / cap)

    def projected_out(self, hidden: Tensor) -> Tensor:
        """Return what the decoder gives to the unembedding for normed final hidden states (..., D)."""
        return hidden if self._project_out is None else self._project_out(hidden)

    @property
    def head(self) -> Head | None:
        """The head in front of the unembedding; None where it reads the final norm itself."""
        home = self.family.head
        if home is None:
            return None
        module = self._below_model(home)
        return Head(module.dense, module.act, self.made_norm(module.norm))

    def entering_unembedding(self, hidden: Tensor) -> Tensor:
        """Return what the unembedding reads where the head, if there is one, is given ``hidden`` (..., D)."""
        return hidden if self.head is None else self.head(hidden)

    @property
    def has_end_constants(self) -> bool:
        """True if anything behind the final norm adds a constant to a logit."""
        return self.unembedding_bias is not None or (self.head is not None and self.head.has_bias)

    def token_directions(self, tokens: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Directions (K, D) and constants (K,) whose products and sums with hidden states are the logits of ``tokens``.

        All lie on the unembedding's device, where ``tokens`` (K,) are. A cap on the logits is frozen at its ratio
        capped / raw at each token's normed hidden state ``hidden`` (K, D), and so is a head.
        """
        read = self.entering_unembedding(hidden.to(dtype))
        return self.pulled_back(*self.capped_directions(tokens, read, dtype), hidden)

    def pulled_back(self, vectors: Tensor, constants: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The same directions (K, D) and constants (K,) in front of the head at ``hidden`` (K, D), if there is one."""
        return (vectors, constants) if self.head is None else self.head.pulled_back(vectors, constants, hidden)

    def capped_directions(self, tokens: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:meth:`token_directions` behind a head: ``hidden`` (K, D) is what the unembedding reads."""
        vectors, constants = self.uncapped_directions(tokens, dtype)
        if self.family.logit_cap is None:
            return vectors, constants
        ratio = self.cap_ratio((vectors * hidden.to(vectors)).sum(1) + constants)
        return vectors * ratio[:, None], constants * ratio

    def uncapped_directions(self, tokens: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:meth:`token_directions` behind a head and in front of a cap on the logits."""
        if isinstance(tokens, slice):
            tokens = slice(tokens.start, min(tokens.stop, self.vocabulary_size))
        vectors, bias = stored_weight(self.unembedding)[tokens].to(dtype), self.unembedding_bias
        if self._project_out is not None:
            vectors = vectors @ stored_weight(self._project_out).to(dtype)
        constants = vectors.new_zeros(len(vectors)) if bias is None else bias[tokens].to(dtype)
        scale = self.family.logit_scale
        return (vectors, constants) if scale == 1.0 else (vectors * scale, constants * scale)

    def cap_ratio(self, raw: Tensor) -> Tensor:
        """The ratio capped / raw of logits in front of the family's cap; ones where it has none."""
        if self.family.logit_cap is None:
            return torch.ones_like(raw)
        raw = raw / self.family.logit_cap
        return torch.where(raw == 0, 1.0, torch.tanh(raw) / torch.where(raw == 0, 1.0, raw))

    @property
    def _project_out(self) -> nn.Module | None:
        return self._below_model(self.family.project_out) if self.family.project_out else None

    def _norm(self, module: nn.Module | None) -> Norm | None:
        return None if module is None else self.made_norm(module)

    def made_norm(self, module: nn.Module) -> Norm:
        read, inner = self.family.norm_gate, self.inside_gate(module)
        if read is None or inner is module:
            return self._plain_norm(module)
        return replace(self._plain_norm(inner), gate=partial(read, module))

    def inside_gate(self, module: nn.Module) -> nn.Module:
        """The norm itself, of a module that has a gate behind it; else the module."""
        return module if self.family.norm_gate is None else getattr(module, "norm", module)

    def _plain_norm(self, module: nn.Module) -> Norm:
        weight = getattr(module, "weight", None)
        if weight is not None and self.family.norm_offset:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.family.norm_offset
        eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 1e-5)
        return Norm(weight, float(eps), stored_bias(module), centred=self.family.norm == "layer")

    def _below_model(self, path: Path) -> Any:
        return below(self.model, path)
