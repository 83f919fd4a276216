"""Constants of the attention kernels that depend on the GPU. `make gpu-import` writes this file.

Estimates, NOT MEASURED ON A GPU YET. The values of KERNEL_FROM follow from how the kernels work:
PyTorch's flash kernel splits along the keys as the Triton kernel does, but it accepts no mask. The
PyTorch kernels that accept one neither split along the keys nor skip hidden slots.
"""

from __future__ import annotations

from typing import NamedTuple


class Costs(NamedTuple):
    """What `launch.split_count` assumes, in units of the time in which a program reads one block.

    resident: programs that a multiprocessor runs at a time
    start: cost of starting a program
    second: cost of the second kernel, which adds up the splits
    """

    resident: int
    start: int
    second: int


# With two programs a multiprocessor loads 128 KiB at once, which hides the latency of memory.
COSTS = Costs(resident=2, start=2, second=4)

# The number of slots from which a decode step uses the Triton kernel, None for never: "masked" if
# SDPA would need a mask, or for soft-capping, which it does not support; "plain" otherwise.
KERNEL_FROM: dict[str, int | None] = {"plain": None, "masked": 0}
