"""The lmms-eval plugin: `python -m lmms_eval --model plphp --model_args pretrained=...,method=...`.

lmms-eval finds it by the entry point group `lmms_eval.models` (pyproject.toml). It reads this file
while it is itself being imported, so nothing but the name of the class is here.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval needs to know: chat tasks by default, the older kind with --force_simple."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="plphp",
        chat_class_path="plphp.eval.lmms.model.Chat",
        simple_class_path="plphp.eval.lmms.model.Simple",
    )
