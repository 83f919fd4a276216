"""Other models, threads and processes: pruning of one model does not affect the others."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from answers import KEEP_ALL, check_tokens, new_tokens
from methods import Method
from modes import Mode, NotApplicable
from torch import Tensor

import plphp
from invariants import EVERY, generate, run_policy, state_of, truth

SCRIPT = Path(__file__).parent / "tensor_parallel.py"
PATIENCE = 300  # seconds for one job on a busy machine


def check_models(mode: Mode, family: str, method: Method) -> None:
    """Three models share one config object; two are attached, with different policies."""
    expected = truth(family, 0, mode.rows)
    config = EVERY[family].config()
    pruned, whole, bystander = (EVERY[family].build(seed, config) for seed in (0, 0, 1))
    assert pruned.config is bystander.config
    alone, _ = generate(bystander, expected.inputs)
    before = state_of(bystander)
    attached = method.attach(pruned, expected.numbers)
    with attached as pruning, plphp.prune(whole, KEEP_ALL) as other:
        assert state_of(bystander) == before
        for _ in range(2):
            assert torch.equal(new_tokens(whole, expected.inputs), expected.tokens)
            assert torch.equal(new_tokens(bystander, expected.inputs), alone)
            tokens = new_tokens(pruned, expected.inputs)
        assert pruning.report is not other.report
        assert other.report.retention == 1
        check_tokens(expected, tokens, pruning.report, method)
        assert torch.equal(new_tokens(EVERY[family].build(1, config), expected.inputs), alone)


def check_threads(mode: Mode, family: str, method: Method) -> None:
    """Two threads run one attached model, and one runs another that is not attached."""
    prompts = [truth(family, 0, rows) for rows in ("one", "three")]
    model, other = prompts[0].build(), prompts[0].build()
    got: dict[int, list[tuple[Tensor, Any]]] = {0: [], 1: [], 2: []}
    failed: list[BaseException] = []

    def work(which: int) -> None:
        try:
            for _ in range(2):
                got[which].append(turn(which))
        except BaseException as error:
            failed.append(error)

    def turn(which: int) -> tuple[Tensor, Any]:
        if which == 2:
            return new_tokens(other, prompts[1].inputs), None
        cache = plphp.PrunedCache(model)
        return new_tokens(model, prompts[which].inputs, cache=cache), cache.report

    with method.attach(model, prompts[1].numbers):
        wanted = [turn(which) for which in got]
        threads = [threading.Thread(target=work, args=(which,)) for which in got]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed
    for which, (tokens, report) in enumerate(wanted):
        assert all(torch.equal(said, tokens) for said, _ in got[which])
        assert all(str(its) == str(report) for _, its in got[which])
    assert torch.equal(wanted[2][0], prompts[1].tokens)
    check_tokens(prompts[1], wanted[1][0], wanted[1][1], method)


def check_ranks(mode: Mode, family: str, method: Method) -> None:
    """tp_plan on two gloo processes: the same decision and tokens, each rank has its heads."""
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    policy = method.make(expected.numbers)
    tokens, _, one = run_policy(model, expected.inputs, policy, recall=method.recall)
    check_tokens(expected, tokens, one, method)
    ranks = processes().run(model, family, mode.rows, method.name, asdict(expected.numbers))
    for rank in ranks:
        if "stock" in rank:
            raise NotApplicable(f"the unpruned model fails in this mode with {rank['stock']}")
        assert rank["untouched"] == rank["whole"], "keeping all"
        if len(rank["kept"][-1][0]) == one.layers[-1].kept.shape[1]:
            raise NotApplicable("transformers has no tensor-parallel plan for this model's heads")
    for layer, alone in enumerate(one.layers):
        for rank in ranks:
            assert rank["gamma"][layer] == pytest.approx(alone.gamma, abs=1e-5, nan_ok=True)
            assert rank["classes"][layer] == list(alone.layer_class)
        heads = [rank["kept"][layer] for rank in ranks]
        together = [first + second for first, second in zip(*heads, strict=True)]
        assert together == alone.kept.tolist()
    assert ranks[0]["tokens"] == ranks[1]["tokens"] == tokens.tolist()


class Ranks:
    """Two processes under torchrun that run one job after another, since starting takes seconds."""

    def __init__(self) -> None:
        self.home = Path(mkdtemp())
        self.jobs = 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "2", str(SCRIPT), str(self.home), str(os.getpid())]
        path = os.pathsep.join([str(SCRIPT.parent), *sys.path])
        with (self.home / "log").open("w") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )
        atexit.register(self.close)

    def run(self, model: Any, *job: Any) -> list[dict[str, Any]]:
        name = str(self.jobs)
        self.jobs += 1
        model.save_pretrained(self.home / f"model.{name}")
        (self.home / "new").write_text(json.dumps(job))
        (self.home / "new").rename(self.home / f"job.{name}")
        files = [self.home / f"rank.{name}.{rank}" for rank in (0, 1)]
        limit = time.monotonic() + PATIENCE
        while not all(file.exists() for file in files):
            if self.process.poll() is not None or time.monotonic() > limit:
                said = (self.home / "log").read_text()[-2000:]
                self.close()
                processes.cache_clear()
                raise AssertionError(f"the ranks are lost: {said}")
            time.sleep(0.02)
        return [json.loads(file.read_text()) for file in files]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)


@cache
def processes() -> Ranks:
    return Ranks()
