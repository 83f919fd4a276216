"""What the task files of this folder name. lmms-eval imports it; the package is not needed."""

from typing import Any

from PIL import Image


def pictures(document: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in document["images"]]


def exact(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact": float(results[0].strip() == document["answer"])}
