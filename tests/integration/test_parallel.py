"""Tensor parallel with two gloo processes: one model, one decision, each rank its own heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import plphp
import tiny

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_two_ranks_prune_as_one_process(name: str, tmp_path: Path) -> None:
    family = tiny.FAMILIES[name]
    model = family.build(0)
    inputs, _ = family.make_inputs(model, tiny.ROWS["batch"], 0)
    with plphp.prune(model, plphp.PLPHP(r=0.3, delta_r=0.2, alpha=0.6, beta=0.5)) as pruning:
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    one = pruning.report
    model.save_pretrained(tmp_path / "model")
    script, out = HERE / "tensor_parallel.py", tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script), str(tmp_path / "model"), name, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1)]
    for layer, alone in enumerate(one.layers):
        for rank in ranks:
            assert rank["gamma"][layer] == pytest.approx(alone.gamma, abs=1e-5, nan_ok=True)
            assert rank["classes"][layer] == list(alone.layer_class)
        heads = [rank["kept"][layer] for rank in ranks]
        together = [first + second for first, second in zip(*heads, strict=True)]
        assert together == alone.kept.tolist()
    assert ranks[0]["tokens"] == ranks[1]["tokens"] == tokens.tolist()
