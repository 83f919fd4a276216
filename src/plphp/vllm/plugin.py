"""The entry point of the plugin, which vLLM calls in each of its processes.

Two functions of vLLM are wrapped. At each call they check whether the config names PLPHPConnector,
and behave as before if it does not:
- `Attention.get_kv_cache_spec`, because no extension point of vLLM knows which layer asks for a
  spec;
- `KVConnectorFactory.get_connector_class`, because it is the first call that gets the connector's
  options. Wrong options, GPUs and combinations with other connectors are refused there, in the
  process that the user started and before a model is loaded.
"""

from __future__ import annotations

import functools
from typing import Any

from plphp.vllm.checks import check_alone, check_platform
from plphp.vllm.options import CONNECTOR, read_options
from plphp.vllm.versions import check_version


def register() -> None:
    """Register `PLPHPConnector` with vLLM. A second call does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR in KVConnectorFactory._registry:
        return
    KVConnectorFactory.register_connector(CONNECTOR, "plphp.vllm.connector", CONNECTOR)
    import vllm

    try:
        check_version(vllm.__version__)
    except Exception:
        return  # the connector's module raises the same error when a config names the connector
    from vllm.model_executor.layers.attention.attention import Attention

    _wrap_spec(Attention)
    _wrap_class(KVConnectorFactory)


def _names_plphp(transfer: Any) -> bool:
    return transfer is not None and transfer.kv_connector == CONNECTOR


def _wrap_spec(attention: Any) -> None:
    original = attention.get_kv_cache_spec

    @functools.wraps(original)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = original(self, vllm_config)
        if spec is None or not _names_plphp(vllm_config.kv_transfer_config):
            return spec
        from plphp.vllm.attach import attach

        return attach(self, spec, vllm_config)

    attention.get_kv_cache_spec = get_kv_cache_spec


def _wrap_class(factory: Any) -> None:
    original = factory.get_connector_class

    @functools.wraps(original)
    def get_connector_class(transfer: Any) -> Any:
        check_alone(transfer, factory._registry)
        if _names_plphp(transfer):
            # vLLM detects the platform at this import, which must not happen any earlier.
            from vllm.platforms import current_platform

            read_options(transfer.kv_connector_extra_config)
            check_platform(current_platform.device_type)
        return original(transfer)

    factory.get_connector_class = staticmethod(get_connector_class)
