"""The machine: its description, memory, bandwidth and energy."""

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

RAPL = Path("/sys/class/powercap")  # of Linux; processors of AMD have the same files
# Bytes copied to measure the bandwidth: far more than processor caches hold, and on a GPU so many
# that the time of a launch does not count.
BLOCK = {"cpu": 1 << 28, "cuda": 1 << 31}


def describe(device: str) -> dict[str, Any]:
    """The machine, the versions and the date, for the head of a result."""
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
    """Wait for the kernels that were launched on a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def bandwidth(device: str, rounds: int = 7) -> float:
    """Bytes per second, read and written, of the fastest of several copies."""
    size = BLOCK[torch.device(device).type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds)


def free_bytes(device: str) -> int | None:
    """Bytes that can still be allocated, None if unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(file: str, entry: str) -> int | None:
    """Bytes of an entry that a file of the kernel gives in kilobytes, None without the entry."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{entry}:")]
    return int(found[0]) * 1024 if found else None


def resident_bytes(device: str) -> int | None:
    """Bytes in use now: allocated on CUDA, resident in the process on the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def forget_peak(device: str) -> None:
    """Reset `peak_bytes` to the bytes in use now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int | None:
    """The most bytes in use since `forget_peak`: allocated on CUDA, resident on the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return _kilobytes("/proc/self/status", "VmHWM")


def energy_meter(device: str) -> tuple[Callable[[], float] | None, str]:
    """A function that returns the joules so far, or None, and the name or the reason."""
    if device.startswith("cuda"):
        if find_spec("pynvml") is None:
            return None, "NVML is absent: pip install nvidia-ml-py"
        import pynvml  # type: ignore[import-not-found]

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError as error:
            return None, f"NVML does not tell: {error}"
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "NVML"
    packages = sorted(RAPL.glob("intel-rapl:*[0-9]/energy_uj"))
    packages = [path for path in packages if path.parent.name.count(":") == 1]  # parts have two
    try:
        meter = _microjoules(packages)
    except OSError:
        packages = []
    if not packages:
        return None, f"RAPL is absent: {RAPL}/intel-rapl:0/energy_uj cannot be read"
    count = "1 package" if len(packages) == 1 else f"{len(packages)} packages"
    return lambda: meter() / 1e6, f"RAPL, {count}"


def _microjoules(packages: list[Path]) -> Callable[[], int]:
    """A function that returns the energy of all packages; their counters begin again at a limit."""
    limits = [int((path.parent / "max_energy_range_uj").read_text()) for path in packages]
    last, total = [int(path.read_text()) for path in packages], 0

    def meter() -> int:
        nonlocal last, total
        now = [int(path.read_text()) for path in packages]
        steps = zip(now, last, limits, strict=True)
        total += sum((new - old) % (limit + 1) for new, old, limit in steps)
        last = now
        return total

    return meter
