"""infra/compose: its schema, what it refers to, what it exposes; and the scripts beside it."""

import copy
import functools
import importlib.resources
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests import image

FOLDER = image.REPOSITORY / "infra" / "compose"
FILES = ("compose.yaml", "compose.gpu.yaml")
MADE = {"secrets", "store", ".env"}  # by secrets.sh
SECRETS = (
    *("ray_token", "PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
)
# Names that the schema leaves to us; a wrong one is found by what refers to it, or by a table below.
OURS = (
    *("services", "networks", "volumes", "secrets", "x-every", "x-ours", "x-node", "x-cuda"),
    *("environment", "args", "depends_on", "options"),
)
ENVIRONMENT = {
    "head": {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "AWS_ENDPOINT_URL", "AWS_REGION", "MLFLOW_TRACKING_URI",
             "MLFLOW_TRACKING_USERNAME"},
    "mlflow": {"MLFLOW_HOST", "MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_S3_ENDPOINT_URL",
               "AWS_DEFAULT_REGION", "PGHOST"},
    "postgres": {"POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD_FILE", "PGDATA"},
    "store": {"VGW_BACKEND", "VGW_BACKEND_ARG", "VGW_PORT", "VGW_REGION", "VGW_HEALTH"},
}  # fmt: skip
ENVIRONMENT["worker"] = ENVIRONMENT["head"]


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@functools.cache
def validator() -> Any:
    """The schema of compose files that check-jsonschema brings."""
    file = importlib.resources.files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json"
    schema = json.loads(file.read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def complaints(document: dict[str, Any]) -> list[str]:
    """Of the schema, and of a reader who follows every name."""
    found = [error.message for error in validator().iter_errors(document)]
    return found or [*references(document), *exposures(document), *unlike(document), *images(document)]


def references(document: dict[str, Any]) -> Iterator[str]:
    """Names and paths that lead nowhere."""
    for kind in ("networks", "volumes", "secrets"):
        known, used = set(document.get(kind) or {}), set()
        for name, service in document["services"].items():
            mine = {_source(kind, entry) for entry in service.get(kind, [])} - {""}
            used |= mine
            yield from (f"{name}: {kind}: nothing is called {one}" for one in mine - known)
        yield from (f"{kind}: nobody uses {one}" for one in known - used)
    for name, service in document["services"].items():
        others = set(service.get("depends_on", {}))
        yield from (f"{name}: depends on {one}, which is no service" for one in others - set(document["services"]))
        yield from (f"{name}: {path} is not there" for path in _paths(service) if not _there(FOLDER / path))
        words = " ".join([str(service.get("command", "")), *service.get("healthcheck", {}).get("test", [])])
        inside = image.let_through(image.tracked(), image.RULES.read_text())
        yield from (
            f"{name}: the image has no {path}" for path in re.findall(r"infra/\S+", words) if path not in inside
        )
    for name, secret in document.get("secrets", {}).items():
        if secret["file"] != f"secrets/{name}" or name not in SECRETS:
            yield f"secrets: {name}: secrets.sh makes no {secret['file']}"


def _source(kind: str, entry: Any) -> str:
    """The name that an entry refers to; "" for a path or a volume without a name."""
    source = entry["source"] if isinstance(entry, dict) else str(entry).rpartition(":/")[0] if ":" in entry else entry
    return "" if kind == "volumes" and re.match(r"[./$]|$", source.partition(":")[0]) else source


def _paths(service: dict[str, Any]) -> list[str]:
    build = service.get("build", {})
    context = build.get("context", "")
    mounts = [entry.split(":")[0] for entry in service.get("volumes", []) if entry.startswith("./")]
    made = [f"{context}/{build['dockerfile']}"] if "dockerfile" in build else []
    return [*service.get("env_file", []), *mounts, *([context] if context else []), *made]


def _there(path: Path) -> bool:
    tracked = os.path.normpath(path.relative_to(image.REPOSITORY))
    return tracked == "." or tracked in image.tracked()


def exposures(document: dict[str, Any]) -> Iterator[str]:
    """What more people could reach than those on this machine, and what should be no container's."""
    for name, service in document["services"].items():
        yield from (f"{name}: publishes {p}" for p in service.get("ports", []) if not str(p).startswith("127.0.0.1:"))
        yield from (
            f"{name}: {w} is set" for w in ("privileged", "network_mode", "pid", "cap_add", "devices") if w in service
        )
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name}: may become more than it is"
        if not re.match(r"\$\{SKIPLANE_UID:\?.*\}:\$\{SKIPLANE_GID:\?", str(service.get("user"))):
            yield f"{name}: runs as {service.get('user')}"
        if not re.search(r":v?\d+\.\d+", service["image"]):
            yield f"{name}: {service['image']} has no version"
        if not {"restart", "healthcheck", "init"} <= set(service):
            yield f"{name}: is not looked after"
    database = [name for name, service in document["services"].items() if "database" in service["networks"]]
    if database != ["mlflow", "postgres"] or not document["networks"]["database"].get("internal"):
        yield f"the database is reached by {database}"
    for text in _texts(document):
        if re.search(r"(?i)(password|secret|token|key)\s*[=:]\s*[^/\s]{6,}|[0-9a-f]{20,}|://[^/\s]+:[^/\s]+@", text):
            yield f"'{text}' looks like a secret"
    for name, service in document["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|KEY", variable) and not str(value).startswith("/run/secrets/"):
                yield f"{name}: {variable} is no file's name"


def _texts(node: Any) -> Iterator[str]:
    match node:
        case dict():
            for value in node.values():
                yield from _texts(value)
        case list():
            for value in node:
                yield from _texts(value)
        case str():
            yield node


def unlike(document: dict[str, Any]) -> Iterator[str]:
    """Variables that nobody reads."""
    for name, service in document["services"].items():
        if (found := set(service.get("environment", {}))) != ENVIRONMENT.get(name):
            yield f"{name}: its environment is {sorted(found)}"
        build = service.get("build", {})
        known = {rest.split("=")[0] for word, rest in image.instructions(image.DOCKERFILE.read_text()) if word == "ARG"}
        yield from (f"{name}: the Dockerfile has no ARG {arg}" for arg in set(build.get("args", {})) - known)


def images(document: dict[str, Any]) -> Iterator[str]:
    """Tags that several services build, which fails with bake, or that are built here and pulled all the same."""
    services = document["services"]
    for tag in sorted({service["image"] for service in services.values()}):
        users = {name for name, service in services.items() if service["image"] == tag}
        builders = {name for name in users if "build" in services[name]}
        pull = {name for name in users - builders if services[name].get("pull_policy") != "never"}
        if tag.startswith("skiplane:") and len(builders) != 1:
            yield f"{tag} is built by {sorted(builders)}"
        if builders and pull:
            yield f"{tag} is built here, and pulled by {sorted(pull)}"


def merged(below: Any, above: Any) -> Any:
    """Two files as compose lays one over the other, as far as ours go."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: merged(below.get(key), above.get(key, below.get(key))) for key in {**below, **above}}
    return below if above is None else above


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all keys whose names are not ours to choose."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not path or path[-1] not in OURS:
                yield (*path, key)
            yield from places(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from places(value, (*path, i))


def renamed(document: Any, path: tuple[Any, ...], name: str) -> Any:
    """A copy in which the key at `path` has another name."""
    changed = copy.deepcopy(document)
    node = functools.reduce(lambda found, key: found[key], path[:-1], changed)
    node[name] = node.pop(path[-1])
    return changed


def plain(document: dict[str, Any]) -> dict[str, Any]:
    """Without the x-... that are merged into it already."""
    return {key: value for key, value in document.items() if not key.startswith("x-")}


COMPOSE, GPU = plain(loaded(FILES[0])), plain(loaded(FILES[1]))
FIXED = sorted(places(COMPOSE), key=str)

# -- the files ---------------------------------------------------------------------------------------------------------


def test_nothing_is_wrong() -> None:
    assert complaints(COMPOSE) == []
    assert [error.message for error in validator().iter_errors(GPU)] == []
    assert complaints(merged(COMPOSE, GPU)) == []


def test_every_typo_is_reported() -> None:
    assert len(FIXED) > 100
    quiet = [path for path in FIXED if not complaints(renamed(COMPOSE, path, f"{path[-1]}x"))]
    assert quiet == []
    over = [path for path in places(GPU) if not complaints(merged(COMPOSE, renamed(GPU, path, f"{path[-1]}x")))]
    assert over == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("services", "worker", "depends_on"), {"hed": {"condition": "service_healthy"}}, "depends on hed"),
        (("services", "mlflow", "secrets"), ["PGPASS"], "secrets: nothing is called PGPASS"),
        (("services", "mlflow", "networks"), ["cluster", "databas"], "networks: nothing is called databas"),
        (("services", "postgres", "volumes"), ["databas:/var/lib/postgresql/data"], "volumes: nothing is called datab"),
        (("services", "worker", "build"), COMPOSE["services"]["head"]["build"], "is built by ['head', 'worker']"),
        (("services", "worker", "pull_policy"), "missing", "is built here, and pulled by ['worker']"),
        (("services", "mlflow", "image"), "skiplane:0.1.0", "skiplane:0.1.0 is built by []"),
        (("services", "mlflow", "env_file"), ["../mlflow/ml.env"], "../mlflow/ml.env is not there"),
        (("services", "store", "volumes"), ["./entrypoint:/entrypoint.sh:ro"], "./entrypoint is not there"),
        (("services", "head", "build", "dockerfile"), "infra/Dockerfil", "infra/Dockerfil is not there"),
        (("services", "head", "command"), "infra/start head", "the image has no infra/start"),
        (("services", "head", "ports"), ["8265:8265"], "publishes 8265:8265"),
        (("services", "head", "ports"), ["0.0.0.0:8265:8265"], "publishes 0.0.0.0:8265:8265"),
        (("services", "head", "network_mode"), "host", "network_mode is set"),
        (("services", "head", "user"), "root", "runs as root"),
        (("services", "store", "image"), "ghcr.io/versity/versitygw:latest", "has no version"),
        (("services", "worker", "networks"), ["cluster", "database"], "the database is reached by"),
        (("services", "head", "environment", "MLFLOW_TRACKING_PASSWORD"), "hunter22", "is no file's name"),
        (("services", "head", "command"), "infra/start.sh head --token=hunter22", "looks like a secret"),
        (("secrets", "ray_token", "file"), "secrets/token", "secrets.sh makes no secrets/token"),
    ],
)
def test_what_leads_nowhere_or_too_far_is_reported(path: tuple[str, ...], value: Any, said: str) -> None:
    changed = copy.deepcopy(COMPOSE)
    functools.reduce(lambda found, key: found[key], path[:-1], changed)[path[-1]] = value
    assert any(said in complaint for complaint in complaints(changed))


def test_postgres_makes_its_folder_inside_the_volume() -> None:
    """initdb changes the mode of its folder, which only the owner may: of a new volume's that is the image's user."""
    service = COMPOSE["services"]["postgres"]
    [volume] = service["volumes"]
    assert Path(service["environment"]["PGDATA"]).parent == Path(volume.partition(":")[2])


def test_nothing_is_asked_of_the_shell_that_has_no_answer() -> None:
    """Variables have a default, or stand in the .env that secrets.sh writes."""
    asked = re.findall(r"\$\{(\w+)([:?-]*)", "".join((FOLDER / name).read_text() for name in FILES))
    assert {name for name, default in asked if "-" not in default} == {"SKIPLANE_UID", "SKIPLANE_GID"}


def test_the_readme_names_what_there_is() -> None:
    text = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"\binfra/[\w./-]+\w", text)) | {
        f"tests/{name}" for name in re.findall(r"tests/(\w+\.py)", text)
    }
    assert named - set(image.tracked()) == {"infra/compose/secrets/ray_token"}
    assert set(re.findall(r"(?:exec|--scale) (\w+)", text)) <= set(COMPOSE["services"])
    assert set(re.findall(r"SKIPLANE_[A-Z_]+", text)) == {"SKIPLANE_REVISION", "SKIPLANE_WORKER_CPUS", "SKIPLANE_STORE"}
    published = [port.split(":")[1] for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == published


@pytest.mark.parametrize("made", ["secrets/ray_token", "secrets.AbC123/ray_token", ".env", "store/skiplane/a"])
def test_what_is_made_is_in_no_commit_no_image_and_no_job(made: str) -> None:
    """A job's package leaves out what the root's .gitignore names."""
    path = f"infra/compose/{made}"
    told = subprocess.run(
        ["git", "check-ignore", "--verbose", path], cwd=image.REPOSITORY, capture_output=True, text=True
    )
    assert told.stdout.startswith(".gitignore:")
    assert image.let_through([path], image.RULES.read_text()) == []


# -- secrets.sh --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy of the folder, so that nobody's secrets are touched."""
    ignore = shutil.ignore_patterns("secrets", "secrets.*[!h]", "store", ".env")
    return shutil.copytree(FOLDER, tmp_path / "compose", ignore=ignore)


def run(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", script], capture_output=True, text=True, cwd="/")


def test_secrets_are_made_once_and_for_nobody_else(own: Path) -> None:
    assert run(own / "secrets.sh").returncode == 0
    assert sorted(p.name for p in (own / "secrets").iterdir()) == sorted(SECRETS)
    texts = {name: (own / "secrets" / name).read_text() for name in SECRETS}
    assert len(set(texts.values())) == len(SECRETS)
    assert all(re.fullmatch("[0-9a-f]{64}", text) for name, text in texts.items() if name != "AWS_ACCESS_KEY_ID")
    assert re.fullmatch("[0-9a-f]{20}", texts["AWS_ACCESS_KEY_ID"])
    user = os.getuid() or 1000
    for path in (own / "secrets", own / "store", *(own / "secrets").iterdir()):
        found = path.stat()
        assert (found.st_mode & 0o077, found.st_uid) == (0, user)
    assert stat.S_IMODE((own / "secrets" / "ray_token").stat().st_mode) == 0o600
    assert (own / ".env").read_text() == f"SKIPLANE_UID={user}\nSKIPLANE_GID={os.getgid() or 1000}\n"


@pytest.mark.parametrize("there", ["secrets", ".env"])
def test_secrets_that_are_there_are_kept(own: Path, there: str) -> None:
    (own / there).mkdir()
    done = run(own / "secrets.sh")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {own}/{re.escape(there)} is there already and is kept: .*\n", done.stderr)
    assert {p.name for p in own.iterdir()} & (MADE | {"secrets"}) == {there}


# -- entrypoint.sh and probe.py ----------------------------------------------------------------------------------------


def entered(tmp_path: Path, command: list[str], shell: str = "sh") -> subprocess.CompletedProcess[str]:
    """entrypoint.sh where the secrets lie elsewhere."""
    script = tmp_path / "entrypoint.sh"
    script.write_text((FOLDER / "entrypoint.sh").read_text().replace("/run/secrets", f"{tmp_path}/secrets"))
    return subprocess.run([shell, script, *command], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_secrets_named_like_variables_become_variables(tmp_path: Path, shell: str) -> None:
    (tmp_path / "secrets").mkdir()
    for name, text in {"PGPASSWORD": "a b$c'\"\n", "ray_token": "no", "1A": "no", "AWS_KEY_2": "yes"}.items():
        (tmp_path / "secrets" / name).write_text(text)
    done = entered(tmp_path, [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"], shell)
    found = json.loads(done.stdout)
    assert {name: found.get(name) for name in ("PGPASSWORD", "ray_token", "1A", "AWS_KEY_2")} == {
        **dict.fromkeys(("ray_token", "1A")),
        "PGPASSWORD": "a b$c'\"",
        "AWS_KEY_2": "yes",
    }


def test_without_secrets_a_command_just_runs_and_its_code_is_kept(tmp_path: Path) -> None:
    assert entered(tmp_path, ["sh", "-c", "exit 7"]).returncode == 7


def test_a_secret_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "PGPASSWORD").symlink_to("/no/such")
    done = entered(tmp_path, ["echo", "started"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/secrets/PGPASSWORD cannot be read by user {os.getuid()};")


class _Guarded(BaseHTTPRequestHandler):
    """Answers 200 at /good to whoever has the token."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {'f' * 64}"
        self.send_response(200 if known and self.path == "/good" else 404 if known else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("page", "token", "good"), [("good", True, True), ("bad", True, False), ("good", False, False), ("", True, False)]
)
def test_a_probe_tells_by_its_exit_code_and_has_the_token(tmp_path: Path, page: str, token: bool, good: bool) -> None:
    (tmp_path / "token").write_text("f" * 64 + "\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Guarded)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        shell = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")} if token else {}
        command = [sys.executable, FOLDER / "probe.py", f"http://127.0.0.1:{server.server_port}/{page}"]
        done = subprocess.run(command, env={"http_proxy": "http://127.0.0.1:1", **shell}, capture_output=True)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert (done.returncode == 0) is good
