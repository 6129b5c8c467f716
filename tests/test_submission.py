"""What may be submitted, and what the end of a job means: tables."""

import re
import zipfile
from pathlib import Path

import pytest

from orchestrator import provenance
from orchestrator import submission as s
from orchestrator.cluster.jobs import Job, pack
from orchestrator.ending import Ending, judge
from pipelines.errors import ConfigError

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "infra" / "runtime-env.yaml"
TRAIN = ["python", "-m", "jobs.train", "--recipe", "digits"]


def test_every_command_but_those_of_this_machine_can_be_submitted():
    found = {path.stem for path in (ROOT / "jobs").glob("*.py") if "edge.run(main)" in path.read_text()}
    assert found - {"local", "submit"} == set(s.COMMANDS)


@pytest.mark.parametrize(
    ("command", "id", "name"),
    [
        ([*TRAIN, "--name", "a"], "", "a"),
        ([*TRAIN, "--name=a", "--name", "b.c_d-2"], "", "b.c_d-2"),  # the last one wins, as in the job
        ([*TRAIN, "--name", "a"], "other", "a"),
        (["python3", "-m", "jobs.sweep", "--name", "s"], "", "s"),
        (["python", "-m", "jobs.evaluate", "--run", "a"], "score", "score"),
        (["python", "-m", "jobs.pack", "zip", "a.zip", "--name", "x"], "p", "p"),
    ],
)
def test_the_name_of_a_command(command, id, name):
    assert s.check_command(command, id) == name


@pytest.mark.parametrize(
    ("command", "id", "words"),
    [
        ([], "", "there is no command; it comes last, after --"),
        (["ls"], "x", "the command is 'ls'; it has to be python -m jobs.X with X one of train, study"),
        (["python", "train.py"], "x", "the command is 'python train.py'"),
        (["python", "-m", "jobs.local", "up"], "x", "the command is 'python -m jobs.local up'"),
        (["python", "-m", "jobs.submit"], "x", "the command is 'python -m jobs.submit'"),
        (["A=1", *TRAIN], "x", "the command is 'A=1 python -m"),
        (TRAIN, "", "the command has no --name; give jobs.train one"),
        (TRAIN, "x", "the command has no --name"),  # an id is no name: the run could not go on
        ([*TRAIN, "--name", ""], "", "the command has no --name"),
        ([*TRAIN, "--name"], "", "the command has no --name"),
        (["python", "-m", "jobs.pack", "digits"], "", "jobs.pack names no run; say with --id"),
        ([*TRAIN, "--name", "a/b"], "", "--name is 'a/b'; up to 100 letters"),
        ([*TRAIN, "--name", "-a"], "", "--name is '-a'"),
        ([*TRAIN, "--name", "a" * 101], "", "--name is 'aaa"),
        ([*TRAIN, "--name", "a"], "b c", "--id is 'b c'"),
        ([*TRAIN, "--name", "a", "--tracking.uri", "http://me:pw@h"], "", r"in 'http://\*\*\*@h'; set it in the env"),
    ],
)
def test_commands_that_are_refused(command, id, words):
    with pytest.raises(ConfigError, match=f"{words}"):
        s.check_command(command, id)


@pytest.mark.parametrize(
    ("entrypoint", "run"),
    [
        ("python -m jobs.train --name a", "a"),
        ("cd /x && python -m jobs.study --name=a --nets b", "a"),
        ("python -m jobs.evaluate --run a --name b", ""),
        ("python -m other.train --name a", ""),
        ("-m jobs.train --name a", ""),
        ("python -c 'broken", ""),
        ("", ""),
    ],
)
def test_the_run_of_an_entrypoint(entrypoint, run):
    assert s.run_of(entrypoint) == run


@pytest.mark.parametrize(
    ("used", "id"),
    [((), "a"), (("b",), "a"), (("a",), "a-2"), (("a", "a-2"), "a-3"), (("a-2",), "a"), (("a", "a-3"), "a-2")],
)
def test_the_next_id(used, id):
    assert s.next_id("a", used) == id


OPEN_NAMES = [
    "NCCL_DEBUG",
    "NCCL_IB_PKEY",
    "TOKENIZERS_PARALLELISM",
    "MAX_TOKENS",
    "MAX_NEW_TOKENS",
    "PAD_TOKEN",
    "SORT_KEY",
    "PUBLIC_KEYS",
    "MONKEY",
    "KEYBOARD",
    "PASS_RATE",
    "NUM_PASSES",
    "PATTERN",
    "PATH",
    "PWD",
    "SECRETARY",
    "RAY_AUTH_TOKEN_PATH",
    "AWS_SHARED_CREDENTIALS_FILE",
    "SECRET_NAME",
]
SECRET_NAMES = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "PGPASSWORD",
    "MYSQL_PWD",
    "DB_PASS",
    "GITHUB_PAT",
    "HF_TOKEN_2",
    "API_KEYS",
    "SSH_KEY",
    "KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "wandb_apikey",
    "GOOGLE_APPLICATION_CREDENTIALS",
]


def test_variables():
    asked = [f"{name}=x" for name in OPEN_NAMES]
    assert s.env_vars([*asked, "A=1=2", "B=", "A=3"]) == {**dict.fromkeys(OPEN_NAMES, "x"), "A": "3", "B": ""}


SECRET_VALUES = [
    "http://me:pw@host/x",
    "postgresql://me:pw@host/x",
    "https://ghp_0123@host",
    "git+https://ghp_0123@host/x",
    "GITHUB_PAT=x",
]
OPEN_VALUES = [
    "http://host/a@b",
    "ssh://git@host/x",
    "postgresql://me@host/x",
    "https://${HF_TOKEN}@host",
    "https://me:${PW}@host",
    "me@host",
    "a==1",
]


@pytest.mark.parametrize("value", OPEN_VALUES)
def test_a_value_that_is_no_secret(value):
    assert s.env_vars([f"A={value}"]) == {"A": value}


@pytest.mark.parametrize("value", SECRET_VALUES)
@pytest.mark.parametrize(
    "text", ["pip: [a, '{}']", "pip: {{packages: [a, '--extra-index-url {}']}}", "x: [{{y: '{}'}}]"]
)
def test_a_secret_in_the_rest_of_a_file_does_not_travel(tmp_path, value, text):
    (tmp_path / "env.yaml").write_text(text.format(value))
    with pytest.raises(ConfigError, match=r"^--runtime-env .*env.yaml: \w+ looks like a secret") as caught:
        s.read_runtime_env(tmp_path / "env.yaml")
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "word", [*(f"{name}=x" for name in SECRET_NAMES), *(f"URL={value}" for value in SECRET_VALUES)]
)
def test_a_secret_does_not_travel(word, tmp_path):
    name, _, value = word.partition("=")
    words = f"{name} looks like a secret.* set it in the environment of `ray start`.*NAME_FILE"
    with pytest.raises(ConfigError, match=f"^--env {words}"):
        s.env_vars([word])
    (tmp_path / "env.yaml").write_text(f"env_vars: {{{name}: '{value}'}}")
    with pytest.raises(ConfigError, match=f"^--runtime-env .*env.yaml: {words}"):
        s.read_runtime_env(tmp_path / "env.yaml")


@pytest.mark.parametrize("word", ["A", "=1", "1A=2", "A B=3"])
def test_what_is_no_variable(word):
    with pytest.raises(ConfigError, match=r"--env is '.*'; NAME=VALUE is needed"):
        s.env_vars([word])


def test_a_runtime_env_file_is_read_whole(tmp_path):
    (tmp_path / "env.yaml").write_text("{excludes: [/x], env_vars: {A: '1'}, config: {setup_timeout_seconds: 60}}")
    assert s.read_runtime_env(tmp_path / "env.yaml") == s.RuntimeEnv(
        ("/x",), {"A": "1"}, {"config": {"setup_timeout_seconds": 60}}
    )
    (tmp_path / "env.yaml").write_text("# nothing")
    assert s.read_runtime_env(tmp_path / "env.yaml") == s.RuntimeEnv()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a", "cannot be read"),
        ("- a", "has to be fields such as env_vars:"),
        ("working_dir: .", "without a working_dir: that is the repository"),
        ("env_vars: {A: 1}", "names with texts; put numbers in quotes"),
        ("env_vars: [A]", "names with texts"),
        ("excludes: x", "excludes has to be a list"),
        ("excludes: [1]", "excludes has to be a list"),
    ],
)
def test_runtime_env_files_that_are_refused(tmp_path, text, words):
    (tmp_path / "env.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"--runtime-env .*env.yaml.*{words}"):
        s.read_runtime_env(tmp_path / "env.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        s.read_runtime_env(tmp_path / "none.yaml")


def test_the_shipped_file_stops_as_every_ray_start_of_ours_does():
    shipped, ray_env = s.read_runtime_env(SHIPPED), (ROOT / "infra" / "ray.env").read_text()
    assert shipped.rest == {}
    assert set(shipped.env_vars) == {"RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"}
    for name, value in shipped.env_vars.items():
        assert re.search(rf"^{name}={value}$", ray_env, re.M)


def test_a_package_holds_the_code_and_nothing_else(tmp_path):
    """Every module and recipe, byte for byte: preflight compares their hash on the nodes."""
    pack(ROOT, s.read_runtime_env(SHIPPED).excludes, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as package:
        package.extractall(tmp_path / "a")
    assert provenance.content_sha256(tmp_path / "a") == provenance.content_sha256()
    top = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"jobs", "orchestrator", "pipelines", "infra", "constraints.txt"} <= top
    assert not top & {".git", ".venv", "tests", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    assert not (tmp_path / "a" / "infra" / "ray.env").exists()  # people write keys into it
    assert not [path for path in (tmp_path / "a").rglob("*") if path.name == "__pycache__"]


def test_the_shipped_file_alone_leaves_out_what_is_no_code(tmp_path):
    """Where a copy of the repository has lost its .gitignore and .rayignore."""
    out = [
        ".git/x",
        ".venv/x",
        "data/x",
        "runs/a/x",
        "tests/x",
        "benchmarks/results/x",
        "infra/ray.env",
        "a/__pycache__/x",
        "s.egg-info/x",
    ]
    kept = ["jobs/a.py", "infra/start.sh", "orchestrator/data/x", "benchmarks/a.py"]
    for name in (*out, *kept):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    pack(tmp_path / "tree", s.read_runtime_env(SHIPPED).excludes, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == set(kept)


@pytest.mark.parametrize(
    ("text", "found"), [("", {}), ("{}", {}), ('{"driver": 0.01, "b": 2}', {"driver": 0.01, "b": 2})]
)
def test_resources(text, found):
    assert s.resources(text) == found


@pytest.mark.parametrize("text", ["driver", "[1]", '{"a": "b"}', '{"a": 0}', '{"a": -1}', '{"a": true}', '{"a": null}'])
def test_what_is_no_resource(text):
    with pytest.raises(ConfigError, match=r"--resources is .*amounts by name are needed"):
        s.resources(text)


FAR, NEAR = "http://mlflow.example:5000", "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("shell", "flags", "asked", "local", "passed", "line"),
    [
        (FAR, [], [], False, FAR, f"it tracks to {FAR}: MLFLOW_TRACKING_URI of this shell"),
        (NEAR, [], [], True, NEAR, f"it tracks to {NEAR}"),
        (NEAR, [], [], False, None, "stays here: it tracks where the cluster's own environment says"),
        ("http://localhost:5000", [], [], False, None, "stays here"),
        ("http://[::1]:5000", [], [], False, None, "stays here"),
        ("sqlite:////home/me/mlflow.db", [], [], False, None, "stays here"),
        ("sqlite:////home/me/mlflow.db", [], [], True, "sqlite:////home/me/mlflow.db", "it tracks to sqlite"),
        ("", [], [], False, None, "MLFLOW_TRACKING_URI is not set here"),
        (FAR, ["--tracking.uri", "off"], [], False, None, ""),  # what the user wrote needs no words
        (FAR, [], ["MLFLOW_TRACKING_URI"], False, None, ""),
    ],
)
def test_where_it_tracks(shell, flags, asked, local, passed, line):
    found, said = s.tracking(shell, [*TRAIN, *flags], asked, local)
    assert found == ({"MLFLOW_TRACKING_URI": passed} if passed else {})
    assert said.startswith(line) if not line.startswith("stays") else line in said


def test_packing_tracks_nothing():
    assert s.tracking(FAR, ["python", "-m", "jobs.pack", "digits"], [], False) == ({}, "")


def test_a_password_in_the_address_of_mlflow_does_not_travel():
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI is http://\*\*\*@h, with a password"):
        s.tracking("http://me:pw@h", TRAIN, [], True)


# -- how a job ended ---------------------------------------------------------------------------------------------------


def failed(code=None, error="", message=""):
    return Job("a", "FAILED", exit_code=code, error=error, message=message)


TERM = {"RAY_JOB_STOP_SIGNAL": "SIGTERM"}


@pytest.mark.parametrize(
    ("job", "ending"),
    [
        (Job("a", "SUCCEEDED", exit_code=0), Ending(0, False, "it has finished")),
        (Job("a", "STOPPED"), Ending(130, False, "it was stopped; the same command goes on")),
        (Job("a", "STOPPED", env_vars=TERM), Ending(143, False, "it was stopped; the same command goes on")),
        (None, Ending(4, True, "the head was lost: the server knows this job no more")),
        (failed(137), Ending(137, True, "its driver was killed (exit code 137)")),
        (failed(-9), Ending(137, True, "its driver was killed (exit code 137)")),
        (failed(-11), Ending(139, False, "it ended with exit code 139")),
        (
            failed(error="RUNTIME_ENV_SETUP_FAILURE", message="no\n such  \n"),
            Ending(4, False, "it never started (RUNTIME_ENV_SETUP_FAILURE): such"),
        ),
        (
            failed(error="JOB_SUPERVISOR_ACTOR_START_TIMEOUT"),
            Ending(4, False, "it never started (JOB_SUPERVISOR_ACTOR_START_TIMEOUT): Ray gives no reason"),
        ),
        (failed(error="JOB_SUPERVISOR_ACTOR_DIED"), Ending(4, True, "its driver was lost (JOB_SUPERVISOR_ACTOR_DIED)")),
        (failed(), Ending(4, True, "its driver was lost (no reason is known)")),
    ],
)
def test_endings(job, ending):
    assert judge(job) == ending


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 130, 143])
def test_a_driver_that_spoke_is_believed(code):
    assert judge(failed(code)) == Ending(code, False, f"it ended with exit code {code}")
