"""Who may talk to whom in infra/kubernetes: its policies, applied to its pods."""

import functools
from ipaddress import ip_address, ip_network

import pytest

from tests.manifests import documents_of, pods

POLICIES = documents_of("base/network.yaml")
OUTSIDE = {
    "monitoring": ("monitoring", {"app": "prometheus"}),
    "operator": ("ray", {"app.kubernetes.io/name": "kuberay-operator"}),  # installed by Helm, and by kustomize
    "manager": ("ray", {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
    "stranger": ("skiplane", {"app": "web"}),
    "elsewhere": (
        "default",
        {"ray.io/is-ray-node": "yes", "skiplane/may-submit": "yes", "app.kubernetes.io/name": "kuberay"},
    ),
}
# A cache of names on each node; at Google the service of names, which on port 80 tells a machine's credentials.
ADDRESSES = {
    "internet": "52.1.2.3",
    "internet6": "2600:1f18::1",
    "cache": "169.254.20.10",
    "metadata": "169.254.169.254",
}


@functools.cache
def places() -> dict[str, tuple[str, dict]]:
    """Name -> (namespace, labels) of a pod; of addresses outside, (address, {})."""
    base = [d for name in ("raycluster", "mlflow", "postgres") for d in documents_of(f"base/{name}.yaml")]
    own = {what: ("skiplane", labels) for what, labels, _ in pods([*base, *documents_of("jobs/train.yaml")])}
    return own | OUTSIDE | {name: (address, {}) for name, address in ADDRESSES.items()}


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


def lets(direction: str, one: tuple[str, dict], other: tuple[str, dict], way: tuple[str, int]) -> bool:
    """Whether the policies of `one` let it talk with the other by (protocol, port), in one direction."""
    if one[0] != "skiplane":
        return True  # another namespace's business
    ours = [p["spec"] for p in POLICIES if selects(p["spec"]["podSelector"], one[1])]
    rules = [rule for spec in ours if direction in spec["policyTypes"] for rule in spec.get(direction.lower(), [])]
    side = "from" if direction == "Ingress" else "to"
    return any(
        any(is_peer(peer, other) for peer in rule[side])
        and ("ports" not in rule or way in [(p.get("protocol", "TCP"), p["port"]) for p in rule["ports"]])
        for rule in rules
    )


# PORT is TCP's; PORT/UDP is not.
TALKS = """
worker head 6379, worker worker 34567, head worker 6380, head worker 10002, submitter head 8265, operator head 8265,
manager head 8265, monitoring worker 8080, monitoring head 8080, worker mlflow 5000, head mlflow 5000,
mlflow postgres 5432, worker internet 443, head internet 443, mlflow internet 443, worker internet6 443,
mlflow internet6 443, head internet 6443, head internet 8443, head internet6 443, head internet6 6443,
head internet6 8443, worker dns 53, worker dns 53/UDP, postgres dns 53/UDP, stranger dns 53, stranger dns 53/UDP,
submitter dns 53/UDP, worker cache 53, worker cache 53/UDP, worker metadata 53, submitter metadata 53/UDP
"""
SILENT = """
stranger head 8265, stranger head 6379, stranger mlflow 5000, stranger postgres 5432, stranger internet 443,
elsewhere head 8265, elsewhere head 6379, elsewhere worker 52365, monitoring head 8265, monitoring mlflow 5000,
submitter head 6379, submitter worker 52365, submitter mlflow 5000, operator worker 52365, manager worker 52365,
operator head 6379, internet head 8265, internet6 head 8265, worker postgres 5432, head postgres 5432,
worker metadata 80, head metadata 80, worker metadata 443/UDP, worker internet 6443, worker internet 8443,
worker internet 80, worker internet 53, stranger internet 53/UDP, submitter internet 443, submitter internet 6443,
mlflow head 8265, mlflow internet 6443, postgres mlflow 5000, postgres internet 443, worker mlflow 5000/UDP
"""


def said(table: str, may: bool) -> list[tuple[str, bool]]:
    return [(row.strip(), may) for row in table.split(",")]


@pytest.mark.parametrize(("row", "may"), said(TALKS, True) + said(SILENT, False))
def test_who_may_talk_to_whom(row, may):
    who, whom, port = row.split()
    number, _, protocol = port.partition("/")
    one, other, way = places()[who], places()[whom], (protocol or "TCP", int(number))
    assert (lets("Egress", one, other, way) and lets("Ingress", other, one, way)) == may


def test_every_policy_is_of_somebody():
    known = [labels for where, labels in places().values() if where == "skiplane"]
    for policy in POLICIES:
        assert any(selects(policy["spec"]["podSelector"], labels) for labels in known), policy["metadata"]["name"]
