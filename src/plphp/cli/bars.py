"""Bars of characters: what a prompt takes in the cache, text and images."""

from __future__ import annotations

from collections.abc import Mapping

WIDTH = 48
TEXT, IMAGES = "░", "█▓"  # the images take turns, so that their borders show
ASCII = str.maketrans(TEXT + IMAGES, ".#=")  # for a terminal that has no such characters


def bars(parts: Mapping[str, tuple[float, float]], images: int, width: int = WIDTH) -> list[str]:
    """One line for each label: its bar, as long as its bytes, and the bytes.

    parts: for each label the bytes of text, and those of all images together, which are equal
    images: the number of images; of more than `width`, no borders could be seen
    width: the number of characters of the longest bar
    """
    images = min(images, width)
    longest = max(map(sum, parts.values()))
    if not longest:
        return []
    margin = max(map(len, parts))
    sizes = {label: f"{round(sum(part)):,}" for label, part in parts.items()}
    right = max(map(len, sizes.values()))
    lines = []
    for label, (text, vision) in parts.items():
        bar = ""
        for i in range(images + 1):
            end = round(width * (text + vision * i / max(images, 1)) / longest)
            end = max(end, 1) if text and not i else end
            bar += (TEXT if i == 0 else IMAGES[(i - 1) % 2]) * (end - len(bar))
        lines.append(f"{label:>{margin}}  {bar:<{width}}  {sizes[label]:>{right}}")
    return lines
