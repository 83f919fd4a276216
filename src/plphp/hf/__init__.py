"""The transformers integration: attaches pruning to a model, and runs it there."""

from plphp.hf.attach import prune
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.calibration import calibrate

__all__ = ["PrunedCache", "Pruning", "calibrate", "prune"]
