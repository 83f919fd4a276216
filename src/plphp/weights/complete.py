"""Compares the weights that a model needs with those that its files hold.

transformers draws weights that the files lack at random, and says so in its log alone, which the
commands hide.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from plphp.errors import InputError

Tell = Callable[[str], object]  # is called with a remark on a model that can be used
SHOWN = 2  # names of weights in a message


def warn(remark: str) -> None:
    """Tell a remark as a warning of Python."""
    warnings.warn(remark, UserWarning, stacklevel=2)


def check_complete(name: str, model: Any, found: Mapping[str, Any], tell: Tell = warn) -> None:
    """Compare a loaded model with its files.

    name: of the model, for messages; found: what `from_pretrained` returns beside the model with
    `output_loading_info=True`: tied weights and keys to ignore are in none of its sets

    Tells of weights that the model has no place for, because some checkpoints hold other heads,
    and of buffers that the files lack, which have a value of their own. Raises InputError for
    parameters that the files lack.
    """
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    buffers = missing & {buffer for buffer, _ in model.named_buffers()}
    drawn = missing - buffers
    if drawn and _foreign(model):
        tell(f"{name}: its files lack {_listed(drawn)}, or its quantizer makes them from others")
    elif drawn:
        raise InputError(
            f"cannot load {name}: its files lack {_listed(drawn)}: transformers would draw them at "
            "random: complete the checkpoint"
        )
    if buffers:
        tell(f"{name}: its files lack {_listed(buffers)}: they have the value of a new model")
    if unexpected:
        tell(
            f"{name}: the model has no place for {_listed(unexpected)} of its files: they are left "
            "out; check the number of layers in config.json"
        )


def _foreign(model: Any) -> bool:
    """Whether the checkpoint was quantised by others, whose layers are stored in other weights."""
    return getattr(model, "hf_quantizer", None) is not None


def _listed(names: Iterable[str]) -> str:
    """The number of weights and the first names."""
    every = sorted(names)
    more = ", ..." if len(every) > SHOWN else ""
    count = f"{len(every):,} weight{'s' if len(every) > 1 else ''}"
    return f"{count} ({', '.join(every[:SHOWN])}{more})"
