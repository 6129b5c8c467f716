"""How a job ended, as an exit code, and whether submitting its command again helps. Pure."""

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.errors import ClusterError

if TYPE_CHECKING:
    from orchestrator.cluster.jobs import Job

KILLED = 128 + signal.SIGKILL
CLUSTER = ClusterError.exit_code
# Ray's names for a driver that never ran: the same command would meet the same.
NEVER = (
    "RUNTIME_ENV_SETUP_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE",
    "JOB_ENTRYPOINT_COMMAND_START_ERROR",
)


@dataclass(frozen=True)
class Ending:
    """code: to exit with. again: whether the same command, submitted once more, goes on. why: for people."""

    code: int
    again: bool
    why: str


def judge(job: "Job | None") -> Ending:
    """What the end of a job means; None is a job that the server knows no more.

    Again: a driver that is gone without a word of its own, with the head, with its node, or killed (the kernel does
    that where memory runs out). Not again: a code of the driver's own. 2, 3 and 5 ask for a change; 4 has already
    waited as long as its settings say, and one that lost its run to another driver must not come back; 130 and 143
    were asked to stop.

        ended                    exit code                again
        SUCCEEDED                0                        no
        STOPPED                  130, SIGTERM: 143        no
        FAILED, driver's code    that one                 137 alone
        FAILED, never ran        4                        no
        FAILED, driver was lost  4                        yes
        no such job any more     4                        yes
    """
    if job is None:
        return Ending(CLUSTER, True, "the head was lost: the server knows this job no more")
    if job.status == "SUCCEEDED":
        return Ending(0, False, "it has finished")
    if job.status == "STOPPED":  # Ray does not keep its driver's code; this is the signal that it was sent
        gently = job.env_vars.get("RAY_JOB_STOP_SIGNAL", "SIGINT") == "SIGINT"
        return Ending(
            128 + (signal.SIGINT if gently else signal.SIGTERM), False, "it was stopped; the same command goes on"
        )
    if job.exit_code is not None:
        return _of_driver(job.exit_code if job.exit_code >= 0 else 128 - job.exit_code)
    if job.error in NEVER:
        return Ending(CLUSTER, False, f"it never started ({job.error}): {_last_line(job.message)}")
    return Ending(CLUSTER, True, f"its driver was lost ({job.error or 'no reason is known'})")


def _of_driver(code: int) -> Ending:
    if code == KILLED:
        return Ending(code, True, f"its driver was killed (exit code {code})")
    return Ending(code, False, f"it ended with exit code {code}")


def _last_line(message: str) -> str:
    return (message.strip().splitlines() or ["Ray gives no reason"])[-1].strip()
