"""Every kernel compiles for every GPU that it is meant for, here, without one."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

pytest.importorskip("triton")


def compiling(*arguments):
    """The JSON that Python prints with these arguments, in a process where kernels are not interpreted."""
    place = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=place, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows():
    return compiling("-m", "bench.speed.aot", "--json", "--quick")


def test_every_kernel_compiles_for_every_target(rows):
    kernels = defaultdict(set)
    for row in rows:
        kernels[row["target"]].add(row["kernel"])
    assert set(kernels) == {"sm_80", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950"}
    everything = {
        "read_rows",
        "row_scales",
        "add_rows",
        "add_norm_back",
        "read_out",
        "missed",
        "apply_few",
        "loudest",
        "log_sum_exp",
        "probabilities",
        "mix",
        "allocate",
        "share_linearly",
        "crowd_mean",
        "crowd_share",
        "crowd_back",
        "neurons_back",
        "gate",
    }
    assert all(found == everything | {"log_partition", "down"} for found in kernels.values())
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit"], row


def test_nothing_spills_on_hopper_and_the_products_are_wgmma(rows):
    hopper = [row for row in rows if row["target"] == "sm_90"]
    products = 0
    for row in hopper:
        assert row["spill_bytes"] == 0 and row["shared_bytes"] <= 227 << 10, row
        if row["kernel"] in ("mix", "gate", "down") and "fp32" not in row["case"] and row["config"].get("BR", 64) >= 64:
            assert "wgmma" in row["matrix"], row  # which takes 64 rows at least
            products += 1
        elif row["kernel"] == "mix":
            assert row["matrix"], row
    assert products >= 10


def test_what_streams_is_pipelined_on_hopper(rows):
    """Loads that are waited for one by one leave the memory idle; the compiler pipelines only where it is told to."""
    found = defaultdict(int)
    for row in rows:
        kernel, config = row["kernel"], row["config"]
        if row["target"] != "sm_90" or kernel not in (
            "allocate",
            "share_linearly",
            "mix",
            "log_sum_exp",
            "missed",
            "gate",
            "down",
        ):
            continue
        if config.get("ONE_TILE") or config.get("STAGES") == 1:
            continue
        loops = 2 if kernel == "allocate" and config["RULE"] != "max" else 1
        assert row["async_copies"] >= 2 * loops, row
        found[kernel] += 1
    assert found["allocate"] >= 6 and len(found) == 7, found


CHUNKS = """
import json, torch
from bench.kernels import fused_products
from bench.speed.aot import _empty as empty, recorded
from depass_fast.kernels import allocation, attention, completeness, crowd, few, linear, loudness, probabilities, rows
from depass_fast.kernels import way_back

found, long, small = {}, torch.int64, torch.int32
for n in (1, 16, 33):  # as a number Triton makes a difference between these
    with recorded(found, str(n)):
        here = rows.Rows(empty(n, dtype=small), empty(3, dtype=long), empty(2, dtype=long), n)
        x, y, w, g = empty(n, 64), empty(n, 64), empty(32, 64), empty(n, 32)
        rows.read_rows(x, here, empty(2), None, False, y)
        rows.read_rows(x, rows.Rows(here.segment, here.base, None, n), empty(2), None, False, y)
        rows.row_scales(x, None, 1e-5, False)
        rows.row_scales(x, empty(n, dtype=long), 1e-5, False)
        rows.add_rows(x, here, y)
        loudness.loudest(empty(n, 32), empty(n, n), empty(n), empty(n))
        few.apply_few(empty(2, 1, n, n), empty(n, n, 32))
        completeness.missed_norms(empty(n * n, 64), x, completeness.Regular(n))
        completeness.missed_norms(x, x, completeness.Jagged(empty(3, dtype=long), empty(2, dtype=long)))
        rows.read_out(x, empty(n, 64), here.segment, empty(2))
        where = allocation.Segments(here.base, empty(2, dtype=long), 9, None, n - 1, n - 1)
        act, alive = empty(2, 32), empty(n, dtype=torch.uint8)
        allocation.allocate(g, where, act, "softmax", 0.1, alive, empty(32))
        linear.share_linearly(g, here.base, 9, act, g, act)
        places, table = empty(2, dtype=small), empty(2, n, 32)
        explicit = crowd.StartRows(here.base, places, places, 9)
        tables, lasting = crowd.CrowdTables(table, table, table, empty(2, n)), empty(n, 32)
        more = empty(n, n, dtype=torch.uint8), empty(2, 1).expand(2, n), lasting, lasting, 0.1, tables, empty(32)
        crowd.share_with_crowds(empty(n, n, 32), explicit, *more)
        crowd.gradients_of_gates(empty(2, n, n, 32), lasting, 0.1, tables, empty(2, n, n))
        rows.add_norm_back(empty(n * n, 64), empty(n * n, 64), empty(n), None, False)
        tiles, more = empty(n, 3, dtype=small), (empty(32), n - 1)
        log_z = fused_products.gate(x, w, tiles, empty(3, dtype=small), here.base, 0.1, g, *more)
        fused_products.down(x, g, empty(64, 32), act, where.recorded, log_z, tiles, here.base, 0.1, empty(n), *more)
        pieces = empty(n + 1, dtype=small)
        given = lasting, lasting, empty(n, 32), empty(n, dtype=long), pieces
        way_back.neurons_back(empty(2, n, 32), *given, "half", "silu")
        frozen = probabilities.Frozen(empty(9, 2, 16), empty(9, 2, 16), 0.1, window=n)
        probabilities.log_sum_exp(frozen, empty(9, dtype=small), empty(1, 7, dtype=small), 16)
print(json.dumps([made[0] for made in found]))
"""


def test_the_numbers_of_a_chunk_compile_nothing_again():
    found = compiling("-c", CHUNKS)
    once = [
        "_add_norm_back",
        "_add_rows",
        "_allocate",
        "_crowd_back",
        "_crowd_mean",
        "_crowd_share",
        "_down",
        "_gate",
        "_log_partition",
        "_log_sum_exp",
        "_loudest",
        "_neurons_back",
        "_read_out",
        "_share_linearly",
    ]
    # of 16 positions at most and of more; jagged, gathered or picked, and all
    twice = ["_apply_few", "_missed", "_read_rows", "_row_scales"]
    assert sorted(found) == sorted([*once, *2 * twice])
