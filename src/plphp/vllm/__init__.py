"""PLPHP in vLLM: a plugin that frees real cache blocks. Importing this does not import vLLM.

    vllm serve MODEL --no-async-scheduling --kv-transfer-config '{"kv_connector": "PLPHPConnector",
        "kv_role": "kv_producer", "kv_connector_extra_config": {"r": 0.4, "delta_r": 0.3}}'

    llm = vllm.LLM(MODEL, **plphp.vllm.engine_args(plphp.PLPHP(r=0.4)))

How it works: docs/vllm.md. `plugin`, `attach` and `blocks` change vLLM; `scheduler`, `worker` and
`layout` read what is not public of it. Each says what it touches, and why.
"""

from __future__ import annotations

from plphp.vllm.options import CONNECTOR, Options, engine_args

__all__ = ["CONNECTOR", "Options", "engine_args"]
