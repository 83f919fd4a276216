"""The options that say how an answer is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from plphp.cli import flags
from plphp.cli import options as o
from plphp.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """The options of sampling. Without temperature, top_p and top_k an answer is greedy."""

    max_new_tokens: o.MaxNewTokens = 128
    temperature: flags.Temperature = None
    top_p: flags.TopP = None
    top_k: flags.TopK = None
    seed: flags.SamplingSeed = None

    def options(self) -> dict[str, Any]:
        """The arguments of generate(). Raises InputError for a number out of range."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        said = {name: value for name, value in given.items() if value is not None}
        for name, value in said.items():
            most = 1 if name == "top_p" else None
            if not 0 < value < math.inf or (most is not None and value > most):
                bounds = "above 0" if most is None else f"above 0 and at most {most}"
                raise InputError(f"--{name.replace('_', '-')} must be {bounds}, got {value}")
        return {"max_new_tokens": self.max_new_tokens, "do_sample": bool(said), **said}
