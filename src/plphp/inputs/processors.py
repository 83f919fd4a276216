"""Whether a model's processor can be loaded here, for commands that load no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from plphp._installed import decoding_fault, has_torchcodec, has_torchvision, install_torchvision
from plphp.errors import InputError
from plphp.inputs.models import EMBEDDED, check_tokenizer, first_sentence, remedy, without_weights


def local_processor(name: str, config: Any, trust: bool = False) -> tuple[Any, str]:
    """The processor, if it can be loaded from this machine, and a note if `load` will refuse it.

    name, trust: as in `plphp.inputs.load`
    """
    from transformers import AutoProcessor

    if name == EMBEDDED:
        return None, ""  # it is read without a processor of its own
    missing = f"torchvision, which is not installed: {install_torchvision()}"
    here = {"trust_remote_code": trust, "local_files_only": True}
    try:
        processor = AutoProcessor.from_pretrained(name, **here)
        check_tokenizer(name, getattr(processor, "tokenizer", processor))
        return processor, ""
    except Exception as error:
        if Path(name).is_dir():
            return None, _reader_here(name, config, trust, missing)
        if isinstance(error, (ImportError, ValueError)) and (what := remedy(error)):
            return None, f"its processor cannot be loaded: {first_sentence(error)}: {what}"
    if not has_torchvision() and _by_class(config):
        return None, f"its processor, whose files are not on this machine, needs {missing}"
    return None, ""


def videos_note(name: str, config: Any, processor: Any) -> str:
    """A note if a model takes videos and the package that decodes them is not here, else ''.

    A package that is here and cannot be loaded is told by `plphp._installed.notes`.

    processor: what `local_processor` returned for them
    """
    if name == EMBEDDED or has_torchcodec():
        return ""
    try:
        made = _class_of(config)
        parts = [] if made is None else made.get_attributes()
    except ImportError:  # of transformers' stand-in for a class that it cannot import
        parts = []
    takes = "video_processor" in parts or getattr(processor, "video_processor", None) is not None
    return f"videos need {decoding_fault()}" if takes else ""


def _reader_here(name: str, config: Any, trust: bool, missing: str) -> str:
    """A note on a directory whose processor cannot be loaded: with what plphp reads its images.

    missing: how to install torchvision
    """
    try:
        without_weights(name, torch.float32, trust, config)
    except InputError as refused:
        why = str(refused).removeprefix(f"cannot load {name}: ")
        return f"its processor cannot be loaded: {why}"
    return f"plphp's commands read its images; AutoProcessor and videos need {missing}"


def _by_class(config: Any) -> bool:
    """Whether transformers' processor for these models loads only where torchvision is installed.

    The class itself needs it, it has a part for videos, or its image processor has no other form.
    """
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    made = _class_of(config)
    if made is None:
        return False
    try:
        parts = made.get_attributes()
    except ImportError as error:  # of transformers' stand-in for a class that it cannot import
        return "torchvision" in str(error).lower()
    forms = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type)
    alone = isinstance(forms, dict) and set(forms) == {"torchvision"}
    return "video_processor" in parts or alone


def _class_of(config: Any) -> Any:
    """transformers' class of the processor for these models, None if there is none."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return getattr(transformers, PROCESSOR_MAPPING_NAMES.get(config.model_type) or "", None)
