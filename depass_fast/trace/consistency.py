"""The consistency check: the recorded pieces of a forward pass must make it up as the family declares.

A fork may compute something else, and the difference would end in a component that has nothing to do with it. At a few
positions of every layer three things are compared. Projections read the frozen norm of the residual stream. Attention
gets the values and gives their mixture. The stream gains what attention and MLP write. A model is checked once, and
again when its hooks or its code have changed, or with prompts twice as long.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..adapters import Adapter, Attention, Branch, Latent, Linear, Mlp, Norm
from ..adapters.maps import Joined
from ..adapters.side_by_side import beside_each_other
from ..adapters.stored import kind_of
from ..adapters.tuned import modules_of
from ..runtime.transfer import to_device
from .record import LayerTrace, MlpTrace, Trace

# part of a layer -> the names under which its input and its output are recorded at the watched positions
WATCHED = {
    "v_proj": ("values_input", "values_output"),
    "o_proj": ("heads", "attention_written"),
    "gate_proj": ("gate_input", "gate_output"),
    "down_proj": ("act_input", "mlp_written"),
}

READING = 0.05  # tolerance, relative to an output: 8-bit activations round it by 0.01
_KEPT = 8  # computations remembered of a model


class Checked:
    """The memory of a check: the computations of every model that have passed it, and the length of the prompts."""

    def __init__(self) -> None:
        self.models: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()

    def knows(self, model: nn.Module, computation: tuple, length: int = 1) -> bool:
        """True if this computation of a model has been checked already, with prompts of at least half this length."""
        return self.models.get(model, {}).get(computation, 0) >= length.bit_length()

    def remember(self, model: nn.Module, computation: tuple, length: int = 1) -> None:
        """Remember that it has been checked."""
        known = self.models.setdefault(model, {})
        known[computation] = max(known.pop(computation, 0), length.bit_length())
        while len(known) > _KEPT:
            del known[next(iter(known))]

    def forget(self, model: nn.Module, computation: tuple) -> None:
        """Forget that it has been checked."""
        self.models.get(model, {}).pop(computation, None)


checked = Checked()


def computation(model: nn.Module) -> tuple:
    """A key of how a model computes: its dtype, and its modules' hooks and code. It keeps none of them alive."""
    modules = modules_of(model)
    hooked: list[tuple] = [
        (place, *module._forward_pre_hooks, "after", *module._forward_hooks)
        for place, module in enumerate(modules)
        if module._forward_hooks or module._forward_pre_hooks
    ]
    hooked.append((*module_hooks._global_forward_pre_hooks, "after", *module_hooks._global_forward_hooks))
    code = (vars(module).get("forward", type(module).forward) for module in modules)
    refs = tuple(weakref.ref(getattr(forward, "__func__", forward)) for forward in code)
    return getattr(model, "dtype", None), tuple(hooked), refs


class Consistency:
    """The differences found so far, relative to the sizes compared, each with its tolerance and its name.

    Correct values differ by two or three roundings, each of half an eps at most relative to the sum of the norms
    compared: together by less than one eps. In half precision 1.5 eps of the coarsest dtype are allowed, else 1e-4.
    """

    def __init__(self) -> None:
        self.errors: list[Tensor] = []
        self.allowed: list[float] = []
        self.names: list[str] = []

    def compare(self, name: str, got: Tensor, expected: Tensor, *sizes: Tensor, tolerance: float | None = None) -> None:
        """Note how far ``got`` (S, C) is from ``expected``, relative to both and to ``sizes``."""
        coarsest = max(torch.finfo(x.dtype).eps for x in (got, expected, *sizes))
        allowed = max(1.5 * coarsest, 1e-4) if tolerance is None else tolerance
        self.note(name, differences(got, expected, *sizes).max(), allowed)

    def note(self, name: str, error: Tensor, allowed: float) -> None:
        """Note an error, a scalar, and the most that it may be."""
        self.errors.append(error)
        self.allowed.append(allowed)
        self.names.append(name)

    def verdict(self, consequence: str = "cannot be decomposed as one of that family", advice: str = "") -> None:
        """Raise RuntimeError, with ``advice``, for the first difference too large. The device is waited for once."""
        if not self.errors:
            return
        device = self.errors[0].device
        errors = torch.stack([error.to(device, torch.float64) for error in self.errors]).tolist()
        for name, error, allowed in zip(self.names, errors, self.allowed, strict=True):
            if error > allowed:
                raise RuntimeError(
                    f"{name} (a difference of {error:.1%}). This model, or a hook on it, computes something that the "
                    f"family does not declare, and {consequence}.{advice}"
                )


def differences(got: Tensor, expected: Tensor, *sizes: Tensor) -> Tensor:
    """The differences of rows (S, C), relative to the sum of their norms and those of ``sizes``: (S,)."""
    wide = torch.promote_types(got.dtype, torch.float32)
    total = torch.stack([x.to(wide).norm(dim=1) for x in (got, expected, *sizes)]).sum(0)
    return (got.to(wide) - expected.to(wide)).norm(dim=1) / total.clamp_min(torch.finfo(wide).tiny)


def check(adapter: Adapter, trace: Trace, records: list[dict[str, Any]], positions: list[int]) -> None:
    """Compare the trace, which holds all positions, with ``records`` of the packed ``positions`` that are checked.

    Raises:
        RuntimeError: naming the layer and the module, and what it should be.
    """
    found, at = Consistency(), torch.tensor(positions, device="cpu")
    for index, record in enumerate(records):
        if adapter.has_attention(index):
            _check_attention(found, adapter, index, trace.layers[index], record, at)
        if adapter.has_mlp(index):
            _check_mlp(found, adapter, index, trace, record, at)
    norm = adapter.final_norm()
    resid, final = (rows(x, at) for x in (trace.before_norm, trace.normed_final))
    found.compare("the final norm gives something else than its formula", final, normed(norm, resid).to(final))
    found.verdict()


def _check_reading(found: Consistency, name: str, linear: Linear, inputs: Tensor, outputs: Tensor) -> None:
    """Compare a projection's outputs with the product of its inputs and the weight that is read."""
    wide, linear = torch.promote_types(inputs.dtype, torch.float32), replace(linear, outer_bias=None)
    bias = None if linear.bias is None else linear.bias.to(wide)
    ours = nn.functional.linear(inputs.to(wide), linear.weight.to(wide), bias)
    name = f"{name} computes something else than its weight says"
    found.compare(name, linear.select(outputs), ours, tolerance=READING)


def _check_attention(
    found: Consistency, adapter: Adapter, index: int, layer: LayerTrace, record: dict[str, Any], at: Tensor
) -> None:
    weights, sides = adapter.attention(index), adapter.sides(index)
    if sides is not None:
        _check_sides(found, adapter, index, layer, record, at)
        return
    name, pre = f"layer {index}: {adapter.path(index, 'attention')}", rows(layer.resid_pre, at)
    read = rows(layer.attention.resid, at)
    found.compare(
        f"layer {index}: {adapter.path(index, 'v_proj')} reads something else than the norm of the residual stream",
        record["values_input"],
        normed(weights.norm, read).to(read),
    )
    computed = isinstance(weights.v, Latent) and not weights.v.up.is_own  # a weight that is computed rounds otherwise
    joined = isinstance(weights.v, Joined)  # no module gives all values, which are compared behind the heads
    if not joined:
        got, raw = record["values_output"], weights.is_recurrent or weights.is_keyed  # the rest is applied by ourselves
        expected = weights.v_input.select(got) if raw else weights.values_of(got)
        between = f"{name} changes the values between their projection and the heads"
        found.compare(between, record["values"], expected, tolerance=READING if computed else None)
    if "heads" in record:  # in a mixture of heads no module is given all of them
        _check_heads(found, adapter, index, weights, record, weights.o.entering(record["attended"]))
    for part, linear, inputs in (
        ("v_proj", weights.v_input, record["values_input"]),
        ("o_proj", weights.o, record["attended"].to(record["attention_written"])),
    ):
        outputs = record[WATCHED[part][1]]
        if part == "v_proj" and joined:
            continue
        _check_reading(found, f"layer {index}: {adapter.path(index, part)}", linear, inputs, outputs)
    if adapter.is_parallel or layer.streams is not None or layer.spreads:
        return  # what the stream gains is more than that: see the MLP, stream_check.py or spread_check.py
    mid, written = rows(layer.resid_mid, at), record["attention_written"]
    written = written if weights.o.outer_bias is None else written + weights.o.outer_bias
    after = mid if layer.attention_sum is None else rows(layer.attention_sum, at)
    _check_write(found, name, weights, written, pre, after, mid)


def _check_heads(
    found: Consistency, adapter: Adapter, index: int, weights: Attention, record: dict[str, Any], ours: Tensor
) -> None:
    """Compare what the output projection reads with ``ours``, and with what a recurrence gives in float32."""
    given, exact = record["heads"], record.get("heads_in_float32")
    ours = ours.view(given.shape)
    what = "gives its output projection something else than the heads' mixture of values"
    name, tolerance = (
        f"layer {index}: {adapter.path(index, 'attention')} {what}",
        _mixture_tolerance(adapter, weights, given.dtype),
    )
    found.compare(name, given, ours.to(given), tolerance=tolerance)
    if exact is not None:  # what is left are tables that the model holds in half precision
        found.compare(f"{name}, also in float32", exact, ours.to(exact), tolerance=1.5 * torch.finfo(given.dtype).eps)


def _check_sides(
    found: Consistency, adapter: Adapter, index: int, layer: LayerTrace, record: dict[str, Any], at: Tensor
) -> None:
    """Compare attention and the recurrence beside it: values of both, and what both write together."""
    weights, sides = adapter.attention(index), adapter.sides(index)
    assert sides is not None
    name, pre, mid = (
        f"layer {index}: {adapter.path(index, 'attention')}",
        rows(layer.resid_pre, at),
        rows(layer.resid_mid, at),
    )
    _check_heads(found, adapter, index, sides[1], record, record["attended"])
    values, heads = (beside_each_other(sides, (record["beside"][key], record[key])) for key in ("values", "attended"))
    wide = torch.promote_types(pre.dtype, torch.float32)
    computed = (
        (
            "reads something else than the norm of the residual stream",
            values,
            normed(weights.norm, pre),
            weights.v,
            pre,
        ),
        (
            "writes something else than what the residual stream gains there",
            mid.to(wide) - pre.to(wide),
            heads,
            weights.o,
            mid,
        ),
    )
    for what, got, read, linear, size in computed:
        bias = None if linear.bias is None else linear.bias.to(wide)
        ours = nn.functional.linear(read.to(wide), linear.weight.to(wide), bias)
        sizes = (size,) if linear is weights.o else ()
        found.compare(f"{name}, or the attention beside it, {what}", got.to(ours), ours, *sizes, tolerance=READING)


def _mixture_tolerance(adapter: Adapter, weights: Attention, dtype: torch.dtype) -> float | None:
    """The tolerance of attention's output: wide where the model's own code computes it, perhaps in half."""
    if adapter.observed is None and not (weights.is_recurrent or weights.is_keyed or weights.scales_heads):
        return None
    return 0.25 if dtype.itemsize < 4 else 1e-3


def _check_mlp(
    found: Consistency, adapter: Adapter, index: int, trace: Trace, record: dict[str, Any], at: Tensor
) -> None:
    layer, weights = trace.layers[index], adapter.layer(index)
    mixture, dense = adapter.is_mixture(index), adapter.has_dense_mlp(index)
    name, read = f"layer {index}: {adapter.path(index, 'mlp')}", rows(layer.mlp.resid, at)
    number, own = next(((i, mlp) for i, mlp in enumerate(weights.mlps) if mlp.is_dense), (0, weights.mlp))
    resid = next((part.resid for part in layer.mlps if part.part == number), layer.mlp.resid)
    of_mixture, of_mlp = (weights.mlp, "experts_input", read), (own, "gate_input", rows(resid, at))
    for is_there, (mlp, given, read) in ((mixture, of_mixture), (dense, of_mlp)):
        if is_there:
            found.compare(
                f"{name} reads something else than the norm of the residual stream",
                rows(record[given], at) if mlp.is_routed else record[given],
                normed(mlp.norm, read).to(read),
            )
    if dense:
        for part, linear in (("gate_proj", own.gate), ("down_proj", own.down)):
            inputs, outputs = (record[name] for name in WATCHED[part])
            _check_reading(found, f"layer {index}: {adapter.path(index, part)}", linear, inputs, outputs)
    if layer.streams is not None or layer.spreads:
        return
    mid, post = rows(layer.resid_mid, at), rows(trace.resid(index + 1), at).to(layer.resid_mid.device)
    computed = mixture and any(kind_of(m) is not None for m in adapter.weighty(index))  # weights that are read here
    tolerance = READING if computed else None
    if _is_factor(weights.mlp) or any(mlp.output is not weights.mlp.output for mlp in weights.mlps):
        _check_all_written(found, name, layer, weights.mlps, at, mid, post, tolerance)
        return
    written = experts_written(layer, weights.mlps, at) if mixture else record["mlp_written"]
    written = written if layer.mlp.out_ratio is None else written * rows(layer.mlp.out_ratio, at).to(written)
    after = post if layer.mlp_sum is None else rows(layer.mlp_sum, at)
    _check_write(found, name, weights.mlp, written, mid, after, post, tolerance)


def _is_factor(mlp: Mlp) -> bool:
    return mlp.stream is not None and mlp.stream.is_factor


def _check_all_written(
    found: Consistency,
    name: str,
    layer: LayerTrace,
    mlps: tuple[Mlp, ...],
    at: Tensor,
    before: Tensor,
    after: Tensor,
    tolerance: float | None,
) -> None:
    """Check that a layer's MLPs, each through norms of its own, lead from ``before`` to ``after``, with its factor."""
    wide, follows = torch.promote_types(before.dtype, torch.float32), [mlps[one.part].follows for one in layer.mlps]
    total, stream = before.to(wide), mlps[0].stream
    for part, is_last in zip(layer.mlps, follows, strict=True):
        if is_last:
            _compare_stream(found, name, rows(part.resid, at), total, before)
        raw = experts_written(layer, mlps, at, (part,)).to(wide)
        total = total + mlps[part.part].written(raw, None if part.out_scale is None else rows(part.out_scale, at))
    total = normed(stream, total)
    what = f"{name} and what stands beside it write something else than what the residual stream gains there"
    found.compare(what, after, total.to(after), before, tolerance=tolerance)


def _compare_stream(found: Consistency, name: str, got: Tensor, expected: Tensor, size: Tensor) -> None:
    found.compare(
        f"{name} is followed by a gate that reads something else than the residual stream", got, expected.to(got), size
    )


def _check_write(
    found: Consistency,
    name: str,
    branch: Branch,
    raw: Tensor,
    before: Tensor,
    after: Tensor,
    stream: Tensor,
    tolerance: float | None = None,
) -> None:
    """Check that outputs ``raw`` (S, D) lead from ``before`` to ``after``, and from there, if normed, to ``stream``."""
    written, wide = normed(branch.output, raw) * branch.factor, torch.promote_types(before.dtype, torch.float32)
    if branch.stream is not None and branch.stream.is_factor:
        total = normed(branch.stream, before.to(wide) + written.to(wide)).to(after)
        found.compare(f"{name} writes something else than what the residual stream gains there", after, total, before)
        return
    found.compare(
        f"{name} writes something else than what the residual stream gains there",
        after.to(wide) / branch.keeps - before.to(wide),
        written.to(before),
        before,
        after,
        tolerance=tolerance,
    )
    if branch.stream is not None:
        found.compare(
            f"{name} is followed by something else than its norm", stream, normed(branch.stream, after).to(stream)
        )


def experts_written(
    layer: LayerTrace, mlps: tuple[Mlp, ...], at: Tensor, parts: tuple[MlpTrace, ...] | None = None
) -> Tensor:
    """The sum of the experts' outputs, or of some ``parts`` of them, at positions (S,): (S, D)."""
    read = layer.mlp.resid
    wide = torch.promote_types(read.dtype, torch.float32)
    total = torch.zeros(len(at), read.shape[1], dtype=wide, device=read.device)
    for part in layer.mlps if parts is None else parts:
        weights, routed = mlps[part.part], part.host_positions
        here = np.arange(len(at)) if routed is None else np.flatnonzero(np.isin(at.numpy(), routed))
        if len(here):
            here, positions = (to_device(x, total.device) for x in (here, at.numpy()[here]))
            total[here] += part.act[part.rows(positions)].to(wide) @ weights.w_down.T.to(wide)
            constant = part.constant(weights, positions, wide)
            total[here] += 0.0 if constant is None else constant
    return total.to(read)


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    """Hidden states (S, D) after a norm, by its formula, in float32 at least."""
    if norm is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = norm.apply(wide, norm.scale(wide))
    return y if norm.bias is None else y + norm.bias.to(y)


def rows(x: Tensor, at: Tensor) -> Tensor:
    return x[at.to(x.device)]
