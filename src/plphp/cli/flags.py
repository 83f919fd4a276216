"""Options of single commands, with their help texts. `options` has those of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from plphp.cli.options import MOST

# generate and inspect
Image = Annotated[
    list[str] | None,
    typer.Option("--image", help="An image file. Repeat the option for more images."),
]
Video = Annotated[
    list[str] | None,
    typer.Option("--video", help="A video file. Repeat the option for more videos."),
]
Rounds = Annotated[int, typer.Option(min=1, max=MOST, help="How many times each answer is timed.")]

# generate
Prompt = Annotated[
    str | None, typer.Option(help="The question. By default it is read from the standard input.")
]
Batch = Annotated[
    Path | None,
    typer.Option(
        help="Answer many prompts: a directory of images, or a JSONL or Parquet file with images "
        "and prompt in each line."
    ),
]
BatchOut = Annotated[
    Path | None, typer.Option("--out", help="The JSONL or Parquet file for the answers of --batch.")
]
Retry = Annotated[
    bool,
    typer.Option("--retry", help="Answer the lines again that have an error in the file of --out."),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Generate with the full and the pruned cache in turn.")
]
FullReport = Annotated[bool, typer.Option("--report", help="Print what each layer kept.")]
Temperature = Annotated[float | None, typer.Option(help="Sample each token at this temperature.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most probable tokens, up to this total probability."),
]
TopK = Annotated[
    int | None,
    typer.Option(max=MOST, help="Sample from this number of most probable tokens."),
]
SamplingSeed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=2**32 - 1, help="The seed of sampling, for repeatable answers."
    ),
]

MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="The memory of the process, such as 4GiB: take the first way that fits of a fixed "
        "list of recall, codes and rounded weights, without the unpruned cache. Options that are "
        "given stay as they are.",
    ),
]

# inspect
PagePrompt = Annotated[
    str | None, typer.Option("--prompt", help="The question about the images and videos.")
]
PageOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The file of the page. The default is report.html; with --json no page is written by "
        "default.",
    ),
]
Policies = Annotated[
    str | None, typer.Option(help="The names of several methods to compare, such as plphp,random.")
]
Oracle = Annotated[
    bool,
    typer.Option(
        "--oracle",
        help="Also show, for each token of the answer, the full model's attention to dropped "
        "tokens.",
    ),
]

# demo
DemoPrompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", help="A question about the images. Repeat the option for more questions."
    ),
]
Details = Annotated[
    bool,
    typer.Option(
        "--details", help="Also show the answers side by side, the layers and the hard cases."
    ),
]
DemoRows = Annotated[
    int,
    typer.Option(
        "--batch", min=1, max=MOST, help="The number of rows in the batch of long prompts."
    ),
]
VisionTokens = Annotated[
    int,
    typer.Option(
        min=1,
        max=MOST,
        help="The smallest number of vision tokens in each long prompt; pictures are repeated.",
    ),
]
DemoDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="The torch device, such as cpu, cuda, cuda:1 or mps. By default a --model uses a GPU "
        "where there is one, and the embedded model the CPU.",
    ),
]

# eval
RunOut = Annotated[
    Path, typer.Option("--out", help="The directory of the run. A run in it is continued.")
]
Tasks = Annotated[str, typer.Option(help="The names of the tasks, or 'all'.")]
Methods = Annotated[
    str,
    typer.Option(
        help="The names of the methods, or 'all'. NAME:paper is a method with its own defaults, "
        "plphp:calibrated is PLPHP with thresholds that fit this model, and divprune/plphp or "
        "divprune:.25/plphp are two stages."
    ),
]
Budgets = Annotated[
    str, typer.Option(help="The shares of the vision K/V to keep, with commas between them.")
]
Limit = Annotated[int, typer.Option(min=1, max=MOST, help="The number of samples of each task.")]
SampleSeed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**32 - 1, help="The seed with which samples are drawn."),
]
Rows = Annotated[
    int, typer.Option("--batch", min=1, max=MOST, help="The number of rows in a batch.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--images", help="A directory of images without labels, to use in place of the tasks."
    ),
]
FolderPrompt = Annotated[
    str | None, typer.Option("--prompt", help="The question about each image of --images.")
]
Shard = Annotated[str, typer.Option(help="i/n runs part i of n parts. The first part is 0.")]

# bench
ShapeName = Annotated[
    str,
    typer.Option(
        "--shape",
        help="The sizes of the language model to build with random weights: tiny, qwen2-vl-2b, "
        "qwen2-vl-7b, llava-onevision-7b, llava-1.5-7b, mantis-8b or idefics2-8b.",
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Measure this model instead of a shape: 'embedded', a local directory, or a hub id.",
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(help="Build only this number of layers, for example to save memory."),
]
Context = Annotated[
    int, typer.Option(min=64, max=MOST, help="The number of columns of the prompt.")
]
Images = Annotated[int, typer.Option(min=1, max=MOST, help="The number of images in the prompt.")]
Keep = Annotated[
    str,
    typer.Option(
        help="The share of its vision tokens that each layer keeps, or several shares with commas "
        "between them, which are repeated over the layers."
    ),
]
Against = Annotated[
    str,
    typer.Option(
        help="What to measure besides the stock cache and the pruned cache: short, static, "
        "pruned-static, int4, fp8, or methods such as snapkv, with commas between them."
    ),
]
NewTokens = Annotated[
    int, typer.Option(min=2, max=MOST, help="The number of decoding steps in a round.")
]
BenchRounds = Annotated[
    int, typer.Option("--rounds", min=1, max=MOST, help="The number of rounds for each cache.")
]
Prefill = Annotated[bool, typer.Option(help="Time the prefill too.")]
FirstToken = Annotated[
    str | None,
    typer.Option(
        help="Time the first token instead of decoding, vision tower included, with these "
        "methods, such as 'divprune:.5,divprune:.25,divprune:.5/plphp,plphp'."
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help="Memory sizes in GiB, for a table of the longest prompt and the largest batch that "
        "fit."
    ),
]
FloatDtype = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="The number format.")
]
Gpu = Annotated[bool, typer.Option("--gpu", help="Run on a CUDA device.")]
ResultsOut = Annotated[
    Path | None,
    typer.Option("--out", help="The directory for result.json, result.md and result.png."),
]
