"""Sees a command through on a cluster: submits it, follows its log, and submits it again where the cluster lost it."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.cluster.jobs import Away, Job, Jobs, NoTail
from orchestrator.ending import Ending, judge
from orchestrator.submission import Submission, next_id, run_of
from pipelines.errors import ClusterError, ConfigError

Answer = TypeVar("Answer")
PAUSE_S = 1.0
SHOWN = 5  # ids in a message


class Screen(Protocol):
    """What a person sees."""

    def say(self, line: str) -> None:
        """A line of our own."""

    def write(self, text: str) -> None:
        """Words of a job, as they come."""


class Log:
    """A job's log on the screen: each character once, however often it is read from its beginning again."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._shown = screen, 0

    def show(self, chunks: Iterable[str]) -> None:
        """One reading, as far as it comes."""
        position = 0
        for chunk in chunks:
            new = chunk[max(0, self._shown - position) :]
            position += len(chunk)
            self._shown = max(self._shown, position)
            if new:
                self._screen.write(new)


class Submitter:
    """One command, one job after the other. id: of the newest one, empty before there is one; taken: whether the
    cluster is known to have it.

    wait_s: how long a server that does not answer is waited for.
    """

    def __init__(
        self,
        jobs: Jobs,
        screen: Screen,
        wait_s: float,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs, self._screen, self._wait_s = jobs, screen, wait_s
        self._pause, self._clock = pause, clock
        self.id, self.taken, self._ids = "", False, set[str]()

    def submit(self, submission: Submission, package: Path) -> None:
        """Starts the first job. Raises ClusterError where one of its name runs now."""
        known = self._jobs.all()
        busy = [job for job in known if not job.ended and _same(job, submission)]
        if busy:
            raise ClusterError(
                f"job {busy[0].id} ({busy[0].status.lower()}) has the name {submission.name} now; follow it with "
                f"--follow {busy[0].id}, end it with `ray job stop {busy[0].id}`, or give another name"
            )
        id = self._next(submission, known)
        try:
            self._send(submission, package, id)
        except Away as error:
            raise ClusterError(f"{error}; whether it has taken job {id} is told by --follow {id}") from error
        self._screen.say(f"job {id} is submitted to {self._jobs.address}")
        if id != submission.id:
            self._screen.say(f"  {submission.id} was the id of an earlier job")

    def see_through(self, submission: Submission, package: Path, retries: int) -> int:
        """Follows the job that was submitted, and those that take its place; the exit code of the last."""
        for left in range(retries, -1, -1):
            ending = self._follow()
            if not ending.again:
                break
            if not left:
                self._screen.say(f"job {self.id} is not submitted again: --retries {retries} are used up; the same "
                                 f"command goes on with the run")  # fmt: skip
                break
            self._again(submission, package, left)
        return ending.code

    def follow(self, id: str) -> int:
        """Follows a job to its end; its exit code. Raises ConfigError where there is none of that id."""
        if self._jobs.find(id) is None:
            newest = [job.id for job in self._jobs.all()][:SHOWN]
            raise ConfigError(f"--follow is {id}, and the cluster at {self._jobs.address} has no such job; it has "
                              f"{', '.join(newest) or 'none'}")  # fmt: skip
        self.id, self.taken = id, True
        return self._follow().code

    # -- one job -----------------------------------------------------------------------------------------------------

    def _next(self, submission: Submission, known: Iterable[Job]) -> str:
        """An id that no job has, nor had one of ours on a head that is lost."""
        id = next_id(submission.id, self._ids | {job.id for job in known})
        self._ids.add(id)
        return id

    def _send(self, submission: Submission, package: Path, id: str) -> None:
        environment = submission.environment
        self.id, self.taken = id, False  # the cluster may have it before its answer comes
        self._jobs.submit(id, submission.entrypoint, package, environment.env_vars, environment.rest,
                          submission.metadata, submission.resources)  # fmt: skip
        self.taken = True

    def _follow(self) -> Ending:
        log, said, unheard = Log(self._screen), {""}, ""
        while True:
            before, unheard = unheard, self._listen(log)
            job = self._patiently(lambda: self._jobs.find(self.id))
            if job is None or job.ended:
                return self._end(job, log)
            waits = f"job {self.id} has not started yet: {job.message}" if job.status == "PENDING" else ""
            for line in (before and unheard, waits):  # once alone it is a server that was away
                if line not in said:
                    self._screen.say(line)
                said.add(line)
            self._pause(PAUSE_S)

    def _listen(self, log: Log) -> str:
        """Shows the log for as long as it comes; a line on why it does not come."""
        try:
            log.show(self._jobs.tail(self.id))
        except NoTail as error:
            return (
                f"the log of job {self.id} does not come as it is written: {error}; it is shown when the job has ended"
            )
        return ""

    def _end(self, job: Job | None, log: Log) -> Ending:
        """What it means that the job has ended, its last words shown: they may not have come."""
        if job:
            try:
                log.show([self._jobs.log(self.id)])
            except Away as error:
                self._screen.say(f"the end of its log may be missing: {error}")
        ending = judge(job)
        self._screen.say(f"job {self.id}: {ending.why}")
        return ending

    def _again(self, submission: Submission, package: Path, left: int) -> None:
        """The same command once more, as soon as the server takes it."""
        self._screen.say(f"the same command is submitted again, {left - 1} more times at most; it goes on from "
                         f"what it has saved")  # fmt: skip
        lost = self.id

        def once() -> None:
            if self.id == lost:
                self._send(submission, package, self._next(submission, self._jobs.all()))
            elif not self._jobs.find(self.id):
                self._send(submission, package, self.id)
            self.taken = True  # also where only the answer was lost

        self._patiently(once)
        self._screen.say(f"job {self.id} is submitted to {self._jobs.address}")

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """What the server answers, as soon as it does. Raises ClusterError after wait_s."""
        began, away = self._clock(), False
        while True:
            try:
                answer = ask()
            except Away as error:
                self._wait(error, self._clock() - began, away)
                away = True
                continue
            if away:
                self._screen.say(f"{self._jobs.address} answers again, after {self._clock() - began:.0f} s")
            return answer

    def _wait(self, error: Away, waited: float, told: bool) -> None:
        if waited >= self._wait_s:
            raise ClusterError(
                f"{error}, for {waited:.0f} s (--wait-seconds); job {self.id} may go on: follow it with --follow "
                f"{self.id}, or give the same command again when the cluster is back"
            ) from error
        if not told:
            self._screen.say(f"{error}; waiting for it, {self._wait_s:.0f} s at most")
        self._pause(PAUSE_S)


def _same(job: Job, submission: Submission) -> bool:
    """Whether a job would be in the way of this one."""
    return job.id == submission.id or run_of(job.entrypoint) == submission.name
