"""Run a part of the GPU work: python3 dev/gpu/run.py check|bench|vllm|all [--dry] [--out DIR]

It needs no installation: Python 3.11 or newer, torch, triton, transformers, and pytest. Every piece
runs in a process of its own with a time limit. Its result is one line of PART.jsonl, written when
it ends, and what it printed goes to PART.log. After a crash the next piece runs. With --dry the
same programs run on the CPU with tiny sizes, and Triton's kernels in its interpreter.

DIR is $OUT if that is set, else runs/gpu. At most seven files are written.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from pieces import PART_SECONDS, PARTS, ROOT, Piece, pieces  # noqa: E402

LEAST = 20  # seconds: with less time left no piece is started
PATIENCE = 5  # times the limits, in a dry run: a CPU may be busy
PATHS = (HERE, ROOT / "src", ROOT)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
DRY_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",
}


def run(piece: Piece, log: Path, limit: float, dry: bool) -> dict[str, Any]:
    """Run a piece and return its line: state, seconds, result, and the end of its messages."""
    with tempfile.TemporaryDirectory() as folder:
        out, tally = Path(folder) / "out", Path(folder) / "tally"
        begin = log.stat().st_size if log.exists() else 0
        start = time.monotonic()
        pid = _start(piece, out, log, {"TALLY": str(tally)}, dry)
        code = _wait(pid, limit)
        seconds = time.monotonic() - start
        end = log.stat().st_size
        result, wrong = _result(piece, out, tally)
    state = "time out" if code is None else "failed" if code or wrong else "ok"
    with log.open("rb") as file:
        file.seek(max(begin, end - 1500))
        tail = file.read(1500).decode(errors="replace")
    return {
        "piece": piece.name,
        "state": state,
        "code": code,
        "seconds": round(seconds, 1),
        "dry": dry,
        "argv": list(piece.dry if dry else piece.argv),
        "result": result,
        "said": wrong or (tail if state != "ok" else ""),
    }


def _start(piece: Piece, out: Path, log: Path, more: Mapping[str, str], dry: bool) -> int:
    """Start a piece as the leader of a new process group, and return its process id.

    In a dry run the new process goes on with the packages that this one has imported, which saves
    their imports. On a GPU it begins anew, since a fork must not share a GPU's state.
    """
    argv = piece.dry if dry else piece.argv
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(ROOT)
        os.environ.update(more)
        with out.open("wb") as target, log.open("ab") as messages:
            if piece.form == "tests":
                target = messages
            os.dup2(target.fileno(), 1)
            os.dup2(messages.fileno(), 2)
            if not dry:
                os.execv(sys.executable, [sys.executable, *argv])
            code = _here(argv)
    finally:
        os._exit(code)


def _here(argv: tuple[str, ...]) -> int:
    """Run a program in this process, as `python ARGV` would, and return its exit code."""
    try:
        if argv[0] == "-m":
            sys.argv = [*argv[1:]]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*argv]
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(pid: int, limit: float) -> int | None:
    """The exit code of a process, or None if it was killed at its limit. Its children end too."""
    end, status = time.monotonic() + limit, None
    try:
        while status is None and time.monotonic() < end:
            done, found = os.waitpid(pid, os.WNOHANG)
            status = found if done else None
            if status is None:
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if status is None:
            os.waitpid(pid, 0)
    return None if status is None else os.waitstatus_to_exitcode(status)


def _result(piece: Piece, out: Path, tally: Path) -> tuple[Any, str]:
    """What a piece left, and what is wrong with it."""
    if piece.form == "tests":
        lines = tally.read_text().splitlines() if tally.exists() else []
        tests = [json.loads(line) for line in lines]
        count = {state: sum(t["outcome"] == state for t in tests) for state in OUTCOMES}
        failed = [test for test in tests if test["outcome"] == "failed"]
        return {**count, "failures": failed[:40]}, "" if tests else "no test ran"
    text = out.read_text(errors="replace") if out.exists() else ""
    try:
        return json.loads(text), ""
    except ValueError:
        return None, f"its output is no JSON: {text[-300:]!r}" if text else ""


OUTCOMES = ("passed", "failed", "skipped")


def headline(line: Mapping[str, Any]) -> str:
    """The lines of the summary about a piece."""
    result = line["result"] if isinstance(line["result"], dict) else {}
    words = [f"{line['piece']:18s} {line['state']:8s} {line['seconds']:6.1f} s"]
    if "passed" in result:
        words[0] += "  " + ", ".join(f"{result[state]} {state}" for state in OUTCOMES)
        words += [test["test"] for test in result["failures"]]
    for row in result.get("steps", []):
        bound = f", {row['of_bound']:.0%} of the bound" if "of_bound" in row else ""
        words.append(
            f"{row['name']:24s} {row['ms']:9.3f} ms, {row['over_stock'][0]} of stock{bound}"
        )
    for row in result.get("prefill") or []:
        words.append(f"prefill, {row['name']:15s} {row['ms']:9.3f} ms, {row['over_stock'][0]}")
    words += [result["note"]] if "note" in result else []
    words += [line["said"].strip()[-400:]] if line["state"] != "ok" else []
    return "\n    ".join(words)


def run_part(part: str, out: Path, seconds: float, dry: bool) -> bool:
    """Run the pieces of a part within a time; return whether none failed."""
    longer = PATIENCE if dry else 1
    end, good = time.monotonic() + seconds * longer, True
    for piece in pieces(part, dry):
        left = end - time.monotonic()
        if left < LEAST:
            line = _left_out(piece, dry)
        else:
            line = run(piece, out / f"{part}.log", min(piece.limit * longer, left), dry)
        good = good and line["state"] in ("ok", "no time")
        with (out / f"{part}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        with (out / "summary.txt").open("a") as file:
            file.write(headline(line) + "\n")
        print(headline(line), flush=True)
    return good


def run_parts(parts: Sequence[str], out: Path, seconds: float, dry: bool) -> bool:
    """Run parts one after another, or beside each other in a dry run; return whether none failed.

    On a GPU the parts would take time and memory from each other.
    """
    if not dry:
        good = [run_part(part, out, seconds, dry) for part in parts]
        return all(good)
    children = []
    for part in parts:
        if not (child := os.fork()):
            code = 70
            try:
                code = 0 if run_part(part, out, seconds, dry) else 1
            finally:
                os._exit(code)
        children.append(child)
    states = [os.waitpid(child, 0)[1] for child in children]
    return not any(states)


def _left_out(piece: Piece, dry: bool) -> dict[str, Any]:
    return {
        "piece": piece.name, "state": "no time", "code": None, "seconds": 0.0, "dry": dry,
        "argv": list(piece.argv), "result": None, "said": "the time of this part was used up",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs/gpu")))
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="of each part")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT | (DRY_ENVIRONMENT if asked.dry else {}))
    if asked.dry:
        sys.path[:0] = map(str, PATHS)
        import dry

        dry.prepare()
    parts = PARTS if asked.part == "all" else (asked.part,)
    sys.exit(0 if run_parts(parts, out, asked.seconds, asked.dry) else 1)


if __name__ == "__main__":
    main()
