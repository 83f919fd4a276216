"""Settings with which this machine trains fastest."""

from __future__ import annotations

import contextlib
import ctypes

import torch

NO_TRIM, NO_MMAP, TOP_PAD = (-1, 2**31 - 1), (-4, 0), (-2, 2**28)  # options of glibc's mallopt


def fastest_dtype() -> torch.dtype:
    """bfloat16 if the processor has bfloat16 units, otherwise float32."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and "avx512_bf16" in _flags()
    return torch.bfloat16 if fast else torch.float32


def keep_memory() -> None:
    """Keep freed memory in the process.

    A step allocates hundreds of tensors of 10 to 50 MB. To get their pages from the system takes
    longer than to fill them. Without glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in (NO_TRIM, NO_MMAP, TOP_PAD):
            libc.mallopt(option, value)


def _flags() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        return cpuinfo.read()
    return ""
