"""``depass-fast doctor``: a report of packages, devices, and the backends that can run on them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

_REQUIRED = ("torch", "transformers", "safetensors", "numpy", "rich")
_OPTIONAL = {
    "triton": "needed by the triton backend only; comes with PyTorch for CUDA",
    "accelerate": "needed to spread a model over several devices, and for GGUF files",
    "gguf": "needed for GGUF files only",
    "pandas": "needed by to_dataframe() only",
}


def report() -> dict[str, Any]:
    """Return a report on this installation as plain Python values.

    ``devices`` holds a dict per device, memory in bytes. ``backends`` maps each backend to "ok" or to the reason why it
    cannot run here. ``environment`` holds the variables that the library reads, None where not set. ``auto`` says
    which backend ``backend="auto"`` chooses and why; None where the variable names one that cannot run.
    """
    import torch

    from .. import __version__
    from ..backends import VARIABLE, backend_status

    return {
        "depass_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
        "cuda": _cuda(torch),
        "cpu_threads": torch.get_num_threads(),
        "devices": devices(),
        "backends": {name: reason or "ok" for name, reason in backend_status().items()},
        "environment": {VARIABLE: os.environ.get(VARIABLE) or None},
        "auto": _auto(),
        "demo_model": _demo_model(),
    }


def devices() -> list[dict[str, Any]]:
    """List the devices that PyTorch sees, the CPU first: name, description, memory and free memory in bytes or None."""
    import torch

    cpu = {"name": "cpu", "description": platform.processor() or platform.machine(), **_cpu_memory()}
    found = [cpu]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        description = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
        found.append({"name": f"cuda:{index}", "description": description, "memory": total, "free": free})
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Return a report as aligned lines of text."""
    rows = [("depass_fast", found["depass_fast"]), ("python", f"{found['python']} on {found['platform']}")]
    rows += found["packages"].items()
    rows += [("cuda", found["cuda"]), ("", "")]
    for device in found["devices"]:
        memory = f"{_gib(device['memory'])}, {_gib(device['free'])} free" if device["memory"] else "memory unknown"
        threads = f", {found['cpu_threads']} threads" if device["name"] == "cpu" else ""
        rows.append((f"device {device['name']}", f"{device['description']}{threads}, {memory}"))
    rows.append(("", ""))
    rows += [(f"backend {name}", status) for name, status in found["backends"].items()]
    rows.append(("backend auto", f"{found['auto']['backend'] or 'none'} ({found['auto']['why']})"))
    rows += [(name, value) for name, value in found["environment"].items() if value is not None]
    rows.append(("", ""))
    rows.append(("demo model", found["demo_model"]))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}".rstrip() for name, value in rows]


def _auto() -> dict[str, str | None]:
    from ..backends import choose_backend

    try:
        choice = choose_backend("auto")
    except ValueError as error:
        return {"backend": None, "why": str(error)}
    return {"backend": choice.name, "why": choice.why}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({_OPTIONAL.get(package, 'required: pip install ' + package)})"


def _cuda(torch: Any) -> str:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not (torch.version.cuda or torch.version.hip):
        return "this PyTorch is built for the CPU only"
    return built if torch.cuda.is_available() else f"PyTorch is built with {built}, but sees no device or no driver"


def _cpu_memory() -> dict[str, int | None]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return {"memory": page * os.sysconf("SC_PHYS_PAGES"), "free": page * os.sysconf("SC_AVPHYS_PAGES")}
    except (AttributeError, OSError, ValueError):  # not on every platform
        return {"memory": None, "free": None}


def _demo_model() -> str:
    from ..demo import demo_path

    needed = ("config.json", "model.safetensors", "tokenizer.json")
    absent = [name for name in needed if not (demo_path() / name).is_file()]
    return f"incomplete: {', '.join(absent)} not in the package's demo/model" if absent else "ok"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
