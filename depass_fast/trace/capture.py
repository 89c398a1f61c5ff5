"""One ordinary forward pass, recorded. The model is left as it was found, whatever happens.

Prompts of different lengths go through the model as one packed sequence without padding: T positions in all, with
position ids that start over at every prompt and an attention function of our own that never looks past a prompt's
edges. That function also is where Q, K and the kind of mask are recorded.

Attention that does not go through transformers' interface is observed instead: its family says how Q, K and V come from
its projections (:class:`depass_fast.adapters.family.Observed`), and our function's output takes the place of its own
before the output projection. Such a model runs prompt by prompt.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..adapters import Adapter, ExpertAssignment, route, sort_choices, watch_router
from ..runtime.progress import progress_bar_of_calls
from . import attention, consistency
from .finite import check_finite
from .hooks import Tap, active, full_precision, is_recording
from .record import AttentionTrace, LayerTrace, MlpTrace, Trace, TraceSource

_ATTENTION_NAME = "depass_fast_recorder"

_ORDINARY = 256  # positions that are also looked at without any hook: all that comes later sees these

_one_at_a_time = threading.RLock()  # hooks and attention implementation belong to the model, not to a thread


def capture(adapter: Adapter, prompts: list[Tensor], progress: bool = False) -> Trace:
    """Run the model once over ``prompts`` (ids, each (N,), N ≥ 1) and record what the decomposition freezes.

    The model is left as it was found, also after an exception or Ctrl-C: its attention implementation and hooks.
    ``progress``: with a bar of its layers.

    Raises:
        FloatingPointError: weights or activations hold NaN or inf; the message names the layer.
        RuntimeError: the model's attention did not go through the recorder, or what was recorded does not add up.
    """
    adapter = replace(adapter, drop_biases=False)  # which concerns the propagation alone
    device = adapter.embedding.weight.device
    with _one_at_a_time:
        computation, longest = consistency.computation(adapter.model), max(map(len, prompts))
        watching = not consistency.is_known(adapter.model, computation, longest)
        groups = [[prompt] for prompt in prompts] if adapter.one_by_one else [prompts]
        with progress_bar_of_calls("forward pass", adapter.blocks, len(groups) + watching, progress):
            trace = _capture(adapter, groups, device, watching)
        if watching:
            consistency.know(adapter.model, computation, longest)
        return trace


def _capture(adapter: Adapter, groups: list[list[Tensor]], device: torch.device, watching: bool) -> Trace:
    """Prompts that go through the model together, one group after the other."""
    recorder, prompts = _Recorder(adapter, watching), [prompt for group in groups for prompt in group]
    with torch.no_grad(), _recording(adapter, recorder):
        for group in groups:
            recorder.enter([len(prompt) for prompt in group])
            position_ids = torch.cat([torch.arange(n, device="cpu") for n in recorder.lengths]).to(device)
            ids = torch.cat(group).to(device)
            adapter.run(input_ids=ids[None], position_ids=position_ids[None])
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64)
    trace = recorder.trace(torch.cat(prompts).to(device), offsets)
    check_finite(adapter, trace)
    if watching:
        consistency.check(adapter, trace, recorder.layers, recorder.positions)
        known = prompts[-1] if adapter.one_by_one else prompts[-1][:_ORDINARY]
        consistency.check_end(trace, recorder.layers, _ordinary(adapter, known.to(device)))
    return trace


@torch.no_grad()
def _ordinary(adapter: Adapter, ids: Tensor) -> consistency.Ordinary:
    """An ordinary forward pass over ``ids`` (N,): nothing is replaced."""
    own, thread = consistency.Ordinary(), threading.get_ident()
    end = adapter.final_norm_module or adapter.blocks[-1]

    def is_ours() -> bool:
        return threading.get_ident() == thread  # others may use the model, too

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        if is_ours():
            own.end = (output[0] if isinstance(output, tuple | list) else output).detach().flatten(0, -2)

    def watch(index: int) -> None:
        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if is_ours():
                x = args[0] if args else kwargs["hidden_states"]
                own.mixtures[index] = {"experts_input": x.detach().flatten(0, -2)}

        def decided(weights: Tensor, chosen: Tensor) -> None:
            if is_ours():
                own.mixtures[index] |= {"router_weights": weights.detach(), "chosen": chosen}

        undo.callback(adapter.module(index, "mlp").register_forward_pre_hook(read, with_kwargs=True).remove)
        undo.callback(watch_router(adapter.block(index), adapter.family.experts, decided))

    with _one_at_a_time, ExitStack() as undo:
        if "torch._dynamo" in sys.modules:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        if adapter.dtype == torch.float64 and hasattr(adapter.config, "_experts_implementation"):
            undo.callback(setattr, adapter.config, "_experts_implementation", adapter.config._experts_implementation)
            adapter.config._experts_implementation = "eager"
        for index in range(adapter.n_layers):
            if adapter.is_mixture(index):
                watch(index)
        undo.callback(end.register_forward_hook(look).remove)
        adapter.run(ids[None])
    return own


class _Recorder:
    """Collects forward passes; hooks and the attention function write into it."""

    def __init__(self, adapter: Adapter, watching: bool) -> None:
        self.adapter, self.watching = adapter, watching
        self.places = {id(adapter.module(index, "attention")): index for index in range(adapter.n_layers)}
        self.implementation = adapter.config._attn_implementation  # the model's own, before ours takes its place
        self.lengths: list[int] = []  # of the prompts that are now in the model, packed
        self.watched: list[int] = []  # positions of these that are looked at more closely
        self.seen = 0  # positions that have gone before
        self.positions: list[int] = []  # the same among all that have been in the model
        self.layers: list[dict[str, Any]] = [{} for _ in range(adapter.n_layers)]
        self.final: dict[str, Any] = {}

    def enter(self, lengths: list[int]) -> None:
        """Prompts of these lengths go through the model next."""
        total = sum(lengths)
        self.seen += sum(self.lengths)
        self.lengths, self.watched = lengths, sorted({0, total // 2, total - 1})
        self.positions += [self.seen + position for position in self.watched]

    def keep(self, record: dict[str, Any], name: str, x: Any) -> None:
        """Note what a forward pass made, after what earlier ones did."""
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
        **rest: Any,
    ) -> Tensor:
        """Record Q and K, and attend within each prompt. q (1, H, T, d), k and v (1, Hkv, T, d) -> (1, T, H, d).

        ``key_bias`` maps a prompt's length N to what its keys' logits are raised by, (N, H). ``sinks`` (H,) are logits
        that every query has besides, of nothing.
        """
        record, biases, parts, sums, first = self.layers[index], [], [], [], 0
        for name, x in (("q", q), ("k", k)):
            self.keep(record, name, x[0].transpose(0, 1).contiguous())
        # logits that lie in memory: a prompt's at a time
        alone = rest["softcap"] is not None or key_bias is not None or sinks is not None
        for length, count in [(length, len(list(run))) for length, run in groupby(self.lengths)]:
            bias = None if key_bias is None else key_bias(length).to(torch.promote_types(q.dtype, torch.float32))
            most = 1 if alone else max(1, attention.TILE // (q.shape[1] * length**2))  # torch may hold all logits, too
            part = (x[0, :, first : first + count * length].unflatten(1, (count, length)) for x in (q, k, v))
            for few in zip(*(x.transpose(0, 1).split(most) for x in part), strict=True):
                out, row_sum = attention.causal_attention(*few, key_bias=bias, sinks=sinks, **rest)
                parts.append(out.permute(0, 2, 1, 3).flatten(0, 1))  # (P, H, N, d) -> (P·N, H, d)
                sums += [] if row_sum is None else [row_sum.transpose(1, 2).flatten(0, 1)]
            biases += [bias] * count
            first += count * length
        if key_bias is not None:
            self.keep(record, "key_bias", torch.cat(biases))
        if sinks is not None:
            self.keep(record, "row_sum", torch.cat(sums))
        record["mask"] = rest
        out = (parts[0] if len(parts) == 1 else torch.cat(parts))[None].contiguous()
        if self.watching:
            self.keep(record, "values", v[0].transpose(0, 1)[self.watched].flatten(1))
            self.keep(record, "attended", out[0, self.watched].flatten(1))
        return out

    @torch.no_grad()
    def trace(self, input_ids: Tensor, offsets: np.ndarray) -> Trace:
        mixtures = [index for index, record in enumerate(self.layers) if "chosen" in record]
        sent = dict(zip(mixtures, sort_choices([self.layers[index]["chosen"] for index in mixtures]), strict=True))
        layers = [self._layer(index, record, sent.get(index)) for index, record in enumerate(self.layers)]
        if self.adapter.final_norm_module is None:
            self.final["normed_final"] = self.final["resid_final"]
        return Trace(input_ids, offsets, layers, **self.final, source=TraceSource.of(self.adapter.model))

    def _layer(self, index: int, record: dict[str, Any], sent: ExpertAssignment | None) -> LayerTrace:
        adapter, mixture = self.adapter, self.adapter.is_mixture(index)
        parallel, wanted = adapter.family.parallel, {"resid_pre", "mask"}
        wanted |= {"attention_output"} if parallel else {"resid_mid"}
        wanted |= {"experts_input", "router_weights"} if mixture else {"gate", "act"}
        if missing := wanted - record.keys():
            names = sorted("attention" if name == "mask" else name for name in missing)
            raise RuntimeError(
                f"layer {index}: the forward pass recorded no {', '.join(names)}. The model's code does "
                "not call these modules, or not through transformers' attention interface; supported: "
                "transformers 4.51 to 5.x, models as transformers defines them."
            )
        pre = record["resid_pre"]
        mid = pre + record["attention_output"] * adapter.family.factor if parallel else record["resid_mid"]
        ratio = record.get("value_ratio")
        attention = AttentionTrace(
            resid=pre,
            q=record["q"],
            k=record["k"],
            key_bias=record.get("key_bias"),
            row_sum=record.get("row_sum"),
            latent_scale=record.get("latent_scale"),
            value_ratio=None if ratio is None or (ratio == 1).all() else ratio,
            out_scale=record.get("attention_out_scale"),
            **record["mask"],
        )
        common = {"resid": pre if parallel else mid, "out_scale": record.get("mlp_out_scale")}
        if mixture:
            read = (record[name] for name in ("experts_input", "router_weights"))
            done = route(adapter.block(index), adapter.family.experts, *read, sent)
            mlps = tuple(MlpTrace(**common, **vars(routed)) for routed in done)
        else:
            mlps = (MlpTrace(gate=record["gate"], act=record["act"], **common),)
        return LayerTrace(pre, mid, attention, mlps, record.get("attention_sum"), record.get("mlp_sum"))


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # built for an unpacked sequence, or not at all: ours is made of the offsets
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    recorder: _Recorder | None = getattr(active, "recorder", None)
    if recorder is None:
        raise RuntimeError("this model is being traced by depass_fast in another thread; run it when that is done.")
    if scaling is None:
        scaling = recorder.adapter.scale(module, recorder.implementation) or query.shape[-1] ** -0.5
    index = recorder.places.get(id(module), module.layer_idx)  # a pruned model's layers keep the indices that they had
    window = recorder.adapter.window(index, sliding_window, recorder.implementation)
    softcap = None if recorder.implementation == "sdpa" else softcap  # which has none, and older versions ignore it
    mask = {"scale": scaling, "window": window, "softcap": softcap}
    return recorder.attend(index, query, key, value, sinks=s_aux, **mask), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _attention_function)


@contextmanager
def _recording(adapter: Adapter, recorder: _Recorder) -> Iterator[None]:
    """Hook the model up to ``recorder`` and undo all of it, whatever happens in between."""
    with _one_at_a_time, ExitStack() as undo:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it takes seconds
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for index in range(adapter.n_layers):
            _hook_layer(adapter, index, recorder, undo)
        end = adapter.final_norm_module
        if end is None:
            undo.callback(Tap(recorder, recorder.final, "resid_final").after(adapter.blocks[-1]))
        else:
            undo.callback(Tap(recorder, recorder.final, "resid_final").before(end))
        if adapter.dtype == torch.float64:
            for module, norm in adapter.norms():
                undo.callback(module.register_forward_hook(full_precision(norm)).remove)
        if end is not None:
            undo.callback(Tap(recorder, recorder.final, "normed_final").after(end))

        changes = {} if adapter.observed is not None else {"_attn_implementation": _ATTENTION_NAME}
        if adapter.dtype == torch.float64:
            changes["_experts_implementation"] = "eager"  # the others know no float64
        for name, value in changes.items():
            if hasattr(adapter.config, name):
                undo.callback(setattr, adapter.config, name, getattr(adapter.config, name))
                setattr(adapter.config, name, value)
        undo.callback(setattr, active, "recorder", getattr(active, "recorder", None))
        active.recorder = recorder
        yield


def _hook_layer(adapter: Adapter, index: int, recorder: _Recorder, undo: ExitStack) -> None:
    family, weights, record = adapter.family, adapter.layer(index), recorder.layers[index]

    def tap(name: str, made: Callable[[Tensor], Tensor] | None = None) -> Tap:
        return Tap(recorder, record, name, made)

    def part(name: str) -> nn.Module | None:
        return adapter.module(index, name)

    undo.callback(tap("resid_pre").before(part("attention_norm") or part("attention")))
    if family.parallel:
        undo.callback(tap("attention_output").after(part("o_proj")))
    else:
        undo.callback(tap("resid_mid").before(part("mlp_norm") or part("mlp")))
    for kind, branch in (("attention", weights.attention), ("mlp", weights.mlp)):
        if branch.output is not None:
            undo.callback(tap(f"{kind}_out_scale", branch.output.scale).before(part(f"{kind}_output_norm")))
        if branch.stream is not None:
            undo.callback(tap(f"{kind}_sum").before(part(f"{kind}_stream_norm")))
    for place, (before, after) in consistency.WATCHED.items() if recorder.watching else ():
        if adapter.is_mixture(index) and place in ("gate_proj", "down_proj"):
            continue
        if before is not None:
            undo.callback(tap(before, lambda x: x[recorder.watched]).before(part(place)))
        if after is not None:
            undo.callback(tap(after, lambda x: x[recorder.watched]).after(part(place)))
    if family.v_norm is not None:
        undo.callback(tap("latent_scale", weights.attention.v.norm.scale).before(part("v_norm")))
    if family.v_clip is not None:
        v_part, limit = family.v_part or (lambda weight: weight), family.v_clip
        undo.callback(tap("value_ratio", lambda x: _clamped_ratio(v_part(x.T).T, limit)).after(part("v_proj")))
    if adapter.is_mixture(index):
        undo.callback(tap("experts_input").before(part("mlp")))
        undo.callback(watch_router(adapter.block(index), family.experts, _routing(recorder, record)))
    else:
        gate = family.gate_part
        undo.callback(tap("gate", gate and (lambda x: gate(x.T).T.contiguous())).after(part("gate_proj")))
        undo.callback(tap("act").before(part("down_proj")))
    if adapter.observed is not None:
        _observe(adapter, index, recorder, undo)


def _routing(recorder: _Recorder, record: dict[str, Any]) -> Callable[[Tensor, Tensor], None]:
    """What records a router's weights and indices (T, K)."""

    def note(weights: Tensor, chosen: Tensor) -> None:
        if is_recording(recorder):
            recorder.keep(record, "router_weights", weights.detach())
            recorder.keep(record, "chosen", chosen)

    return note


def _observe(adapter: Adapter, index: int, recorder: _Recorder, undo: ExitStack) -> None:
    """Attention that is not pluggable: its projections give Q, K and V, and our output replaces its own."""
    module, observed = adapter.module(index, "attention"), adapter.observed
    seen: dict[str, Any] = {}

    def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if is_recording(recorder):
            seen["kwargs"] = kwargs

    def replaced(projection: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if not is_recording(recorder):
            return None
        outputs = [seen[name] for name in observed.projections]
        mask = {"window": recorder.adapter.window(index, None, recorder.implementation), "softcap": None}
        out = recorder.attend(index, **{**mask, **observed.read(module, outputs, seen["kwargs"])})
        return (out.reshape(args[0].shape).to(args[0].dtype),)

    undo.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
    for name in observed.projections:
        undo.callback(Tap(recorder, seen, name, batched=True).after(module.get_submodule(name)))
    undo.callback(adapter.module(index, "o_proj").register_forward_pre_hook(replaced).remove)


def _clamped_ratio(raw: Tensor, limit: float) -> Tensor:
    """Clamped / raw, one where a value is within ± ``limit``."""
    return torch.where(raw.abs() > limit, limit / raw.abs(), 1.0)
