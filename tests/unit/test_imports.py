"""The package is light to import, its imports go one way, and no two files need each other."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

import plphp
from plphp._renamed import OLD

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = SOURCE / "plphp"
# Each package may import from packages of a lower level, and from itself.
LEVELS = {
    "_blocks": 0,
    "_drawing": 0,
    "_installed": 0,
    "_version": 0,
    "_words": 0,
    "_renamed": 0,
    "errors": 0,
    "policy": 1,
    "cache": 2,
    "report": 2,
    "attention": 2,
    "models": 2,
    "weights": 2,
    "recall": 3,
    "paged": 3,
    "hf": 4,
    "vllm": 4,
    "demo": 5,
    "bench": 5,
    "inputs": 6,
    "cluster": 6,
    "eval": 7,
    "inspector": 7,
    "cli": 8,
    "__main__": 9,
}
# Files that import a computed name, which the graph below cannot show.
COMPUTED = {
    "plphp": "the public names, loaded with their first use; no other file imports this one",
    "plphp._renamed": "old names of moved things, for one release",
}
# Imports that close a circle of files, and why they may stay. This list may only shrink.
CLOSING: dict[tuple[str, str], str] = {}


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str | None]:
    """Every module of plphp that a file imports anywhere. None stands for a computed name.

    `from package import name` is the module `package.name` if there is one. Imports for type
    checkers count too, and `import_module` and `__import__` with a literal.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "the package imports by absolute names"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in FILES else base
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__"):
                name = node.args[0] if node.args else node
                yield str(name.value) if isinstance(name, ast.Constant) else None


def edges(module: str) -> set[str]:
    """The files of the package that a file imports. `import a.b` counts as the file `a.b`."""
    found = imports(ast.parse(FILES[module].read_text()))
    return {name for name in found if name in FILES and name != module}


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """The groups of two or more files that can all be reached from each other."""
    reached = {start: _reached(graph, start) for start in graph}
    groups = {
        frozenset(other for other in graph if other in reached[start] and start in reached[other])
        for start in graph
    }
    return [group for group in groups if group]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    own = module.split(".")[1:2]
    for name in edges(module):
        assert name != "plphp", f"{module} imports the public page: import from where it is"
        room = name.split(".")[1]
        if own and room != own[0]:
            assert LEVELS[room] < LEVELS[own[0]], f"{module} imports {name}"


def test_no_two_files_need_each_other() -> None:
    graph = {module: edges(module) for module in FILES}
    for module, name in CLOSING:
        assert name in graph[module], f"{module} imports {name} no more: take it off the list"
        graph[module].remove(name)
    found = circles(graph)
    assert not found, "\n".join(" ".join(sorted(group)) for group in found)


def test_only_listed_files_compute_what_they_import() -> None:
    found = {m for m, p in FILES.items() if None in imports(ast.parse(p.read_text()))}
    assert found == {*COMPUTED}


def test_the_graph_sees_every_kind_of_import() -> None:
    text = (
        "import plphp.cache.store\nfrom plphp.hf import compat\nfrom plphp.policy import Look\n"
        "def later():\n    from plphp.recall import codes\n"
        "    return importlib.import_module('plphp.inspector'), import_module(name)\n"
    )
    assert [*imports(ast.parse(text))] == [
        "plphp.cache.store",
        "plphp.hf.compat",
        "plphp.policy",
        "plphp.recall.codes",
        "plphp.inspector",
        None,
    ]


def test_the_graph_sees_circles() -> None:
    chain = {a: {b} for a, b in pairwise("abcd")}
    assert circles({**chain, "d": set()}) == []
    assert circles({**chain, "d": {"b"}}) == [frozenset("bcd")]


@pytest.mark.parametrize(
    ("package", "name", "new"), [(p, n, new) for p in OLD for n, new in OLD[p].items()]
)
def test_old_names_work_and_warn(package: str, name: str, new: str) -> None:
    module, _, attribute = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{package}\.{name} is now {new}") as said:
        found = getattr(importlib.import_module(package), name)
    assert found is getattr(importlib.import_module(module), attribute)
    assert said[0].filename == __file__, "the warning names the line that uses the old name"


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'plphp\.cache' has no attribute 'Nothing'"):
        importlib.import_module("plphp.cache").Nothing  # noqa: B018


def test_importing_plphp_is_light() -> None:
    heavy = ["transformers", "triton", "matplotlib", "vllm", "ray"]
    code = f"import plphp, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_importing_the_integration_brings_no_model_code() -> None:
    code = (
        "import plphp, sys; plphp.prune; plphp.PrunedCache; plphp.vision_spans\n"
        "print([m for m in sys.modules if m.startswith('transformers.models.')"
        " and '.modeling_' in m])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["policy", "paged"])
def test_policies_and_paged_caches_import_torch_only(package: str) -> None:
    for path in (PACKAGE / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                assert top in ("plphp", "torch") or top in sys.stdlib_module_names, module


def test_no_public_name_hides_a_package() -> None:
    """`import plphp.policy as P` gives the package, whatever else `plphp.policy` is."""
    import plphp.policy as package

    assert isinstance(package, ModuleType) and package.PLPHP is plphp.PLPHP
    assert plphp.policy("plphp", r=0.3) == plphp.PLPHP(r=0.3)
    assert plphp.policy is package
    rooms = [".".join(path.parent.parts[-2:]) for path in PACKAGE.glob("*/__init__.py")]
    for name in (*sorted(rooms), "plphp.hf.calibration"):
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:  # an extra that is not installed
            continue
        shown: object = plphp
        for part in name.split(".")[1:]:
            shown = getattr(shown, part)
        assert shown is found, name
