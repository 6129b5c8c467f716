"""infra/cloud is what `ray up` takes, its machines are closed, and a machine that is taken back says so in time."""

import copy
import functools
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import Draft202012Validator

from jobs import submit
from tests import image
from tests.manifests import OWN
from tests.test_readme import check_job

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "infra" / "cloud"
FILES = ["own-hosts.yaml", "aws.yaml", "gcp.yaml"]
FREE = {"available_node_types", "resources", "file_mounts"}  # names below these are the user's
COMMANDS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


@functools.cache
def schemas() -> list[Draft202012Validator]:
    """The one that ships with Ray, and ours for what it leaves open."""
    [ray] = importlib.util.find_spec("ray").submodule_search_locations
    files = (Path(ray, "autoscaler", "ray-schema.json"), OWN / "ray-up.json")
    return [Draft202012Validator(json.loads(file.read_text())) for file in files]


@functools.cache
def run_instances() -> object:
    """What Amazon takes to start machines, as boto3 knows it: a node_config goes there."""
    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def complaint(document: dict) -> str:
    """The first thing that is wrong; "" where all is right."""
    for schema in schemas():
        if error := next(schema.iter_errors(document), None):
            return f"{error.json_path}: {error.message}"
    if document.get("provider", {}).get("type") == "aws":
        for kind in document["available_node_types"].values():
            asked = {"MinCount": 1, "MaxCount": 1, **kind["node_config"]}
            asked["SubnetId"] = asked.pop("SubnetIds", [None])[0]  # Ray chooses one of them
            if said := ParamValidator().validate(asked, run_instances()).generate_report():
                return said
    return ""


def typos(document: dict) -> Iterator[tuple[str, dict]]:
    """(where, the document with one letter too many) for each name that is not the user's."""
    stack: list[tuple[tuple, object]] = [((), document)]
    while stack:
        path, value = stack.pop()
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, below in inner:
            stack.append(((*path, name), below))
            if isinstance(value, dict) and not (path and path[-1] in FREE):
                changed = copy.deepcopy(document)
                place = functools.reduce(lambda at, step: at[step], path, changed)
                place[f"{name}z"] = place.pop(name)
                yield "/".join(map(str, (*path, name))), changed


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_right_and_any_typo_in_it_is_found(name):
    assert complaint(read(name)) == ""
    places = list(typos(read(name)))
    assert len(places) > 12
    assert [where for where, changed in places if not complaint(changed)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_ray_itself_takes_it(name):
    """Its own preparation, which `ray up` begins with: defaults are filled in, legacy fields refused."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(name))
    validate_config(prepared)
    wanted = {"own-hosts.yaml": ("local.cluster.node", 2, 2), "aws.yaml": ("spot", 2, 8), "gcp.yaml": ("spot", 2, 8)}
    kind, least, most = wanted[name]
    workers = prepared["available_node_types"][kind]
    assert (workers["min_workers"], workers["max_workers"]) == (least, most)
    assert "ray-wheels" not in str(prepared["setup_commands"])  # nothing of the defaults' commands is left
    for command in COMMANDS:
        assert prepared[command] == read(name)[command]


@pytest.mark.parametrize("name", FILES)
def test_ray_is_started_by_start_sh_with_a_token(name):
    document = read(name)
    assert document["file_mounts"]["~/.skiplane/ray_token"] == "~/.skiplane/cloud/ray_token"
    for local in document["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    for command in COMMANDS[1:]:
        stop, start = document[command]
        assert stop == "ray stop"
        subprocess.run(["bash", "-n", "-c", f"({start})"], check=True)
        assert start.startswith("RAY_AUTH_TOKEN_PATH=~/.skiplane/ray_token ")
        words = shlex.split(start)
        role = words[words.index("~/skiplane/infra/start.sh") + 1]
        assert role == command.split("_")[0]
        assert "--insecure" not in words
        assert "dashboard-host" not in start  # 127.0.0.1: people come through ssh
    assert any(">>~/.bashrc" in command for command in document["setup_commands"])  # where `ray down` finds ray
    for command in document["setup_commands"]:
        subprocess.run(["bash", "-n", "-c", f"({command})"], check=True)


SECRET = [
    "infra/compose/secrets/ray_token",
    "infra/compose/.env",
    "infra/compose/store/skiplane/data",
    "infra/secrets.env",
]


def travels(mounts: dict[str, str]) -> list[str]:
    """Which of those files rsync would bring to each machine: of a folder it takes all, whatever git ignores."""
    ours = [local.rstrip("/") for local in mounts.values()]
    return [path for path in SECRET if any(path == local or path.startswith(f"{local}/") for local in ours)]


@pytest.mark.parametrize("name", FILES)
def test_no_machine_gets_what_is_none_of_its_business(name):
    mounts = read(name)["file_mounts"]
    assert travels({"": "infra"}) == SECRET
    assert travels(mounts) == []
    ours = {there: local for there, local in mounts.items() if not local.startswith("~")}
    assert set(ours.values()) <= set(image.tracked())  # files, and none that git ignores
    assert {there.removeprefix("~/skiplane/") for there in ours} == set(ours.values())
    scripts = [word for command in COMMANDS for line in read(name)[command] for word in re.findall(r"\S+\.sh\b", line)]
    assert set(scripts) <= set(ours)
    beside = {"~/skiplane/infra/environment.sh", "~/skiplane/infra/ray.env"}  # of start.sh, which reads them
    assert beside <= set(ours)


PYTHONS = {"22.04": (3, 10), "24.04": (3, 12)}  # python3 of an Ubuntu


@pytest.mark.parametrize("name", FILES[1:])
def test_a_clouds_image_has_a_python_that_is_new_enough(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = tuple(map(int, re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"]).groups()))
    [(year, month)] = re.findall(r"[Uu]buntu[ -](2\d)\.?(\d\d)(?: \(|-nvidia)", (FOLDER / name).read_text())
    assert PYTHONS[f"{year}.{month}"] >= least
    assert set(re.findall(r"(python\S*) -m venv", str(read(name)["setup_commands"]))) == {"python3"}


@pytest.mark.parametrize("name", FILES[1:])
def test_machines_in_a_cloud_are_closed_and_have_roles(name):
    document, text = read(name), (FOLDER / name).read_text()
    assert document["provider"]["use_internal_ips"] is True
    assert "ssh_proxy_command" in document["auth"]
    for kind in document["available_node_types"].values():
        machine = kind["node_config"]
        if name == "aws.yaml":
            assert machine["SecurityGroupIds"]  # else Ray makes a group that lets ssh in from everywhere
            assert machine["IamInstanceProfile"]
            assert machine["MetadataOptions"] == {"HttpTokens": "required"}
            assert machine["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
        else:
            assert "accessConfigs" not in str(machine)  # no public address
            assert machine["serviceAccounts"]
    head, spot = (document["available_node_types"][kind]["node_config"] for kind in ("head", "spot"))
    assert "spot" in str(spot) or "preemptible" in str(spot)
    assert "spot" not in str(head).lower()
    assert "preemptible" not in str(head)
    assert not re.search(r"AKIA|aws_credentials|private_key_id|0\.0\.0\.0", text)


@pytest.mark.parametrize(("name", "notice"), [("aws.yaml", 120), ("gcp.yaml", 30)])
def test_a_node_drains_for_less_than_the_notice(name, notice):
    words = shlex.split(read(name)["worker_start_ray_commands"][1])
    at = words.index("~/skiplane/infra/cloud/spot.sh")
    assert words[at + 1] == read(name)["provider"]["type"]
    assert 0 < int(words[at + 2]) <= notice - 10
    assert "--block" in words  # it is that which takes SIGTERM
    assert words[-1] == "&"


# A metadata service, of which $TAKEN is the notice, and a node that says what becomes of it.
CURL = """#!/bin/sh
case "$*" in
*api/token*) echo key ;;
*spot/instance-action*) [ -e "$TAKEN" ] && case "$*" in *"token: key"*) exit 0 ;; esac; exit 22 ;;
*instance/preempted*) if [ -e "$TAKEN" ]; then echo TRUE; else echo FALSE; fi ;;
*) exit 2 ;;
esac
"""
NODE = """
trap 'echo "drains for $RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S s"; exit 1' TERM
echo up
while :; do sleep 0.1; done
"""


@pytest.fixture
def spot(tmp_path):
    """Starts spot.sh with a node that is up."""
    (tmp_path / "curl").write_text(CURL)
    (tmp_path / "curl").chmod(0o755)
    path, taken = f"{tmp_path}{os.pathsep}{os.environ['PATH']}", tmp_path / "taken"
    started = []

    def start(cloud: str) -> subprocess.Popen:
        line = [FOLDER / "spot.sh", cloud, "20", "bash", "-c", NODE]
        shell = {"PATH": path, "TAKEN": str(taken)}
        started.append(subprocess.Popen(line, env=shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert started[0].stdout.readline() == "up\n"
        return started[0]

    start.taken = taken
    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_machine_that_is_taken_back_ends_its_node(spot, cloud):
    process = spot(cloud)
    spot.taken.touch()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "drains for 20 s\n")
    assert err == "this machine is taken back: the node drains\n"


def test_who_ends_spot_sh_ends_the_node(spot):
    process = spot("aws")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (1, "drains for 20 s\n", "")


def test_a_node_that_ends_by_itself_ends_spot_sh():
    done = subprocess.run([FOLDER / "spot.sh", "gcp", "20", "bash", "-c", "exit 7"], capture_output=True, timeout=30)
    assert done.returncode == 7


@pytest.mark.parametrize("line", [[], ["azure", "20", "true"], ["aws", "soon", "true"], ["aws", "20"]])
def test_what_spot_sh_does_not_know_is_refused(line):
    done = subprocess.run([FOLDER / "spot.sh", *line], capture_output=True, text=True)
    usage = "infra/cloud/spot.sh aws|gcp DRAIN_SECONDS COMMAND..."
    said = f"error: '{' '.join(line)}' is not what spot.sh takes; it is {usage}"
    assert (done.returncode, done.stderr) == (2, f"{said}\n")


READMES = ["infra/cloud/README.md", "infra/kubernetes/README.md"]


@pytest.mark.parametrize("name", READMES)
def test_what_a_readme_submits_is_a_job(name, monkeypatch, tmp_path, capsys):
    """The words after `--` of each jobs.submit; and every file that it names is there."""
    text = (ROOT / name).read_text()
    submitted = re.findall(r"^python -m jobs\.submit (.+)$", text, re.MULTILINE)
    assert submitted
    for line in submitted:
        args, command = submit.parse(shlex.split(line))
        assert args.address == "http://127.0.0.1:8265"
        check_job(command, monkeypatch, tmp_path)
    paths = re.findall(r"(?:^|[ `(])(infra/[\w./-]+[\w/])", text) + re.findall(r"\]\(([^):]+)\)", text)
    for path in paths:
        assert (ROOT / path).exists() or ((ROOT / name).parent / path).exists(), path
