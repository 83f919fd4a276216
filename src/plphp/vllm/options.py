"""The options of a server and of a request. They are checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from plphp.policy import PLPHP
from plphp.policy.base import check_count

CONNECTOR = "PLPHPConnector"
SWITCH = "plphp"  # the extra_args key that switches pruning on or off for a request
PREFIX = "plphp."  # extra_args keys with this prefix change one option of PLPHP for a request

_TUNABLE = tuple(f.name for f in fields(PLPHP) if f.name != "round_to")
_SWITCHES = {"on": True, "off": False, True: True, False: False}  # True and False match 1 and 0


@dataclass(frozen=True)
class Options:
    """The options of a server.

    policy: the options of `PLPHP`; `round_to` must be 1, because the engine's block size takes its
        place
    layers_per_group: number of consecutive layers that share a block table and keep equally many
        tokens, a divisor of the model's layers. A larger number is cheaper to schedule and keeps
        more tokens
    share_prefix: whether the unpruned blocks of a prompt stay in the prefix cache and the kept
        tokens are copied into fresh blocks, so that another question on the same images need not
        compute them again
    on: whether requests are pruned that do not set the switch themselves

    Raises ValueError, naming the field.
    """

    policy: PLPHP = field(default_factory=PLPHP)
    layers_per_group: int = 1
    share_prefix: bool = True
    on: bool = True

    def __post_init__(self) -> None:
        check_count("layers_per_group", self.layers_per_group, 1)
        for name in ("share_prefix", "on"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if type(self.policy) is not PLPHP:
            raise ValueError(f"the vLLM plugin prunes with PLPHP only, got {self.policy!r}")
        if self.policy.kind != "layer":
            raise ValueError(
                f"budget must be 'image' or 'global' in vLLM, got {self.policy.budget!r}"
            )
        if self.policy.round_to != 1:
            raise ValueError(
                "round_to cannot be set in vLLM, where it is the block size: leave it at 1"
            )

    def served(self, block_size: int) -> str:
        """What the start log says, with the `round_to` that the policy gets in this engine."""
        own = (f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "policy")
        return ", ".join([str(replace(self.policy, round_to=block_size)), *own])


def read_options(given: Mapping[str, Any]) -> Options:
    """The options of `kv_connector_extra_config`. Raises ValueError, naming the option."""
    own = tuple(f.name for f in fields(Options) if f.name != "policy")
    for name in given:
        if name not in (*_TUNABLE, *own):
            raise ValueError(f"no option {name!r}; the options are {', '.join((*_TUNABLE, *own))}")
    policy = PLPHP(**{name: given[name] for name in _TUNABLE if name in given})
    return Options(policy, **{name: given[name] for name in own if name in given})


def request_policy(options: Options, extra_args: Mapping[str, Any] | None) -> PLPHP | None:
    """The policy of one request; None if the request is not pruned.

    options: of the server
    extra_args: of vLLM's SamplingParams. {"plphp": "on"} and {"plphp": "off"} switch pruning, and
        {"plphp.r": 0.2} changes one option of PLPHP, which also switches pruning on
    Raises ValueError, naming the key.
    """
    given = extra_args or {}
    changed = {name[len(PREFIX) :]: given[name] for name in given if name.startswith(PREFIX)}
    switch = given.get(SWITCH, bool(changed) or options.on)
    if isinstance(switch, (list, dict)) or switch not in _SWITCHES:
        raise ValueError(f"{SWITCH} must be 'on' or 'off', got {switch!r}")
    for name in given:
        like = name.lower().startswith(SWITCH) and name != SWITCH
        if like and name not in [PREFIX + known for known in _TUNABLE]:
            known = ", ".join([SWITCH, *(PREFIX + known for known in _TUNABLE)])
            raise ValueError(f"no option {name!r}; the options are {known}")
    if not _SWITCHES[switch]:
        return None
    return replace(options, policy=replace(options.policy, **changed)).policy


def engine_args(
    policy: PLPHP | None = None,
    *,
    layers_per_group: int = 1,
    share_prefix: bool = True,
    on: bool = True,
) -> dict[str, Any]:
    """The arguments for `vllm.LLM(model, **engine_args(policy))` and for AsyncEngineArgs.

    The parameters are those of `Options`. Raises ValueError, naming the field.
    """
    options = Options(PLPHP() if policy is None else policy, layers_per_group, share_prefix, on)
    extra = asdict(options)
    tuned = {name: value for name, value in extra.pop("policy").items() if name in _TUNABLE}
    return {
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": tuned | extra,
        },
    }
