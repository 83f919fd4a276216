"""Files and functions of the package are short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "plphp"
FILE, KERNEL_FILE, FUNCTION = 300, 400, 50  # lines

# Longer functions, with their present lines and the reason. Numbers may only become smaller.
LONGER: dict[str, tuple[int, str]] = {}
FILES = sorted(PACKAGE.rglob("*.py"))


def is_kernel(node: ast.AST) -> bool:
    """Whether a function is compiled by Triton. Such a function is hard to split."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in decorators)


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and lines, without decorators, of every function and method that is no kernel."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    most = KERNEL_FILE if any(map(is_kernel, ast.walk(tree))) else FILE
    assert len(text.splitlines()) <= most, f"{path} has more than {most} lines: split it"
    for name, lines in functions(tree):
        most, _ = LONGER.get(f"{path.relative_to(PACKAGE).as_posix()} {name}", (FUNCTION, ""))
        assert lines <= most, f"{name} in {path} has {lines} lines, more than {most}: split it"


@pytest.mark.parametrize("entry", LONGER)
def test_the_list_of_longer_functions_only_shrinks(entry: str) -> None:
    file, name = entry.split()
    found = dict(functions(ast.parse((PACKAGE / file).read_text())))
    assert found.get(name) == LONGER[entry][0] > FUNCTION, "write the new number, or take it off"


def test_a_long_function_is_seen() -> None:
    body = "\n".join(["    pass"] * 60)
    tree = ast.parse(f"def long():\n{body}\n@triton.jit(a=1)\ndef kernel():\n{body}\n")
    assert [*functions(tree)] == [("long", 61)]
