"""Offsets need 64 bits: kernels find what lies behind 2³¹ elements of memory that is reserved and never touched.

An offset that is cut to 32 bits becomes negative, and ends the process.
"""

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from bench.kernels import fused_products
from depass_fast.kernels import allocation, attention, completeness, crowd, few, linear, loudness, probabilities, rows
from depass_fast.kernels.common import LOG2E

FAR = 2**31 + 5  # elements in front of what is looked at


def far(*shape: int, rows_before: int) -> torch.Tensor:
    """A tensor behind more elements than 32 bits can count; the memory before it is never touched."""
    before = torch.empty((rows_before + shape[0], *shape[1:]), dtype=torch.float16)
    assert before.numel() > 2**31
    return before


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Last:
    """A kernel that runs the last of its programs alone."""

    def __init__(self, kernel, monkeypatch):
        self.kernel, self.monkeypatch = kernel, monkeypatch

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            def last(x: int, y: int, z: int) -> None:
                interpreter_builder.grid_idx = (grid[0] - 1, y, z)

            with self.monkeypatch.context() as patch:
                patch.setattr(interpreter_builder, "set_grid_idx", last)
                self.kernel[(1, *grid[1:])](*arguments, **constants)

        return launch


def test_in_the_allocation():
    """Gates and records that lie behind 2³¹ others become what the same ones become at the beginning."""
    width, count, n = 1 << 16, 3, 8
    skipped = FAR // width + 1
    room = far(count, width, rows_before=skipped)
    room[skipped:, : 2 * n] = random(0, count, 2 * n).half()
    near, act = (room[skipped:, i * n :][:, :n].clone() for i in range(2))
    before, alive = near.clone(), torch.ones(len(room), dtype=torch.uint8)

    def shares(g: torch.Tensor, act: torch.Tensor, first: int) -> None:
        where = allocation.Segments(torch.tensor([first, first + count]), torch.tensor([first]), count)
        allocation.allocate(g, where, act, "softmax", 0.1, alive[: len(g)])

    shares(*(room[:, i * n :][:, :n] for i in range(2)), skipped)
    shares(near, act, 0)
    assert torch.equal(room[skipped:, :n], near) and not torch.equal(near, before)


def test_in_the_linear_rules(monkeypatch):
    """Gates, ups and coefficients that lie behind 2³¹ others: the last of so many segments."""
    width, count, n = 1 << 16, 3, 8
    skipped = FAR // width + 1
    room, tables = far(count, width, rows_before=skipped), torch.empty(skipped + 1, width)
    room[skipped:, : 2 * n], tables[skipped, : 2 * n] = random(0, count, 2 * n).half(), random(1, 2 * n)
    g, u = room[:, :n], room[:, n : 2 * n]
    of_gate, of_up = tables[:, :n], tables[:, n : 2 * n]
    expected = g[skipped:].float() * of_gate[skipped] + u[skipped:].float() * of_up[skipped]
    starts = torch.full((skipped + 2,), skipped)
    starts[-1] += count
    monkeypatch.setattr(linear, "_share_linearly", Last(linear._share_linearly, monkeypatch))
    linear.share_linearly(g, starts, count, of_gate, u, of_up)
    assert torch.equal(g[skipped:], expected.half())


def test_in_the_crowds_of_a_sweep():
    """A start's rows, and gradients of a start, that lie behind 2³¹ numbers."""
    width, count, n = 1 << 16, 3, 300
    skipped = FAR // width + 1
    room = far(count, width, rows_before=skipped)
    room[skipped:, :n] = random(0, count, n).half()
    room[skipped:, n:] = 0
    act, total = random(1, 1, width), random(2, 1, width)
    alive, places = torch.ones(len(room), 1, dtype=torch.uint8), torch.full((1,), -1, dtype=torch.int32)

    def shares(g: torch.Tensor, first: int) -> crowd.CrowdTables:
        rows_of = crowd.StartRows(torch.tensor([first, first + count]), places, places, count)
        tables = crowd.CrowdTables(*torch.full((3, 1, 1, width), torch.nan), torch.full((1, 1), torch.nan))
        given = alive[: len(g)], torch.full((1, 1), 50.0), act, total, 0.1, tables
        crowd.share_with_crowds(g[:, None], rows_of, *given)
        return tables

    near, before = room[skipped:].clone(), room[skipped:].clone()
    found, expected = shares(room, skipped), shares(near, 0)
    assert torch.equal(room[skipped:], near) and not torch.equal(near, before)
    assert torch.equal(found.log_z, expected.log_z) and torch.equal(found.share, expected.share)


def test_in_the_way_back_of_a_sweep(monkeypatch):
    width = 1 << 16
    skipped = FAR // width + 1
    y = far(1, width, rows_before=skipped)
    y[skipped:] = random(3, 1, width).half()
    gradients, act = y[skipped:].float(), torch.ones(1, width)
    tables = [torch.ones(1, 1, width).expand(skipped + 1, 1, -1) for _ in range(3)]
    slope, offsets = torch.ones(skipped + 1, 1), torch.zeros(skipped + 1)
    strides = (0, 1, tables[0].stride(0), tables[0].stride(1))
    Last(crowd._crowd_back, monkeypatch)[(skipped + 1,)](
        y, act, *tables[1:], slope, offsets, 1, width, 1, *strides, 1, 2.0, BI=1 << 14
    )
    assert torch.allclose(y[skipped:].float(), 2 * gradients, rtol=2e-3) and float(offsets[-1]) == 0.0


def test_in_rows(monkeypatch):
    width = 1 << 16
    skipped = FAR // width // 4 * 4 + 4  # a program takes at most four rows
    state = far(2, width, rows_before=skipped)
    state[skipped:] = random(1, 2, width).half()
    expected = state[skipped:].float()
    base, source = torch.tensor([0, 2]), torch.tensor([skipped])
    where = rows.Rows(torch.zeros(2, dtype=torch.int32), base, source)
    out = rows.read_rows(state, where, torch.tensor([2.0]), None, False, torch.empty(2, width))
    assert torch.equal(out, 2 * expected)
    scales = rows.row_scales(state, torch.tensor([skipped + 1]), 1e-5, False)
    right = expected.square().mean(1).add(1e-5).rsqrt()
    assert torch.allclose(scales, right[1:], rtol=1e-5)
    rows.add_rows(state, where, expected)
    assert torch.allclose(state[skipped:].float(), 2 * expected, rtol=2e-3)
    neighbours = rows.Rows(torch.zeros(2, dtype=torch.int32), base, None, skipped)
    out = rows.read_rows(state, neighbours, torch.tensor([0.5]), None, False, torch.empty(2, width))
    assert torch.allclose(out, expected, rtol=2e-3)

    for name in ("_row_scales", "_add_rows", "_add_norm_back"):  # of as many rows
        monkeypatch.setattr(rows, name, Last(getattr(rows, name), monkeypatch))
    assert torch.allclose(rows.row_scales(state, None, 1e-5, False)[skipped:], right / 2, rtol=2e-3)
    segment = torch.zeros(skipped + 2, dtype=torch.int32)
    segment[skipped:] = 1
    where = rows.Rows(segment, torch.tensor([0, skipped, skipped + 2]), torch.tensor([0, 0]))
    small = torch.zeros(2, width)
    rows.add_rows(small, where, state)
    assert torch.equal(small, state[skipped:].float())
    wide, narrow = torch.empty(state.shape), torch.empty(state.shape, dtype=torch.float16)  # memory that is not touched
    wide[skipped:] = 1.0
    rows.add_norm_back(wide, state, torch.tensor([9.0, 2.0]), None, False, narrow)
    found = torch.stack([wide[-1], narrow[-1].float()])
    assert torch.allclose(found, 1 + 2 * state[-1].float(), rtol=2e-3, atol=1e-3)


def test_in_completeness(monkeypatch):
    """The last segment lies far behind, where each of all has as many rows and where the first is the longest."""
    width, count = 1 << 16, 3
    n = FAR // (count * width) + 2
    state, x = torch.empty(count * n, width), torch.zeros(2, width)  # memory that is not touched
    state[-count:] = random(0, count, width)
    x[1] = 1.0
    expected = (state[-count:].sum(0) - 1.0).norm()
    starts, packed = torch.tensor([0, count * (n - 1), count * n]), torch.tensor([0, 1])
    monkeypatch.setattr(completeness, "_missed", Last(completeness._missed, monkeypatch))
    missed, sizes = completeness.missed_norms(state, x, completeness.Jagged(starts, packed))
    assert torch.allclose(missed[1].norm(), expected) and torch.allclose(sizes[1].norm(), x[1].norm())
    hidden = torch.empty(n, width, dtype=torch.float16)
    hidden[-1] = 1.0
    missed, _ = completeness.missed_norms(state, hidden, completeness.Regular(count))
    assert torch.allclose(missed[-1].norm(), expected)


def test_in_the_search_for_loud_components(monkeypatch):
    width = 1 << 16
    skipped = FAR // width + 1
    gates = far(1, width, rows_before=skipped)
    gates[skipped:] = random(0, 1, width).half()
    amounts, out = torch.empty(1, skipped + 1), torch.empty(skipped + 1)
    amounts[0, -1] = 2.0
    monkeypatch.setattr(loudness, "_loudest", Last(loudness._loudest, monkeypatch))
    loudness.loudest(gates, amounts, torch.tensor([3.0]), out)
    assert torch.equal(out[-1], 6 * gates[-1].float().abs().max())


def test_where_few_positions_are_mixed(monkeypatch):
    """A row that lies far behind the first, in what is read and in what is written."""
    width, n = 256, 64
    skipped = FAR // (width * n) + 1
    x = far(1, n, width, rows_before=skipped)
    x[skipped:] = random(0, 1, n, width).half()
    p = random(1, 1, 1, n, n).softmax(-1).half()
    monkeypatch.setattr(few, "_apply_few", Last(few._apply_few, monkeypatch))
    monkeypatch.setattr(few, "few_config", lambda *_: {"BO": n, "BI": n, "BR": 1, "BD": width})
    expected = p[0, 0].float() @ x[-1].float()
    assert torch.allclose(few.apply_few(p, x)[-1].float(), expected, atol=2e-3)
    assert torch.allclose(few.apply_few(p.mT, x, transposed=True)[-1].float(), expected, atol=2e-3)


@pytest.mark.parametrize("one_tile", [True, False])
def test_in_mix(one_tile, monkeypatch):
    """Everything lies far behind: values, the output, and a trace of which this prompt is the last.

    A key's bias and the log-sum-exp (T, H) never lie as far: q (T, H, d) of such a trace fits no device.
    """
    ordinary = attention.mix_config
    monkeypatch.setattr(
        attention, "mix_config", lambda *arguments, **has: ordinary(*arguments, **has) | {"ONE_TILE": one_tile}
    )
    heads, head_dim, n = 16, 256, 3  # a component at three positions
    width = heads * head_dim
    skipped = FAR // width + 1
    room = far(4 * n, width, rows_before=skipped)
    room[skipped:] = random(2, 4 * n, width).half()
    q, k, values, out = (room[i * n :][: skipped + n] for i in range(4))  # the same rows of each, side by side
    expected = [x[skipped:].float().view(n, heads, head_dim) for x in (q, k, values)]
    trace = probabilities.Frozen(q.view(-1, heads, head_dim), k.view(-1, heads, head_dim), head_dim**-0.5)
    packed, whole = torch.arange(skipped, skipped + n, dtype=torch.int32), torch.tensor([[0, n, 0, 0, 1, 0, 0]]).int()
    lse = probabilities.log_sum_exp(trace, packed, whole, 16)
    keys = attention.Keys(packed, torch.arange(skipped, skipped + n + 1), torch.ones(n).int(), torch.zeros(1).int())
    attention.mix(values, keys, whole, trace, lse, 16, n, out)
    logits = torch.einsum("qhd,khd->hqk", *expected[:2]) * head_dim**-0.5
    p = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(out[skipped:].float(), torch.einsum("hqk,khd->qhd", p, expected[2]).flatten(1), atol=5e-3)


@pytest.mark.parametrize("scaled", [True, False])
def test_in_the_readout(scaled, monkeypatch):
    width = 1 << 16
    skipped = FAR // width // 16 * 16 + 16
    state = far(2, width, rows_before=skipped)
    state[skipped:] = random(3, 2, width).half()
    directions = random(4, 3, width) * width**-0.5
    segment, out = torch.zeros(len(state), dtype=torch.int32), torch.full((len(state), 3), torch.nan)
    sizes = {"BR": 16, "BK": 16, "BD": 1 << 14, "HAS_SCALE": scaled}
    Last(rows._read_out, monkeypatch)[(skipped // 16 + 1, 1)](
        state, directions, out, segment, torch.tensor([2.0]), len(state), width, 3, **sizes
    )
    assert torch.allclose(out[skipped:], state[skipped:].float() @ directions.T * (2 if scaled else 1), atol=1e-3)
    assert bool(out[:skipped].isnan().all())


def test_in_the_products():
    """Rows of x, the gates, the state and the records behind 2³¹ numbers."""
    width, n = 256, 3  # as many neurons as columns
    skipped = FAR // width + 1
    room = far(4 * n, width, rows_before=skipped)
    room[skipped:] = random(5, 4 * n, width).half()
    x, g, state, act = (room[i * n :][: skipped + n] for i in range(4))
    before, w = state[skipped:].float(), (random(6, width, width) * width**-0.5).half()
    tiles, firsts = torch.tensor([[skipped, skipped + n, 0]]).int(), torch.tensor([0, 1]).int()
    starts, away = torch.tensor([skipped, skipped + n]), torch.zeros(skipped + n, dtype=torch.uint8)
    log_z = fused_products.gate(x, w, tiles, firsts, starts, 1.0, g, away=away)
    gates = x[skipped:].float() @ w.float().T
    assert torch.allclose(g[skipped:].float(), gates, atol=5e-3)
    assert torch.allclose(log_z[0], gates.logsumexp(0) * LOG2E, atol=1e-2)
    fused_products.down(
        state, g, w, act, torch.tensor([skipped]), log_z, tiles, starts, 1.0, torch.zeros(skipped + n), away=away
    )
    added = gates.softmax(0) * act[skipped].float() @ w.float().T
    assert torch.allclose(state[skipped:].float(), before + added, atol=2e-2)


def test_in_the_partitions_of_the_products(monkeypatch):
    """The last of so many tiles, and of so many segments; no other is looked at."""
    width, n = 256, 3  # as many neurons as columns
    last = FAR // width + 1
    room = far(3, width, rows_before=last)
    tops, sums, log_z = (room[i:] for i in range(3))  # their rows `last` side by side
    x, w = random(7, n, width).half(), (random(8, width, width) * width**-0.5).half()
    g, state, act, fallback = torch.empty(n, width).half(), torch.zeros(n, width), torch.ones(1, width), torch.zeros(n)
    tiles, firsts = torch.empty(last + 1, 3, dtype=torch.int32), torch.empty(last + 2, dtype=torch.int32)
    starts, recorded = (torch.empty(last + 1, dtype=torch.int64) for _ in range(2))
    tiles[last], firsts[last:], recorded[last] = torch.tensor([0, n, last]), torch.tensor([last, last + 1]), 0
    numbers = (LOG2E, -1)  # by the temperature of 1; no bias
    sizes = {"BM": 16, "BN": width, "BK": width, "GROUP": 8, "PRECISION": "ieee", "WIDE": False}
    special = {"HAS_CONSTANT": False, "HAS_AWAY": False}
    programs = (last + 1,)  # as many as tiles, and as segments
    Last(fused_products._gate, monkeypatch)[programs](
        *(x, w, g, x, tiles, tops, sums, tiles, starts, last + 1, width, width, *numbers), **sizes, **special
    )
    Last(fused_products._log_partition, monkeypatch)[programs](tops, sums, log_z, firsts, width, BN=width)
    gates = x.float() @ w.float().T
    assert torch.allclose(log_z[last].float(), gates.logsumexp(0) * LOG2E, atol=1e-2)
    fused_products._down[(1,)](
        *(state, g, w, act, log_z, act, tiles, fallback, recorded, tiles[last:], starts, 1, width, width, width, width),
        *numbers, **sizes, **special,
    )  # fmt: skip
    assert torch.allclose(state, gates.softmax(0) @ w.float().T, atol=2e-2)
