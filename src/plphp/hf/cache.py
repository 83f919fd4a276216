"""`PrunedCache`, the cache of a conversation that users keep, save and load."""

from __future__ import annotations

import os
from typing import Any

from plphp.hf.conversation import Conversation
from plphp.hf.storage import load_into, save_cache


class PrunedCache(Conversation):
    """Keys and values of one conversation, pruned after each prompt.

    Pass it to `generate(..., cache=cache)` on an attached model in every turn. Before transformers
    5.24 the keyword is `past_key_values`; an attached model accepts both names in every version.

    model: an attached model; the cache works with it only, and only under its present `recall`
    max_len: columns (prompt and answer) to allocate at once; without it the buffers grow as needed
    static: keep lengths on the device and never move the buffers, for compiled decoding; it needs
        max_len
    report: `Report` of the last prompt that was read into this cache, None before the first. Unlike
        `Pruning.report` it is right if several threads generate on one model

    Gradients pass through the forward of a prompt, but not through the cache to later tokens.
    `copy.deepcopy` makes an independent conversation; `save` and `load` store it in a file.

    Raises UnsupportedModeError for a model that is not attached and for `static` with recall, and
    InputError for a bad `max_len`.
    """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a safetensors file; raises as `storage.save_cache`."""
        save_cache(self, path)

    @classmethod
    def load(cls, model: Any, path: str | os.PathLike[str]) -> PrunedCache:
        """Read a conversation that `save` wrote; raises as `storage.load_into`.

        model: an attached model, the same as when it was saved
        """
        cache = cls(model)
        load_into(cache, model, path)
        return cache
