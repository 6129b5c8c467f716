"""The Slurm job: what it decides, with programs that only tell; and real runs on two hosts, cut, put back, finished."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.slurm import Job, Slurm, sbatch_options, supported

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "infra" / "slurm" / "skiplane.sbatch"
FACTS = ("weights_sha256", "data_digest", "eval_digest", "steps", "top1", "train_loss")

# -- what it decides ---------------------------------------------------------------------------------------------------

PROGRAMS = {  # one host, no Ray, and a Slurm that takes note
    "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_PROCID=0 exec env --default-signal "$@"',
    "ray": 'echo "$*" >>"$TOLD/ray"; ${RAY_FAILS:+exit 0}; while [[ "$1" != -- ]]; do shift; done; shift; exec "$@"',
    "squeue": 'cat "$TOLD/fate"',  # and its failure, where there is no such file
    "scontrol": '[[ "$1" != show ]] || exec echo localhost; echo "$*" >>"$TOLD/scontrol"; exit "${REFUSES:-0}"',
}
CHECKPOINT = 'mkdir -p "$RUN/checkpoints/step-1"; touch "$RUN/checkpoints/step-1/manifest.json"'
# Says that it is there, then waits for SIGINT or SIGTERM as a driver does, and ends as that does.
DRIVER = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
open(os.environ["TOLD"] + "/ready", "w").close()
signal.pause()
"""
COLD = "import os; os.mkfifo(os.environ['TOLD'] + '/ready'); open(os.environ['TOLD'] + '/ready').read()"


class Place:
    """Where a job is tried: programs in `bin`, what they were asked in `told`, a home, runs."""

    def __init__(self, folder: Path) -> None:
        self.told, self.home, self.bin, self.runs = (folder / name for name in ("told", "home", "bin", "runs"))
        for made in (self.told, self.home, self.bin):
            made.mkdir()
        for name, text in PROGRAMS.items():
            (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.bin / name).chmod(0o700)
        self.own = self.home / ".skiplane" / "slurm" / "7"  # the job's folder
        self.fate("RUNNING None")

    def environment(self, changes: Mapping[str, object]) -> dict[str, str]:
        """As Slurm gives it, changed; "" unsets."""
        told = {
            "HOME": self.home, "TOLD": self.told, "RUN": self.runs / "a", "SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 1,
            "SLURM_CPUS_ON_NODE": 4, "SLURM_JOB_NODELIST": "host0",
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        return {name: str(value) for name, value in (told | dict(changes)).items() if value != ""}

    def start(self, *command: str, line: str | None = None, **changes: object) -> subprocess.Popen[str]:
        """A submission whose job runs `command`."""
        words = f"--name a --cluster.storage {self.runs}" if line is None else line
        return subprocess.Popen(["bash", str(SCRIPT), *command, *words.split()], env=self.environment(changes),
                                text=True, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, script: str, **changes: object) -> tuple[int, str]:
        """A submission whose job runs a line of bash: its exit code, and stderr."""
        job = self.start("bash", "-c", script, **changes)
        said = job.communicate(timeout=60)[1]
        return job.returncode, said

    def drive(self, **changes: object) -> subprocess.Popen[str]:
        """A submission with a driver, which is ready."""
        job = self.start(sys.executable, "-c", DRIVER, **changes)
        return until((self.told / "ready").exists, job)

    def fate(self, text: str) -> None:
        """What squeue says of the job from now on."""
        (self.told / "fate").write_text(text + "\n")

    def asked(self, program: str) -> list[str]:
        """What a program was asked."""
        file = self.told / program
        return file.read_text().splitlines() if file.exists() else []


def until(true, job: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """The job, once it is true."""
    limit = time.monotonic() + 60
    while not true():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    return job


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    """The job's exit code, and stderr."""
    said = job.communicate(timeout=60)[1]
    return job.returncode, said


DISK = Path("/tmp/skiplane-7")  # the job's, for Ray's files


@pytest.fixture
def place(tmp_path):
    yield Place(tmp_path)
    shutil.rmtree(DISK, ignore_errors=True)  # a job that Slurm ends leaves it


BACK = ["requeue 7"]


def test_the_lines_that_slurm_reads():
    assert sbatch_options(SCRIPT) == {
        "job-name": "skiplane", "nodes": "2", "gpus-per-node": "8", "mem": "0", "time": "24:00:00",
        "signal": "B:USR1@180", "output": "skiplane-%j.out", "ntasks-per-node": "1", "exclusive": "", "requeue": "",
        "open-mode": "append",
    }  # fmt: skip


def test_a_command_that_ends_well_ends_the_job_and_leaves_nothing(place):
    modes = 'stat -c %a "$RAY_AUTH_TOKEN_PATH" "$RAY_TMPDIR" >"$TOLD/modes"'
    assert place.run(f'env >"$TOLD/env"; {modes}; wc -c <"$RAY_AUTH_TOKEN_PATH" >"$TOLD/length"') == (0, "")
    environment = dict(line.split("=", 1) for line in place.asked("env") if "=" in line)
    assert (environment["RAY_ADDRESS"], environment["RAY_AUTH_MODE"]) == ("127.0.0.1:6379", "token")
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(place.own / "token")
    assert environment["RAY_health_check_period_ms"] == "1000"  # of infra/ray.env
    assert (place.asked("modes"), place.asked("length")) == (["600", "700"], ["65"])
    assert place.asked("scontrol") == []
    assert not place.own.exists()
    assert not DISK.exists()


def test_ray_has_the_nodes_cpus_fixed_ports_and_its_dashboard_on_loopback(place):
    place.run("true", SLURM_JOB_NUM_NODES=3)
    [line] = place.asked("ray")
    ports = set(re.findall(r"--[a-z-]+-port=(\d+)", (ROOT / "infra" / "start.sh").read_text())) - {"6379", "10001"}
    assert set(re.findall(r"--[a-z-]+-port=(\d+)", line)) == ports
    assert line.startswith("symmetric-run --address 127.0.0.1:6379 --min-nodes 3 ")
    assert " --num-cpus=4 " in line
    assert " --dashboard-host=127.0.0.1 " in line


@pytest.mark.parametrize("code", [1, 2, 3, 5, 130, 137])
def test_a_command_that_cannot_go_on_ends_the_job(place, code):
    assert place.run(f"exit {code}") == (code, "")
    assert (place.asked("scontrol"), place.own.exists()) == ([], False)


@pytest.mark.parametrize("code", [4, 143])
def test_a_cluster_that_failed_is_tried_again_once_or_as_long_as_the_run_gets_on(place, code):
    for script in (f"exit {code}", f"{CHECKPOINT}; exit {code}", f"exit {code}"):
        assert place.run(script) == (code, "")
    assert place.asked("scontrol") == BACK * 3
    got, said = place.run(f"exit {code}")
    assert (got, said) == (code, f"error: two submissions in a row left no checkpoint in {place.runs}/a; give the job "
                                 f"more --time; the same sbatch line goes on with the run\n")  # fmt: skip
    assert (place.asked("scontrol"), place.own.exists()) == (BACK * 3, False)


def test_a_checkpoint_of_an_earlier_submission_is_no_progress(place):
    place.run(f"{CHECKPOINT}; exit 4")
    codes = [place.run("exit 4")[0] for _ in range(3)]
    assert (codes, place.asked("scontrol")) == ([4, 4, 4], BACK * 3)  # the third one was not put back


def test_a_ray_that_does_not_start_is_a_cluster_that_failed(place):
    """It is tried three times; `ray symmetric-run` itself ends with 0 then."""
    assert place.run("exit 0", RAY_FAILS=1) == (4, "")
    assert (len(place.asked("ray")), place.asked("scontrol")) == (3, BACK)


def test_submissions_have_an_upper_bound(place):
    assert place.run(f"{CHECKPOINT}; exit 4", SLURM_RESTART_COUNT=8, SKIPLANE_SUBMISSIONS=10)[0] == 4
    got, said = place.run(f"{CHECKPOINT}; exit 4", SLURM_RESTART_COUNT=9, SKIPLANE_SUBMISSIONS=10)
    assert (got, place.asked("scontrol")) == (4, BACK)
    assert said.startswith("error: this was submission 10, and SKIPLANE_SUBMISSIONS allows 10; the same sbatch line")


def test_a_slurm_that_does_not_take_it_back_is_told(place):
    assert place.run("exit 4", REFUSES=1) == (
        4, "error: Slurm does not take the job back; the same sbatch line goes on with the run\n"
    )  # fmt: skip


def test_the_notice_stops_the_driver_as_ctrl_c_does_and_the_job_goes_back(place):
    job = place.drive()
    job.send_signal(signal.SIGUSR1)
    assert (ended(job), place.asked("scontrol")) == ((130, ""), BACK)


def test_a_notice_before_the_driver_has_begun_keeps_it_from_beginning(place):
    """Ray takes its time: it waits until this test writes."""
    (place.bin / "ray").write_text(f'#!/bin/bash\n{sys.executable} -c "{COLD}"; shift 2\n' + PROGRAMS["ray"])
    job = until((place.told / "ready").exists, place.start("touch", str(place.told / "began")))
    job.send_signal(signal.SIGUSR1)
    until((place.own / "stop").exists, job)
    (place.told / "ready").write_text("")
    assert (ended(job), place.asked("scontrol")) == ((130, ""), BACK)
    assert not (place.told / "began").exists()


def test_a_slurm_that_is_too_busy_to_answer_does_not_keep_the_job_from_going_back(place):
    """At a limit many jobs end at once."""
    job = place.drive()
    (place.told / "fate").unlink()
    job.send_signal(signal.SIGUSR1)
    code, said = ended(job)
    assert (code, place.asked("scontrol")) == (130, BACK), said


def test_a_job_that_was_cancelled_or_not_is_not_put_back_unasked(place):
    (place.told / "fate").unlink()
    assert place.run("exit 143") == (143, "")
    assert place.asked("scontrol") == []


def test_a_folder_that_somebody_else_made_is_not_used(place):
    """Who had a job on the node before may have made it, and could then change this job's code."""
    DISK.mkdir()
    DISK.chmod(0o777)
    code, said = place.run('touch "$TOLD/ran"')
    assert (code, (place.told / "ran").exists()) == (4, False)
    assert f"error: {DISK} on " in said


def test_a_users_interrupt_stops_the_run_for_good(place):
    """scancel --batch --signal=INT."""
    job = place.drive()
    job.send_signal(signal.SIGINT)
    assert (ended(job), place.asked("scontrol"), place.own.exists()) == ((130, ""), [], False)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_cancelled_job_does_not_go_back_not_even_while_it_stops(place, noticed):
    job = place.drive()
    place.fate("COMPLETING None")
    if noticed:
        job.send_signal(signal.SIGUSR1)
    job.send_signal(signal.SIGTERM)
    os.kill(int((place.own / "driver").read_text()), signal.SIGTERM)
    code, said = ended(job)
    assert code in ((130, 143) if noticed else (143,))  # which of two signals the driver took
    assert (said, place.asked("scontrol"), place.own.exists()) == ("", [], False)


def test_a_limit_that_comes_first_puts_the_job_back_at_once(place):
    """Slurm kills what is left soon, the script too; so it does not wait for a driver that still saves."""
    job = place.drive()
    driver = int((place.own / "driver").read_text())
    place.fate("COMPLETING TimeLimit")
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 4
    os.kill(driver, signal.SIGTERM)  # it still waits
    assert (ended(job), place.asked("scontrol")) == ((4, ""), BACK)


def test_a_limit_that_is_seen_after_the_command_has_ended_puts_the_job_back(place):
    assert place.run('echo "COMPLETING TimeLimit" >"$TOLD/fate"; kill -KILL $$')[0] == 137
    assert place.asked("scontrol") == BACK


def test_secrets_come_from_a_private_file_and_what_was_set_before_wins(place):
    (place.home / ".skiplane").mkdir()
    file = place.home / ".skiplane" / "secrets.env"
    file.write_text("AWS_ACCESS_KEY_ID=file\nMLFLOW_TRACKING_URI=file\n")
    file.chmod(0o600)
    script = 'echo "$AWS_ACCESS_KEY_ID $MLFLOW_TRACKING_URI" >"$TOLD/seen"'
    assert place.run(script, MLFLOW_TRACKING_URI="set") == (0, "")
    assert place.asked("seen") == ["file set"]
    file.chmod(0o640)
    assert place.run("true") == (
        2, f"error: SKIPLANE_SECRETS is {file}, of mode 640, which lets others read what is secret; chmod 600 it, and "
           f"make it anew if others were here\n"
    )  # fmt: skip


def test_it_refuses_outside_of_the_repository(place):
    done = subprocess.run(["bash", SCRIPT, "true"], env=place.environment({}), cwd=place.home, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"error: {place.home} is not the repository's root; submit from there")


def test_a_token_of_ones_own_is_taken_where_nobody_else_reads_it(place):
    file = place.home / "token"
    file.write_text("t" * 64)
    file.chmod(0o600)
    assert place.run('[[ "$(cat "$RAY_AUTH_TOKEN_PATH")" == ttt* ]]', RAY_AUTH_TOKEN_PATH=file) == (0, "")
    assert file.exists()
    file.chmod(0o604)
    code, said = place.run("true", RAY_AUTH_TOKEN_PATH=file)
    assert (code, place.own.exists()) == (2, False)
    assert said.startswith(f"error: RAY_AUTH_TOKEN_PATH is {file}, of mode 604, which lets others read")


def test_a_password_that_others_can_read_is_refused(place):
    (place.home / ".mlflow").mkdir()
    (place.home / ".mlflow" / "credentials").write_text("[mlflow]\n")
    (place.home / ".mlflow" / "credentials").chmod(0o644)
    code, said = place.run("true")
    assert (code, said.split(",")[0]) == (2, f"error: MLflow's password is {place.home}/.mlflow/credentials")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SLURM_JOB_ID": ""}, "this is no Slurm job; submit it: sbatch infra/slurm/skiplane.sbatch python"),
        ({"line": "--cluster.storage /runs"}, "--name is not in the line; give the run one"),
        ({"line": "--name a"}, "--cluster.storage is ''; name a folder that all nodes see, from / on, or a bucket"),
        ({"line": "--name a --cluster.storage=runs"}, "--cluster.storage is 'runs'; name a folder that all nodes see"),
        ({"SKIPLANE_DISK": "/scratch/local/of/this/node/alone"}, "SKIPLANE_DISK is /scratch/local/of/this/node/alone,"),
        ({"RAY_AUTH_TOKEN": "t"}, "RAY_AUTH_TOKEN is set, and Slurm's tables would show it; unset it"),
        ({"SKIPLANE_SECRETS": "/no/such"}, "SKIPLANE_SECRETS is /no/such, which cannot be read"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled'; it must be token, or whoever reaches"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such"}, "RAY_AUTH_TOKEN_PATH is /no/such, where no token is; unset it"),
        ({"PATH": "/usr/bin:/bin"}, "ray is not on PATH; activate the environment, then submit"),
    ],
)
def test_it_refuses_in_a_sentence_before_anything_starts(place, changes, said):
    code, heard = place.run('touch "$TOLD/began"', **changes)
    assert (code, heard.count("\n")) == (2, 1)
    assert heard.startswith(f"error: {said}")
    assert not (place.told / "began").exists()


# -- real runs on two hosts --------------------------------------------------------------------------------------------

SECONDS = 900.0  # that one submission may take on two slow cores, beside others


class Site(Slurm):
    """Two hosts with a Slurm, digits in `shared`, and a line that trains on both."""

    def submit(self, name: str) -> Job:
        """The line of run `name`."""
        settings = {
            "recipe": "digits-quick", "name": name, "data.root": self.shared / "digits", "cluster.workers": 2,
            "cluster.storage": self.shared / "runs", "tracking.uri": "off", "train.epochs": 20,
        }  # fmt: skip
        words = [word for setting, value in settings.items() for word in (f"--{setting}", str(value))]
        own = {"SKIPLANE_HOME": str(self.shared / "home"), "SKIPLANE_DISK": str(self.own), "OMP_NUM_THREADS": "1"}
        return self.sbatch(SCRIPT, ["python", "-m", "jobs.train", *words], own)

    def step(self, name: str) -> int:
        """Of the run's newest checkpoint; 0 where there is none."""
        found = (self.shared / "runs" / name / "checkpoints").glob("step-*/manifest.json")
        return max((int(manifest.parent.name.split("-")[1]) for manifest in found), default=0)

    def advance(self, job: Job, name: str) -> None:
        """Until the run has a newer checkpoint than now."""
        before, limit = self.step(name), time.monotonic() + SECONDS
        while self.step(name) <= before:
            assert not job.ended.wait(0.1), job.output.read_text()[-4000:]
            assert time.monotonic() < limit, job.output.read_text()[-4000:]

    def over(self, job: Job, submission: int) -> bool:
        """Whether that submission ended in time."""
        limit = time.monotonic() + SECONDS
        while job.restarts == submission and time.monotonic() < limit:
            job.ended.wait(0.1)
        return job.restarts != submission

    def result(self, name: str) -> dict:
        """result.json of a run."""
        return json.loads((self.shared / "runs" / name / "result.json").read_text())

    def finished(self, name: str) -> bool:
        """Whether the run has come to its end."""
        file = self.shared / "runs" / name / "result.json"
        return file.exists() and self.result(name)["status"] == "finished"

    def facts(self, name: str) -> dict:
        """What has to be equal for runs that are."""
        return {fact: self.result(name)[fact] for fact in FACTS}


@pytest.fixture(scope="module")
def site(home):
    with Site(2, kill_wait=10) as slurm:
        shutil.copytree(home / "data" / "digits", slurm.shared / "digits")
        uncut = slurm.submit("uncut")
        assert slurm.wait(uncut, SECONDS) == 0, uncut.output.read_text()[-4000:]
        yield slurm


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.skipif(bool(supported()), reason=supported() or "hosts can be made")
def test_a_run_that_the_limit_cuts_goes_on_in_the_same_job_and_ends_with_the_uncut_runs_weights(site):
    job = site.submit("cut")
    for _ in range(2):
        site.advance(job, "cut")
        site.limit(job, seconds=120)
        assert site.over(job, job.restarts)
    assert site.wait(job, SECONDS) == 0, job.output.read_text()[-4000:]
    said = job.output.read_text()
    assert said.count("skiplane: the time limit is near, and the run has stopped") == 2
    assert len(re.findall(r"from epoch \d+ step \d+", said)) == 2
    assert job.restarts >= 3  # submissions: more where Ray did not come up in time
    assert site.result("cut")["status"] == "finished"
    assert site.facts("cut") == site.facts("uncut")
    assert not list((site.shared / "home" / "slurm").iterdir())
    assert [list(site.disk(i).glob("skiplane-*")) for i in range(2)] == [[], []]


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.skipif(bool(supported()), reason=supported() or "hosts can be made")
def test_a_cancelled_job_ends_and_one_that_was_killed_goes_on_when_it_is_submitted_again(site):
    job = site.submit("killed")
    site.advance(job, "killed")
    site.scancel(job)
    site.wait(job, SECONDS)
    assert (job.restarts, site.finished("killed")) == (1, False)
    job = site.submit("killed")
    site.advance(job, "killed")
    site.kill_all(job)
    site.wait(job, SECONDS)
    assert (job.restarts, site.finished("killed")) == (1, False)
    job = site.submit("killed")
    assert site.wait(job, SECONDS) == 0, job.output.read_text()[-4000:]
    assert site.facts("killed") == site.facts("uncut")
