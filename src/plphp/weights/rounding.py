"""Which weights of a model are rounded, and to how many bits.

The layers of the decoder get the bits that are asked for. All other linear layers get 8 bits: the
vision tower and the output head suffer more from rounding, and a decoding step reads nothing of the
tower. The table of input embeddings gets 8 bits too, and shares them with the head if it is tied.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from plphp.weights.linear import Int4Linear, Int8Embedding, Int8Linear, to_int8

BITS = {"int8": 8, "int4": 4}


def round_weights(model: Any, bits: int) -> None:
    """Round the weights of a model of transformers in place, on the CPU.

    bits: 8 or 4, of the decoder's layers

    Layers that are rounded already stay as they are, and so do weights that no `nn.Linear` holds,
    such as stacked experts.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(table) is nn.Embedding:
        codes, scales = to_int8(table.weight)
        if type(head) is nn.Linear and head.weight is table.weight:
            model.set_output_embeddings(Int8Linear(codes, scales, head.bias))
        model.set_input_embeddings(Int8Embedding(codes, scales))
    inside = decoder_modules(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, rounded(module, module.weight, bits, module in inside))


def rounded(linear: nn.Linear, weight: Any, bits: int, in_decoder: bool) -> nn.Module:
    """A layer with a rounded weight (N, K) and the bias of a linear layer.

    It has `bits` inside the decoder, and 8 elsewhere and where the size does not allow 4.
    """
    small = bits == 4 and in_decoder and Int4Linear.fits(weight)
    return (Int4Linear if small else Int8Linear).of(weight, linear.bias)


def decoder_modules(model: Any) -> set[nn.Module]:
    """The modules of the decoder: neither the vision tower nor the output head."""
    return set(model.get_decoder().modules())


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers of modules, of which shared ones count once."""
    every = [t for module in modules for t in [*module.parameters(), *module.buffers()]]
    return sum({id(t): t.nbytes for t in every}.values())


def step_bytes(model: Any) -> int:
    """Bytes of the weights that a decoding step reads: those of the decoder and the output head,
    without a table of input embeddings that is not the head's own."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    shared = {id(t) for t in [*head.parameters(), *head.buffers()]}
    own = [t for t in [*table.parameters(), *table.buffers()] if id(t) not in shared]
    spared: int = sum(t.nbytes for t in own)
    return weight_bytes(model.get_decoder(), head) - spared
