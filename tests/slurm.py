"""A stand-in for Slurm on hosts of this machine: as much of it as infra/slurm uses, with ends that really end.

    with Slurm(2) as slurm:
        job = slurm.sbatch(script, ["python", "-m", "jobs.train", ...], environment)
        slurm.limit(job, seconds=30)  # its notice now, as by --signal=B:USR1; its end then
        slurm.wait(job)

What is copied was seen with Slurm 22.05: the batch script runs on the first host from a copy, `srun` one task a host;
an end is SIGTERM for all processes of all steps and for the batch script, SIGKILL after `kill_wait` seconds; a job
that is put back while it ends begins again with the same line, environment and number, and SLURM_RESTART_COUNT.
Other than there, it does not wait two minutes for that. `srun`, `scontrol` and `squeue` in a job ask this process.
"""

import argparse
import json
import os
import re
import shutil
import socketserver
import stat
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM, SIGUSR1, Signals

import psutil

from tests.machines import Machines
from tests.machines import supported as supported

POLL_S = 0.1
# What a program was asked goes to the stand-in; what it says and its exit code come back.
PROGRAM = """#!{python}
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({socket!r})
asked.sendall(json.dumps({{"argv": [{name!r}, *sys.argv[1:]], "environment": dict(os.environ)}}).encode() + b"\\n")
said, code = json.loads(asked.makefile().readline())
print(said, end="")
sys.exit(code)
"""


@dataclass
class Job:
    """One job, over all its submissions."""

    id: int
    line: Sequence[str]
    environment: Mapping[str, str]
    output: Path
    state: str = "RUNNING"
    reason: str = "None"
    restarts: int = 0
    steps: int = 0
    code: int | None = None  # of the last submission
    again: bool = False  # it was put back
    batch: subprocess.Popen | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    ending: threading.Lock = field(default_factory=threading.Lock)  # held by whoever ends it


class Slurm(Machines):
    """Hosts with a Slurm for one user, while the context lasts. cpus: of each host."""

    def __init__(self, count: int, cpus: int = 1, kill_wait: float = 30.0) -> None:
        super().__init__(count)
        self.cpus, self.kill_wait = cpus, kill_wait
        self.jobs: dict[int, Job] = {}
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Turns the hosts on, and listens to the programs."""
        for i in range(self.count):
            self.boot(i)
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        address = str(self.folder / "slurm")
        slurm = self

        class Asked(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                words = json.loads(self.rfile.readline())
                answer = slurm.answer(words["argv"], words["environment"])
                with suppress(BrokenPipeError):
                    self.wfile.write(json.dumps(answer).encode() + b"\n")

        self._server = socketserver.ThreadingUnixStreamServer(address, Asked)
        self._server.daemon_threads = True
        self._start_thread(self._server.serve_forever)
        for name in ("srun", "scontrol", "squeue"):
            text = PROGRAM.format(python=shutil.which("python3"), socket=address, name=name)
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(stat.S_IRWXU)

    def __exit__(self, *_):
        for job in self.jobs.values():
            job.again = False
        with ExitStack() as stack:
            stack.callback(super().__exit__, *_)
            stack.callback(self._server.server_close)
            stack.callback(self._server.shutdown)
        for thread in self._threads:
            thread.join()

    # -- what a user does --------------------------------------------------------------------------------------------

    def sbatch(self, script: Path, line: Sequence[str], environment: Mapping[str, str]) -> Job:
        """Starts a job on all hosts, at once."""
        number = len(self.jobs) + 1
        job = self.jobs[number] = Job(number, list(map(str, line)), environment, self.folder / f"job-{number}.out")
        copy = self.disk(0) / "slurm_script"
        shutil.copy(script, copy)
        self._start_thread(self._live, job)
        return job

    def scancel(self, job: Job) -> None:
        """As `scancel JOB`: returns when nothing of it is left."""
        self._end(job, job.restarts, "None")

    def limit(self, job: Job, seconds: float) -> None:
        """Its time limit is `seconds` from now, and the notice of --signal=B:USR1 comes at once."""
        self._signal_batch(job, SIGUSR1)
        timer = threading.Timer(seconds, self._end, (job, job.restarts, "TimeLimit"))
        timer.daemon = True
        timer.start()

    def kill_all(self, job: Job) -> None:
        """Every process of it at once, as when KillWait has passed: nobody is told, nothing can be saved."""
        self._signal_batch(job, SIGKILL)  # first: it must not see its step end
        self._signal(job, SIGKILL)

    def wait(self, job: Job, seconds: float) -> int:
        """The exit code of its last submission. Raises TimeoutError with its output."""
        if not job.ended.wait(seconds):
            raise TimeoutError(job.output.read_text()[-4000:])
        assert job.code is not None
        return job.code

    # -- what the programs do ----------------------------------------------------------------------------------------

    def answer(self, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
        """What a program in a job prints, and its exit code."""
        job = self.jobs[int(environment["SLURM_JOB_ID"])]
        match argv:
            case ["srun", *words]:
                return "", self._srun(job, words, environment)
            case ["squeue", "--noheader", _, "--format=%T %r"]:
                return f"{job.state} {job.reason}\n", 0
            case ["scontrol", "show", "hostnames", _]:
                return "".join(f"host{i}\n" for i in range(self.count)), 0
            case ["scontrol", "requeue", number] if int(number) == job.id:
                job.again = True
                self._start_thread(self._end, job, job.restarts, "None")
                return "", 0
        return f"{argv[0]}: the stand-in does not know {argv[1:]}\n", 1

    def _srun(self, job: Job, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Highest exit code of its tasks. --wait: the others are killed so many seconds after the first one's end."""
        own, command = _options(words)
        step, job.steps = job.steps, job.steps + 1
        tasks = [self._task(job, i, step, own, command, environment) for i in range(own.nodes)]
        _until(lambda: any(task.poll() is not None for task in tasks))
        if own.wait and not _until(lambda: all(task.poll() is not None for task in tasks), own.wait):
            self._signal(job, SIGKILL, step)
        return max(task.wait() for task in tasks)

    def _task(self, job, i, step, own, command, environment) -> subprocess.Popen:
        told = {
            "SLURM_PROCID": i, "SLURM_NODEID": i, "SLURM_LOCALID": 0, "SLURM_STEP_ID": step, "SLURM_NTASKS": own.nodes,
            "SLURM_CPUS_PER_TASK": own.cpus_per_task, "SLURMD_NODENAME": f"host{i}",
        }  # fmt: skip
        environment = {**environment, **{name: str(value) for name, value in told.items()}}
        return self._on(i, job, ["env", "--default-signal", *command], environment)

    # -- a job's life ------------------------------------------------------------------------------------------------

    def _live(self, job: Job) -> None:
        while True:
            job.state, job.reason, job.steps, job.again = "RUNNING", "None", 0, False
            line = ["bash", f"{self.own}/slurm_script", *job.line]
            job.batch = self._on(0, job, line, self._environment(job))
            job.batch.wait()
            with job.ending:
                self._signal(job, SIGKILL)
                job.restarts += 1
            if not job.again:
                break
        job.code = job.batch.returncode
        job.ended.set()

    def _environment(self, job: Job) -> dict[str, str]:
        told = {
            "SLURM_JOB_ID": job.id, "SLURM_JOB_NUM_NODES": self.count, "SLURM_CPUS_ON_NODE": self.cpus,
            "SLURM_JOB_NODELIST": f"host[0-{self.count - 1}]", "SLURMD_NODENAME": "host0",
            **({"SLURM_RESTART_COUNT": job.restarts} if job.restarts else {}),
        }  # fmt: skip
        own = self.environment()
        path = {"PATH": f"{self.bin}{os.pathsep}{own['PATH']}"}
        return own | path | dict(job.environment) | {name: str(value) for name, value in told.items()}

    def _end(self, job: Job, submission: int, reason: str) -> None:
        """SIGTERM for all of it, SIGKILL for what is left after kill_wait. Nothing where that submission is over."""
        with job.ending:
            if job.restarts != submission:
                return
            job.state, job.reason = "COMPLETING", reason
            for number in (SIGCONT, SIGTERM):
                self._signal(job, number)
                self._signal_batch(job, number)
            with suppress(subprocess.TimeoutExpired):
                job.batch.wait(self.kill_wait)
            self._signal(job, SIGKILL)
            self._signal_batch(job, SIGKILL)

    # -- processes ---------------------------------------------------------------------------------------------------

    def _on(self, i: int, job: Job, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
        with job.output.open("ab") as out:
            return self._run(i, command, environment, stdout=out, stderr=subprocess.STDOUT)

    def _signal(self, job: Job, number: Signals, step: int | None = None) -> None:
        """To all processes of all its steps, or of one, by what is in their environment: as Slurm by its cgroups."""
        for i in range(self.count):
            for process in self.processes(i):
                with suppress(psutil.Error):
                    found = process.environ().get("SLURM_STEP_ID")
                    if found is not None and step in (None, int(found)):
                        process.send_signal(number)

    def _signal_batch(self, job: Job, number: Signals) -> None:
        with suppress(psutil.Error, ValueError):
            self.process(job.batch).send_signal(number)

    def _start_thread(self, what, *words) -> None:
        thread = threading.Thread(target=what, args=words, daemon=True)
        self._threads.append(thread)
        thread.start()


def _options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Of srun; those that are not known are refused."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("nodes", "ntasks-per-node", "cpus-per-task", "kill-on-bad-exit", "wait"):
        parser.add_argument(f"--{name}", type=int, default=0)
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    return parser.parse_args(words[:first]), list(words[first:])


def sbatch_options(script: Path) -> dict[str, str]:
    """The #SBATCH lines: NAME -> value."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))


def _until(true, seconds: float = float("inf")) -> bool:
    """Whether it was true within so many seconds."""
    limit, pause = time.monotonic() + seconds, threading.Event()
    while not (found := true()) and time.monotonic() < limit:
        pause.wait(POLL_S)
    return bool(found)
