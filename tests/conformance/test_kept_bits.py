"""Later turns with kept tokens in codes: the oracle rounds the tokens of each turn once."""

from dataclasses import replace

import pytest
from conversations import IMAGE_TURN, THREE_TURNS, Turns, check_turns
from methods import METHODS
from modes import MODES

CELLS = [("qwen2_vl", THREE_TURNS, 4), ("llava", IMAGE_TURN, 2), ("internvl", THREE_TURNS, 2)]


@pytest.mark.parametrize(("family", "turns", "bits"), CELLS, ids=["qwen", "llava", "internvl"])
def test_nothing_is_rounded_twice(family: str, turns: Turns, bits: int) -> None:
    method = replace(METHODS["plphp"], kv_bits=bits)
    check_turns(turns, MODES["several images"], family, method)
