"""The containers of infra/compose, without Docker: a training, a sweep, the run's page, and who is not let in."""

import base64
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests import browser
from tests.machines import supported
from tests.mlflow_servers import why_no_postgres
from tests.topology import Topology

WHY_NOT = supported() or why_no_postgres()
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "everything is here"),
]
HEAD = "http://127.0.0.1:8265"
SUBMIT = ("ray", "job", "submit", "--address", HEAD, "--runtime-env", "infra/runtime-env.yaml", "--working-dir", ".")
PLACE = (
    "--data.root",
    "s3://skiplane/data/digits",
    "--cluster.storage",
    "s3://skiplane/runs",
    "--data.cache",
    "/cache",
)
SMALL = ("--recipe", "digits-quick", "--model.width", "4")
TRAIN = ("python", "-m", "jobs.train", *SMALL, *PLACE, "--cluster.workers", "2", "--train.epochs", "2")
SPACE = ("--sweep.depth", "18,34", "--sweep.lr", "0.05", "--sweep.stop", "none")
SWEEP = ("python", "-m", "jobs.sweep", *SMALL, *PLACE, "--train.epochs", "1", *SPACE)
READ = """
import sys, boto3
print(boto3.client("s3").get_object(Bucket="skiplane", Key=sys.argv[1])["Body"].read().decode())
"""
WRONG = "f" * 64


@pytest.fixture(scope="module")
def up() -> Iterator[Topology]:
    """All services, and the digits in the store."""
    with Topology() as made:
        packed = made.run("head", ["python", "-m", "jobs.pack", "digits", "--out", "s3://skiplane/data/digits"])
        assert packed.returncode == 0, packed.stderr
        yield made


@pytest.fixture(scope="module")
def trained(up: Topology) -> str:
    """What a submitted training said."""
    submit = [
        "ray",
        "job",
        "submit",
        "--address",
        HEAD,
        "--runtime-env",
        "infra/runtime-env.yaml",
        "--working-dir",
        ".",
    ]
    done = up.run("head", [*submit, "--", *TRAIN, "--name", "a"])
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def result(up: Topology, name: str) -> dict:
    found = up.run("head", ["python", "-c", READ, f"runs/{name}/result.json"])
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def asked(url: str, *user: str) -> tuple[int, bytes]:
    """Status and body."""
    request = urllib.request.Request(url)
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(user).encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def page(up: Topology, url: str) -> str:
    """The same page for this side of the published port."""
    return url.replace("http://mlflow:5000", f"http://127.0.0.1:{up.published['mlflow']}")


def run_of(up: Topology, run_id: str) -> dict:
    """What MLflow has of it, once the journal is delivered: what is still on its way is waited for."""
    password, limit = up.secret("MLFLOW_AUTH_ADMIN_PASSWORD"), time.monotonic() + 60
    url = page(up, f"http://mlflow:5000/api/2.0/mlflow/runs/get?run_id={run_id}")
    while (found := json.loads(asked(url, "admin", password)[1])["run"])["info"]["status"] == "RUNNING":
        assert time.monotonic() < limit
        time.sleep(0.5)
    return found


# -- what works --------------------------------------------------------------------------------------------------------


def test_a_training_reads_and_writes_the_store_and_is_tracked(up: Topology, trained: str) -> None:
    done = result(up, "a")
    assert (done["status"], done["world_size"], done["epochs"], done["val_samples"]) == ("finished", 2, 2, 360)
    assert "data on worker: streamed shards are kept in /cache" in trained
    assert [line for line in trained.splitlines() if done["mlflow_url"] in line]
    run = run_of(up, done["mlflow_run_id"])
    assert run["info"]["status"] == "FINISHED"
    measured = {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}
    assert done["top1"] in measured.values()


def test_a_sweep_is_submitted_and_its_trials_are_tracked_below_it(up: Topology, trained: str) -> None:
    done = up.run("head", ["python", "-m", "jobs.submit", "--address", HEAD, "--", *SWEEP, "--name", "s"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = result(up, "s")
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished"]
    runs = [run_of(up, trial["mlflow_run_id"]) for trial in found["trials"]]
    assert [run["info"]["status"] for run in runs] == ["FINISHED", "FINISHED"]
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
    assert len({tag["mlflow.parentRunId"] for tag in tags}) == 1


def test_the_page_of_a_run_asks_for_the_password(up: Topology, trained: str) -> None:
    url = page(up, result(up, "a")["mlflow_url"])
    assert asked(url)[0] == 401
    assert asked(url, "admin", "wrong")[0] == 401
    assert asked(url, "admin", up.secret("MLFLOW_AUTH_ADMIN_PASSWORD"))[0] == 200


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")
def test_the_page_of_a_run_is_shown_to_whoever_has_the_password(up: Topology, trained: str) -> None:
    url = page(up, result(up, "a")["mlflow_url"])
    with browser.opened(url, "admin", up.secret("MLFLOW_AUTH_ADMIN_PASSWORD")) as shown:
        words = shown.until("document.body.innerText", lambda text: text and "Top-1" in text)
    assert "360 validation images" in words


@pytest.mark.parametrize("node", ["head", "worker"])
def test_nobody_else_reaches_the_sockets_and_the_code_of_jobs(up: Topology, trained: str, node: str) -> None:
    """Ray opens its own folder to everybody; the one around it is the user's."""
    there = "stat --format='%a %n' /tmp/skiplane-$(id -u); ls -d /tmp/skiplane-*/node/session_latest; ls -d /tmp/ray"
    user = up.own_values["SKIPLANE_UID"]
    done = up.run(node, ["sh", "-c", there])
    assert done.stdout.splitlines() == [
        f"700 /tmp/skiplane-{user}",
        f"/tmp/skiplane-{user}/node/session_latest",
    ]


# -- who is not let in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["python", "-m", "jobs.submit", "--address", HEAD, "--", *TRAIN, "--name", "t"], 4,
         rf"error: the cluster at {HEAD} refuses the token in /tmp/wrong; take the one that its `ray start` was.*"),
        ([*TRAIN, "--name", "t"], 4,
         r"error: RAY_ADDRESS is head:6379, and Ray there does not take this driver: .*; check that /tmp/wrong "
         r"\(RAY_AUTH_TOKEN_PATH\) is the token that its `ray start` was given, .*"),
    ],
    ids=["submit", "driver"],
)  # fmt: skip
def test_a_wrong_token_is_refused_in_a_sentence(up: Topology, command: list[str], code: int, said: str) -> None:
    up.run("head", ["sh", "-c", f"umask 077; echo {WRONG} > /tmp/wrong"])
    shell = {"RAY_AUTH_TOKEN_PATH": "/tmp/wrong", "RAY_ADDRESS": "head:6379"}
    done = up.run("head", command, **shell)
    assert done.returncode == code, done.stdout + done.stderr
    assert re.fullmatch(said, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


def test_a_node_with_a_wrong_token_does_not_join(up: Topology) -> None:
    up.run("worker", ["sh", "-c", f"umask 077; echo {WRONG} > /tmp/wrong"])
    line = ["infra/start.sh", "worker", "head:6379", "--block", "--temp-dir=/tmp/other"]
    done = up.run("worker", line, RAY_AUTH_TOKEN_PATH="/tmp/wrong")
    assert done.returncode == 1
    assert "AuthenticationError" in done.stderr
    assert "Authentication token is missing or incorrect." in done.stderr


def test_a_wrong_password_is_refused_in_a_sentence(up: Topology) -> None:
    wrong = ["env", "MLFLOW_TRACKING_PASSWORD=wrong"]
    done = up.run("head", [*wrong, *TRAIN, "--name", "p"], RAY_ADDRESS="head:6379")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: MLflow at http://mlflow:5000 does not take the password of user 'admin' \(status 401\); correct "
        r"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.*\n",
        done.stderr,
    )


def test_a_job_with_a_wrong_password_ends_with_that_sentence(up: Topology) -> None:
    """Before it trains. `ray job submit` ends with 1 whatever the job's own code was, and prints that."""
    done = up.run("head", [*SUBMIT, "--", "env", "MLFLOW_TRACKING_PASSWORD=wrong", *TRAIN, "--name", "j"])
    assert done.returncode == 1
    assert "error: MLflow at http://mlflow:5000 does not take the password of user 'admin' (status 401)" in done.stdout
    assert "failed with exit code 2" in done.stdout
