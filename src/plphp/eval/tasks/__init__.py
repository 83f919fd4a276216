"""The tasks by name. A new task is a file with a function `draw`, and an entry here.

`TASKS` are the default. `SUITES` has most of them again, drawn so that each thing covers 1, 4 or 16
vision tokens, and as clips of frames.
"""

from __future__ import annotations

from plphp.eval.sample import Task
from plphp.eval.tasks import boards, digits, easyvqa, regimes, video
from plphp.eval.tasks.folder import folder

__all__ = ["SUITES", "TASKS", "folder"]

_TASKS = (
    Task(
        "easyvqa",
        "easy-VQA, test split: a third party's questions about one coloured shape",
        easyvqa.draw,
        "vqa",
    ),
    Task(
        "digits",
        "pages of handwritten digits (scikit-learn). The embedded model reads letters only: its "
        "labels score 0, so only agreement with the unpruned model means something",
        digits.draw,
        metric=None,
    ),
    Task(
        "needle",
        "the only thing of one color in 1 to 12 pictures; training went up to 6",
        boards.sampler("needle", boards.needle),
    ),
    Task(
        "difference",
        "two pictures alike but for the color of one thing: its color in one of them",
        boards.sampler("difference", boards.difference),
    ),
    Task(
        "refer",
        "the color of a thing in a picture that is named; other pictures hold the same thing",
        boards.sampler("refer", boards.asked("refcolor")),
    ),
    Task(
        "what",
        "which thing has a color in a picture that is named, 2 to 6 pictures",
        boards.sampler("what", boards.asked("what")),
    ),
    Task(
        "describe",
        "all things of one picture with their colors, 2 to 6 pictures",
        boards.sampler("describe", boards.asked("describe")),
    ),
    Task(
        "transcribe",
        "read a page of one row of letters",
        boards.sampler("transcribe", boards.asked("read", boards.MEDIUM, boards.is_row)),
        "words",
    ),
    Task(
        "grid",
        "read a page of two rows of letters",
        boards.sampler("grid", boards.asked("read", boards.MEDIUM, boards.is_grid)),
        "words",
    ),
    Task(
        "long",
        "describe all of 4 pictures: answers of 60 and more tokens",
        boards.sampler("long", boards.asked("describe_all", boards.LONG_LEVEL, boards.is_long)),
        "words",
    ),
    Task(
        "second",
        "a question about one picture after another one was described: what is left of the images "
        "was chosen for the first question",
        boards.sampler(
            "second", boards.asked("what", fits=boards.is_elsewhere), "describe picture 1."
        ),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
SUITES: dict[str, dict[str, Task]] = {
    **{name: {task.name: task for task in regimes.suite(name)} for name in regimes.SCALES},
    video.SUITE: {task.name: task for task in video.suite()},
}
