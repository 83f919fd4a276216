"""Says what is wrong with a chat template, whose errors are not about the pictures of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plphp.errors import InputError, PlphpError

FILE = "chat_template.jinja"
NONE = (
    f"it has no chat template: put its {FILE} beside its other files, or take a checkpoint that "
    "was trained to answer"
)


@contextmanager
def with_template(model: Any, holder: Any, chats: Any) -> Iterator[None]:
    """Context in which chats are encoded; an error that the chat template makes names the model.

    holder: the processor or tokenizer that has the template
    chats: as `apply_chat_template` takes them

    Raises InputError if the template alone, without pictures, cannot write the chats. Other errors
    pass.
    """
    try:
        yield
    except PlphpError:
        raise
    except Exception as error:
        if why := _fault(holder, chats):
            name = getattr(model, "name_or_path", "") or "this model"
            raise InputError(f"{name} cannot be prompted: {why}") from error
        raise


def _fault(holder: Any, chats: Any) -> str:
    """What is wrong with the template, an empty string if it writes the chats."""
    try:
        holder.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        if getattr(holder, "chat_template", None) is None:
            return NONE
        return f"its chat template, such as {FILE}, fails: {error}"
    return ""
