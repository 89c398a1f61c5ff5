"""Every kernel compiles for every GPU that it is meant for, here, without one."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    """What `python -m bench.aot --json` prints, in a process where kernels are not interpreted."""
    place = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", "--json"]
    done = subprocess.run(command, env=place, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_every_target(rows):
    kernels = defaultdict(set)
    for row in rows:
        kernels[row["target"]].add(row["kernel"])
    assert set(kernels) == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    everything = {"read_rows", "add_rows", "read_out", "log_sum_exp", "mix", "allocate", "share_linearly", "gate"}
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
