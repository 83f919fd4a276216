"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Rate = Annotated[float, typer.Option("--r", help="Retention rate of vision-balanced layers.")]
DeltaR = Annotated[
    float, typer.Option("--delta-r", help="How much more or less other layers keep.")
]
Alpha = Annotated[
    float, typer.Option("--alpha", help="Vision attention from which a layer is attentive.")
]
Beta = Annotated[
    float, typer.Option("--beta", help="Vision attention below which a layer is indifferent.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Literal["float32", "bfloat16", "float16"]
