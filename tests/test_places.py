"""Which trials' groups fit, on nodes that are given."""

import pytest

from orchestrator.cluster import places as module
from orchestrator.cluster.places import Places
from orchestrator.cluster.session import Node
from orchestrator.config import ClusterConfig
from pipelines.errors import ClusterError


@pytest.fixture
def nodes(monkeypatch):
    found = [Node("a", "10.0.0.1", 4, 0), Node("b", "10.0.0.2", 3, 0)]
    monkeypatch.setattr(module.session, "nodes", lambda: found)
    return found


@pytest.mark.parametrize(
    ("cpus", "gpus", "device", "total"),
    [
        (1, 0, "auto", 7),
        (2, 0, "auto", 3),  # 4 // 2 + 3 // 2: a worker is on one node
        (5, 0, "auto", 0),
        (1, 2, "auto", 4),  # two GPUs a node
        (1, 2, "cpu", 7),
        (1, 0, "gpu", 0),
    ],
)
def test_places_of_a_cluster(nodes, cpus, gpus, device, total):
    nodes[:] = [Node(n.id, n.address, n.cpus, gpus) for n in nodes]
    assert Places(ClusterConfig(cpus_per_worker=cpus, device=device)).total == total


def test_a_group_has_places_whole_or_not_at_all(nodes):
    places = Places(ClusterConfig())
    assert places.take("t001", "4") == "4"
    assert places.take("t002", "4") is None
    assert places.take("t003", "2..8") == "2..3"  # elastic: what is left, never less than its least
    assert places.take("t004", "1") is None
    places.give("t001")
    assert places.take("t004", "1..2") == "1..2"
    assert places.take("t005", "3..9") is None
    nodes.append(Node("c", "10.0.0.3", 8, 0))  # a node comes
    assert places.take("t005", "3..9") == "3..9"
    places.give("nobody")


def test_what_never_fits_is_refused_with_whose_it_is(nodes):
    places = Places(ClusterConfig(cpus_per_worker=2))
    places.check("3", "depth 50")
    with pytest.raises(ClusterError) as refused:
        places.check("4..8", "depth 152")
    assert str(refused.value) == (
        "depth 152 asks for 4 workers of 2 CPU each, and the cluster has room for 3: the sweep could never place it; "
        "ask for fewer (--sweep.workers) or add nodes"
    )
