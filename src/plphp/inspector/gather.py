"""Make the data of the inspector's page from a report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plphp.errors import InputError
from plphp.inspector.data import Answer, Layer, Page, Picture, PolicyResult
from plphp.inspector.pictures import Media, data_uris, name_of, size_of
from plphp.models import Shown, places
from plphp.models.layouts import Run as Columns
from plphp.policy import Policy, Stages
from plphp.report import LayerReport, Report, Seen


def page_of_report(
    report: Report,
    images: Sequence[Media] = (),
    prompt: str = "",
    answer: str = "",
    processor: Any = None,
    row: int = 0,
) -> Page:
    """The page of a report alone, without times and without the full model's answer."""
    result = result_of(report, "pruned", None, row)
    if answer:
        result = replace(result, answer=Answer(answer, (answer,)))
    return page_of(report, [result], images, prompt, processor=processor, row=row)


def page_of(
    report: Report,
    runs: Sequence[PolicyResult],
    images: Sequence[Media],
    prompt: str,
    *,
    model: str = "",
    processor: Any = None,
    row: int = 0,
    made: dict[str, str] | None = None,
) -> Page:
    """The page of several policies' results on one prompt.

    report: the report of any of them, since all have read the same images
    """
    seen = _seen(report)
    return Page(
        prompt=prompt,
        model=model or str(getattr(seen.config, "model_type", "")),
        tokens=report.prompt[row],
        vision=int((seen.spans[row] > 0).sum()),
        pictures=pictures_of(report, images, processor, row),
        runs=tuple(runs),
        made=made or {},
    )


def result_of(report: Report, name: str, policy: Policy | None, row: int = 0) -> PolicyResult:
    """The result of one policy for one row of its report, without answers."""
    seen = _seen(report)
    vision = seen.vision(row)
    return PolicyResult(
        policy=name,
        settings=_settings(policy),
        layers=tuple(_layer(report, layer, vision, row) for layer in report.layers),
        retention=report.retention,
        kv_bytes=report.kv_bytes,
        kv_bytes_full=report.kv_bytes_full,
        notes=report.notes,
        recall=None if report.recall is None else report.recall.to_dict(),
        codes=None if report.codes is None else report.codes.to_dict(),
        stages=tuple(stage.to_dict() for stage in report.stages),
    )


def _settings(policy: Policy | None) -> dict[str, Any]:
    """The options of a policy; of two stages those of the second, and the first as a text."""
    if isinstance(policy, Stages):
        return {"first stage": repr(policy.first), **_settings(policy.second)}
    return asdict(policy) if is_dataclass(policy) else {}


def pictures_of(
    report: Report, images: Sequence[Media], processor: Any = None, row: int = 0
) -> tuple[Picture, ...]:
    """The images and videos of a row with the places of their tokens.

    images: all images and videos of the row, or none, in which case the places are unknown

    Raises InputError if another number of images is given than the prompt has.
    """
    seen, count = _seen(report), report.images[row]
    if images and len(images) != count:
        raise InputError(
            f"images and videos of the prompt: {count}, and given: {len(images)}. Pass all of this "
            "row, a video as a list of its frames"
        )
    earlier = sum(report.images[:row])
    found, first = [], 0
    kinds = {False: earlier, True: 0}  # images and videos are numbered separately
    for number in range(1, count + 1):
        media = images[number - 1] if images else None
        runs = _runs(seen.spans[row] == number)
        tokens = sum(stop - start for start, stop in runs)
        video = media is not None and isinstance(media, (list, tuple))
        shown = Shown(
            config=seen.config,
            size=size_of(media) if media is not None else (0, 0),
            runs=tuple(runs),
            index=kinds[video],
            inputs=seen.inputs,
            processor=processor,
            after=_after(seen, runs, row),
        )
        kinds[video] += 1
        found.append(_picture(media, shown, number, first, video))
        first += tokens
    return tuple(found)


def mask_bits(mask: Tensor) -> str:
    """A mask (V,) bool as base64, with eight tokens in a byte and the lowest bit first."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    packed = (bits * weights).sum(-1).to(torch.uint8)
    return base64.b64encode(packed.numpy().tobytes()).decode()


def _layer(report: Report, layer: LayerReport, vision: Tensor, row: int) -> Layer:
    kept = torch.stack([torch.isin(vision, head) for head in layer.kept[row]])
    entered = report.entered(layer.layer)
    return Layer(
        gamma=_number(layer.gamma[row]),
        layer_class=layer.layer_class[row] if report.recall is None else None,
        rate=_number(layer.rate[row]),
        pruned=layer.pruned,
        kept=tuple(mask_bits(head) for head in kept),
        share=tuple(_round(head.float().mean()) for head in kept),
        agreement=_agreement(kept.float()),
        kv_bytes=layer.kv_bytes,
        kv_bytes_full=layer.kv_bytes_full,
        entered="" if entered is None else mask_bits(torch.isin(vision, entered[row])),
    )


def _agreement(kept: Tensor) -> tuple[float, ...]:
    """The mean Jaccard index of each head with the others; 1 for a single head.

    kept: (Hkv, V) float, 1 for a kept token
    """
    both = kept @ kept.T
    sizes = kept.sum(-1)
    either = sizes[:, None] + sizes - both
    same = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    others = max(len(kept) - 1, 1)
    alone = len(kept) == 1
    return tuple(1.0 if alone else _round((row.sum() - 1) / others) for row in same)


def _picture(media: Media | None, shown: Shown, number: int, first: int, video: bool) -> Picture:
    places_of = places(shown, video) if media is not None else []
    frames = max((p.frame for p in places_of if p is not None), default=0) + 1
    boxes = [_box(place) for place in places_of]
    named = [box for box in boxes if box is not None]
    keys = [(p.view, p.frame, b) for p, b in zip(places_of, boxes, strict=True) if p is not None]
    return Picture(
        name=name_of(media, number),
        width=shown.size[0],
        height=shown.size[1],
        frames=data_uris(media, frames) if media is not None else (),
        first=first,
        tokens=shown.tokens,
        boxes=tuple(boxes) if named else (),
        views=tuple(p.view if p is not None else 0 for p in places_of) if named else (),
        frame=tuple(p.frame if p is not None else 0 for p in places_of) if named else (),
        shared=len(set(keys)) < len(keys),
    )


def _box(place: Any) -> tuple[float, float, float, float] | None:
    if place is None:
        return None
    box = place.box
    return (round(box.left, 1), round(box.top, 1), round(box.right, 1), round(box.bottom, 1))


def _runs(mask: Tensor) -> list[Columns]:
    """Unbroken runs of True in (N,) as columns [start, stop)."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    starts, stops = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _after(seen: Seen, runs: Sequence[Columns], row: int) -> tuple[int, ...]:
    if seen.ids is None:
        return ()
    ids = seen.ids[row]
    return tuple(int(ids[stop]) for _, stop in runs if stop < len(ids))


def _seen(report: Report) -> Seen:
    if report.seen is None:
        raise InputError("this report does not hold the spans of its prompt")
    seen = report.seen
    ids = None if seen.ids is None else seen.ids.cpu()
    return replace(seen, ids=ids, inputs={name: t.cpu() for name, t in seen.inputs.items()})


def _number(value: float) -> float | None:
    return None if value != value else round(value, 4)


def _round(value: Tensor) -> float:
    return round(float(value), 4)
