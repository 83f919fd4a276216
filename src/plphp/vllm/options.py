"""The options of a server and of a request. They are checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from plphp.policy import ALIASES, PLPHP, POLICIES, CachePolicy, Policy
from plphp.policy import policy as make_policy
from plphp.policy.checks import check_count

CONNECTOR = "PLPHPConnector"
OF_SERVER = ("window",)  # options that a request cannot change: the prefix cache depends on them
SWITCH = "plphp"  # the extra_args key that switches pruning on or off for a request
PREFIX = "plphp."  # extra_args keys with this prefix change one option of the method for a request

_SWITCHES = {"on": True, "off": False, True: True, False: False}  # True and False match 1 and 0


def refusal(policy: Policy) -> str | None:
    """Why the plugin cannot prune with a policy, None if it can."""
    if type(policy) not in POLICIES.values():
        return "only the policies of plphp.policy have a name that all processes of vLLM know"
    if not isinstance(policy, CachePolicy):
        return "it does not prune the cache"
    if policy.kind != "layer" and isinstance(policy, PLPHP):
        return f"budget must be 'image' or 'global' in vLLM, got {policy.budget!r}"
    if policy.kind != "layer":
        return "its layers share a budget, and vLLM prunes them apart"
    if policy.round_to != 1:
        return "round_to cannot be set in vLLM, where it is the block size: leave it at 1"
    return None


METHODS = tuple(name for name, kind in POLICIES.items() if refusal(kind()) is None)


@dataclass(frozen=True)
class Options:
    """The options of a server.

    policy: the method and its options, one of `METHODS`; `round_to` must be 1, because the
        engine's block size takes its place
    layers_per_group: number of consecutive layers that share a block table and keep equally many
        tokens, a divisor of the model's layers. A larger number is cheaper to schedule and keeps
        more tokens
    share_prefix: whether the unpruned blocks of a prompt stay in the prefix cache and the kept
        tokens are copied into fresh blocks, so that another question on the same images need not
        compute them again
    on: whether requests are pruned that do not set the switch themselves
    full_graphs: whether decoding steps may be replayed as full CUDA graphs; not yet run on a GPU

    Raises ValueError, naming the field.
    """

    policy: CachePolicy = field(default_factory=PLPHP)
    layers_per_group: int = 1
    share_prefix: bool = True
    on: bool = True
    full_graphs: bool = False

    def __post_init__(self) -> None:
        check_count("layers_per_group", self.layers_per_group, 1)
        for name in ("share_prefix", "on", "full_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        reason = refusal(self.policy)
        if reason:
            raise ValueError(
                f"vLLM cannot prune with {self.policy!r}: {reason}; the methods are "
                f"{', '.join(METHODS)}"
            )

    @property
    def method(self) -> str:
        """The name of the policy."""
        return next(name for name, kind in POLICIES.items() if kind is type(self.policy))

    def served(self, block_size: int) -> str:
        """What the start log says, with the `round_to` that the policy gets in this engine."""
        tuned = (f"{name}={getattr(self.policy, name)!r}" for name in _tunable(self.policy))
        own = (f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "policy")
        return ", ".join([f"method={self.method}", *tuned, f"round_to={block_size}", *own])


def read_options(given: Mapping[str, Any]) -> Options:
    """The options of `kv_connector_extra_config`. Raises ValueError, naming the option."""
    policy = _served(given.get("method", "plphp"))
    tunable, own = _tunable(policy), [f.name for f in fields(Options) if f.name != "policy"]
    known = ("method", *tunable, *own)
    for name in given:
        if name not in known:
            raise ValueError(f"no option {name!r}; the options are {', '.join(known)}")
    policy = _changed(policy, {name: given[name] for name in tunable if name in given})
    return Options(policy, **{name: given[name] for name in own if name in given})


def request_policy(options: Options, extra_args: Mapping[str, Any] | None) -> CachePolicy | None:
    """The policy of one request; None if the request is not pruned.

    options: of the server
    extra_args: of vLLM's SamplingParams. {"plphp": "on"} and {"plphp": "off"} switch pruning, and
        {"plphp.r": 0.2} changes one option of the server's method, which also switches pruning on
    Raises ValueError, naming the key.
    """
    given = {name: value for name, value in (extra_args or {}).items() if isinstance(name, str)}
    tunable = [name for name in _tunable(options.policy) if name not in OF_SERVER]
    changed = {name[len(PREFIX) :]: given[name] for name in given if name.startswith(PREFIX)}
    switch = given.get(SWITCH, bool(changed) or options.on)
    if isinstance(switch, (list, dict)) or switch not in _SWITCHES:
        raise ValueError(f"{SWITCH} must be 'on' or 'off', got {switch!r}")
    known = [SWITCH, *(PREFIX + name for name in tunable)]
    for name in given:
        if name.lower().startswith(SWITCH) and name not in known:
            raise ValueError(f"no option {name!r}; the options are {', '.join(known)}")
    policy = replace(options, policy=_changed(options.policy, changed)).policy
    return policy if _SWITCHES[switch] else None


def engine_args(
    policy: CachePolicy | str | None = None,
    *,
    layers_per_group: int = 1,
    share_prefix: bool = True,
    on: bool = True,
    full_graphs: bool = False,
) -> dict[str, Any]:
    """The arguments for `vllm.LLM(model, **engine_args(policy))` and for AsyncEngineArgs.

    policy: a policy or the name of one, PLPHP by default; the others as in `Options`
    Raises ValueError, naming the field, and for a policy that vLLM cannot prune with.
    """
    made = _served(policy) if isinstance(policy, str) else policy or PLPHP()
    options = Options(made, layers_per_group, share_prefix, on, full_graphs)
    extra = asdict(options)
    tuned = {name: extra["policy"][name] for name in _tunable(options.policy)}
    own = {name: value for name, value in extra.items() if name != "policy"}
    return {
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"method": options.method, **tuned, **own},
        },
    }


def _served(name: Any) -> CachePolicy:
    """The policy of this name with its defaults. Raises ValueError unless vLLM can prune with it.

    vLLM reads the options several times, so the check is made here and in `Options`.
    """
    known = (*METHODS, *ALIASES)
    if name in known:
        return make_policy(name)  # type: ignore[return-value]  # a cache policy
    reason = f"; {refusal(make_policy(name))}" if name in list(POLICIES) else ""
    raise ValueError(f"method must be one of {', '.join(known)}, got {name!r}{reason}")


def _changed(policy: Any, options: Mapping[str, Any]) -> CachePolicy:
    """A policy with other options."""
    changed: CachePolicy = replace(policy, **options)
    return changed


def _tunable(policy: CachePolicy) -> tuple[str, ...]:
    """The options of a policy that a server or a request may set."""
    return tuple(f.name for f in fields(policy) if f.name != "round_to")  # type: ignore[arg-type]
