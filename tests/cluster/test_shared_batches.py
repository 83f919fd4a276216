"""`plphp generate --batch --ray`: the file is that of a local run, whatever dies on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plphp.demo
from plphp.cli import shared_batch

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

PICTURES = sorted((Path(plphp.demo.__file__).parent / "pictures").glob("*.png"))
COMMAND = [sys.executable, "-c", "import sys; from plphp.cli import main; sys.exit(main())"]


def questions(folder: Path, count: int) -> Path:
    """A JSONL file with two bad lines: one is no JSON, and one names a file that is none."""
    for picture in PICTURES:
        shutil.copy(picture, folder)
    rows = [
        json.dumps({"id": k, "images": PICTURES[k % len(PICTURES)].name, "prompt": f"read {k % 7}"})
        for k in range(count)
    ]
    rows[3] = "not JSON"
    rows[5] = json.dumps({"id": 5, "images": "none.png", "prompt": "read picture 1."})
    (folder / "in.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "in.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text().splitlines()]


@pytest.mark.usefixtures("two_cores")
def test_the_same_file_as_without_ray(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    questions(tmp_path, 20)
    same = ("--max-new-tokens", "3", "--top-k", "4", "--seed", "5")
    assert run("generate", "--batch", "in.jsonl", "--out", "a", *same) == 3
    assert run("generate", "--batch", "in.jsonl", "--out", "b", *same, "--ray") == 3
    assert Path("b").read_bytes() == Path("a").read_bytes()
    assert [k for k, line in enumerate(lines(Path("b"))) if "error" in line] == [3, 5]
    # What a run without Ray has begun is gone on with on Ray.
    Path("c.part").write_bytes(b"".join(Path("a").read_bytes().splitlines(keepends=True)[:7]))
    assert run("generate", "--batch", "in.jsonl", "--out", "c", *same, "--ray") == 3
    assert Path("c").read_bytes() == Path("a").read_bytes()


@pytest.mark.usefixtures("two_cores")
def test_parquet_and_folders_of_images(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    questions(tmp_path, 12)
    rows = [
        {"id": k, "images": [PICTURES[k % 3].name], "prompt": f"read {k}" if k != 2 else None}
        for k in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet")
    same = ("--max-new-tokens", "2", "--ray", "--workers", "2")
    assert run("generate", "--batch", "in.parquet", "--out", "o.parquet", *same) == 3
    found = pq.read_table("o.parquet").to_pylist()
    assert [row["line"] for row in found] == [row["id"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert found[2]["error"].startswith("there is no prompt") and found[2]["answer"] is None
    assert all(row["answer"] and row["error"] is None for row in found if row["line"] != 2)
    # The same prompts from JSON lines, and back again.
    text = "".join(
        json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows
    )
    Path("in2.jsonl").write_text(text)
    assert run("generate", "--batch", "in2.jsonl", "--out", "o.jsonl", *same[:2]) == 3
    assert [line.get("answer") for line in lines(Path("o.jsonl"))] == [r["answer"] for r in found]
    Path("broken.parquet").write_bytes(b"PAR1 nothing")
    assert run("generate", "--batch", "broken.parquet", "--out", "x", *same) == 2

    Path("folder").mkdir()
    for name in ("b.png", "a.png"):
        shutil.copy(PICTURES[0], Path("folder") / name)
    Path("folder/broken.png").write_bytes(b"no picture")
    asked = ("generate", "--batch", "folder", "--prompt", "read picture 1.", "--out", "f.parquet")
    assert run(*asked, *same) == 3
    table = pq.read_table("f.parquet")
    assert table.column("id").to_pylist() == ["a.png", "b.png", "broken.png"]
    assert "not an image" in table.column("error").to_pylist()[2]


@pytest.mark.usefixtures("two_cores")
def test_a_line_without_memory_and_one_that_kills_its_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from plphp.cli.batch import open_batch
    from plphp.cluster import Pool

    def answer(job: Any, images: Any, prompt: str) -> Any:
        if prompt == "read 1":
            raise MemoryError
        if prompt == "read 2":
            os.kill(os.getpid(), signal.SIGKILL)
        return prompt, job

    class Job:
        retention, kv_bytes, kv_bytes_full = 0.5, 1, 2

        def seeded(self, number: int) -> Any:
            return self

    source = questions(tmp_path, 7)
    key = {"model": shared_batch.model_identity("embedded"), "source": {"model": "embedded"}}
    with open_batch(source, tmp_path / "x", None, key) as work:
        pool = Pool(workers=2)
        assert work.run(shared_batch.share(pool, work.left, key, Job, answer), True) == 3
    assert capsys.readouterr().out == "", "standard output is for results"
    said = [line.get("error", "") for line in lines(tmp_path / "x")]
    assert "no memory left" in said[1] and "its worker process died 3 times" in said[2]
    assert [bool(text) for text in said] == [False, True, True, True, False, False, False]
    assert lines(tmp_path / "x")[2]["id"] == 2


@pytest.mark.usefixtures("two_cores")
def test_a_model_that_is_none_is_said_once(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = questions(tmp_path, 7)
    (tmp_path / "model").mkdir()
    named = ("--model", tmp_path / "model", "--ray")
    assert run("generate", "--batch", source, "--out", tmp_path / "x", *named) == 2
    assert "config.json" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "x.part").read_bytes() == b"" and not (tmp_path / "x").exists()


@pytest.mark.usefixtures("two_cores")
def test_a_full_disk_ends_the_command_and_it_goes_on(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = questions(tmp_path, 20)
    again = ("generate", "--batch", source, "--out", tmp_path / "x", "--max-new-tokens", 1, "--ray")
    calls = []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("plphp.cli.batch.os.fsync", full)
        assert run(*again) == 2
    assert "x.part: No space left on device; give the same command again" in capsys.readouterr().err
    assert run(*again) == 3
    assert [line["line"] for line in lines(tmp_path / "x")] == list(range(20))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "head:x"])
def test_no_cluster_at_the_address(address: str, tmp_path: Path) -> None:
    source = questions(tmp_path, 7)
    end = subprocess.run(
        [*COMMAND, "generate", "--batch", source, "--out", tmp_path / "x", "--ray", address],
        capture_output=True,
        text=True,
    )
    assert end.returncode == 2
    assert "no Ray cluster answers at this address" in end.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(400, id="400 lines"),
        pytest.param(2000, marks=pytest.mark.slow, id="2,000 lines"),
    ],
)
def test_killed_workers_and_a_killed_command(count: int, tmp_path: Path) -> None:
    """A worker is killed, then the one that replaces it or its neighbour, then the command."""
    questions(tmp_path, count)
    same = ["generate", "--batch", "in.jsonl", "--max-new-tokens", "2", "--json"]
    shared = [*COMMAND, *same, "--out", "shared", "--ray", "--workers", "2"]
    options: dict[str, Any] = {"cwd": tmp_path, "stderr": subprocess.DEVNULL}
    command = subprocess.Popen(shared, **options)
    for share in (0.15, 0.4):
        wait_for(tmp_path / "shared.part", int(share * count), command)
        os.kill(workers_of(command.pid)[0], signal.SIGKILL)
    wait_for(tmp_path / "shared.part", int(0.6 * count), command)
    workers = workers_of(command.pid)
    command.kill()
    command.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in workers):
        assert time.monotonic() < end, "workers outlive the command"
        time.sleep(0.5)
    before = (tmp_path / "shared.part").read_bytes()
    assert subprocess.run(shared, **options).returncode == 3
    alone = [*COMMAND, *same, "--out", "alone"]
    assert subprocess.run(alone, **options).returncode == 3
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()
    assert [line["line"] for line in lines(tmp_path / "shared")] == list(range(count))
    kept = before[: before.rfind(b"\n") + 1].splitlines()
    assert len(kept) >= int(0.6 * count), "the second command began again"


def wait_for(part: Path, count: int, command: subprocess.Popen[bytes]) -> None:
    """Until so many answers stand in the file."""
    end = time.monotonic() + 600
    while not part.exists() or part.read_bytes().count(b"\n") < count:
        assert command.poll() is None, "the command ended by itself"
        assert time.monotonic() < end
        time.sleep(0.1)


def workers_of(driver: int) -> list[int]:
    """The processes with a model that a command has started, by way of Ray's own."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and b"ray::MapWorker" in _read(folder / "cmdline"):
            process = int(folder.name)
            while process > 1 and process != driver:
                process = int(
                    _read(Path(f"/proc/{process}/stat")).rpartition(b")")[2].split()[1] or 0
                )
            if process == driver:
                found.append(int(folder.name))
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b") ? 0"
