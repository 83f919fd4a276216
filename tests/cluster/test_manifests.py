"""The manifests of docs/cluster: fields that KubeRay knows, and pods that Kubernetes accepts.

KUBERAY_CRDS names a folder with KubeRay's own `ray.io_rayjobs.yaml` and `ray.io_rayservices.yaml`:
then the whole manifest is checked against their schemas too. They were those of 2026-08-19.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import plphp
from plphp.vllm.options import engine_args

FOLDER = Path(__file__).parents[2] / "docs" / "cluster"
# The fields of KubeRay's v1 API that the manifests use, with those that it requires.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "RayJob": (
        {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"},
        {"rayClusterSpec"},
    ),
    "RayService": ({"serveConfigV2", "rayClusterConfig"}, {"rayClusterConfig"}),
    "cluster": ({"rayVersion", "headGroupSpec", "workerGroupSpecs"}, {"headGroupSpec"}),
    "head": ({"rayStartParams", "template"}, {"template"}),
    "group": (
        {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
        {"groupName", "minReplicas", "maxReplicas", "template"},
    ),
}
MANIFESTS = pytest.mark.parametrize("name", ["rayjob", "rayservice"])


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


def cluster(found: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = found["spec"]
    part: dict[str, Any] = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return part


def parts(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield found["kind"], found["spec"]
    yield "cluster", cluster(found)
    yield "head", cluster(found)["headGroupSpec"]
    for group in cluster(found)["workerGroupSpecs"]:
        yield "group", group


@MANIFESTS
def test_fields_are_those_of_kuberay(name: str) -> None:
    found = manifest(name)
    assert found["apiVersion"] == "ray.io/v1" and set(found) == {
        "apiVersion", "kind", "metadata", "spec",
    }  # fmt: skip
    for kind, part in parts(found):
        known, required = FIELDS[kind]
        assert required <= set(part) <= known, (kind, set(part) - known, required - set(part))
    ray = pytest.importorskip("ray")
    assert cluster(found)["rayVersion"] == ray.__version__, "the version that was tested"


@MANIFESTS
def test_kubernetes_accepts_the_pods(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for kind, part in parts(manifest(name)):
        if kind in ("head", "group"):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **part["template"]}
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
            mounts = {m["name"] for c in pod["spec"]["containers"] for m in c["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}


@MANIFESTS
def test_the_schemas_of_kuberay_accept_the_whole(name: str) -> None:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder")
    import jsonschema

    found = yaml.load((Path(folder) / f"ray.io_{name}s.yaml").read_text(), yaml.CSafeLoader)
    (version,) = (v for v in found["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(manifest(name), schema)


def closed(schema: Any) -> Any:
    """The schema that refuses fields it does not name, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        unknown = schema.get("x-kubernetes-preserve-unknown-fields", False)
        made.setdefault("additionalProperties", bool(unknown))
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def test_the_service_starts_vllm_with_the_arguments_of_the_plugin() -> None:
    config = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    (llm,) = config["applications"][0]["args"]["llm_configs"]
    asked = engine_args(plphp.PLPHP(r=0.4, delta_r=0.3))
    told = llm["engine_kwargs"]
    connector = told["kv_transfer_config"]
    for key in ("kv_connector", "kv_role"):
        assert connector[key] == asked["kv_transfer_config"][key]
    given = connector["kv_connector_extra_config"].items()
    assert given <= asked["kv_transfer_config"]["kv_connector_extra_config"].items()


def test_the_entrypoint_is_a_command_that_plphp_has() -> None:
    words = manifest("rayjob")["spec"]["entrypoint"].split()
    assert words[:2] == ["plphp", "generate"]
    from plphp.cli.cluster import Cluster
    from plphp.cli.flags import Batch
    from plphp.cli.options import Source

    known = {"--batch", "--out"} | {f"--{f}" for c in (Cluster, Source) for f in vars(c())}
    assert Batch and {word for word in words if word.startswith("--")} <= known
