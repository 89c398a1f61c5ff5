"""The recorder of a forward pass: hooks and our attention function write into it, and it makes a trace of that."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, ExpertAssignment, Keyed, Mixer, Recurrence, sort_choices
from ..adapters.side_by_side import beside_each_other
from . import attention
from .constants import constant_heads, constant_values
from .head_experts import HeadChoice, checked_heads, of_all_heads
from .keyed import FrozenKeyed
from .mixers import KeyedTrace, frozen
from .mixing import apply, convolve
from .mlp_traces import mlp_traces
from .record import AttentionTrace, LayerTrace, Trace, TraceSource
from .selection import by_query, padded_to
from .stable import stable
from .streams import layer_of_streams


class Recorder:
    """Collects forward passes. Prompts that go through the model together are packed.

    With ``is_checking`` it also keeps what the consistency check looks at, at a few positions.
    """

    def __init__(self, adapter: Adapter, is_checking: bool) -> None:
        self.adapter, self.is_checking = adapter, is_checking
        layers = [index for index in range(adapter.n_layers) if adapter.has_attention(index)]
        self.places = {id(adapter.module(index, "attention")): index for index in layers}
        self.besides = [index for index in layers if adapter.kind(index).beside is not None]
        self.places |= {id(adapter.beside(index)): index for index in self.besides}
        self._one_prompt = adapter.has_mixers()  # beside others, a recurrence of the model's own would go on
        self.implementation = adapter.config._attn_implementation  # the model's own, before ours takes its place
        self.lengths: list[int] = []  # of the prompts that are now in the model, packed
        self.watched: list[int] = []  # the positions of these that are checked
        self.seen = 0  # positions of the prompts that have gone before
        self.positions: list[int] = []  # all positions that are checked, among those of all prompts
        self.layers: list[dict[str, Any]] = [{} for _ in range(adapter.n_layers)]
        self.final: dict[str, Any] = {}
        self._selecting = -1  # the last layer whose indexer selected keys

    def enter(self, lengths: list[int]) -> None:
        """Note that prompts of these lengths go through the model next."""
        total = lengths[0] if self._one_prompt else sum(lengths)
        self.seen += sum(self.lengths)
        self.lengths, self.watched = lengths, sorted({0, total // 2, total - 1})
        self.positions += [self.seen + position for position in self.watched]

    def keep(self, record: dict[str, Any], name: str, x: Any) -> None:
        """Keep a tensor of this forward pass behind those of earlier ones."""
        before = record.get(name)
        if record is self.final and before is not None:
            before = before[: self.seen]  # the last norm may have been the first, too (NanoChat)
        record[name] = torch.cat([before, x]) if isinstance(before, Tensor) else x

    def attend(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Any = None,
        sinks: Tensor | None = None,
        indices: Tensor | None = None,
        **mask: Any,
    ) -> Tensor:
        """Record Q and K, and attend within each prompt. q (1, H, T, d), k and v (1, Hkv, T, d) -> (1, T, H, d).

        ``key_bias`` maps a prompt's length N to what is added to its keys' logits, (N, H). ``sinks`` (H,) are logits of
        nothing that every query also has. ``indices`` (1, T, K) are the keys that an indexer selected for every
        query, of one prompt alone. ``mask`` holds ``scale``, ``window``, ``softcap`` and ``chunked``, and ``key_block``
        where indices (1, Hkv, T, K) are blocks of keys.
        """
        if self.adapter.kind(index).keyed is not None:
            return self._keep_keys(index, q, k, sinks, mask)
        record, biases, outputs, sums, first = self.layers[index], [], [], [], 0
        if self.adapter.kind(index).beside is not None:
            record = record.setdefault("beside", {})
        choice = HeadChoice.of(self.adapter, index, record, q.shape[2])
        for name, x in of_all_heads(choice, q[0].transpose(0, 1), k[0].transpose(0, 1)).items():
            self.keep(record, name, x.contiguous())
        changed = (mask["softcap"], key_bias, sinks, indices)
        in_memory = any(x is not None for x in changed)  # the logits, not fused
        chosen = None if indices is None else by_query(indices)[None]
        if indices is not None:
            self._keep_selection(index, indices)
        for length, count in [(length, len(list(run))) for length, run in groupby(self.lengths)]:
            bias = None if key_bias is None else key_bias(length).to(torch.promote_types(q.dtype, torch.float32))
            # torch may hold all logits, too
            at_once = 1 if in_memory else max(1, attention.TILE[q.device.type == "cpu"] // (q.shape[1] * length**2))
            packed = [x[0, :, first : first + count * length].unflatten(1, (count, length)) for x in (q, k, v)]
            prompts = [x.transpose(0, 1) for x in packed]
            for output, row_sum in _attend_in_parts(
                prompts, at_once, key_bias=bias, sinks=sinks, chosen_keys=chosen, **mask
            ):
                outputs.append(output)
                sums.append(row_sum)
            biases += [bias] * count
            first += count * length
        if key_bias is not None:
            self.keep(record, "key_bias", torch.cat(biases))
        if sinks is not None:
            self.keep(record, "row_sum", torch.cat(sums))
        record["mask"] = mask
        out = (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None].contiguous()
        self.keep_given(index, record, out[0].flatten(1))
        if self.is_checking:
            self._keep_watched(record, checked_heads(choice, v[0].transpose(0, 1), out[0]))
        return out

    def keep_given(self, index: int, record: dict[str, Any], heads: Tensor) -> None:
        """Keep what heads give, (T, H·d), until it is scaled, where it is."""
        if self.adapter.kind(index).head_scale is not None:
            record["heads_given"] = heads

    def _keep_watched(self, record: dict[str, Any], named: dict[str, Tensor]) -> None:
        """Keep the watched positions of heads (T, H, d)."""
        for name, x in named.items():
            self.keep(record, name, x[self.watched].flatten(1))

    def _keep_keys(self, index: int, q: Tensor, k: Tensor, sinks: Tensor | None, mask: dict[str, Any]) -> Tensor:
        """Record queries, and keys of positions and of entries behind them. What is attended to comes later: zeros."""
        record, n, keyed = self.layers[index], q.shape[2], self.adapter.kind(index).keyed
        for name, x in (("q", q), ("k", k[:, :, :n])):
            self.keep(record, name, x[0].transpose(0, 1).contiguous())
        record["mask"], record["sinks"] = mask, None if sinks is None else sinks.detach()
        if keyed is not None and keyed.rate is not None:
            entries = torch.zeros_like(k[0, 0, :n])
            entries[keyed.rate - 1 :: keyed.rate] = k[0, 0, n:]
            self.keep(record, "entries", entries)
        return torch.zeros_like(q).transpose(1, 2)

    def turn_keys(
        self, index: int, keyed: Keyed, raw: Tensor, ratio: Tensor, angles: tuple[Tensor, Tensor], chosen: Tensor | None
    ) -> Tensor:
        """Record what turns keys that are values, and apply it to raw values (T, C) of one prompt: (T, H·d).

        ``ratio`` (T, C) are their factors, ``angles`` cos and sin (1, T, r / 2). ``chosen`` (1, T, K) are the entries
        that an indexer selected.
        """
        record, weights, n = self.layers[index], self.adapter.attention(index), len(raw)
        for name, x in (("cos", angles[0][0].clone()), ("sin", angles[1][0].clone()), ("value_ratio", ratio)):
            self.keep(record, name, x)
        if chosen is not None:
            assert self.adapter.selects is not None
            self.keep(record, "chosen_keys", padded_to(self.adapter.selects, chosen[0]))
        record["keyed"] = keyed
        last = {name: record[name][-n:] for name in ("q", "k", "value_ratio", "chosen_keys") if name in record}
        own = AttentionTrace(record["resid_pre"][-n:], **last, **record["mask"], keyed=self._keyed(record, n))
        values = raw.to(ratio)[:, None]
        out = FrozenKeyed(weights, own, slice(0, n), ratio.dtype).forward(values)[:, 0]
        if self.is_checking:
            self.keep(record, "values", raw[self.watched, : weights.head_dim])
            self.keep(record, "attended", out[self.watched])
        return out

    @staticmethod
    def _keyed(record: dict[str, Any], last: int = 0) -> KeyedTrace | None:
        """Return what turns keys that are values, at all positions or at the last ones; None without."""
        keyed: Keyed | None = record.get("keyed")
        if keyed is None:
            return None
        held = {name: record[name][-last:] for name in ("cos", "sin", "entries") if name in record}
        return KeyedTrace(**held, sinks=record["sinks"], rate=keyed.rate, overlaps=keyed.overlaps)

    def _keep_selection(self, index: int, indices: Tensor) -> None:
        """Record the keys that layer ``index`` sees, or the layer that selected them, if that was another."""
        if self.adapter.selects is None or not self.adapter.one_by_one:
            raise RuntimeError(f"layer {index}: an indexer selects its keys, which its family does not declare.")
        if self.adapter.has_indexer(index):
            self._selecting = index
            width = self.adapter.selects // (self.adapter.kind(index).key_block or 1)
            self.keep(self.layers[index], "chosen_keys", padded_to(width, by_query(indices)))
        self.layers[index]["selected_by"] = self._selecting

    def scale_heads(self, index: int, heads: Tensor, ratio: Tensor, constant: Tensor | None) -> Tensor:
        """Record the factors of what heads give, both (T, H·d), and return their product, plus a ``constant``."""
        record = self.layers[index]
        self.keep(record, "out_ratio", ratio)
        scaled = heads * ratio.to(heads)
        if constant is not None:
            self.keep(record, "out_constant", constant)
            scaled = scaled + constant.to(scaled)
        if self.is_checking:
            before = record["attended"][: -len(self.watched)]
            record["attended"] = torch.cat([before, scaled[self.watched]])
        return scaled

    def mix(self, index: int, mixer: Mixer, recurrence: Recurrence, raw: Tensor) -> Tensor:
        """Record a recurrence, and apply it to raw values (T, H·d) with their constants: (T, H·d)."""
        record, sides = self.layers[index], self.adapter.sides(index)
        weights, recurrence = (
            self.adapter.attention(index) if sides is None else sides[1],
            stable(recurrence, self.lengths),
        )
        wide = torch.promote_types(raw.dtype, torch.float32)
        values, ratio = raw.to(wide), None
        if recurrence.in_ratio is not None:
            values = values * recurrence.in_ratio
        if weights.conv is not None:
            bias = weights.conv.bias
            values = convolve(
                values, weights.conv.weight[:, 0].to(wide), None if bias is None else bias.to(wide), self.lengths
            )
        if mixer.value_ratio is not None:
            ratio = mixer.value_ratio(values)
            self.keep(record, "value_ratio", ratio)
        named = {"q": recurrence.q, "k": recurrence.k, "decay": recurrence.decay}
        named |= {name: getattr(recurrence, name) for name in ("write", "own", "in_ratio", "relative")}
        for name, x in named.items():
            if x is not None:
                self.keep(record, name, x)
        record["recurrence"] = recurrence
        mask: dict[str, Any] = {"scale": 1.0} if recurrence.softmax is None else asdict(recurrence.softmax)
        record["mask"] = mask
        own = AttentionTrace(record["resid_pre"], recurrence.q, recurrence.k, recurrence=frozen(recurrence), **mask)
        shaped = [values if ratio is None else values * ratio]
        # constants go through it at the same time; beside a softmax they wait for its factors
        constant = constant_values(weights, own, self.lengths) if sides is None else None
        if constant is not None:
            shaped.append(constant if ratio is None else constant * ratio)
        out, *constants = apply(weights, own, torch.stack(shaped, 1), self.lengths).unbind(1)
        for mixed in constants:
            self.keep(record, "mixed_constants", mixed.contiguous())
        if self.is_checking:
            self.keep(record, "values", raw[self.watched])
            self.keep(record, "attended", out[self.watched])
        return out

    @torch.no_grad()
    def trace(self, input_ids: Tensor, offsets: np.ndarray) -> Trace:
        """The trace of all forward passes. ``offsets`` (P + 1,) is the first packed position of every prompt."""
        mixtures = [index for index, record in enumerate(self.layers) if "chosen" in record]
        assignments = sort_choices([self.layers[index]["chosen"] for index in mixtures])
        self.offsets = offsets
        by_layer = dict(zip(mixtures, assignments, strict=True))
        for index, record in enumerate(self.layers if self.adapter.family.streams is not None else ()):
            self.adapter.streams(index).gathered(record)
        layers = [self._layer(index, record, by_layer.get(index)) for index, record in enumerate(self.layers)]
        if self.adapter.final_norm_module is None:
            self.final["normed_final"] = self.final["resid_final"]
        if self.adapter.family.streams is not None:
            self.final["collapsed"] = self.final.pop("resid_final")
            self.final["resid_final"] = self.final.pop("streams_final")
        return Trace(input_ids, offsets, layers, **self.final, source=TraceSource.of(self.adapter.model))

    def _layer(self, index: int, record: dict[str, Any], assignment: ExpertAssignment | None) -> LayerTrace:
        parallel = self.adapter.is_parallel
        self._require_all(index, record)
        pre = record["resid_pre"]
        if self.adapter.family.streams is not None:
            made = self._attention(index, record)
            return layer_of_streams(self.adapter, index, record, made, assignment, self._after(index))
        if not self.adapter.has_mlp(index):
            return LayerTrace(pre, self._after(index), self._attention(index, record), (), record.get("attention_sum"))
        if not self.adapter.has_attention(index):
            mid = pre
        elif parallel:
            mid = pre + record["attention_output"] * self.adapter.attention(index).factor
        else:
            mid = record["resid_mid"]
        attention_trace = self._attention(index, record)
        ahead = self.layers[index - 1]["resid_mid"] if self.adapter.kind(index).has_experts_ahead else None
        read = self.adapter.mlps(index)[0].read_of(pre if parallel else mid, self.offsets)
        mlps = mlp_traces(self.adapter, index, record, assignment, read, ahead)
        sums = record.get("attention_sum"), record.get("mlp_sum")
        return LayerTrace(pre, mid, attention_trace, mlps, *sums, spreads=self.adapter.spreads(index))

    def _after(self, index: int) -> Tensor:
        """The residual stream (T, D) behind a layer, or the streams (T, n·D)."""
        last, several = index + 1 == len(self.layers), self.adapter.family.streams is not None
        record, names = (
            (self.final, ("resid_final", "streams_final"))
            if last
            else (self.layers[index + 1], ("resid_pre", "streams_pre"))
        )
        return record[names[several]]

    def _attention(self, index: int, record: dict[str, Any]) -> Any:
        """Return the AttentionTrace of a layer's attention or recurrence; None without."""
        if not self.adapter.has_attention(index):
            return None
        ratio, recurrence = record.get("value_ratio"), record.get("recurrence")
        if recurrence is not None:
            kept = {name: record.get(name) for name in ("decay", "write", "own", "in_ratio", "relative")}
            recurrence = frozen(replace(recurrence, **kept))
        chosen = self.layers[record.get("selected_by", index)].get("chosen_keys")
        source = self.adapter.kind(index).source
        given = record if source is None else self.layers[source]  # what values and keys came from
        out_ratio, beside, sides = record.get("out_ratio"), None, self.adapter.sides(index)
        if sides is not None:
            beside = AttentionTrace(
                record["resid_pre"], record["beside"]["q"], record["beside"]["k"], **record["beside"]["mask"]
            )
            ratio, out_ratio = (
                None if x is None else beside_each_other(sides, (None, x), 1.0) for x in (ratio, out_ratio)
            )
        weights = self.adapter.attention(index)
        made = AttentionTrace(
            resid=weights.read_of(given["resid_pre"], self.offsets),
            q=record["q"],
            k=given["k"],
            key_bias=record.get("key_bias"),
            chosen_keys=None if chosen is None or self._selects_all(record, chosen) else chosen,
            row_sum=record.get("row_sum"),
            latent_scale=record.get("latent_scale"),
            head_scales=given.get("head_scales"),
            value_ratio=None if ratio is None or (ratio == 1).all() else ratio,
            out_scale=record.get("attention_out_scale"),
            out_ratio=out_ratio,
            out_constant=record.get("out_constant"),
            recurrence=recurrence,
            keyed=self._keyed(record),
            source=source,
            beside=beside,
            **record["mask"],
        )
        lengths, mixed = np.diff(self.offsets).tolist(), record.pop("mixed_constants", None)
        made.constant_heads = constant_heads(weights, made, lengths, mixed)
        if made.out_constant is not None:
            made.constant_heads = made.out_constant + (0.0 if made.constant_heads is None else made.constant_heads)
        return made

    def _selects_all(self, record: dict[str, Any], chosen: Tensor) -> bool:
        """True if an indexer selects all keys, blocks or entries that even the longest prompt has."""
        keyed: Keyed | None = record.get("keyed")
        apart = keyed.rate if keyed is not None and keyed.rate is not None else 1
        return int(np.diff(self.offsets).max()) // apart <= chosen.shape[-1] * (record["mask"].get("key_block") or 1)

    def _require_all(self, index: int, record: dict[str, Any]) -> None:
        """Raise RuntimeError if the forward pass did not go through everything that is recorded of a layer."""
        mixes, has_mlp, wanted = self.adapter.has_attention(index), self.adapter.has_mlp(index), {"resid_pre"}
        wanted |= {"mask"} if mixes else set()
        wanted |= set() if self.adapter.family.streams is None else {"streams_pre"}
        if has_mlp:
            wanted |= {"attention_output"} if self.adapter.is_parallel else {"resid_mid"} if mixes else set()
            wanted |= {"experts_input", "router_weights"} if self.adapter.is_mixture(index) else set()
            wanted |= {"gate", "act"} if self.adapter.has_dense_mlp(index) else set()
            wanted |= set() if self.adapter.kind(index).input_gate is None else {"token_gate", "token_act"}
        if missing := wanted - record.keys():
            names = sorted("attention" if name == "mask" else name for name in missing)
            raise RuntimeError(
                f"layer {index}: the forward pass recorded no {', '.join(names)}. The model's code does "
                "not call these modules, or not through transformers' attention interface; supported: "
                "transformers 4.51 to 5.x, models as transformers defines them."
            )


def _attend_in_parts(qkv: list[Tensor], at_once: int, **how: Any) -> list[tuple[Tensor, Any]]:
    """Attend within prompts of one length, q (P, H, N, d), k and v (P, Hkv, N, d), ``at_once`` of them at a time.

    Every part is an output (P'·N, H, d) and, with sinks, the sums (P'·N, H) of the rows of P.
    """
    parts = []
    for few in zip(*(x.split(at_once) for x in qkv), strict=True):
        out, row_sum = attention.causal_attention(*few, **how)
        row_sum = None if row_sum is None else row_sum.transpose(1, 2).flatten(0, 1)
        parts.append((out.permute(0, 2, 1, 3).flatten(0, 1), row_sum))
    return parts
