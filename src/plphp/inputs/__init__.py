"""Loads the models and files that a user names, and makes the inputs of generate()."""

from plphp.demo.shown import Clip, Prompt
from plphp.inputs.images import Still, image_files, open_image, upright
from plphp.inputs.models import EMBEDDED, check_device, load, load_config
from plphp.inputs.prompts import check_prompt, make_inputs
from plphp.inputs.runnable import Loaded, Runnable
from plphp.inputs.told_apart import told_apart

__all__ = [
    "EMBEDDED",
    "Clip",
    "Loaded",
    "Prompt",
    "Runnable",
    "Still",
    "check_device",
    "check_prompt",
    "image_files",
    "load",
    "load_config",
    "make_inputs",
    "open_image",
    "told_apart",
    "upright",
]
