"""Grouping of runs of vision tokens into images, by the other tokens of the prompt.

Each function takes the runs of one kind (image or video) in one row, in order, and the token ids of
the row, or None for a prompt without token ids. It returns the runs of each image.
"""

from __future__ import annotations

from collections.abc import Callable

Run = tuple[int, int]  # columns [start, stop) of one unbroken run of vision tokens
Layout = Callable[[list[Run], list[int] | None], list[list[Run]]]


def run_per_image(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Each run is one image."""
    return [[run] for run in runs]


def joined_by_one_token(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Runs that are separated by a single token are one image.

    The single tokens are Ovis2's <col> and <row>, Cohere2's line breaks and Pixtral's [IMG_BREAK].
    Two images are separated by at least an end token and a start token.
    """
    chains: list[list[Run]] = []
    for run in runs:
        if chains and run[0] - chains[-1][-1][1] == 1:
            chains[-1].append(run)
        else:
            chains.append([run])
    return chains


def one_or_five_runs(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Idefics2: an image is one run, or five: its four quarters and the whole image.

    One <fake_token_around_image> separates the five runs. Five adjacent images that are not split
    cannot be told from one that is split, and are treated as one; splitting is the processor's
    default.
    """
    images: list[list[Run]] = []
    for chain in joined_by_one_token(runs, ids):
        step = 5 if len(chain) % 5 == 0 else 1
        images += [chain[i : i + step] for i in range(0, len(chain), step)]
    return images


def whole_last(runs: list[Run], ids: list[int] | None) -> list[list[Run]]:
    """Idefics3, SmolVLM, Aya Vision: the tiles of an image, then the whole image after a tag token.

    Every image ends with its whole view, so the token before the last run of a row is the tag.
    """
    if ids is None or not runs:
        return run_per_image(runs, ids)
    tag = ids[runs[-1][0] - 1]
    images: list[list[Run]] = [[]]
    for run in runs:
        images[-1].append(run)
        if ids[run[0] - 1] == tag:
            images.append([])
    return images[:-1]
