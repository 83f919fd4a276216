"""What the tests have to know about the installed transformers."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

# The keyword that carries the cache to a model that plphp is not attached to.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in the output of a model."""
    return output[CACHE]
