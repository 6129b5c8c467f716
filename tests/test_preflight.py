"""What a node must have before a run starts: the driver's software and time, data, cache, storage, space."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.preflight import APART_S, Answer, check_clocks, check_software, judge
from orchestrator.cluster.report import Question, Report, Software, inspect
from orchestrator.state import space
from orchestrator.state.packed import Progress, pack
from orchestrator.state.space import check_space, checkpoint_bytes, lacking
from orchestrator.state.storage import Storage
from orchestrator.training.models import cost
from orchestrator.training.models.resnet import build
from pipelines.errors import ClusterError, ConfigError
from tests.faults import ACCESS_DENIED, always
from tests.servers import S3Server

ROOT = Path(__file__).parent.parent
OURS = Software("3.11.7", "2.13.0+cpu", "99887766" * 8)
FINE = Report("10.0.0.1", OURS, "eth0", "", "", "", 1000.0)


def node(address="10.0.0.2", python="3.11.7", torch="2.13.0+cpu", skiplane=OURS.skiplane, **more):
    return replace(FINE, address=address, software=Software(python, torch, skiplane), **more)


def answers(*reports):
    return [Answer(report, 999.0, 1001.0) for report in reports]


# -- software ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (
            [node(python="3.11.8")],
            "Python is 3.11.8 on 10.0.0.2, and 3.11.7 in the driver; install the driver's version there",
        ),
        (
            [node(python="3.11.8"), node("10.0.0.3"), node("10.0.0.4", "3.12.1"), node("10.0.0.5", "3.11.8")],
            "Python is 3.11.8 on 10.0.0.2, 10.0.0.5, 3.12.1 on 10.0.0.4, and 3.11.7 in the driver; ",
        ),
        ([node(torch="2.12.0+cpu")], "torch is 2.12.0 on 10.0.0.2, and 2.13.0 in the driver; "),
        ([node(torch="2.13.0+cu130")], "torch is 2.13.0+cpu on 10.0.0.1, 2.13.0+cu130 on 10.0.0.2; install one build"),
        (
            [node(skiplane="ab12cd34" * 8)],
            "Skiplane is ab12cd34 on 10.0.0.2, and 99887766 in the driver; the code differs (sha256): take",
        ),
    ],
)
def test_other_software_is_refused_with_the_node_and_both_versions(others, sentence):
    with pytest.raises(ClusterError) as told:
        check_software(OURS, [FINE, *others])
    assert str(told.value).startswith(sentence)


def test_the_driver_counts_where_its_node_gets_no_workers():
    check_software(OURS, [node(), node("10.0.0.3")])
    with pytest.raises(ClusterError, match=r"Python is 3.12.1 on 10.0.0.2, 10.0.0.3, and 3.11.7 in the driver"):
        check_software(OURS, [node(python="3.12.1"), node("10.0.0.3", python="3.12.1")])
    # A head without a GPU may have torch's CPU build: it does not train.
    check_software(OURS, [node(torch="2.13.0+cu130"), node("10.0.0.3", torch="2.13.0+cu130")])


def test_this_process_knows_its_software():
    here = Software.here()
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert len(here.skiplane) == 64
    assert Software.here() is here  # hashed once


# -- clocks ------------------------------------------------------------------------------------------------------------

seconds = st.integers(0, 10**10)


@given(clock=seconds, asked=seconds, took=st.integers(0, 10**4))
def test_a_clock_is_off_by_what_the_time_of_the_question_cannot_explain(clock, asked, took):
    ahead = Answer(replace(FINE, clock=clock), asked, asked + took).ahead_s
    # Set right by that much it lies between question and answer; and by less it does not.
    assert asked <= clock - ahead <= asked + took
    assert ahead == 0 or not asked <= clock - (ahead - math.copysign(1, ahead)) <= asked + took


@pytest.mark.parametrize("clock", [100 - APART_S, 100, 105, 110, 110 + APART_S])
def test_clocks_that_may_be_right_are(clock):
    check_clocks([Answer(replace(FINE, clock=clock), asked=100, had=110)])


def test_clocks_that_are_not_are_named_with_how_far_they_are_off():
    clocks = {"a": 100 - APART_S - 1, "b": 105, "c": 110 + APART_S + 1, "d": 110 + 86400}
    with pytest.raises(ClusterError) as told:
        check_clocks([Answer(replace(FINE, address=a, clock=c), 100, 110) for a, c in clocks.items()])
    assert str(told.value) == (
        "clocks are more than 30 s apart: a is 31 s behind the driver, c is 31 s ahead of the driver, d is 86,400 s "
        "ahead of the driver; set them right with NTP (chrony, systemd-timesyncd), then submit again"
    )


# -- what a node reaches -----------------------------------------------------------------------------------------------


def test_nodes_with_the_same_fault_are_told_together():
    judge(OURS, answers(FINE, node()))
    faults = [node(a, storage="no such folder") for a in ("b", "c")] + [node("d", storage="it is full")]
    with pytest.raises(
        ClusterError,
        match=r"^cluster.storage cannot be used on b, c: no such folder; on d: it is full; every node has to see",
    ):
        judge(OURS, answers(FINE, *faults))


def test_a_cache_that_cannot_be_used_is_a_setting():
    with pytest.raises(ConfigError, match=r"data.cache cannot be used on 10.0.0.2: it lies in memory; it has to be"):
        judge(OURS, answers(FINE, node(cache="it lies in memory")))


def question(storage, probe="probe"):
    return Question("127.0.0.1", (), "", None, storage.place, probe)


def test_a_node_reads_what_the_driver_wrote_and_writes_itself(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("probe", b"")
    report = inspect(question(storage))
    assert (report.address, report.software, report.storage) == ("127.0.0.1", Software.here(), "")
    assert storage.names() == ["probe"]  # its own object is gone
    report = inspect(question(storage, "other"))
    assert report.storage == f"{tmp_path} is not shared: what the driver wrote there is not there"


def test_a_node_that_may_only_read_is_found(monkeypatch):
    with S3Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        storage = Storage(server.url)
        storage.write("probe", b"")
        server.fault = always(ACCESS_DENIED, method="PUT")
        fault = inspect(question(storage)).storage
        assert fault.startswith(f"{server.url}/.preflight/")
        assert fault.endswith("cannot be written: 403 Forbidden (AccessDenied)")


# -- space -------------------------------------------------------------------------------------------------------------

MB = 10**6


@pytest.mark.parametrize(
    ("keep", "held", "free", "lacks"),
    [
        (2, 0, 36 * MB, 0),  # one million parameters: 9 MB each; two, the best one, and the one being written
        (2, 0, 35 * MB, MB),
        (2, 27 * MB, 9 * MB, 0),  # three of them are there
        (2, 27 * MB, 8 * MB, MB),
        (2, 90 * MB, 0, 0),  # train.keep was larger before
        (1, 0, 27 * MB, 0),
        (5, 0, 27 * MB, 36 * MB),
    ],
)
def test_what_checkpoints_lack(keep, held, free, lacks):
    assert lacking(MB, keep, held, free) == lacks


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path / "run"))
    storage.write("checkpoints/step-000000001/tensors.pt", bytes(1000))
    check_space(storage, MB, keep=2)
    monkeypatch.setattr(Storage, "free", lambda self: 20 * MB)
    with pytest.raises(ClusterError) as told:
        check_space(storage, 3 * MB, keep=2)
    assert str(told.value) == (
        f"cluster.storage has 20.0 MB free in {tmp_path}/run; 4 checkpoints of 25.0 MB (train.keep = 2, the best one, "
        f"and the one being written) need 100.0 MB more; make space, lower train.keep, or name another folder"
    )


def test_a_bucket_has_no_end(monkeypatch):
    monkeypatch.setattr(space, "_held", None)  # nobody asks
    check_space(Storage("s3://nowhere/at-all"), 10**12, keep=1000)


def test_a_checkpoint_is_as_large_as_it_is_said_to_be(settings_for):
    """Of a real net, BatchNorm's averages and all."""
    arch = settings_for("--model.layout", "imagenet", "--model.depth", "50", "--model.width", "64").model.arch(10)
    model = build(arch, seed=0)
    momentum = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    progress = Progress(1, 0, 0, sums={}, total={}, curve=[], bad=0, seconds=0.0)
    packed = pack({"model": model.state_dict(), "momentum": momentum}, progress)
    said = checkpoint_bytes(cost.parameters(arch))
    assert 0.99 * said < packed.nbytes <= said


# -- Ray ---------------------------------------------------------------------------------------------------------------

TWO_NODES = """
import sys
from pathlib import Path
from orchestrator.cluster.environment import prepare
prepare(Path(sys.argv[1]))
import ray
from ray.cluster_utils import Cluster
from orchestrator.cluster import session
from orchestrator.cluster.preflight import _ask, judge
from orchestrator.cluster.report import Question, Software
from orchestrator.state.storage import Storage
from pipelines.errors import ClusterError

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(cluster.address, log_to_driver=False, runtime_env=session._runtime_env())
storage = Storage(sys.argv[1] + "/run")
storage.write("probe", b"")
question = Question("", (), "", None, storage.place, "probe")
nodes = session.nodes()
answers = _ask(nodes, question)
judge(Software.here(), answers)
assert len(answers) == 2
assert [a.report.address for a in answers] == [n.address for n in nodes]
lost = session.Node("a" * 56, "10.9.9.9", 1, 0)
try:
    _ask([*nodes, lost], question)
except ClusterError as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_nodes_are_asked_in_processes_of_their_own_and_a_silent_one_is_named(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", TWO_NODES, str(tmp_path)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the preflight had no answer from 10.9.9.9 (" in done.stdout
