"""Compile the launches of a few attention calls for a GPU that is not here, and launch nothing.

python compile_offline.py 80 90 prints capability, name and bytes of shared memory of every kernel.
In a process of its own: Triton reads once whether to interpret, and knows one driver.
"""

import os
import sys
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from plphp.attention import flash_codes, flash_decode


class Absent:
    """A driver that knows what to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # what is compiled is kept for a device

    def get_current_stream(self, device: int) -> int:
        return 0


def attend(dtype: torch.dtype, dim: int, queries: int, slots: int, **options: Any) -> None:
    q = torch.empty(1, queries, 14, dim, dtype=dtype).transpose(1, 2)
    k = torch.empty(1, 2, slots, dim, dtype=dtype)
    start, end = torch.zeros(1, dtype=torch.int64), options.pop("end", torch.tensor(200))
    flash_decode.attend(q, k, k, start, end, 1.0, **options)


def attend_codes(
    dtype: torch.dtype, dim: int, queries: int, bits: int, window: int = 0, **options: Any
) -> None:
    q = torch.empty(1, queries, 14, dim, dtype=dtype).transpose(1, 2)
    k = torch.empty(1, 2, 500, dim, dtype=dtype)
    row, start = dim * bits // 8 + 4, torch.zeros(1, dtype=torch.int64)
    codes = tuple(
        torch.empty(1, 2, *size, dtype=torch.uint8) for size in ((row * 900,), (900, row))
    )
    if window:
        columns = tuple(torch.zeros(1, 2, size, dtype=torch.int32) for size in (500, 900))
        options |= {"columns": columns, "window": window, "logical": 1400}
    flash_codes.attend(q, k, k, start, 400, codes, 900, bits, 32, 1.0, **options)


def compile_all(capability: int) -> None:
    driver.set_active(Absent(capability))
    attend(torch.bfloat16, 128, 1, 256)
    attend(torch.bfloat16, 64, 1, 8192, end=200)
    attend(torch.float32, 72, 1, 8192)
    attend(
        torch.float16, 256, 16, 8192, softcap=2.0, window=8,
        columns=torch.zeros(1, 2, 8192, dtype=torch.int32),
        new_mask=torch.ones(1, 1, 16, 16, dtype=torch.bool),
    )  # fmt: skip
    attend_codes(torch.bfloat16, 128, 1, 4)
    attend_codes(torch.float32, 72, 1, 2)
    valid = torch.ones(1, 900, dtype=torch.bool)
    attend_codes(torch.float16, 256, 16, 2, window=8, softcap=2.0, valid=valid)


def main(capabilities: list[int]) -> None:
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(driver.active.target.arch, kernel.metadata.name, kernel.metadata.shared)
        return kernel

    JITFunction.run = compile_only
    for capability in capabilities:
        compile_all(capability)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
