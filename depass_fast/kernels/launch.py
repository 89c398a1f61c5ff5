"""Launch configurations: computed from shape and device, with measured exceptions per device in ``tuned.json``.

Triton compiles a kernel again for an argument of 1 and for multiples of 16. Arguments that vary from chunk to chunk
(numbers of rows, first rows of slices) and align no load are excluded from that (``do_not_specialize``).

Nothing is tuned when a user calls. ``python -m bench.speed.tune`` measures candidates on a device and writes the file:
it maps an architecture (`sm_90`), then a kernel's name, then the bucket of the shape, to the configuration that won. A
device's full name in the place of the architecture is looked up first.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from .common import interpreted, power_of_two

TUNED = Path(__file__).with_name("tuned.json")
_LAUNCH = ("num_warps", "num_stages")
KEYWORDS = {"mix": ("BK", "BM", *_LAUNCH), "allocate": ("BM", "BI", "STAGES", "num_warps")}


def row_config(n_columns: int) -> dict:
    """Rows and columns for a kernel that holds whole rows: one row of a large model, several of a small one."""
    columns = power_of_two(n_columns)
    rows = max(1, min(64, (2**18 if interpreted() else 1024) // columns))  # fewer programs to interpret
    return {"BR": rows, "BD": columns, "num_warps": min(16, max(1, columns * rows // 512))}


def mix_tile(longest: int, groups: int, dtype: torch.dtype) -> int:
    """Rows (pairs of query and head) per tile; few in float32, whose products take many registers."""
    return min(64 if dtype.itemsize == 2 else 16, power_of_two(longest * groups, 16))


def mix_config(
    longest: int, head_dim: int, groups: int, tile: int, dtype: torch.dtype, device: torch.device,
    stored: bool = False, scaled: bool = False,
) -> dict:  # fmt: skip
    """Keys per tile (all of them, if few) and components per step, for prompts of up to ``longest`` positions.

    ``stored``: probabilities are read; ``scaled``: every component has probabilities of its own.
    """
    half = dtype.itemsize == 2
    keys, width = min(64 if half else 32, power_of_two(longest, 16)), power_of_two(head_dim)
    if width > 128 and (longest > keys or shared_memory(device) < 128 << 10):
        keys = min(keys, 32)  # more take more registers than there are, or more shared memory
    one = longest <= keys
    columns = 1 if one or not half or scaled or width > 128 or groups > 1 else 2  # two take all registers
    full = scaled and width == 128 and groups > 1 and not (one or stored)  # with more keys registers are spilled
    keys = min(keys, 32) if columns == 2 or full else keys
    if interpreted() and not scaled:
        columns = 8  # every operation of a step costs the same there, of any size
    warps = 8 if stored or tile * width > 64 * 128 else 4
    config = {"BK": keys, "BM": columns, "ONE_TILE": one, "num_warps": warps, "num_stages": 3 if one and half else 2}
    kind = f"one k{keys}" if one else "stored" if stored else "many"
    bucket = f"{kind} d{width} r{tile} g{groups}{' scaled' if scaled else ''}"  # a step's size is in it
    return config | (tuned(device, "mix", bucket) if half else {})


def takes_scales(longest: int, head_dim: int, groups: int, dtype: torch.dtype, device: torch.device) -> bool:
    """True if `mix` takes rows with scales: a query's heads must lie in one tile, or all keys in one.

    A tile's rows are stored in the unit of the keys that the tile sees, and the heads of a query have one scale.
    """
    tile = mix_tile(longest, groups, dtype)
    one = mix_config(longest, head_dim, groups, tile, dtype, device, scaled=True)["ONE_TILE"]
    return one or tile % groups == 0


def allocation_config(longest: int, n_neurons: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Rows and neurons per program, for segments of up to ``longest`` rows; all rows at once where they are few.

    ``STAGES`` tiles are on their way from memory at a time. The compiler pipelines only loops that are told to, unless
    what they load goes into a product, for which ``num_stages`` of a launch is enough.
    """
    rows = min(32, power_of_two(longest, 4))
    one = longest <= rows
    columns = min(64, power_of_two(n_neurons))
    config = {"BM": rows, "BI": columns, "ONE_TILE": one, "STAGES": 1 if one else 3, "num_warps": 2 if one else 8}
    if dtype.itemsize == 2:  # only half precision is tuned
        config |= tuned(device, "allocate", f"one r{rows}" if one else "some" if longest < 2048 else "many")
    return config | {"BI": min(config["BI"], power_of_two(n_neurons))}


def crowd_config(longest: int, n_neurons: int, dtype: torch.dtype) -> dict:
    """Rows and neurons per program, for starts of up to ``longest`` rows; the fewer rows, the more neurons."""
    rows = power_of_two(longest, 4)
    one = rows <= 32
    columns = (512 if dtype.itemsize == 2 else 256) if rows == 4 else 256 if rows == 8 else 64
    config = {"BM": rows if one else 16, "ONE_TILE": one, "STAGES": 1 if one else 3, "num_warps": 4}
    return config | {"BI": min(columns, power_of_two(n_neurons))}


def few_config(n_out: int, n_in: int, head_dim: int, dtype: torch.dtype) -> dict:
    """Positions, rows and columns for a kernel that applies P of few positions to a head of some rows."""
    out, width = power_of_two(n_out), power_of_two(head_dim)
    warps = 8 if out * width * dtype.itemsize > 64 * 128 * 2 else 4
    return {"BO": out, "BI": power_of_two(n_in), "BR": 16 if interpreted() else 1, "BD": width, "num_warps": warps}


def sum_config(n_columns: int) -> dict:
    """Rows and columns of a tile for a kernel that sums rows."""
    columns = power_of_two(n_columns)
    return {"BM": 16, "BD": columns if interpreted() else min(256, columns), "STAGES": 3, "num_warps": 4}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 227 << 10
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10))


@functools.cache
def _table() -> dict:
    """The contents of the file: device -> kernel -> bucket -> keyword -> number.

    Raises:
        ValueError: the file holds something else; the message names the place.
    """
    table = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
    for device, kernels in _inside(table):
        for kernel, buckets in _inside(kernels, device):
            if kernel not in KEYWORDS:
                _refuse(f"no kernel is called {kernel!r}; tuned are {', '.join(KEYWORDS)}", device)
            for bucket, config in _inside(buckets, device, kernel):
                for key, value in _inside(config, device, kernel, bucket):
                    if key not in KEYWORDS[kernel]:
                        _refuse(f"{key!r} is none of {', '.join(KEYWORDS[kernel])}", device, kernel, bucket)
                    if type(value) is not int or value < 1:
                        _refuse(f"{value!r} is no positive integer", device, kernel, bucket, key)
    return table


def _inside(found: object, *place: str) -> Iterator[tuple[str, object]]:
    if not isinstance(found, dict):
        _refuse(f"expected an object, got {found!r}", *place)
    return iter(found.items())


def _refuse(why: str, *place: str) -> NoReturn:
    raise ValueError(
        f"{': '.join([str(TUNED), *place])}: {why}. `python -m bench.speed.tune --write` writes this file."
    )


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def architecture(index: int) -> str:
    """The architecture of a GPU, by which its launch configurations are known: `sm_90`, `gfx942`."""
    about = torch.cuda.get_device_properties(index)
    return about.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{about.major}{about.minor}"


def tuned(device: torch.device, kernel: str, bucket: str) -> dict:
    """The configuration that measured best on this device, else on its architecture; empty if there is none."""
    if device.type != "cuda" or not _table():
        return {}
    index = device.index or 0
    by_name, by_architecture = (
        _table().get(name, {}).get(kernel, {}).get(bucket, {}) for name in (_device_name(index), architecture(index))
    )
    return by_name or by_architecture


__all__ = [
    "allocation_config",
    "architecture",
    "crowd_config",
    "few_config",
    "mix_config",
    "mix_tile",
    "row_config",
    "sum_config",
    "takes_scales",
    "tuned",
]
