"""The bytes of `plphp doctor` for every image-text class, against transformers' own caches.

docs/doctor.md is made from the default configs: PLPHP_WRITE_DOCS=1 rewrites it.
"""

import os
from pathlib import Path

import pytest
import transformers

import defaults

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"
LENGTH = 5000  # tokens, more than the windows of all classes
HEAD = f"""# What doctor says

After this page you know whether you can trust the bytes that `plphp doctor` reports. This page
compares them with the cache that a model fills when it reads a prompt of {LENGTH:,} tokens, for
every image-text-to-text class of transformers, with its default config and in bfloat16.

"""
HOW = """`plphp doctor` builds a model without its weights, on torch's meta device, and fills
transformers' own cache with keys and values. `tests/integration/test_default_classes.py` writes
this page.

"""
COLUMNS = """- layers: the number of layers that are pruned for this prompt, of all layers
- bytes: the bytes of the keys and values that doctor reports
- other bytes: those of other tensors in the cache, such as states of linear and convolutional
  layers, and keys of indexers
- ratio: doctor's bytes of keys and values, divided by those in transformers' cache

| class | layers | bytes | other bytes | ratio |
|---|---|---|---|---|
"""


def page(version: str, classes: list[tuple[str, ...]], unread: dict[str, str]) -> str:
    """The text of docs/doctor.md.

    classes: the cells of a row for every class with a cache to compare with
    unread: for every other class, why it has none
    """
    right = sum(ratio == "1.00" for *_, ratio in classes)
    shares = [layers.split(" of ") for _, layers, *_ in classes]
    every = sum(pruned == whole for pruned, whole in shares)
    none = sum(pruned == "0" for pruned, _ in shares)
    table = "".join(f"| {' | '.join(row)} |\n" for row in classes)
    reasons = "".join(f"| {name} | {said} |\n" for name, said in unread.items())
    said = f"the bytes are right for {right} of {len(classes)} classes"
    return f"""{HEAD}With transformers {version}, **{said}**:

| classes | number |
|---|--:|
| every layer is pruned for this prompt | {every} |
| a part of the layers is pruned | {len(classes) - every - none} |
| no layer is pruned, and the command says why | {none} |
| there is nothing to compare with: no prompt can be read on the meta device | {len(unread)} |

{HOW}<details markdown="1">
<summary>Every class</summary>

{COLUMNS}{table}
</details>

<details markdown="1">
<summary>The classes without a cache to compare with</summary>

| class | reason |
|---|---|
{reasons}
</details>
"""


def problems(held: defaults.Held) -> list[str]:
    """Wrong results of doctor. Classes without a cache to compare with are not checked."""
    if held.real is None:
        return []
    if held.found is None:
        return [f"refused: {held.refused}"]
    wrong = []
    if held.found.full != held.real:
        wrong.append(f"{held.found.full} bytes of keys and values, {held.real} in the cache")
    if held.found.other_bytes != held.other:
        wrong.append(f"{held.found.other_bytes} bytes beside them, {held.other} in the cache")
    return wrong


KINDS = (
    "cohere2_vision",  # windows
    "gemma4",  # windows, and heads that differ by layer
    "inkling2_loop",  # layers that are read more than once
    "lfm2_vl",  # convolutions
    "llava",
    "mistral4",  # latents
    "qwen3_5",  # linear layers
    "unlimited_ocr",  # a prompt and a ring buffer after it
)


@pytest.mark.parametrize("name", KINDS)
def test_bytes_of_every_kind_of_layer_are_those_of_its_cache(name: str) -> None:
    if name not in defaults.names():
        pytest.skip("not in the installed transformers")
    held = defaults.held(name, defaults.shrunk(name), LENGTH)
    assert held.ratio == 1
    assert problems(held) == []


@pytest.mark.slow
def test_bytes_of_every_class_are_those_of_its_cache() -> None:
    """Default configs with a few of their layers."""
    wrong, right, unread = {}, [], {}
    for name in defaults.names():
        held = defaults.held(name, defaults.shrunk(name), LENGTH)
        if found := problems(held):
            wrong[name] = found
        elif held.real is None:
            unread[name] = held.unread
            # doctor also says why, or measures the cache of a prompt without images
            assert held.refused or held.found is not None
        else:
            right.append(name)
    assert wrong == {}
    assert {"qwen2_vl", "llava", "gemma3", "qwen3_5", "lfm2_vl", "idefics2"} <= set(right)
    assert len(right) > 2 * len(unread), unread


@pytest.mark.slow
def test_the_page_shows_every_class() -> None:
    """The default configs themselves. This takes about three minutes."""
    classes, unread = [], {}
    for name in defaults.names():
        held = defaults.held(name, transformers.AutoConfig.for_model(name), LENGTH)
        assert problems(held) == [], name
        if held.ratio is None:
            said = held.refused or (held.found.unmeasured if held.found else "") or held.unread
            unread[name] = plain(said)
        else:
            assert held.found is not None
            layers = f"{len(held.found.prunable_layers)} of {held.found.layers}"
            sizes = f"{held.found.full:,}", f"{held.found.other_bytes:,}"
            classes.append((name, layers, *sizes, f"{held.ratio:.2f}"))
    written = page(transformers.__version__, classes, unread)
    if os.environ.get("PLPHP_WRITE_DOCS"):
        PAGE.write_text(written)
    if not PAGE.exists():
        pytest.skip("docs/doctor.md is not written yet: PLPHP_WRITE_DOCS=1 writes it")
    assert PAGE.read_text() == written


def plain(said: str) -> str:
    """One line that fits a table."""
    line = " ".join(said.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= 160 else f"{line[:157]}..."
