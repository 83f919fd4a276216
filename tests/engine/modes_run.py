"""Many requests in every hard mode of `elsewhere`: `modes_run.py COUNT [MODE...]`.

`make test-vllm-200` calls it. What it finds is written beside docs/benchmarks/vllm/measure.py after
every mode; a later call on the same day runs the modes that are missing or have failed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from variables import ENGINE

HERE = Path(__file__).parent
WHAT = (
    "Requests that share prefixes, are aborted and are short of blocks, in modes of vLLM: answers "
    "that equal those of plphp on transformers."
)


def main(count: str, *names: str) -> int:
    os.environ.update(ENGINE)
    sys.path += [str(HERE.parent), str(HERE.parents[1] / "docs" / "benchmarks" / "vllm")]
    import elsewhere
    import modes
    from record import record, results_of

    hard = [name for name, mode in elsewhere.MODES.items() if mode.hard]
    results, failed = results_of("modes"), 0
    for name in names or hard:
        before = results.get(name, {})
        if before.get("requests") == int(count) and "failed" not in before:
            continue
        start, found = time.perf_counter(), {}
        try:
            with tempfile.TemporaryDirectory() as folder:
                told = modes.run(name, int(count), Path(folder))
                found = modes.compare(name, int(count), told, Path(folder))
            modes.check(elsewhere.MODES[name], int(count), found)
        except AssertionError as error:
            last = str(error).strip().splitlines()[-1]
            found["failed"], failed = last, failed + 1
            print(f"{name}: {error}", file=sys.stderr)
        seconds = round(time.perf_counter() - start)
        results[name] = {"requests": int(count), **found, "seconds": seconds}
        record("modes", WHAT, results)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
