"""What the machine is, what it can move, and what it draws."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from plphp._version import __version__

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
BLOCK = 1 << 28  # bytes copied to measure the bandwidth: far more than a cache holds


def describe(device: str) -> dict[str, Any]:
    """Machine and versions, for the head of every result."""
    cuda = device.startswith("cuda")
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": None if cuda else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "plphp": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def synchronize(device: str) -> None:
    """Wait for what was launched."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def bandwidth(device: str, rounds: int = 7) -> float:
    """Bytes a second that a copy moves, read and written: the best of a few, as a bound is."""
    source = torch.ones(BLOCK // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * BLOCK / min(seconds)


def free_bytes(device: str) -> int | None:
    """Bytes that can still be allocated, None where nobody says."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(file: str, entry: str) -> int | None:
    """Bytes that a file of the kernel's names in kilobytes."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{entry}:")]
    return int(found[0]) * 1024 if found else None


def resident_bytes(device: str) -> int | None:
    """Bytes held now: by the allocator on CUDA, by the process on the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def forget_peak(device: str) -> None:
    """Let `peak_bytes` begin again at what is held now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int | None:
    """The most bytes held since `forget_peak`: allocated on a GPU, resident in a process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return _kilobytes("/proc/self/status", "VmHWM")


def energy_meter(device: str) -> tuple[Callable[[], float] | None, str]:
    """A counter of joules so far, or None and why there is none."""
    if device.startswith("cuda"):
        if find_spec("pynvml") is None:
            return None, "NVML is absent: pip install nvidia-ml-py"
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "NVML"
    try:
        RAPL.read_text()
    except OSError:
        return None, f"RAPL is absent: {RAPL} cannot be read"
    return lambda: int(RAPL.read_text()) / 1e6, "RAPL, package 0"
