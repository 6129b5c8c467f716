"""The one-machine cluster: refusals at once, and one real life from `up` to `down`."""

import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs import local as job
from orchestrator.cluster import environment, local, processes, services
from pipelines.errors import ClusterError, ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKIPLANE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and differ."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def flags(ports: list[int]) -> list[str]:
    return [f"--{name}-port={port}" for name, port in zip(services.DEFAULT_PORTS, ports, strict=True)]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", range(3))
def test_port_taken_starts_nothing(home: Path, taken: int) -> None:
    ports = free_ports(3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports[taken]))
        other.listen()
        name = list(services.DEFAULT_PORTS)[taken]
        with pytest.raises(
            ClusterError, match=rf"port {ports[taken]} is in use by process {os.getpid()} .*--{name}-port"
        ):
            job.main(["up", *flags(ports)])
    assert not (home / "local" / "cluster.json").exists()
    assert not (home / "local" / "logs").exists()


def test_other_host_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"--host is 0\.0\.0\.0; .* 127\.0\.0\.1 alone"):
        job.main(["up", "--host", "0.0.0.0"])


@pytest.mark.parametrize("port", ["80", "70000", "http", "-1"])
def test_impossible_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        job.main(["up", f"--mlflow-port={port}"])
    assert exit.value.code == 2
    assert f"'{port}' is no port; a number from 1024 to 65535" in capsys.readouterr().err


def test_two_at_work_at_once(home: Path) -> None:
    (home / "local").mkdir(parents=True)
    with (home / "local" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ClusterError, match=r"another `jobs\.local` is at work"):
            job.main(["down"])


def test_service_that_ends_while_starting(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is ended too, and the log's last lines are shown."""
    codes = {"ray": "import time; time.sleep(600)", "mlflow": "import sys; print('no such table'); sys.exit(1)"}
    monkeypatch.setattr(services, "command", lambda name, *_: [sys.executable, "-c", codes[name]])
    monkeypatch.setattr(services, "ready", lambda *_: False)
    before = psutil.Process().children()  # of other tests
    with pytest.raises(ClusterError, match=r"MLflow ended while it was starting(.|\n)*no such table"):
        job.main(["up", *flags(free_ports(3))])
    assert local.load(home).services == {}
    assert psutil.Process().children() == before


# -- ports and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "asked", "expected"),
    [
        (["ray", "mlflow"], {}, services.DEFAULT_PORTS),
        (["ray", "mlflow"], {"mlflow": 5001}, {**services.DEFAULT_PORTS, "mlflow": 5001}),
        # What runs was told of all ports: MLflow alone comes back where Ray's jobs look for it.
        (["mlflow"], {}, {"ray": 1111, "dashboard": 2222, "mlflow": 3333}),
        ([], {"mlflow": 3333}, {"ray": 1111, "dashboard": 2222, "mlflow": 3333}),
    ],
)
def test_ports(missing: list[str], asked: dict[str, int], expected: dict[str, int]) -> None:
    cluster = local.Cluster(Path("/h"), {"ray": 1111, "dashboard": 2222, "mlflow": 3333}, {})
    assert local._ports(cluster, asked, missing) == expected


def test_other_port_than_the_one_that_is_up() -> None:
    cluster = local.Cluster(Path("/h"), {"ray": 1111, "dashboard": 2222, "mlflow": 3333}, {})
    with pytest.raises(ClusterError, match=r"--mlflow-port is 5000, but the cluster is up with 3333; end it first"):
        local._ports(cluster, {"mlflow": 5000}, ["ray"])


def test_token_is_private_whatever_the_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        path = services.token_file(home)
    finally:
        os.umask(before)
    assert mode(path) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", text := path.read_text())
    assert services.token_file(home).read_text() == text


def test_token_that_others_can_read_is_refused(home: Path) -> None:
    services.token_file(home).chmod(0o644)
    with pytest.raises(ConfigError, match="has mode 0644, which lets others read it"):
        services.token_file(home)


def test_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = [
            services.private_folder(tmp_path / "home"),
            tmp_path / "home",
            services.sessions_folder(tmp_path).parent,
        ]
    finally:
        os.umask(before)
    assert [mode(folder) for folder in made] == [0o700] * 3
    assert services.sessions_folder(tmp_path).parent == made[2]


@pytest.mark.parametrize("made", ["open", "link", "another's"])
def test_a_folder_that_others_made_is_no_place_for_sessions(tmp_path: Path, made: str) -> None:
    folder = tmp_path / f"skiplane-{os.geteuid()}"
    if made == "link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir(0o755 if made == "open" else 0o700)
    if made == "another's":
        if os.geteuid():
            pytest.skip("giving a folder away needs root")
        os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match=r"others can write there; .* mode 0700"):
        services.sessions_folder(tmp_path)


@pytest.mark.parametrize("folder", ["plain", "with space", "it's $HOME"])
def test_env_script_survives_any_folder(tmp_path: Path, folder: str) -> None:
    home = tmp_path / folder
    script = tmp_path / "env.sh"
    services.replace_private(script, services.shell_lines(home, services.DEFAULT_PORTS))
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    command = f'. "$0"; . "$0"; exec {sys.executable} -c "{show}"'
    done = subprocess.run(
        ["bash", "-c", command, str(script)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert mode(script) == 0o600
    assert found["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"  # once, however often it is sourced
    assert found["RAY_AUTH_TOKEN_PATH"] == str(home / "local" / "token")
    assert found["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:8265"
    assert services.ONE_MACHINE.items() <= found.items()  # else a driver from here looks for Ray on the network card
    assert found["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"


def test_services_do_not_inherit_another_cluster(home: Path) -> None:
    shell = {"RAY_ADDRESS": "10.0.0.1:6379", "MLFLOW_TRACKING_URI": "http://far", "PATH": "/bin", "LANG": "C"}
    found = services.environment(home, services.DEFAULT_PORTS, shell)
    assert "RAY_ADDRESS" not in found
    assert found["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert found["PATH"] == f"{Path(sys.executable).parent}:/bin"
    assert (found["LANG"], found["RAY_AUTH_MODE"], found["RAY_worker_niceness"]) == ("C", "token", "0")


@pytest.mark.parametrize(
    ("given", "set_"),
    [
        ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "HOME/local/token", **services.ONE_MACHINE}),
        ({"RAY_AUTH_TOKEN_PATH": "mine"}, {"RAY_AUTH_TOKEN_PATH": "mine", **services.ONE_MACHINE}),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, {}),  # that cluster has its own ways, and its own token
    ],
)
def test_a_command_without_a_cluster_is_for_this_machine_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], set_: dict[str, str]
) -> None:
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *services.ONE_MACHINE)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names} | given)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    environment.prepare(home)
    found = {name: os.environ[name] for name in names[1:] if name in os.environ}
    assert found == {name: value.replace("HOME", str(home)) for name, value in set_.items()}
    assert (home / "local" / "token").exists() == (not given)


def test_status_and_down_of_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["status"]) == 1
    assert job.main(["down"]) == 0
    assert "The local cluster is down." in capsys.readouterr().out


# -- a real life -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster_home(home: Path) -> Iterator[Path]:
    yield home
    local.down(home, lambda _: None)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs.local", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_up_submit_status_down(cluster_home: Path) -> None:
    home, ports = cluster_home, free_ports(3)
    up = command("up", *flags(ports))
    assert up.returncode == 0, up.stderr
    assert f"source {home}/local/env.sh" in up.stdout
    assert (mode(home / "local"), mode(home / "local" / "token")) == (0o700, 0o600)
    first = local.load(home)
    assert mode(Path(first.ray_temp)) == 0o700
    members = [p for service in first.services.values() for p in processes.members(service)]
    assert len(members) > 8
    assert all(p.nice() == 0 for p in members)
    assert command("status").returncode == 0

    again = command("up")
    assert (again.returncode, local.load(home)) == (0, first)
    assert "is up already" in again.stdout
    other = command("up", "--mlflow-port", str(free_ports(1)[0]))
    assert other.returncode == 4
    assert "but the cluster is up with" in other.stderr

    assert submit(home) == f"{home} http://127.0.0.1:{ports[2]} SIGINT"

    os.kill(first.services["mlflow"].pid, signal.SIGKILL)
    assert command("status").returncode == 1
    assert command("up").returncode == 0
    second = local.load(home)
    assert second.services["ray"] == first.services["ray"]
    assert second.services["mlflow"].pid != first.services["mlflow"].pid
    assert second.ports == first.ports

    down = command("down")
    assert down.returncode == 0, down.stderr
    services_then = [*first.services.values(), *second.services.values()]
    assert not [p for service in services_then for p in processes.members(service)]
    assert [processes.holder(port) for port in ports] == [None] * 3
    assert not Path(first.ray_temp).exists()
    assert sorted(p.name for p in (home / "local").iterdir()) == ["lock", "logs", "token"]
    assert command("status").returncode == 1


def submit(home: Path) -> str:
    """Submits as the README says: source env.sh, `ray job submit`. Returns the job's one line of output."""
    seen = "SKIPLANE_HOME", "MLFLOW_TRACKING_URI", "RAY_JOB_STOP_SIGNAL"
    code = f"import os; print('seen:', *(os.environ[n] for n in {seen}))"
    line = f'. {home}/local/env.sh && ray job submit -- python -c "{code}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"seen: (.*)", done.stdout)[1]  # type: ignore[index]
