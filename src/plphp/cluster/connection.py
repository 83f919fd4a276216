"""Imports Ray, and connects to a cluster for the duration of some work."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from plphp.errors import InputError, how_to_install

LOCAL = "local"
OBJECTS = 256 * 2**20  # bytes of the local object store: prompts and answers only, no tensors

# Read by Ray at its import. Its core library writes lines for its developers to standard error.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def import_ray() -> Any:
    """The module ray, with ray.data. Raises InputError if it is not installed."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f"--ray needs Ray Data ({error}): {how_to_install('ray')}") from None
    return ray


@contextlib.contextmanager
def connected(address: str, workers: int | None) -> Iterator[None]:
    """A context with a connection to Ray, which is closed at the end.

    address: of a running cluster; "local" starts Ray on this machine and ends it afterwards
    workers: CPU cores that a local Ray may use, None for all of them

    If this process is connected to Ray already, that connection is used and not closed. Raises
    InputError if no cluster answers.
    """
    ray = import_ray()
    # Ray's threads print to standard output what happens to workers.
    with contextlib.redirect_stdout(sys.stderr):
        if ray.is_initialized():
            yield
            return
        _init(ray, address, workers)
        try:
            yield
        finally:
            ray.shutdown()


def _init(ray: Any, address: str, workers: int | None) -> None:
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a lost block is reported by plphp
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": workers or os.cpu_count(), "object_store_memory": OBJECTS}
        options["include_dashboard"] = False
    try:
        _check_answers(address)
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--ray {address}: no Ray cluster answers at this address ({reason}): start one with "
            "`ray start --head`, or leave the address out"
        ) from error


def _check_answers(address: str) -> None:
    """Raise OSError or ValueError if nothing listens at HOST:PORT.

    This takes a moment, whereas Ray itself tries again for minutes.
    """
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()
