"""Who may talk to whom in infra/kubernetes: its policies, applied to its pods."""

import functools
from ipaddress import ip_address, ip_network

import pytest

from tests.manifests import documents_of, pods

POLICIES = documents_of("base/network.yaml")
OUTSIDE = {
    "monitoring": ("monitoring", {"app": "prometheus"}),
    "operator": ("ray", {"app.kubernetes.io/name": "kuberay-operator"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
    "stranger": ("skiplane", {"app": "web"}),
    "elsewhere": ("default", {"ray.io/is-ray-node": "yes", "skiplane/may-submit": "yes"}),
}


@functools.cache
def places() -> dict[str, tuple[str, dict]]:
    """Name -> (namespace, labels) of a pod; of addresses outside, (address, {})."""
    base = [d for name in ("raycluster", "mlflow", "postgres") for d in documents_of(f"base/{name}.yaml")]
    own = {what: ("skiplane", labels) for what, labels, _ in pods([*base, *documents_of("jobs/train.yaml")])}
    return own | OUTSIDE | {"internet": ("52.1.2.3", {}), "metadata": ("169.254.169.254", {})}


def selects(selector: dict, labels: dict) -> bool:
    assert set(selector) <= {"matchLabels"}  # the one kind that is used here
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer: dict, place: tuple[str, dict]) -> bool:
    where, labels = place
    if where[0].isdigit():
        return "ipBlock" in peer and ip_address(where) in ip_network(peer["ipBlock"]["cidr"])
    if "ipBlock" in peer:
        return False  # of pods, which plug-ins do not count as addresses
    namespace = peer.get("namespaceSelector")
    near = where == "skiplane" if namespace is None else selects(namespace, {"kubernetes.io/metadata.name": where})
    return near and selects(peer.get("podSelector", {}), labels)


def lets(direction: str, one: tuple[str, dict], other: tuple[str, dict], port: int) -> bool:
    """Whether the policies of `one` let it talk with the other, in one direction."""
    if one[0] != "skiplane":
        return True  # another namespace's business
    ours = [p["spec"] for p in POLICIES if selects(p["spec"]["podSelector"], one[1])]
    rules = [rule for spec in ours if direction in spec["policyTypes"] for rule in spec.get(direction.lower(), [])]
    side = "from" if direction == "Ingress" else "to"
    return any(
        any(is_peer(peer, other) for peer in rule[side])
        and ("ports" not in rule or port in [p["port"] for p in rule["ports"]])
        for rule in rules
    )


TALKS = """
worker head 6379, worker worker 34567, head worker 6380, head worker 10002, submitter head 8265, operator head 8265,
monitoring worker 8080, monitoring head 8080, worker mlflow 5000, head mlflow 5000, mlflow postgres 5432, worker dns 53,
worker internet 443, head internet 6443, head internet 443, mlflow internet 443, postgres dns 53, stranger dns 53
"""
SILENT = """
stranger head 8265, stranger head 6379, stranger mlflow 5000, stranger postgres 5432, stranger internet 443,
elsewhere head 8265, elsewhere head 6379, elsewhere worker 52365, monitoring head 8265, monitoring mlflow 5000,
submitter head 6379, submitter worker 52365, submitter mlflow 5000, operator worker 52365, internet head 8265,
worker postgres 5432, head postgres 5432, worker metadata 80, worker internet 6443, worker internet 80,
mlflow head 8265, postgres mlflow 5000, postgres internet 443
"""


def said(table: str, may: bool) -> list[tuple[str, bool]]:
    return [(row.strip(), may) for row in table.split(",")]


@pytest.mark.parametrize(("row", "may"), said(TALKS, True) + said(SILENT, False))
def test_who_may_talk_to_whom(row, may):
    who, whom, port = row.split()
    one, other = places()[who], places()[whom]
    assert (lets("Egress", one, other, int(port)) and lets("Ingress", other, one, int(port))) == may


def test_every_policy_is_of_somebody():
    known = [labels for where, labels in places().values() if where == "skiplane"]
    for policy in POLICIES:
        assert any(selects(policy["spec"]["podSelector"], labels) for labels in known), policy["metadata"]["name"]
