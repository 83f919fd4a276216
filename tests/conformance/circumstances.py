"""The modes of the second table: ways to run a model, whatever its prompts.

Every mode meets all policies; a policy and a family meet in one cell of every mode.
"""

import warnings
from functools import partial

import torch
from answers import (
    check_answers,
    check_assisted,
    check_compiled,
    check_kept_codes,
    check_lookup,
    check_processor,
    check_refused,
    pipe,
    static,
    stop,
    stream,
)
from batches import check_padded_turn, check_rows
from company import check_models, check_ranks, check_threads
from conversations import (
    IMAGE_TURN,
    TEXT_TURN,
    THREE_TURNS,
    check_between,
    check_turns,
    cropped,
    moved,
    other_talk,
    stored,
)
from methods import HOMES, METHODS, Method, goes_with_recall
from modes import MODES, Mode
from settings import (
    EAGER,
    FLEX,
    SDPA,
    check_half,
    check_setting,
    check_weights,
    flash_attention,
    int4,
    int8,
    lora,
    offloaded,
    spread,
)

import tiny

CIRCUMSTANCES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("streamer", partial(check_answers, stream), "three"),
        Mode("stopping criterion", partial(check_answers, stop), "batch"),
        Mode("logits processor", check_processor, "batch"),
        Mode("pipeline", partial(check_answers, pipe), "three"),
        Mode("PEFT (LoRA)", partial(check_weights, lora), "batch"),
        Mode("assisted decoding", check_assisted, "three"),
        Mode("prompt lookup", check_lookup, "three"),
        Mode("later turn, text only", partial(check_turns, TEXT_TURN)),
        Mode("later turn, new image", partial(check_turns, IMAGE_TURN)),
        Mode("three turns", partial(check_turns, THREE_TURNS)),
        Mode("later turn of a padded batch", check_padded_turn, "batch"),
        Mode("two conversations", partial(check_between, other_talk)),
        Mode("cache saved and loaded", partial(check_between, stored)),
        Mode("cache cropped", partial(check_between, cropped)),
        Mode("cache moved", partial(check_between, moved)),
        Mode("cache rows repeated, selected, reordered", check_rows, "batch"),
        Mode("static cache", partial(check_answers, static), "batch"),
        Mode("compiled decode", check_compiled, "batch"),
        Mode("sdpa prefill", partial(check_setting, SDPA), "batch"),
        Mode("eager prefill", partial(check_setting, EAGER), "batch"),
        Mode("flash prefill (stand-in kernel)", partial(check_setting, flash_attention), "batch"),
        Mode("flex prefill", partial(check_setting, FLEX), "batch"),
        Mode("bfloat16", partial(check_half, torch.bfloat16), "batch"),
        Mode("float16", partial(check_half, torch.float16), "batch"),
        Mode("int8 weights (torchao)", partial(check_weights, int8), "batch"),
        Mode("several models of one config", check_models, "batch"),
        Mode("threads", check_threads),
        Mode("tensor parallel, two processes", check_ranks, "batch"),
        Mode("CPU offload", partial(check_setting, offloaded), "batch"),
        Mode("device_map", partial(check_setting, spread), "batch"),
        Mode(
            "quantized KV cache",
            partial(check_refused, {"cache_implementation": "quantized"}),
            "one",
        ),
        Mode(
            "transformers' static cache",
            partial(check_refused, {"cache_implementation": "static"}),
            "one",
        ),
        Mode("no cache", partial(check_refused, {"use_cache": False}), "one"),
        Mode("attention returned", partial(check_refused, {"output_attentions": True}), "one"),
        Mode("kept tokens in 4 bits", check_kept_codes, "batch"),
        Mode("weights in 4 bits", partial(check_weights, int4), "batch"),
    )
}
REFUSED = ("quantized KV cache", "transformers' static cache", "no cache", "attention returned")


# Families that differ in positions, masks, image tokens or kinds of layers
COLUMNS = (
    "qwen2_vl",
    "qwen3_vl_moe",
    "glm4v",
    "llava",
    "llava_onevision",
    "idefics2",
    "internvl",
    "gemma3",
    "llava + lfm2",
)
# Besides plphp, which meets every family in every mode: one method of each kind, on one family
OTHERS = ("plphp paged", "snapkv", "vl-cache")
COMPILES = ("compiled decode", "flex prefill")  # take most of a minute
MAY_REFUSE = {  # for families with layers that are left to transformers
    "cache saved and loaded": COLUMNS[7:],
    "static cache": COLUMNS[7:],
    "compiled decode": COLUMNS[7:],
    **dict.fromkeys(REFUSED, COLUMNS),
}


def cells() -> list[tuple[str, str, str]]:
    """(family, method, mode)."""
    found = []
    for number, mode in enumerate(CIRCUMSTANCES):
        found += [(family, "plphp", mode) for family in COLUMNS]
        others = () if mode in (*COMPILES, *REFUSED) else OTHERS
        for turn, method in enumerate(others):
            found.append((COLUMNS[(number + 2 * turn) % len(COLUMNS)], method, mode))
    return found


def normal() -> set[tuple[str, str, str]]:
    """One cell of every mode, of the families in turn; tests/integration has a compiled one."""
    return {
        (COLUMNS[number % len(COLUMNS)], "plphp", mode)
        for number, mode in enumerate(CIRCUMSTANCES)
        if mode not in COMPILES
    }


# With recall: families of three kinds in every mode, and all families in one mode
NOT_WITH_RECALL = ("static cache", "compiled decode", "kept tokens in 4 bits")
FAMILIES = {**tiny.FAMILIES, **tiny.DECODERS}
RECALLED = ("qwen2_vl", "idefics2", "gemma3")
PLAIN = "padded batch"


def recalled() -> list[tuple[str, str, str]]:
    """(family, plphp with a home, mode), and one cell of every other method."""
    found = []
    for mode in (*MODES.values(), *CIRCUMSTANCES.values()):
        for family in FAMILIES if mode.name == PLAIN else RECALLED:
            if mode.applies(FAMILIES[family]):
                found += [(family, f"plphp+{home}", mode.name) for home in HOMES]
    for number, method in enumerate(METHODS):
        if method != "plphp" and goes_with_recall(method):
            home = tuple(HOMES)[number % len(HOMES)]
            found.append((tuple(tiny.FAMILIES)[number], f"{method}+{home}", PLAIN))
    return found


def normal_recalled() -> set[tuple[str, str, str]]:
    """One cell of every mode and of every family, with the homes in turn."""
    modes: dict[str, list[tuple[str, str, str]]] = {}
    for cell in recalled():
        if cell[1].startswith("plphp+") and cell[2] not in COMPILES:
            modes.setdefault(cell[2], []).append(cell)
    found = {cells[number % len(cells)] for number, cells in enumerate(modes.values())}
    return found | {cell for number, cell in enumerate(modes[PLAIN]) if number % 4 in (0, 3)}


def run(mode: Mode, family: str, method: Method) -> None:
    """Run one cell. Warnings of other libraries about such a use are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode.check(mode, family, method)
