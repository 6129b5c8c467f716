"""The server of infra/mlflow as it ships, against a real PostgreSQL and an S3 store; and what serve.sh refuses."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.mlflow_servers import ADMIN, PASSWORD, SHIPPED, MlflowServer, Postgres, why_no_postgres
from tests.servers import S3Server

ANNA, ANNAS = "anna", "another-long-password"
ROOT, FOLDER, API = Path(__file__).parent.parent, Path(sys.executable).parent, "/api/2.0/mlflow"
CLOSED = (
    *("/", "/version", "/metrics", "/graphql", "/signup", "/v1/traces", "/gateway/any", f"{API}/experiments/search"),
    *("/api/2.0/mlflow-artifacts/artifacts", "/ajax-api/3.0/jobs/", "/ajax-api/3.0/mlflow/assistant/config"),
)

# -- what serve.sh refuses ---------------------------------------------------------------------------------------------

SECRETS = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 64, "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}


def serve(changes: Mapping[str, str], shipped: bool = True) -> subprocess.CompletedProcess[str]:
    """serve.sh in mlflow.env, changed; a Python that only tells what it would run. "" unsets."""
    lines = [f"export {name}={value!r}" if value else f"unset {name}" for name, value in changes.items()]
    read = f"set -a; source {SHIPPED}/mlflow.env; set +a" if shipped else ":"
    script = "\n".join([read, *lines, f"PYTHON=echo exec bash {SHIPPED}/serve.sh"])
    return subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)


def test_it_starts_as_shipped_with_secrets_and_nothing_secret_on_the_command_line() -> None:
    done = serve(SECRETS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "-m mlflow server --app-name basic-auth\n"


@pytest.mark.parametrize("hosts", ["127.0.0.1:*,localhost:*", "*.example.org", "10.0.*:5000", "[::1]:5000,::1"])
def test_a_pattern_that_names_something_is_taken(hosts: str) -> None:
    """And pages that are named."""
    done = serve({**SECRETS, "MLFLOW_SERVER_ALLOWED_HOSTS": hosts, "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://*.b"})
    assert (done.returncode, done.stderr) == (0, "")


def test_without_passwords_only_on_this_machine() -> None:
    done = serve({"AUTHENTICATION": "none"})
    assert (done.returncode, done.stdout) == (0, "-m mlflow server\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MLFLOW_FLASK_SERVER_SECRET_KEY": ""}, "MLFLOW_FLASK_SERVER_SECRET_KEY is not set; put 32 random bytes"),
        ({"MLFLOW_BACKEND_STORE_URI": ""}, "MLFLOW_BACKEND_STORE_URI is not set; read mlflow.env first"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": ""}, "MLFLOW_ARTIFACTS_DESTINATION is not set; read mlflow.env first"),
        ({"MLFLOW_SERVER_ALLOWED_HOSTS": ""}, "MLFLOW_SERVER_ALLOWED_HOSTS is not set; read mlflow.env first"),
        ({"MLFLOW_SERVER_ALLOWED_HOSTS": "a.b, *"}, "MLFLOW_SERVER_ALLOWED_HOSTS is 'a.b, *'; name the hosts"),
        *(
            ({"MLFLOW_SERVER_ALLOWED_HOSTS": hosts}, f"MLFLOW_SERVER_ALLOWED_HOSTS is '{hosts}'; name the hosts")
            for hosts in ("*:5000", "**", "a.b,*:*", "*.*", "*, a.b", "?*:5000", "*.*:5000", "*5000")
        ),
        ({"MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "*"}, "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS is '*'; name the pages that"),
        ({"MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://a.b, *"}, "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS is 'https://a"),
        ({"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false"}, "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE is set"),
        ({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true"}, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION is 'true'; it must be"),
        ({"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": ""}, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION is ''; it must be false"),
        ({"MLFLOW_ENABLE_REMOTE_ASSISTANT": "1"}, "MLFLOW_ENABLE_REMOTE_ASSISTANT is '1'; it must be false"),
        ({"MLFLOW_ENABLE_AI_GATEWAY": "1"}, "MLFLOW_ENABLE_AI_GATEWAY is '1'; it must be false"),
        ({"MLFLOW_AUTH_CONFIG_PATH": "/no/such.ini"}, "MLFLOW_AUTH_CONFIG_PATH is /no/such.ini, which cannot be read"),
        ({"AUTHENTICATION": "none", "MLFLOW_HOST": "0.0.0.0"}, "MLFLOW_HOST is 0.0.0.0 and AUTHENTICATION is none;"),
        ({"AUTHENTICATION": "none", "MLFLOW_HOST": "127.evil.org"}, "MLFLOW_HOST is 127.evil.org and AUTHENTICATION"),
        ({"AUTHENTICATION": "oauth"}, "AUTHENTICATION is 'oauth'; use basic or none"),
    ],
)
def test_it_refuses_in_a_sentence(changes: dict[str, str], said: str) -> None:
    done = serve({**SECRETS, **changes})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(said)}.*\n", done.stderr)


def test_it_refuses_a_shell_that_has_not_read_the_settings() -> None:
    done = serve(SECRETS, shipped=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: MLFLOW_HOST is not set; read mlflow.env first")


# -- a real one --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[S3Server]:
    with S3Server() as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, store: S3Server) -> Iterator[MlflowServer]:
    if reason := why_no_postgres():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("mlflow")
    keys = {"MLFLOW_S3_ENDPOINT_URL": store.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    keys |= {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    with (
        Postgres(folder) as postgres,
        MlflowServer(folder, postgres.database("mlflow"), auth=True, artifacts=store.url, more=keys) as made,
    ):
        yield made


@pytest.fixture
def client(server: MlflowServer, monkeypatch: pytest.MonkeyPatch):
    """MLflow's own, as admin."""
    from mlflow import MlflowClient

    for name, value in server.client.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(server.uri)


@pytest.fixture(scope="module")
def anna(server: MlflowServer) -> tuple[str, str]:
    """A user made by the README's command."""
    readme(server, "create_user", answer=f"{ANNAS}\n")
    return ANNA, ANNAS


def readme(server: MlflowServer, about: str, answer: str = "", changes: Mapping[str, str] | None = None) -> str:
    """Runs the one command of the README that speaks of `about`, as admin; returns what it printed."""
    (command,) = re.findall(rf"^ {{4,}}(.*{about}.*)$", (SHIPPED / "README.md").read_text(), re.MULTILINE)
    for old, new in {"URL": server.uri, **(changes or {})}.items():
        command = re.sub(rf"(?<=[ =]){old}(?= |$)", new, command)
    shell = {**os.environ, **server.settings, **server.client, "PATH": f"{FOLDER}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], env=shell, input=answer, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(server: MlflowServer, path: str, auth=None, method: str = "GET", **more) -> tuple[int, str]:
    import requests

    answer = requests.request(method, f"{server.uri}{path}", auth=auth, timeout=10, **more)
    return answer.status_code, answer.text


@pytest.mark.slow
def test_health_alone_is_open(server: MlflowServer) -> None:
    assert ask(server, "/health") == (200, "OK")
    for method in ("GET", "POST"):
        assert {path: ask(server, path, method=method, json={})[0] for path in CLOSED} == dict.fromkeys(CLOSED, 401)
    page = f"{API}/experiments/search?max_results=1"
    assert ask(server, page, (ADMIN, "wrong"))[0] == 401
    assert ask(server, page, (ADMIN, PASSWORD))[0] == 200


@pytest.mark.slow
def test_a_user_sees_nothing_until_he_is_let_in(server: MlflowServer, client, anna: tuple[str, str]) -> None:
    experiment = client.create_experiment("admin's")
    run = client.create_run(experiment).info.run_id
    page = f"{API}/runs/get?run_id={run}"
    assert ask(server, page, anna)[0] == 403
    assert ask(server, f"{API}/experiments/search?max_results=9", anna) == (200, "{}")
    assert ask(server, f"{API}/users/create", anna, "POST", json={"username": "b", "password": ANNAS})[0] == 403
    readme(server, "grant_user_permission", changes={"1": experiment})
    assert ask(server, page, anna)[0] == 200
    assert ask(server, f"{API}/experiments/create", anna, "POST", json={"name": "hers"})[0] == 200


def tracked(server: MlflowServer, folder: Path, experiment: str, known: Mapping[str, str]) -> str:
    """Opens a run in a process of its own, with variables of MLflow; returns the error's kind and sentence."""
    script = f"""
import sys
from orchestrator.state.storage import Storage
from orchestrator.tracking import Place, look_for_server, open_tracker
from pipelines.errors import SkiplaneError
storage = Storage({str(folder)!r})
try:
    look_for_server(storage, {server.uri!r})
    open_tracker(Place(storage, 1), {server.uri!r}, {experiment!r}, "run", id="0" * 32, params={{}}, tags={{}})
except SkiplaneError as error:
    print(type(error).__name__, error)
"""
    shell = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING_")}
    shell |= {f"MLFLOW_TRACKING_{name}": value for name, value in known.items()} | {"HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=shell, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrong" not in done.stdout + done.stderr
    assert ANNAS not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "asks for a user and a password (status 401); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ({"USERNAME": ANNA, "PASSWORD": "wrong"}, "does not take the password of user 'anna' (status 401); correct"),
    ],
)
def test_a_run_is_refused_at_the_start_without_its_password(
    server: MlflowServer, anna: tuple[str, str], tmp_path: Path, known: dict[str, str], said: str
) -> None:
    told = tracked(server, tmp_path, "any", known)
    assert told.startswith("ConfigError MLflow at http://127.0.0.1:")
    assert said in told


@pytest.mark.slow
def test_a_run_in_an_experiment_that_is_not_ones_own(
    server: MlflowServer, client, anna: tuple[str, str], tmp_path: Path
) -> None:
    client.create_experiment("not hers")
    known = {"USERNAME": ANNA, "PASSWORD": ANNAS}
    told = tracked(server, tmp_path / "a", "not hers", known)
    assert told.startswith("ConfigError MLflow at http://127.0.0.1:")
    assert "MLFLOW_TRACKING_USERNAME" in told
    assert tracked(server, tmp_path / "b", "hers too", known) == ""


@pytest.mark.slow
def test_a_thousand_points_in_one_request(client) -> None:
    from mlflow.entities import Metric

    run = client.create_run(client.create_experiment("points")).info.run_id
    points = [Metric(f"train/{i % 10}", i / 7, 10**12 + i, i // 10) for i in range(1000)]
    for _ in range(2):  # and again: no row is doubled
        client.log_batch(run, metrics=points)
    stored = [m for key in range(10) for m in client.get_metric_history(run, f"train/{key}")]
    assert sorted((m.key, m.value, m.timestamp, m.step) for m in stored) == sorted(
        (m.key, m.value, m.timestamp, m.step) for m in points
    )


@pytest.mark.slow
def test_an_artifact_goes_to_the_store_and_leaves_it(server: MlflowServer, client, store: S3Server, tmp_path) -> None:
    from mlflow.artifacts import download_artifacts

    run = client.create_run(client.create_experiment("files")).info.run_id
    client.log_text(run, "text", "reports/a.txt")
    put = [request.path for request in store.log if request.method == "PUT" and run in request.path]
    assert [path.rpartition("artifacts/")[2] for path in put] == ["reports/a.txt"]
    path = download_artifacts(run_id=run, artifact_path="reports/a.txt", dst_path=str(tmp_path))
    assert Path(path).read_text() == "text"
    assert not (server.folder / "artifacts").exists()


@pytest.mark.slow
def test_foreign_pages_are_refused(server: MlflowServer) -> None:
    admin, page = (ADMIN, PASSWORD), f"{API}/experiments/search?max_results=1"
    for host in ("evil.example", "10.1.2.3", "127.0.0.1"):  # the port belongs to it
        assert ask(server, page, admin, headers={"Host": host})[0] == 403
    origin = {"Origin": "http://evil.example"}
    assert ask(server, f"{API}/experiments/create", admin, "POST", json={"name": "o"}, headers=origin)[0] == 403


@pytest.mark.slow
def test_no_jobs_no_pickle_no_secret_in_a_command(server: MlflowServer) -> None:
    found = server.members()
    assert len(found) == 2  # mlflow, and uvicorn with its one worker; with jobs there would be eleven more
    for process in found:
        known = process.environ()
        off = {name: known[name] for name in ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_ENABLE_AI_GATEWAY",
                                              "MLFLOW_SERVER_ENABLE_JOB_EXECUTION")}  # fmt: skip
        assert set(off.values()) == {"false"}
        secret = [server.settings[n] for n in ("PGPASSWORD", *SECRETS, "AWS_SECRET_ACCESS_KEY")]
        assert not [word for word in process.cmdline() if any(value in word for value in secret)]


@pytest.mark.slow
def test_upgrade_and_clearing_away_as_the_readme_says(server: MlflowServer, client) -> None:
    experiment = client.create_experiment("cleared")
    runs = [client.create_run(experiment).info.run_id for _ in range(2)]
    client.log_text(runs[0], "text", "a.txt")
    client.delete_run(runs[0])
    readme(server, "mlflow db upgrade")
    readme(server, "mlflow gc", changes={"--older-than 30d": "--older-than 0d"})
    assert [run.info.run_id for run in client.search_runs([experiment], run_view_type=3)] == [runs[1]]


@pytest.mark.slow
def test_it_is_itself_again_after_a_kill(server: MlflowServer, client, anna: tuple[str, str]) -> None:
    """Runs and users are in the database; the first start's password is only the first start's."""
    run = client.create_run(client.create_experiment("kept")).info.run_id
    client.log_param(run, "a", "1")
    server.kill()
    server.start()
    assert client.get_run(run).data.params == {"a": "1"}
    assert ask(server, f"{API}/experiments/search?max_results=9", anna)[0] == 200
