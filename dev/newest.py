"""Run the quick tests with the newest transformers of the package index: `make test-newest`.

pyproject.toml has upper bounds for transformers and torch. This run ignores them, so that it fails
as soon as a new release breaks plphp. It makes one environment for each combination of versions,
and keeps it in a given folder.

torch is the pinned one, since a newer one from PyPI brings gigabytes of CUDA libraries;
`--torch-index URL` (make ... TORCH_INDEX=URL) takes the newest torch of another index, and
`--torch SPEC` (make ... TORCH_NEWEST=SPEC) any other. With `--unless-pinned` nothing is run
if these are the versions of constraints.txt, which `make test` has tested.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUNDED = ("torch", "transformers")
DONE = ".installed"


def main() -> int:
    """Find the versions, install them and run the tests. The exit code is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True, help="where they are kept")
    parser.add_argument("--torch", default="", help="a requirement, such as torch==2.14.1")
    parser.add_argument("--torch-index", default="", help="an index of CPU builds")
    parser.add_argument("--unless-pinned", action="store_true", help="run only what is new")
    parser.add_argument("tests", nargs="+", help="arguments of pytest")
    options = parser.parse_args()
    found = versions(options.torch, options.torch_index)
    plain = [version.partition("+")[0] for version in found or ()]
    if options.unless_pinned and plain == [pinned("transformers"), pinned("torch")]:
        print("test-newest: not run. The newest transformers is the pinned one: make test has it.")
        return 0
    place = environment(options.environments, found, options.torch_index)
    if place is None:
        print("test-newest: not run. The package index does not answer, and no environment of an")
        print(f"earlier run is in {options.environments}.")
        return 0
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [str(place / "bin" / "python"), "-m", "pytest", *options.tests]
    return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode


def versions(torch: str, index: str) -> tuple[str, str] | None:
    """The versions of transformers and torch; None if the package index does not answer."""
    asked = torch or ("torch" if index else f"torch=={pinned('torch')}")
    transformers = newest("transformers")
    found_torch = newest(asked, *(["--index-url", index] if index else []))
    if transformers is None or found_torch is None:
        return None
    why = (
        "newest of its index"
        if index
        else "as given"
        if torch
        else "as pinned; TORCH_INDEX=... takes the newest of another index"
    )
    print(f"test-newest: transformers {transformers} (newest), torch {found_torch} ({why})")
    return transformers, found_torch


def environment(parent: Path, found: tuple[str, str] | None, index: str) -> Path | None:
    """The environment of some versions of transformers and torch, made if it does not exist.

    Without versions the latest environment, or None without one.
    """
    if found is None:
        kept = sorted(parent.glob(f"*/{DONE}"), key=lambda path: path.stat().st_mtime)
        if kept:
            print(f"test-newest: the package index does not answer; used again: {kept[-1].parent}")
        return kept[-1].parent if kept else None
    (transformers, torch), others = found, requirements()
    from_index = ["--index-url", index] if index else []
    key = json.dumps([sys.version, transformers, torch, others]).encode()
    place = parent / f"{transformers}-{torch}-{hashlib.sha256(key).hexdigest()[:8]}"
    if not (place / DONE).exists():
        for old in parent.glob("*-*-*"):
            shutil.rmtree(old)  # an older combination, or an installation that was interrupted
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip(place, f"torch=={torch}", *from_index)
        pip(place, f"torch=={torch}", f"transformers=={transformers}", *others)
        (place / DONE).touch()
    return place


def newest(requirement: str, *options: str) -> str | None:
    """The version that pip would install today, None if the index does not answer."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--report", "-", *options, requirement]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        print(answer.stderr.strip(), file=sys.stderr)
        return None
    return str(json.loads(answer.stdout)["install"][0]["metadata"]["version"])


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{name}=="))


def requirements() -> list[str]:
    """The other requirements of plphp and its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everything = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [line for line in everything if re.split(r"[^\w-]", line)[0] not in BOUNDED]


def pip(place: Path, *arguments: str) -> None:
    """Install packages into an environment."""
    command = [place / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run([*command, "-q", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"test-newest: pip cannot install {' '.join(arguments)}\n{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
