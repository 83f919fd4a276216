"""The lmms-eval plugin: `python -m lmms_eval --model plphp --model_args pretrained=...,method=...`.

lmms-eval finds it through the entry point group `lmms_eval.models` (pyproject.toml). lmms-eval
imports this file during its own import, so that this file has only the names of the classes.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The manifest of the plugin: a class for chat tasks, and one for --force_simple."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="plphp",
        chat_class_path="plphp.eval.lmms.model.Chat",
        simple_class_path="plphp.eval.lmms.model.Simple",
    )
