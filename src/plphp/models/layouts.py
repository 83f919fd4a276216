"""Which runs of vision tokens make up one image, where the prompt's other tokens tell.

Each function takes the runs of one kind in one row, in order, and the row's ids (None where a
prompt came without ids), and deals the runs out to images.
"""

from __future__ import annotations

from collections.abc import Callable

Run = tuple[int, int]  # columns [start, stop) of one unbroken run of vision tokens
Layout = Callable[[list[Run], list[int] | None], list[list[Run]]]


def apart(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Every run is an image."""
    return [[run] for run in runs]


def chained(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Runs with one token between them are one image.

    Ovis2's <col> and <row>, Cohere2's line breaks, Pixtral's [IMG_BREAK]; between two images stand
    an end and a start token at least.
    """
    chains: list[list[Run]] = []
    for run in runs:
        if chains and run[0] - chains[-1][-1][1] == 1:
            chains[-1].append(run)
        else:
            chains.append([run])
    return chains


def fives(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Idefics2: four quarters and the whole, one <fake_token_around_image> between them, or a run.

    Five touching images that are not split look like one that is; splitting is the default.
    """
    images: list[list[Run]] = []
    for chain in chained(runs, ids):
        step = 5 if len(chain) % 5 == 0 else 1
        images += [chain[i : i + step] for i in range(0, len(chain), step)]
    return images


def whole_last(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Idefics3, SmolVLM, Aya Vision: tiles first, then the whole image behind a tag of its own.

    What stands before a row's last run is that tag, whatever its id: every image ends with it.
    """
    if ids is None or not runs:
        return apart(runs, ids)
    tag = ids[runs[-1][0] - 1]
    images: list[list[Run]] = [[]]
    for run in runs:
        images[-1].append(run)
        if ids[run[0] - 1] == tag:
            images.append([])
    return images[:-1]
