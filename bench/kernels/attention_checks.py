"""The attention kernels against plain float64, over layouts and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from depass_fast.backends.triton.pieces import cut, make_piece, query_tiles
from depass_fast.kernels import attention, launch, probabilities
from depass_fast.state.layout import Layout
from depass_fast.trace.attention import attention_probabilities
from depass_fast.trace.record import AttentionTrace

from .checking import Check, born, error, everywhere, piece_rows, poisoned, random, tokens


def _check_mix(
    layout: Layout, heads: int, kv: int, head_dim: int, max_rows: int = 1 << 20, value_dim: int | None = None,
    stored: bool = False, scaled: bool = False, **mask: Any,
) -> Callable:  # fmt: skip
    """Check `mix`. ``stored``: P is stored before; ``scaled``: rows of many sizes, in float16 with scales."""

    def run(dtype: torch.dtype, device: torch.device) -> float:
        n, v_dim = len(layout.packed), value_dim or head_dim
        of_trace = mask.get("of_trace", dtype)
        q, k = random(0, n, heads, head_dim).to(of_trace), random(1, n, kv, head_dim).to(of_trace)
        values = random(2, layout.n_rows, kv * v_dim).to(dtype)
        has_scales = scaled and dtype == torch.float16
        size = (random(5, layout.n_rows) * 2).round().exp2() if has_scales else torch.ones(layout.n_rows)
        options = {name: value for name, value in mask.items() if name != "of_trace"}
        key_bias = random(3, n, heads) if options.pop("key_bias", False) else None
        out_scale = random(4, n) if options.pop("out_scale", False) else None
        scale = head_dim**-0.5
        trace = AttentionTrace(resid=q, q=q, k=k, scale=scale, key_bias=key_bias, **options)
        oracle = torch.zeros(layout.n_rows, heads * v_dim, dtype=torch.float64)
        for prompt, components in enumerate(layout.components):
            at = layout.segments(prompt)
            dense = torch.zeros(at.stop - at.start, len(components), values.shape[1], dtype=torch.float64)
            alive = torch.arange(len(components)) < torch.from_numpy(layout.counts[at])[:, None]
            dense[alive] = (values.double() * size[:, None])[layout.rows(prompt)]
            here = torch.from_numpy(layout.packed[at])
            p = attention_probabilities(trace, here, torch.arange(len(here)), torch.float64)
            v = dense.unflatten(-1, (kv, v_dim)).repeat_interleave(heads // kv, 2)
            mixed = torch.einsum("hqk,kmhd->qmhd", p, v).flatten(2)
            mixed = mixed if out_scale is None else mixed * out_scale[here].double()[:, None, None]
            oracle[layout.rows(prompt)] = mixed[alive]
        lengths = np.bincount(layout.prompt, minlength=len(layout.components))
        tile = launch.mix_tile(int(lengths.max()), heads // kv, torch.promote_types(dtype, of_trace))
        put: dict[str, Any] = {"key_bias": key_bias, "out_scale": out_scale}
        put = {name: None if t is None else t.to(device) for name, t in put.items()}
        frozen = probabilities.Frozen(q.to(device), k.to(device), scale, **options, **put)
        packed = torch.from_numpy(layout.packed.astype(np.int32)).to(device)
        tiles = query_tiles(lengths, tile, heads // kv, device)
        lse = probabilities.log_sum_exp(frozen, packed, tiles, tile)
        longest = int(lengths.max())
        p = probabilities.stored_probabilities(frozen, lse, packed, tiles, tile, longest, dtype) if stored else None
        worst, covered = 0.0, 0
        for prompts, first, last in cut(layout, max_rows):
            piece = make_piece(layout, prompts, first, last, tile, heads // kv, device)
            source = piece_rows(layout, prompts, first, last)
            out = poisoned(len(source), heads * v_dim, dtype=dtype, device=device)
            scales = None
            if has_scales:
                put_there = poisoned(len(source), dtype=torch.float32, device=device)
                scales = attention.RowScales(size[source].to(device), put_there, 3)
            where = (piece.keys, piece.items, frozen, lse, tile, piece.longest, out, p, scales)
            attention.mix(values[source].to(device), *where)
            found, expected = out, oracle[source]
            if scales is not None:  # every row is as precise as any other
                each = expected.norm(dim=1, keepdim=True).clamp_min(1e-30)
                found, expected = out.double().cpu() * scales.mixed.double().cpu()[:, None] / each, expected / each
            worst, covered = max(worst, error(found, expected)), covered + len(source)
        return worst if covered == layout.n_rows else float("inf")

    return run


def attention_checks(small: bool) -> Iterator[Check]:
    """Every kind of layout and mask; ``small``: sizes for the interpreter."""
    scale = 1 if small else 9
    jagged, heads = tokens([5, 1, 11 * scale, 3]), everywhere([6 * scale, 3], 7)
    for name, layout in (("tokens", jagged), ("everywhere", heads), ("one", tokens([1]))):
        yield Check("mix", name, _check_mix(layout, 4, 2, 24))
    yield Check("mix", "tokens in pieces", _check_mix(jagged, 4, 4, 16, max_rows=20 * scale**2))
    yield Check("mix", "one component at a time", _check_mix(tokens([5, 4]), 2, 2, 16, max_rows=1))
    yield Check("mix", "window", _check_mix(jagged, 4, 2, 16, window=3))
    yield Check("mix", "cap", _check_mix(jagged, 4, 1, 16, softcap=0.7))
    yield Check("mix", "key bias, scaled", _check_mix(jagged, 3, 3, 16, key_bias=True, out_scale=True))
    long = tokens([70 if small else 200])
    for of_trace in (torch.float32, torch.bfloat16):  # a model in one dtype, products in another
        name = str(of_trace).removeprefix("torch.")
        yield Check("mix", f"trace in {name}", _check_mix(jagged, 4, 2, 16, of_trace=of_trace))
    for wide, narrow in ((24, 16), (16, 40)):
        yield Check("mix", f"{wide} wide, values {narrow}", _check_mix(jagged, 4, 2, wide, value_dim=narrow))
    for name, layout in (("tokens", jagged), ("everywhere", heads)):
        yield Check("mix", f"{name}, scales", _check_mix(layout, 4, 2, 24, scaled=True))
    for pieces, scaled in ((1 << 20, False), (900, True), (900, False)):
        case = f"stored, {'scales' if scaled else 'plain'}, {pieces} rows"
        yield Check("mix", case, _check_mix(long, 4, 2, 16, max_rows=pieces, stored=True, scaled=scaled))
    yield Check("mix", "many tiles, scales", _check_mix(long, 4, 2, 16, max_rows=900, scaled=True))
    few = everywhere([len(long.packed)], 3)
    yield Check("mix", "many tiles, narrow values", _check_mix(few, 4, 4, 24, value_dim=16))
    yield Check("mix", "many tiles", _check_mix(long, 4, 2, 16, max_rows=1 << 20 if small else 5000))
    masks = {"window": 9, "softcap": 0.7, "key_bias": True, "out_scale": True}
    for stored in (False, True):
        case = "many tiles, masks, stored" if stored else "many tiles, masks"
        yield Check("mix", case, _check_mix(long, 2, 1, 16, stored=stored, scaled=stored, **masks))
    # two prompts in a piece, where the first has a birth behind the second's end; then one prompt in two pieces, where
    # the later begins at position 3 and has a birth that lies in another tile counted from there
    late = born([66, 3, 70], [[0] * 8 + [65], [0] * 9, [0] * 8 + [3] * 8 + [66]])
    yield Check("mix", "many tiles, prompts and pieces", _check_mix(late, 2, 1, 16, max_rows=620))
    stores = _check_mix(late, 2, 1, 16, max_rows=620, stored=True, scaled=True)
    yield Check("mix", "prompts and pieces, stored", stores)
    if not small:
        for head_dim in (64, 80, 96, 128, 256):
            yield Check("mix", f"head_dim {head_dim}", _check_mix(tokens([40, 130]), 4, 2, head_dim, max_rows=3000))
