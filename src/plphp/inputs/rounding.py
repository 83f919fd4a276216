"""Rounds the weights of a model while transformers loads them, one weight after the other.

The whole model in full never is in memory, so that a machine can load what it can run. transformers
has a registry for this: a quantizer with a name of its own.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from plphp.errors import InputError
from plphp.weights import BITS, decoder_modules, round_weights, rounded

NAME = "plphp_rounding"
MMAP_THRESHOLD = -3  # mallopt's number for the size from which memory is mapped by itself


class RoundingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers is told: the name of the quantizer, and the bits of the decoder."""

    def __init__(self, bits: int) -> None:
        self.quant_method = NAME
        self.bits = bits


class Rounding(ConversionOps):  # type: ignore[misc]
    """Makes a rounded layer from a weight that was just read.

    bits: of the decoder's layers; inside: the names of the decoder's modules
    """

    def __init__(self, bits: int, inside: frozenset[str]) -> None:
        self.bits, self.inside = bits, inside

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Tensor]:
        """Put the layer into the model. Returns no tensor, since nothing is left to load."""
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        model, name = given["model"], given["full_layer_name"]
        place = name.rpartition(".")[0]
        linear = model.get_submodule(place)
        inside = place in self.inside
        model.set_submodule(place, rounded(linear, weight, self.bits, inside))
        if given.get("missing_keys") is not None:
            given["missing_keys"].discard(name)
        return {}


class RoundingQuantizer(HfQuantizer):  # type: ignore[misc]
    """Rounds the linear layers while they are loaded, and the table and the head afterwards."""

    inside: frozenset[str] = frozenset()  # set before the first weight is read

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        decoder = decoder_modules(model)
        self.inside = frozenset(name for name, m in model.named_modules() if m in decoder)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is the weight of a linear layer. The head may be tied: it waits."""
        place, _, kind = param_name.rpartition(".")
        module = model.get_submodule(place)
        head = model.get_output_embeddings()
        return kind == "weight" and type(module) is nn.Linear and module is not head

    def get_quantize_ops(self) -> Rounding:
        """The operation that transformers applies to these weights."""
        return Rounding(self.quantization_config.bits, self.inside)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        round_weights(model, self.quantization_config.bits)
        return model

    def is_serializable(self) -> bool:
        """A rounded model is not saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """A rounded model is not trained."""
        return False


def bits_of(weights: str | None, device: str, dtype: str) -> int | None:
    """The bits of `--weights`.

    dtype: as in `plphp.inputs.load`; "auto" is bfloat16 with rounded weights

    Raises InputError for an unknown word, and where torch has no fast kernel.
    """
    if weights is None:
        return None
    if weights not in BITS:
        raise InputError(f"--weights {weights}: known are {' and '.join(BITS)}")
    if device != "cpu":
        raise InputError(
            f"--weights {weights} needs --device cpu, because torch has these products for CPUs "
            "only: on another device load a checkpoint that is quantised already"
        )
    if dtype not in ("auto", "bfloat16"):
        raise InputError(
            f"--weights {weights} needs --dtype bfloat16: torch's kernels for other formats are "
            "slower than weights in full"
        )
    return BITS[weights]


def loading_options(config: Any, bits: int) -> dict[str, Any]:
    """The options of `from_pretrained` that round weights while they are loaded.

    Raises InputError for a checkpoint whose weights are quantised already.
    """
    for one in (config, config.get_text_config(decoder=True)):
        if getattr(one, "quantization_config", None) is not None:
            raise InputError(
                "--weights: the weights of this checkpoint are quantised already: leave it out"
            )
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(NAME)(RoundingQuantizer)
    return {"quantization_config": RoundingConfig(bits)}


@contextmanager
def frugal() -> Iterator[None]:
    """Context in which memory that is freed goes back to the system at once, if glibc manages it.

    Otherwise glibc keeps what was freed for later, and after several hundred weights that is as
    much as the model.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)  # the most that glibc chooses by itself
        libc.malloc_trim(0)


def settle(model: Any) -> None:
    """Remove what transformers notes on a model that a quantizer has loaded, and its open file.

    The weights that were not rounded are parts of the mapped checkpoint, which stays in memory as
    long as one of them does.
    """
    for tensor in model.parameters():
        tensor.data = tensor.data.clone()
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_is_quantized", False):
            del config._is_quantized
