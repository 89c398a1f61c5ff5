"""Recurrences that several families share: how their frozen numbers come from the outputs of their projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu, softplus

from .family import Family, HeadScale, Mixer
from .mixer_activation import curve, value_ratio
from .recurrence import Recurrence, Softmax
from .stored import stored_weight

OLDEST = (5, 20)  # transformers, whose recurrent layers are called as they are here


def knows_recurrences() -> bool:
    """True if the recurrent layers of the installed transformers can be traced."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= OLDEST


def wide(x: Tensor) -> Tensor:
    """The same in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gated_delta(mixer: Any, qk: Tensor, beta: Tensor, a: Tensor, convolve: Callable[..., Tensor]) -> Recurrence:
    """The gated delta rule of Qwen3-Next: queries and keys (T, 2·Hk·n) before their convolution.

    S = e^g S, then S += k ⊗ β (v - Sᵀ k); q and k are unit vectors, q divided by √n; β, as logits, and a are (T, H).
    """
    decay = -wide(mixer.A_log).exp() * softplus(wide(a) + wide(mixer.dt_bias))
    return delta_rule(mixer, qk, beta, decay[..., None], mixer.head_k_dim, convolve)


def delta_rule(
    mixer: Any, qk: Tensor, beta: Tensor, decay: Tensor, width: int, convolve: Callable[..., Tensor]
) -> Recurrence:
    """The same with its decay given, (T, H, 1) or (T, H, n), and the ``width`` n of a head's keys."""
    channels = qk.shape[1]
    q, k = curve(mixer)(convolve(wide(qk), mixer.conv1d, lambda w: w[:channels])).chunk(2, -1)
    q, k = (_unit(x.unflatten(-1, (-1, width))) for x in (q, k))
    return Recurrence(q * width**-0.5, k, decay, write=wide(beta).sigmoid(), corrects=True)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_head_norm(norm: Any, z: Tensor, heads: Tensor, gate: Callable[[Tensor], Tensor] = silu) -> Tensor:
    """The factors (T, H·d) of an RMSNorm of every head, its weight (d,), and of a gate, such as silu(z), behind it."""
    y = wide(heads).unflatten(-1, (-1, len(norm.weight)))
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.variance_epsilon) * wide(norm.weight)
    return scale.flatten(1) * gate(wide(z))


def norm_of_centred(norm: Any, heads: int, y: Tensor) -> Tensor:
    """The factors (T, H·d) of a norm of every head, its weight (H·d,), which is given heads (T, H·d) without a mean."""
    by_head = wide(y).unflatten(-1, (heads, -1))
    scale = torch.rsqrt(by_head.square().mean(-1, keepdim=True) + norm.eps)
    return scale.expand_as(by_head).flatten(1) * norm.weight


def centred_by_head(weight: Tensor, heads: int) -> Tensor:
    """A projection to heads (H·d, D), or its bias, without the mean of each head's outputs."""
    by_head = weight.unflatten(0, (heads, -1))
    return (by_head - by_head.mean(1, keepdim=True)).flatten(0, 1)


def mlstm(q: Tensor, k: Tensor, gates: Tensor, cap: float | None, eps: float) -> Recurrence:
    """mLSTM, of q and k (T, H, n) and of its gates' projections (T, 2H), [i; f]: C = σ(f) C + e^i k vᵀ, n of ones.

    h = Cᵀ q / (max(|n·q|, 1) + ε), where C, n, and one are divided by e^m; q is divided by √n. Gates are capped.
    """
    gates = gates if cap is None else cap * torch.tanh(gates / cap)
    log_write, forget = gates.chunk(2, -1)

    def divisor(n: Tensor, m: Tensor) -> Tensor:
        return torch.maximum(n.abs(), torch.exp(-m)) + eps

    return Recurrence(q * q.shape[2] ** -0.5, k, logsigmoid(forget)[..., None], log_write=log_write, divisor=divisor)


def wkv(k: Tensor, rate: Tensor, bonus: Tensor) -> Recurrence:
    """RWKV-4's mean of values, of k (T, H): weights e^(k_i - (t-1-i)·rate) of earlier positions, e^(k_t + bonus) of t.

    Every channel is a head of width one. ``rate`` and ``bonus`` are (H,), the former at least zero.
    """
    ones, decay = torch.ones_like(k)[..., None], (-rate).expand_as(k)[..., None]
    return Recurrence(ones, ones[:, :1], decay, log_write=k, log_own=k + bonus)


def state_space(mixer: Any, projected: Tensor, convolve: Callable[..., Tensor]) -> Recurrence:
    """Mamba-2's recurrence, of the projection [z; x; B; C; dt]: h = e^(dt·A) h + dt · B xᵀ, y = hᵀ C + D x."""
    inner, states, heads = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size, mixer.num_heads
    bc = projected[:, 2 * inner : 2 * (inner + states)]
    bc = curve(mixer)(convolve(wide(bc), mixer.conv1d, lambda w: w[inner:]))
    k, q = (x.unflatten(-1, (mixer.n_groups, -1)) for x in bc.chunk(2, -1))
    dt = softplus(wide(projected[:, -heads:]) + wide(mixer.dt_bias)).clamp(*mixer.time_step_limit)
    decay = -dt * wide(mixer.A_log).exp()
    return Recurrence(q, k, decay[..., None], write=dt, skip=wide(mixer.D))


def selective_scan(mixer: Any, x: Tensor, convolve: Callable[..., Tensor]) -> Recurrence:
    """Mamba-1's recurrence, of x in front of its convolution. Every channel is a head, with a decay for every state.

    h = e^(dt·A) h + dt · B x, y = h·C + D x; dt, B and C are projections of x behind the convolution, maybe with norms.
    """
    mixed = curve(mixer)(convolve(wide(x), mixer.conv1d))
    states = mixer.ssm_state_size
    projected = mixed @ stored_weight(mixer.x_proj).to(mixed).T
    parts = projected.split([projected.shape[1] - 2 * states, states, states], -1)
    dt, k, q = (
        _normed(getattr(mixer, f"{name}_layernorm", None), y) for name, y in zip(("dt", "b", "c"), parts, strict=True)
    )
    dt = softplus(dt @ stored_weight(mixer.dt_proj).to(dt).T + wide(mixer.dt_proj.bias))
    rates, decay = wide(mixer.A_log).exp(), -dt[..., None]
    return Recurrence(q[:, None], k[:, None], decay, write=dt, skip=wide(mixer.D), rates=rates)


def selective_scan_of_heads(mixer: Any, x: Tensor, convolve: Callable[..., Tensor]) -> Recurrence:
    """The same for `n_mamba_heads` groups of channels (Zamba), each with projections of its own to dt, B and C."""
    mixed = curve(mixer)(convolve(wide(x), mixer.conv1d)).unflatten(-1, (mixer.n_mamba_heads, -1))  # (T, G, channels)
    projected = torch.einsum("tgc,gpc->tgp", mixed, mixer.x_proj_weight.to(mixed))
    dt, k, q = projected.split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], -1)
    dt = torch.einsum("tgr,gcr->tgc", dt, mixer.dt_proj_weight.to(dt)) + wide(mixer.dt_proj_bias)
    dt, rates = softplus(dt).flatten(1), wide(mixer.A_log).exp().flatten(0, 1)
    return Recurrence(q, k, -dt[..., None], write=dt, skip=wide(mixer.D).flatten(), rates=rates)


def _normed(norm: Any, x: Tensor) -> Tensor:
    if norm is None:
        return x
    eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * norm.weight.to(x) if isinstance(norm.weight, nn.Parameter) else x  # Falcon-Mamba's is not used


def gated_group_norm(norm: Any, gate: Tensor, heads: Tensor, group: int) -> Tensor:
    """The factors (T, H·d) of a gate silu(z) and of an RMSNorm behind it, by groups of so many channels."""
    gate = silu(wide(gate))
    y = (wide(heads) * gate).unflatten(-1, (-1, group))
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.variance_epsilon).expand_as(y).flatten(1)
    return gate * scale * wide(norm.weight)


def softmax_by_distance(attention: Any, q: Tensor, k: Tensor, r: Tensor, convolve: Callable[..., Tensor]) -> Recurrence:
    """Inkling's softmax, of its projections (T, C): q and k with norms, k behind a convolution, no rotary embedding.

    The logits have a bias by the distance of query and key, a product of what r (T, H·r) gives for the query.
    They are scaled up with the position's logarithm where the config says so. Packed prompts are one.
    """
    conv, config, width = attention.k_sconv.conv1d, attention.config, attention.head_dim
    k = (wide(k) + convolve(wide(k), conv)).to(k)
    q, k = attention.q_norm(q.unflatten(-1, (-1, width))), attention.k_norm(k.unflatten(-1, (-1, width)))
    relative, tau = wide(r).unflatten(-1, (attention.num_heads, -1)), 1.0
    if not attention.is_sliding and config.log_scaling_n_floor is not None:
        n = torch.arange(1, len(q) + 1, device=q.device).to(relative)
        tau = 1.0 + config.log_scaling_alpha * (n / config.log_scaling_n_floor).clamp(min=1.0).log()[:, None, None]
    distances, kind = attention.rel_logits_proj.proj.detach(), Softmax(attention.scaling, attention.sliding_window)
    return Recurrence((wide(q) * tau).to(q), k, None, softmax=kind, relative=relative * tau, distances=distances)


def query_gate(heads: int, width: int) -> dict[str, Any]:
    """The fields of a family whose query projection also gives a gate of what the head gives: [q1; z1; q2; z2; ...]."""

    def gate(attention: Any, outputs: list[Tensor], y: Tensor) -> Tensor:
        return torch.sigmoid(outputs[0].unflatten(-1, (heads, 2, width))[..., 1, :].flatten(-2))

    part = {"q_part": lambda weight: weight.unflatten(0, (heads, 2, width))[:, 0].flatten(0, 1)}
    return {**part, "head_scale": HeadScale(("q_proj",), gate)}


def with_mixer(family: Family, home: str, head_dim: int, mixer: Mixer, scale: HeadScale, **parts: Any) -> Family:
    """The declaration of a layer of that family with a recurrence at ``home`` in the place of its attention."""
    if not knows_recurrences():
        raise ValueError(
            f"model: its recurrent layers need transformers {'.'.join(map(str, OLDEST))} or newer, not "
            f"{transformers.__version__}."
        )
    dims = {"value_dim": head_dim, "key_dim": head_dim, "q_norm": None, "k_norm": None, "q_part": None, **parts}
    return replace(family, attention=home, mixer=mixer, head_scale=scale, o_proj=f"{home}.out_proj", **dims)


def with_state_space(family: Family, home: str, inner: int, head_dim: int, activation: str) -> Family:
    """The declaration of a layer of that family with Mamba-2's mixer of ``inner`` channels for attention.

    ``activation`` is the name of the one behind its convolution. Its gate is always silu(z).
    """

    def read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
        return state_space(mixer, outputs[0], convolve)

    def scale(mixer: Any, outputs: list[Tensor], y: Tensor) -> Tensor:
        return gated_group_norm(mixer.norm, outputs[0][:, :inner], y, getattr(mixer.norm, "group_size", inner))

    mixer = Mixer(("in_proj",), read, f"{home}.conv1d", lambda weight: weight[:inner], value_ratio(activation))
    parts = {"v_proj": f"{home}.in_proj", "v_part": lambda weight: weight[inner : 2 * inner]}
    return with_mixer(family, home, head_dim, mixer, HeadScale(("in_proj",), scale), **parts)
