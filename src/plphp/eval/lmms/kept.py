"""The kept share of a run of lmms-eval, which the results file shows with the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plphp._words import counted
from plphp.report import Report


@dataclass(frozen=True)
class Kept:
    """One prefill.

    prompts: number of rows with images
    vision: number of vision tokens of all rows
    retention, kv_bytes, kv_bytes_full: as in the report
    """

    prompts: int
    vision: int
    retention: float
    kv_bytes: int
    kv_bytes_full: int

    @classmethod
    def of(cls, report: Report) -> Kept:
        return cls(
            prompts=sum(images > 0 for images in report.images),
            vision=sum(report.layers[0].vision),
            retention=report.retention,
            kv_bytes=report.kv_bytes,
            kv_bytes_full=report.kv_bytes_full,
        )


def numbers(kept: Sequence[Kept]) -> dict[str, float]:
    """The share of vision K/V kept in a run, 1 without vision tokens, and mean bytes a prefill."""
    vision = sum(k.vision for k in kept)
    left = sum(k.vision * k.retention for k in kept)
    return {
        "prompts_with_images": float(sum(k.prompts for k in kept)),
        "vision_kv_kept": left / vision if vision else 1.0,
        "kv_bytes": sum(k.kv_bytes for k in kept) / max(len(kept), 1),
        "kv_bytes_full": sum(k.kv_bytes_full for k in kept) / max(len(kept), 1),
    }


def in_words(method: str, kept: Sequence[Kept]) -> tuple[str, bool]:
    """One line for the log, and whether it is a warning because nothing was pruned."""
    if method == "none":
        return "plphp: method=none, the model ran without plphp", False
    if method == "downsample":
        return "plphp: method=downsample, smaller images without pruning", False
    found = numbers(kept)
    if not found["prompts_with_images"]:
        return f"plphp: method={method}, but no prompt had vision tokens: nothing was pruned", True
    share = found["kv_bytes"] / found["kv_bytes_full"]
    line = (
        f"plphp: method={method} kept {found['vision_kv_kept']:.1%} of the vision K/V of "
        f"{counted(round(found['prompts_with_images']), 'prompt')}; "
        f"cache {share:.3f} of the full bytes "
        f"({found['kv_bytes']:,.0f} of {found['kv_bytes_full']:,.0f} a prefill)"
    )
    nothing = method != "full" and found["vision_kv_kept"] == 1
    return line + ("; NOTHING WAS PRUNED" if nothing else ""), nothing
