"""`plphp.inspect`: the inspector's page from one call, shown in a notebook or saved to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from plphp.errors import InputTypeError
from plphp.inputs import Loaded, Runnable, Still, load, make_inputs, open_image
from plphp.inspector.data import Page
from plphp.inspector.examine import examine
from plphp.inspector.html import frame, write_html
from plphp.policy import Policy, policy
from plphp.recall import Recall


@dataclass(frozen=True, repr=False)
class Inspection:
    """A page of the inspector. A notebook shows it in place.

    page: its data: the answers of every method, times, layers, kept tokens
    """

    page: Page

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page as one HTML file. Raises InputError if it cannot be written."""
        write_html(self.page, path)

    def _repr_html_(self) -> str:
        return frame(self.page)

    def __repr__(self) -> str:
        names = ", ".join(run.policy for run in self.page.runs)
        return f"<Inspection of {names}: a notebook shows it, print() its answers; .save(path)>"

    def __str__(self) -> str:
        return "\n".join(
            f"{run.policy}: {run.retention:.0%} of the vision K/V {run.held}; {run.answer.text}"
            for run in self.page.runs
            if run.answer is not None
        )


def inspect(
    model: Any,
    images: Sequence[Still] | Still,
    prompt: str,
    policies: Mapping[str, Policy] | Sequence[str] | str = "plphp",
    *,
    processor: Any = None,
    max_new_tokens: int = 128,
    rounds: int = 1,
    oracle: bool = True,
    recall: Recall | None = None,
    kv_bits: int | None = None,
    kv_text: bool = False,
) -> Inspection:
    """Answer a question about images with the full and the pruned cache, and show the difference.

    model: "embedded", a directory, a hub id, what `plphp.demo.model.load` returns, or a model of
        transformers together with its `processor`
    images: an image or several, as PIL images or files, in the order of the prompt
    policies: names of methods, or policies by a name for the page
    max_new_tokens, rounds, oracle, recall, kv_bits, kv_text: as in `plphp.inspector.examine`

    Raises InputError for files and prompts that cannot be read, InputTypeError for a model without
    a processor, and the errors of `plphp.prune`.
    """
    loaded = _runnable(model, processor)
    pictures = [open_image(image) for image in _several(images)]
    names = [policies] if isinstance(policies, str) else policies
    chosen = dict(names) if isinstance(names, Mapping) else {name: policy(name) for name in names}
    page = examine(
        loaded,
        make_inputs(loaded, pictures, prompt),
        chosen,
        pictures,
        prompt,
        model=model if isinstance(model, str) else type(loaded.model).__name__,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        oracle=oracle,
        recall=recall,
        kv_bits=kv_bits,
        kv_text=kv_text,
    )
    return Inspection(page)


def _several(images: Sequence[Still] | Still) -> Sequence[Still]:
    return [images] if isinstance(images, (str, os.PathLike, Image.Image)) else images


def _runnable(model: Any, processor: Any) -> Runnable:
    """The model with what makes its inputs."""
    if isinstance(model, str):
        return load(model, "auto", "auto")
    if processor is not None:
        return Loaded(model, processor)
    if hasattr(model, "inputs") and hasattr(model, "decode"):
        made: Runnable = model
        return made
    raise InputTypeError(
        "plphp.inspect needs the processor of this model: plphp.inspect(model, images, prompt, "
        "processor=AutoProcessor.from_pretrained(...))"
    )
