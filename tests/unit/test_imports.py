"""The package stays light and its imports go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "plphp"
# Each room may import from rooms of a lower level, and from itself.
LEVELS = {
    "errors": 0,
    "policy": 1,
    "cache": 2,
    "attention": 2,
    "models": 2,
    "recall": 3,
    "hf": 4,
    "vllm": 4,
    "demo": 5,
    "bench": 5,
    "inputs": 6,
    "eval": 7,
    "report": 7,
    "cli": 8,
}


def imported(path: Path) -> set[str]:
    """Rooms of plphp that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("plphp.")}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return  # the public page and the errors
    for room in imported(path):
        assert room == parts[0] or LEVELS[room] < LEVELS[parts[0]], f"{path} imports {room}"


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


def test_policies_import_torch_only() -> None:
    for path in (PACKAGE / "policy").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                assert top in ("plphp", "torch") or top in sys.stdlib_module_names, module
