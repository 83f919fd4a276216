"""The options that share work among several models on Ray Data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from plphp.cli.options import MOST

if TYPE_CHECKING:
    from plphp.cluster import Pool

RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Share the work among several models on Ray Data. Without a value Ray is started on "
        "this machine; a value is the address of a cluster: auto, or HOST:PORT.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST, help="The number of models with --ray. The default is one per GPU or core."
    ),
]


@dataclass(frozen=True)
class Cluster:
    """Whether the work is shared on Ray, where, and among how many."""

    ray: RayAddress = None
    workers: Workers = None

    def pool(self, device: str) -> Pool | None:
        """The workers, or None without --ray. Raises InputError if Ray is missing, or for a
        device that workers cannot share."""
        if self.ray is None:
            return None
        from plphp.cluster import Pool

        return Pool(self.ray, self.workers, device)
