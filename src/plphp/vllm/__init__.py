"""PLPHP in vLLM: a plugin that frees blocks of the paged cache. Importing this imports no vLLM.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "PLPHPConnector",
        "kv_role": "kv_producer", "kv_connector_extra_config": {"r": 0.4, "delta_r": 0.3}}'

    llm = vllm.LLM(MODEL, **plphp.vllm.engine_args(plphp.PLPHP(r=0.4)))

docs/vllm-details.md explains how the plugin works. What would be the same in another engine is in
`plphp.paged`. The modules `plugin`, `attach`, `runner` and `blocks` change
objects of vLLM, and `scheduler`, `worker` and `layout` read objects that are not part of its public
API. The docstring of each module lists these objects and the reason.
"""

from __future__ import annotations

from plphp.vllm.options import CONNECTOR, Options, engine_args

__all__ = ["CONNECTOR", "Options", "engine_args"]
