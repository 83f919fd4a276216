"""Which frame of its video each vision token shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plphp.models.families import places
from plphp.models.layouts import Run
from plphp.models.patches import Shown
from plphp.models.sizes import Inputs
from plphp.models.spans import VIDEO, columns_of_kind


def frames_of(
    config: Any,
    spans: Tensor,
    input_ids: Tensor | None,
    mm_token_type_ids: Tensor | None,
    inputs: Inputs,
) -> Tensor:
    """The frame (B, N) int64 of each vision token of a video; 0 for all other tokens.

    spans: (B, N) int64; the other arguments are those of `find_spans`. Where the family does not
    say how a video is cut into frames, each unbroken run of its tokens is one.
    """
    frames = torch.zeros_like(spans, device="cpu")
    found = columns_of_kind(config, input_ids, mm_token_type_ids, VIDEO)
    index = 0
    for row, line in enumerate(spans.cpu()):
        for number in range(1, int(line.max()) + 1):
            columns = (line == number).nonzero()[:, 0]
            if not len(columns):
                continue
            runs = _runs(columns)
            video = found is not None and bool(found[row, columns[0]])
            shown = Shown(config, (1, 1), tuple(runs), index, inputs)
            parts = places(shown, video=True) if video else []
            index += video
            if parts:
                frame, of_tokens = 0, []
                for part in parts:  # a token that shows no part, such as a line end, ends a frame
                    frame = frame if part is None else part.frame
                    of_tokens.append(frame)
                frames[row, columns] = torch.tensor(of_tokens)
            else:
                for frame, (start, stop) in enumerate(runs):
                    frames[row, start:stop] = frame
    return frames.to(spans.device)


def _runs(columns: Tensor) -> list[Run]:
    """The unbroken runs [start, stop) of ascending columns (M,)."""
    ends = (columns.diff() > 1).nonzero()[:, 0] + 1
    parts = columns.tensor_split(ends)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]
