"""Notes of a report that the shell and `plphp.inspect` can answer themselves."""

from __future__ import annotations

from dataclasses import replace

from plphp.models.spans import FRAMES
from plphp.report import Report


def told_apart(report: Report, videos: bool) -> Report:
    """The report without a doubt about frames of videos, where the caller named every file.

    Some families mark the frames of a video as images, so that images of one size leave a doubt.
    Without videos there is none. With them the note stays, but for the argument of `plphp.prune`
    that it names, which nobody can give here.

    videos: whether there are videos among the files of the prompt
    """
    if FRAMES not in report.notes:
        return report
    counted = [FRAMES.removesuffix(" unless vision_mask=... says otherwise")] if videos else []
    notes = [counted if note == FRAMES else [note] for note in report.notes]
    return replace(report, notes=tuple(note for some in notes for note in some))
