"""References for tokens that leave the hidden states: hidden by a mask, or never given at all."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from invariants import generate


@contextmanager
def hidden_from(model: Any, first: int, dropped: Tensor) -> Iterator[None]:
    """Columns that are True in `dropped` (B, N) are hidden in layers from `first` on."""

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        batch, columns = dropped.shape
        mask = mask.expand(batch, *mask.shape[1:]).clone()
        part = mask[..., :columns]
        part.masked_fill_(dropped[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    layers = model.get_decoder().layers[first:]
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def without(
    model: Any, inputs: dict[str, Tensor], dropped: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a model that was never given the dropped columns (B, N), row by row.

    tokens: (B, T), decoded along
    """
    given: dict[str, Tensor] = {}
    decoder = model.get_decoder()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.update({name: kwargs[name] for name in ("inputs_embeds", "position_ids")})

    with decoder.register_forward_pre_hook(note, with_kwargs=True):
        generate(model, inputs, steps=1)
    stays = ~dropped & (inputs["attention_mask"] > 0)
    rows = []
    for row, columns in enumerate(stays):
        embeds = given["inputs_embeds"][row : row + 1, columns]
        positions = given["position_ids"][:, row : row + 1][..., columns]
        answer = model.get_input_embeddings()(tokens[row : row + 1, :-1])
        later = positions[..., -1:] + 1 + torch.arange(answer.shape[1])
        hidden = decoder(
            inputs_embeds=torch.cat([embeds, answer], 1),
            position_ids=torch.cat([positions, later], -1),
            attention_mask=stays.new_ones(1, embeds.shape[1] + answer.shape[1]).long(),
            use_cache=False,
        ).last_hidden_state
        rows.append(model.lm_head(hidden[:, -tokens.shape[1] :]))
    logits = torch.cat(rows)
    return logits.argmax(-1), logits


def cut(
    model: Any, inputs: dict[str, Tensor], first: int, dropped: Tensor, tokens: Tensor
) -> Tensor:
    """Logits along an answer (1, T) of the layers from `first` on, which get no dropped column.

    dropped: (1, N) bool. The layers before get every column, and so do their states.
    """
    decoder, found = model.get_decoder(), {}
    answer = tokens[:, :-1]
    given = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], 1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        fill = torch.full_like(answer, int(name == "attention_mask"))
        given[name] = torch.cat([inputs[name], fill.to(inputs[name])], 1)

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found["hidden"] = args[0]

    def place(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found["places"] = kwargs["position_ids"]

    with (
        decoder.layers[first].register_forward_pre_hook(note, with_kwargs=True),
        decoder.register_forward_pre_hook(place, with_kwargs=True),
    ):
        model(**given, use_cache=False)
    config = copy.deepcopy(decoder.config)
    config.layer_types = config.layer_types[first:]
    config.num_hidden_layers = len(config.layer_types)
    rest = type(decoder)(config).eval()
    rest.layers, rest.norm, rest.rotary_emb = (
        decoder.layers[first:], decoder.norm, decoder.rotary_emb,
    )  # fmt: skip
    stays = torch.cat([~dropped[0], torch.ones_like(answer[0], dtype=torch.bool)])
    hidden = found["hidden"][:, stays]
    out = rest(
        inputs_embeds=hidden,
        position_ids=found["places"][..., stays],
        attention_mask=hidden.new_ones(1, hidden.shape[1]).long(),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(out[:, -tokens.shape[1] :])


def dropped_columns(spans: Tensor, kept: Tensor) -> Tensor:
    """(B, N) bool: vision columns that are not among the row-logical positions kept (B, 1, K)."""
    logical = (spans >= 0).cumsum(-1) - 1
    stays = (logical[:, :, None] == kept[:, 0][:, None]).any(-1)
    return (spans > 0) & ~stays
