"""What infra/kubernetes holds: the documents of its files and of kustomize's renderings, and what is wrong with one."""

import copy
import functools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import referencing
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "infra" / "kubernetes"
VERSION = "1.34"  # of Kubernetes, whose schemas come with the package kubernetes-validate
STRICT = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{VERSION}.0-local-strict"
OWN = Path(__file__).parent / "schemas"
# Below these anybody's names stand.
FREE = {"labels", "annotations", "matchLabels", "nodeSelector", "rayStartParams", "data", "clusterSelector", "requests",
        "limits"}  # fmt: skip


def documents(text: str) -> list[dict]:
    """The YAML documents of a text."""
    return [found for found in yaml.safe_load_all(text) if found]


def documents_of(name: str) -> list[dict]:
    """A file's documents, whole: a job that gets its cluster from kustomize has it."""
    found = documents((FOLDER / name).read_text())
    if name == "components/own-cluster/job.yaml":
        found[0]["spec"]["rayClusterSpec"] = documents_of("base/raycluster.yaml")[0]["spec"]
    return found


@functools.cache
def rendered(folder: str) -> list[dict]:
    """What `kubectl apply -k` would send; raises CalledProcessError where kustomize refuses. Not to be changed."""
    made = subprocess.run(["kubectl", "kustomize", FOLDER / folder], capture_output=True, text=True, check=True)
    return documents(made.stdout)


def pods(found: list[dict]) -> Iterator[tuple[str, dict, dict]]:
    """(what, labels, specification) of every pod that these documents make, with the labels that KubeRay gives."""
    for document in found:
        kind, spec = document["kind"], document.get("spec", {})
        if kind in ("Deployment", "StatefulSet"):
            yield document["metadata"]["name"], spec["template"]["metadata"]["labels"], spec["template"]["spec"]
        cluster = spec if kind == "RayCluster" else spec.get("rayClusterSpec")
        if cluster:
            node = {"ray.io/is-ray-node": "yes", "ray.io/cluster": document["metadata"]["name"]}
            yield "head", node | {"ray.io/node-type": "head"}, cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                yield "worker", node | {"ray.io/node-type": "worker"}, group["template"]["spec"]
        if submitter := spec.get("submitterPodTemplate"):
            yield "submitter", submitter["metadata"]["labels"], submitter["spec"]


def complaint(document: dict) -> str:
    """The first thing that is wrong with names and types of a document's fields; "" where all are right."""
    version, kind = document.get("apiVersion", ""), document.get("kind", "")
    try:
        validator = _validator(version, kind)
    except FileNotFoundError:
        return f"there is no {kind} of {version}"
    error = next(validator.iter_errors(document), None)
    return f"{error.json_path}: {error.message}" if error else ""


def crd_complaint(document: dict, folder: Path) -> str:
    """As `complaint`, by the CustomResourceDefinitions that a folder holds, such as KubeRay's own."""
    group, _, version = document["apiVersion"].partition("/")
    for file in sorted(folder.glob("*.yaml")):
        for crd in (found["spec"] for found in documents(file.read_text())):
            if (crd["group"], crd["names"]["kind"]) == (group, document["kind"]):
                [schema] = [v["schema"]["openAPIV3Schema"] for v in crd["versions"] if v["name"] == version]
                error = next(Draft202012Validator(_closed(schema)).iter_errors(document), None)
                return f"{error.json_path}: {error.message}" if error else ""
    return f"there is no {document['kind']} of {document['apiVersion']}"


def _closed(schema: dict) -> dict:
    """With no field but those that it has; Kubernetes drops others, or warns of them."""
    made = dict(schema)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            made[name] = _closed(schema[name])
    if "properties" in schema:
        made["properties"] = {name: _closed(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


def typos(document: dict) -> Iterator[tuple[str, dict]]:
    """(where, the document with one letter too many) for each name that is not anybody's."""
    for path, names in _objects(document, ()):
        for name in names:
            changed = copy.deepcopy(document)
            place = functools.reduce(lambda at, step: at[step], path, changed)
            place[f"{name}z"] = place.pop(name)
            yield "/".join(map(str, (*path, name))), changed


def _objects(value: object, path: tuple) -> Iterator[tuple[tuple, list[str]]]:
    if isinstance(value, dict):
        if not _free(path):
            yield path, list(value)
            for name, inner in value.items():
                yield from _objects(inner, (*path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _objects(inner, (*path, i))


def _free(path: tuple) -> bool:
    match path:
        case (*_, "workerGroupSpecs", int(), "resources") | ("spec", "metadata") | ("spec", "selector"):
            return True  # Ray's own resources; what a job tells of itself; a Service's labels
    return bool(path) and path[-1] in FREE


@functools.cache
def _validator(version: str, kind: str) -> Draft202012Validator:
    if version.startswith("ray.io/"):
        own = referencing.Resource.from_contents(_read(OWN / "kuberay-v1.7.json"))
        if kind not in ("RayCluster", "RayJob"):
            raise FileNotFoundError(kind)
        return Draft202012Validator({"$ref": f"{own.id()}#/$defs/{kind}"}, registry=own @ _registry())
    if version.startswith("kustomize."):
        return Draft202012Validator(_read(OWN / "kustomization.json"))
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", version)  # networking.k8s.io/v1 -> networking-v1
    schema = _read(STRICT / f"{kind.lower()}-{group}.json")
    return Draft202012Validator(schema, registry=_registry())


@functools.cache
def _registry() -> referencing.Registry:
    """Where references to Kubernetes' own schemas lead."""
    definitions = referencing.Resource.from_contents(_read(STRICT / "_definitions.json"))
    return referencing.Registry().with_resources([(definitions.id(), definitions)])


def _read(file: Path) -> dict:
    return json.loads(file.read_text())
