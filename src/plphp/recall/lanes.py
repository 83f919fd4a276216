"""Lanes: where the copies between main memory and the device run while the device computes.

A step of the home "host" scores its tokens in parts, and each part fetches what it chose. On CUDA
the scoring of all parts is launched first, on the stream that computes. Then the copies of the
first part run on a second stream, while the device still scores the later parts:

    computes:   score 0   score 1   score 2   score 3   (waits)   attention
    copies:               fetch 0   fetch 1   fetch 2   fetch 3

A fetch waits for the scores of its own part and for nothing else. The attention waits for all
fetches, so that the result is the one that a single stream gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch


class Lane(Protocol):
    """A lane for copies.

    parts: into how many parts a step is cut
    """

    parts: int

    def mark(self) -> Any:
        """A mark after the work that has been launched so far on the stream that computes."""

    def copies(self, mark: Any) -> Any:
        """A context whose work runs in this lane, after what was launched before the mark."""

    def join(self) -> None:
        """Make the stream that computes wait for the lane, from here on."""


class InOrder:
    """The lane of devices without streams: everything runs in the order in which it is called."""

    parts = 1

    def mark(self) -> None:
        """Nothing: what was called before has ended."""

    @contextmanager
    def copies(self, mark: None) -> Iterator[None]:
        """A context that changes nothing."""
        yield

    def join(self) -> None:
        """Nothing: the copies have ended."""


class SideStream:
    """A lane on a CUDA stream of its own. NOT RUN ON A GPU YET.

    The caller must hold tensors that the other stream reads until after `join`. Only then may
    their memory be used again, because PyTorch's allocator orders it by one stream.
    """

    parts = 4  # an estimate: more parts overlap more, and launch more kernels

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        """An event on the stream that computes."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def copies(self, mark: torch.cuda.Event) -> Iterator[None]:
        """A context in which the side stream is the current one, and has waited for the event."""
        self.stream.wait_event(mark)
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Let the stream that computes wait for the side stream. The host does not wait."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


@lru_cache(maxsize=64)
def lane_of(device: torch.device) -> Lane:
    """The lane of a device, the same one for all layers: each stream has memory of its own."""
    return SideStream(device) if device.type == "cuda" else InOrder()


def in_parts(lines: int, parts: int) -> list[range]:
    """The numbers 0 to lines - 1 in `parts` ranges of almost equal length, or in fewer."""
    size = -(-lines // parts)
    return [range(begin, min(begin + size, lines)) for begin in range(0, lines, size)]
