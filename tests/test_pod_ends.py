"""Real hosts: a pod that is told to end, and a spot machine that is taken back, take their leave, as infra/ has it."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from tests.hosts import Hosts, supported
from tests.test_infra_cloud import CURL
from tests.test_notices import Training

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(supported()), reason=supported() or "hosts can be made")]
INFRA = Path(__file__).parent.parent / "infra"


def worker_pod() -> dict:
    """The pod template of the workers."""
    cluster = yaml.safe_load((INFRA / "kubernetes" / "base" / "raycluster.yaml").read_text())
    [group] = cluster["spec"]["workerGroupSpecs"]
    return group["template"]["spec"]


class Pods(Hosts):
    """Whose workers' `ray start` is a container's first process, in KubeRay's own words: a shell that sets a limit."""

    def _run(self, i, command, environment, **how):
        if i and "start" in command:
            line = " ".join(map(str, command))
            shell = ["/bin/bash", "-c", "--", f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {line}"]
            command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *shell]
            [container] = worker_pod()["containers"]
            environment = {**environment, **{known["name"]: known["value"] for known in container["env"]}}
        return super()._run(i, command, environment, **how)

    def first(self, i: int) -> psutil.Process:
        """The container's first process."""
        [found] = [p for p in self.processes(i) if p.name() == "unshare"]
        [child] = found.children()
        return child


class SpotMachines(Hosts):
    """Whose workers' `ray start` is watched over by spot.sh, with a stand-in for their cloud's metadata."""

    def _run(self, i, command, environment, **how):
        if i and "start" in command:
            (tools := self.folder / "tools").mkdir(exist_ok=True)
            (tools / "curl").write_text(CURL)
            (tools / "curl").chmod(0o755)
            command = [INFRA / "cloud" / "spot.sh", "aws", "100", *command]
            path = f"{tools}{os.pathsep}{os.environ['PATH']}"
            environment = {**environment, "PATH": path, "TAKEN": str(self.notice(i))}
        return super()._run(i, command, environment, **how)

    def notice(self, i: int) -> Path:
        """The file that says that machine i is taken back."""
        return self.folder / f"taken{i}"


def leaves(hosts: Hosts, run: Training, seconds: float) -> None:
    """Host 2 is told to go: a checkpoint, a group without it, and its node ends within so many seconds."""
    run.until(lambda: run.says("resize 2 -> 1"))
    assert run.says(f"node {hosts.address(2)} was told to go: saving a checkpoint, then going on without it")
    assert run.says(": 0 samples lost, 0 steps repeated, from the checkpoint in storage")
    try:
        hosts._nodes[2].wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail("it would have been killed")
    result = run.finished()
    assert (result["restarts"], result["resizes"], result["steps_repeated"]) == (0, 1, 0)


FLAGS = ("--cluster.workers", "1..2", "--train.epochs", "20")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_pod_that_is_told_to_end_is_left_after_a_checkpoint(home, tmp_path):
    with Pods(cpus=(0, 1, 1)) as pods, (tmp_path / "log").open("w") as log:
        run = Training(pods, home, 0, log, *FLAGS)
        pods.first(2).send_signal(signal.SIGTERM)
        leaves(pods, run, worker_pod()["terminationGracePeriodSeconds"])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_machine_that_is_taken_back_is_left_after_a_checkpoint(home, tmp_path):
    with SpotMachines(cpus=(0, 1, 1)) as machines, (tmp_path / "log").open("w") as log:
        run = Training(machines, home, 0, log, *FLAGS)
        machines.notice(2).touch()
        leaves(machines, run, 120)
