"""Makes a CPU stand in for a GPU, in the process of a dry run."""

from __future__ import annotations


def prepare() -> None:
    """Import what all pieces need, take Triton's kernels on the CPU, and measure little."""
    import pytest  # noqa: F401

    import plphp.cli  # noqa: F401
    from plphp.attention import choose

    choose.has_kernel = lambda device: True  # the kernels run in Triton's interpreter
    from plphp.bench import machine, run

    machine.BLOCK = {"cpu": 1 << 20}
    run.ATTENTION_STEPS = 1
