"""CPU-time of one thread for the product of one layer, with weights in full, in 8 and in 4 bits.

    python dev/studies/weight_products.py [--json]

CPU-time is the least of several calls, and hardly changes if other programs run beside.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from plphp.bench import machine
from plphp.weights import HAS_BFLOAT16, Int4Linear, Int8Linear

SIZE = (8960, 1536)  # N and K of the MLP of Qwen2-VL-2B
ROWS = {1: 20, 4: 20, 256: 4}  # rows of x -> calls


def least_ms(call: Callable[[], Any], times: int) -> float:
    call()
    spent = []
    for _ in range(times):
        begin = time.thread_time()
        call()
        spent.append(time.thread_time() - begin)
    return round(1e3 * min(spent), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    full = nn.Linear(SIZE[1], SIZE[0], bias=False)
    short = nn.Linear(SIZE[1], SIZE[0], bias=False, dtype=torch.bfloat16)
    layers: dict[str, nn.Module] = {
        "float32": full,
        "bfloat16": short,
        "int8": Int8Linear.of(short.weight),
        "int4": Int4Linear.of(short.weight),
    }
    found: dict[str, Any] = {"about": machine.describe("cpu"), "bfloat16 units": HAS_BFLOAT16}
    with torch.inference_mode():
        for rows, times in ROWS.items():
            x = torch.randn(rows, SIZE[1])
            given = {name: x if name == "float32" else x.bfloat16() for name in layers}
            found[f"{rows} rows, ms"] = {
                name: least_ms(lambda m=m, y=given[name]: m(y), times)  # type: ignore[misc]
                for name, m in layers.items()
            }
    for name, value in found.items():
        if not as_json:
            print(f"{name}: {value}")
    if as_json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
