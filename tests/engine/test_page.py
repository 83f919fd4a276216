"""The Python code of docs/vllm.md, run with the embedded model in place of a large one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import serving
import vllm

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = "".join(re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    small = {"max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}
    made: list[Any] = []

    class Small(vllm.LLM):
        def __init__(self, model: str, **options: Any) -> None:
            made.append(self)
            super().__init__(model, enforce_eager=True, **small, **options)

    monkeypatch.setattr(vllm, "LLM", Small)
    try:
        exec(code, {"MODEL": str(serving.WEIGHTS), "image": serving.picture(1)})
    finally:
        made[0].llm_engine.engine_core.shutdown()
        serving.cleanup_dist_env_and_memory()
    assert "retention" in capsys.readouterr().out
