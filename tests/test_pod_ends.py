"""Real hosts: a pod that is told to end takes its leave, with the command and the seconds of infra/kubernetes."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from tests.hosts import Hosts, supported
from tests.test_notices import Training

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(supported()), reason=supported() or "hosts can be made")]
BASE = Path(__file__).parent.parent / "infra" / "kubernetes" / "base"


def worker_pod() -> dict:
    """The pod template of the workers."""
    cluster = yaml.safe_load((BASE / "raycluster.yaml").read_text())
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


@pytest.mark.long
def test_a_pod_that_is_told_to_end_is_left_after_a_checkpoint(home, tmp_path):
    with Pods(cpus=(0, 1, 1)) as pods, (tmp_path / "log").open("w") as log:
        run = Training(pods, home, 0, log, "--cluster.workers", "1..2", "--train.epochs", "20")
        pods.first(2).send_signal(signal.SIGTERM)
        run.until(lambda: run.says("resize 2 -> 1"))
        assert run.says(f"node {pods.address(2)} was told to go: saving a checkpoint, then going on without it")
        assert run.says(": 0 samples lost, 0 steps repeated, from the checkpoint in storage")
        try:
            pods._nodes[2].wait(worker_pod()["terminationGracePeriodSeconds"])
        except subprocess.TimeoutExpired:
            pytest.fail("the pod would have been killed")
        result = run.finished()
        assert (result["restarts"], result["resizes"], result["steps_repeated"]) == (0, 1, 0)
