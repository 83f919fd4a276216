"""vLLM's entry point: runs in each of its processes, and changes nothing without the switch.

Two functions of vLLM's are wrapped. Both ask at call time whether the config they are given names
PLPHPConnector, and do what they did if it does not:
- `Attention.get_kv_cache_spec`, since no extension point is told which layer asks for a spec;
- `KVConnectorFactory.get_connector_class`, the first call that sees the connector's options: bad
  ones, GPUs and other connectors beside it are refused in the process that was started, before a
  model is loaded.
"""

from __future__ import annotations

import functools
from typing import Any

from plphp.vllm.checks import check_alone, check_platform, check_version
from plphp.vllm.options import CONNECTOR, read_options


def register() -> None:
    """Make `PLPHPConnector` known. Safe to call again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR in KVConnectorFactory._registry:
        return
    KVConnectorFactory.register_connector(CONNECTOR, "plphp.vllm.connector", CONNECTOR)
    import vllm

    try:
        check_version(vllm.__version__)
    except Exception:
        return  # the connector's module says so to whoever asks for it
    from vllm.model_executor.layers.attention.attention import Attention

    _wrap_spec(Attention)
    _wrap_class(KVConnectorFactory)


def _asked(transfer: Any) -> bool:
    return transfer is not None and transfer.kv_connector == CONNECTOR


def _wrap_spec(attention: Any) -> None:
    original = attention.get_kv_cache_spec

    @functools.wraps(original)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = original(self, vllm_config)
        if spec is None or not _asked(vllm_config.kv_transfer_config):
            return spec
        from plphp.vllm.attach import attach

        return attach(self, spec, vllm_config)

    attention.get_kv_cache_spec = get_kv_cache_spec


def _wrap_class(factory: Any) -> None:
    original = factory.get_connector_class

    @functools.wraps(original)
    def get_connector_class(transfer: Any) -> Any:
        check_alone(transfer)
        if _asked(transfer):
            from vllm.platforms import current_platform  # not to be asked for any earlier

            read_options(transfer.kv_connector_extra_config)
            check_platform(current_platform.device_type)
        return original(transfer)

    factory.get_connector_class = staticmethod(get_connector_class)
