"""infra/kubernetes is what it says: every field has a name that is one, every name leads somewhere, and nobody talks to
whom he should not."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import manifests
from tests.hosts import shipped
from tests.manifests import FOLDER, ROOT, complaint, documents, documents_of, pods, rendered, typos
from tests.test_readme import check_job

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which brings kustomize, is not here")
OVERLAYS = ["base", "overlays/cpu-demo", "overlays/gpu", "overlays/own-cluster"]
FILES = sorted(str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*.yaml"))
JOBS = [name for name in FILES if name.startswith("jobs/")] + ["components/own-cluster/job.yaml"]
[CLUSTER] = documents_of("base/raycluster.yaml")


# -- names and types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_right_and_any_typo_in_it_is_found(name):
    for document in documents_of(name):
        assert complaint(document) == ""
        places = list(typos(document))
        assert len(places) >= 5
        assert [where for where, changed in places if not complaint(changed)] == []


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_kustomize_makes_of_it_is_right(overlay):
    assert {f"{d['kind']} {d['metadata']['name']}": complaint(d) for d in rendered(overlay)} == {
        f"{d['kind']} {d['metadata']['name']}": "" for d in rendered(overlay)
    }


WRONG = {
    "a number as a word": (("workerGroupSpecs", 0, "replicas"), "two", "'two' is not of type 'integer'"),
    "no such mode": (("authOptions", "mode"), "none", "'none' is not one of ['disabled', 'token']"),
    "a quantity as a list": (("headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
    "a container's port as a word": (
        ("headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "containerPort"),
        "6379",
        "'6379' is not of type 'integer'",
    ),
}


@pytest.mark.parametrize(("path", "value", "said"), WRONG.values(), ids=WRONG)
def test_wrong_types_are_found(path, value, said):
    [document] = documents((FOLDER / "base/raycluster.yaml").read_text())
    place = document["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert said in complaint(document)


def test_what_the_operator_refuses_is_found():
    """A job on a cluster that is there is not made again, and leaves the cluster alone."""
    [job] = documents_of("jobs/train.yaml")
    for name, value in {"backoffLimit": 3, "shutdownAfterJobFinishes": True, "suspend": True}.items():
        assert complaint({**job, "spec": {**job["spec"], name: value}})
    assert complaint({**job, "spec": {**job["spec"], "rayClusterSpec": CLUSTER["spec"]}})
    assert complaint({**job, "kind": "RayJobs"}) == "there is no RayJobs of ray.io/v1"


CRDS = os.environ.get("SKIPLANE_KUBERAY_CRDS", "")
RAYS = [name for name in FILES if any(document["apiVersion"] == "ray.io/v1" for document in documents_of(name))]


@pytest.mark.skipif(not CRDS, reason="SKIPLANE_KUBERAY_CRDS names no folder with KubeRay's ray.io_*.yaml")
@pytest.mark.parametrize("name", RAYS)
def test_kuberays_own_schemas_take_it(name):
    [document] = documents_of(name)
    assert manifests.crd_complaint(document, Path(CRDS)) == ""
    for field in document["spec"]:
        spec = {f"{known}z" if known == field else known: value for known, value in document["spec"].items()}
        assert manifests.crd_complaint({**document, "spec": spec}, Path(CRDS)), field


CRD = """
kind: CustomResourceDefinition
spec:
  group: ray.io
  names: {kind: RayCluster}
  versions:
    - name: v1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              properties:
                groups: {type: array, items: {type: object, properties: {replicas: {type: integer}}}}
                labels: {type: object, additionalProperties: {type: string}}
                memory: {anyOf: [{type: integer}, {type: string}], x-kubernetes-int-or-string: true}
                more: {type: object, x-kubernetes-preserve-unknown-fields: true, properties: {a: {type: string}}}
"""


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"groups": [{"replicas": 1}], "labels": {"a": "b"}, "memory": "1Gi", "more": {"b": 1}}, ""),
        ({"groups": [{"replicaz": 1}]}, "('replicaz' was unexpected)"),
        ({"groups": [{"replicas": "1"}]}, "'1' is not of type 'integer'"),
        ({"group": []}, "('group' was unexpected)"),
        ({"labels": {"a": 1}}, "1 is not of type 'string'"),
        ({"memory": []}, "is not valid under any of the given schemas"),
    ],
)
def test_a_clusters_own_schemas_can_be_asked(tmp_path, spec, said):
    """How test_kuberays_own_schemas_take_it reads them, with a small one."""
    (tmp_path / "ray.io_rayclusters.yaml").write_text(CRD)
    document = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "a"}, "spec": spec}
    assert (found := manifests.crd_complaint(document, tmp_path)).endswith(said)
    assert bool(found) == bool(said)
    nothing = manifests.crd_complaint({**document, "kind": "RayJob"}, tmp_path)
    assert nothing == "there is no RayJob of ray.io/v1"


def test_ray_start_has_every_option():
    """As its source has them: to import it takes seconds."""
    [ray] = importlib.util.find_spec("ray").submodule_search_locations
    source = Path(ray, "scripts", "scripts.py").read_text()
    known = set(re.findall(r'"--([a-z-]+)"', source[source.index("@cli.command") : source.index("\ndef start(")]))
    groups = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
    for group in groups:
        assert set(group["rayStartParams"]) <= known
    assert "num-cpuz" not in known


# -- one truth ---------------------------------------------------------------------------------------------------------


def test_ports_are_those_of_start_sh():
    script = (ROOT / "infra/start.sh").read_text()
    fixed = dict(re.findall(r"--([a-z-]*port)=(\d+)", script))
    assert len(fixed) == 11
    head = CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]
    assert {name: value for name, value in head.items() if name.endswith("port")} == fixed
    for group in CLUSTER["spec"]["workerGroupSpecs"]:
        assert {k: v for k, v in group["rayStartParams"].items() if k.endswith("port")}.items() <= fixed.items()
        assert len([k for k in group["rayStartParams"] if k.endswith("port")]) == 8


def test_the_environment_is_that_of_every_ray_start():
    assert shipped(FOLDER / "base/ray.env") == shipped()


def test_what_a_job_brings_along_is_what_a_submitted_one_does():
    brought = yaml.safe_load((ROOT / "infra/runtime-env.yaml").read_text())
    for name in JOBS:
        [job] = documents((FOLDER / name).read_text())
        own = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
        assert own == {"working_dir": "/opt/skiplane", "env_vars": brought["env_vars"]}
    image = (ROOT / "infra/Dockerfile").read_text()
    assert re.findall(r"^WORKDIR (\S+)", image, re.MULTILINE)[-1] == "/opt/skiplane"
    assert all(f"COPY {folder} {folder}/" in image for folder in ("jobs", "orchestrator", "pipelines", "infra"))
    assert re.search(r"^USER 1000:1000", image, re.MULTILINE)


def test_the_mlflow_server_is_the_teams():
    """The files that its command reads are those of infra/mlflow; what place.env changes is there to be changed."""
    deployment, _ = documents((FOLDER / "base/mlflow.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    read = re.findall(r"infra/\S+", container["args"][0])
    assert read == ["infra/mlflow/mlflow.env", "infra/mlflow/serve.sh"]
    assert all((ROOT / file).is_file() for file in read)
    kept = (ROOT / ".dockerignore").read_text().splitlines()  # by the image
    assert {f"!{file}" for file in (*read, "infra/mlflow/basic_auth.ini")} <= set(kept)
    given, place = shipped(ROOT / "infra/mlflow/mlflow.env"), shipped(FOLDER / "base/place.env")
    assert set(place) <= set(given)
    assert not [name for name in place if given[name] == place[name]]


def test_serve_sh_takes_it(tmp_path):
    """The command of the pod itself, with its folders elsewhere and a python that says how it was called."""
    deployment, _ = documents((FOLDER / "base/mlflow.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    (tmp_path / "mlflow.env").write_text("MLFLOW_FLASK_SERVER_SECRET_KEY=a\nPGPASSWORD=b\n")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" "$MLFLOW_HOST" "$PGHOST" "$PGPASSWORD"\n')
    (tmp_path / "python").chmod(0o755)
    script = container["args"][0].replace("/etc/mlflow", f"{FOLDER}/base").replace("/run/secrets/mlflow", str(tmp_path))
    shell = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*container["command"], script], cwd=ROOT, env=shell, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "-m mlflow server --app-name basic-auth 0.0.0.0 postgres b\n"


# -- names lead somewhere ----------------------------------------------------------------------------------------------


SUBMITTERS = [documents_of(name)[0] for name in JOBS]


def names(found: list[dict], kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in found if document["kind"] == kind}


def secrets() -> dict[str, str]:
    """Secret -> the key or file that secrets.sh gives it."""
    given = re.findall(r"^give (\S+) --from-(?:env-)?file=(\S+)", (FOLDER / "secrets.sh").read_text(), re.MULTILINE)
    return {name: source.partition("=")[0] for name, source in given}


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_lead_somewhere(overlay):
    found = rendered(overlay)
    for what, _, spec in pods(found):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets(), what
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names(found, "PersistentVolumeClaim"), what
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names(found, "ConfigMap"), what
        claimed = {t["metadata"]["name"] for d in found if d["kind"] == "StatefulSet" and d["metadata"]["name"] == what
                   for t in d["spec"]["volumeClaimTemplates"]}  # fmt: skip
        for container in spec["containers"]:
            mounted = [mount["name"] for mount in container.get("volumeMounts", [])]
            assert set(mounted) <= {*volumes, *claimed}, what
            assert set(volumes) <= {*mounted}, f"{what} has a volume that nobody mounts"
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert source["configMapRef"]["name"] in names(found, "ConfigMap")
                else:
                    assert source["secretRef"]["name"] in secrets() or source["secretRef"]["optional"]
    for cluster in (d["spec"].get("rayClusterSpec", d["spec"]) for d in found if d["apiVersion"] == "ray.io/v1"):
        assert secrets()[cluster["authOptions"]["secretName"]] == "auth_token"  # the key that KubeRay reads


@needs_kubectl
def test_services_lead_to_pods_and_are_called_by_their_names():
    found = rendered("base")
    ports = {}
    for service in (d for d in found if d["kind"] == "Service"):
        [spec] = [spec for _, labels, spec in pods(found) if service["spec"]["selector"].items() <= labels.items()]
        [port] = service["spec"]["ports"]
        assert port["targetPort"] in [p["name"] for p in spec["containers"][0]["ports"]]
        ports[service["metadata"]["name"]] = port["port"]
    [stateful] = [d for d in found if d["kind"] == "StatefulSet"]
    assert stateful["spec"]["serviceName"] in ports
    ray, place = (
        next(d for d in found if d["metadata"]["name"].startswith(name)) for name in ("ray-env", "mlflow-place")
    )
    assert ray["data"]["MLFLOW_TRACKING_URI"] == f"http://mlflow:{ports['mlflow']}"
    settings = dict(line.split("=", 1) for line in place["data"]["place.env"].splitlines() if line[:1] != "#")
    assert settings["PGHOST"] in ports
    assert f"mlflow:{ports['mlflow']}" in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_probes_say_a_host_that_mlflow_answers():
    deployment, _ = documents((FOLDER / "base/mlflow.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["httpHeaders"] == [{"name": "Host", "value": "mlflow:5000"}]


@needs_kubectl
def test_own_cluster_brings_the_cluster_of_the_gpu_overlay():
    [job] = [d for d in rendered("overlays/own-cluster") if d["kind"] == "RayJob"]
    [cluster] = [d for d in rendered("overlays/gpu") if d["kind"] == "RayCluster"]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert "RayCluster" not in {d["kind"] for d in rendered("overlays/own-cluster")}
    images = {c["image"] for what, _, spec in pods([job]) for c in spec["containers"]}
    assert len(images) == 1  # the submitter's Ray is the cluster's


@needs_kubectl
def test_overlays_are_as_large_as_they_say():
    sizes = {}
    for overlay in ("overlays/cpu-demo", "overlays/gpu"):
        [cluster] = [d for d in rendered(overlay) if d["kind"] == "RayCluster"]
        [group] = cluster["spec"]["workerGroupSpecs"]
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        assert set(volumes) == {"shared", "cache", "memory", "ray-logs"}
        assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
        assert set(volumes["cache"]["emptyDir"]) == {"sizeLimit"}
        nodes, cache = (group["minReplicas"], group["maxReplicas"]), volumes["cache"]["emptyDir"]["sizeLimit"]
        sizes[overlay] = (*nodes, limits["cpu"], limits.get("nvidia.com/gpu", 0), cache)
    assert sizes == {"overlays/cpu-demo": (1, 2, "1", 0, "2Gi"), "overlays/gpu": (2, 8, "88", 8, "1400Gi")}


def test_a_durable_head_has_drivers_elsewhere(tmp_path):
    """The component, on the base."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl, which brings kustomize, is not here")
    made = shutil.copytree(FOLDER, tmp_path / "kubernetes") / "overlays/cpu-demo/kustomization.yaml"
    made.write_text(made.read_text() + "components: [../../components/durable-head]\n")
    done = subprocess.run(["kubectl", "kustomize", made.parent], capture_output=True, text=True, check=True)
    [cluster] = [d for d in documents(done.stdout) if d["kind"] == "RayCluster"]
    assert complaint(cluster) == ""
    assert cluster["spec"]["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    [group] = cluster["spec"]["workerGroupSpecs"]
    assert group["resources"] == {"driver": "1"}
    assert all("""entrypointResources: '{"driver": 0.01}'""" in (FOLDER / name).read_text() for name in JOBS)
    names = [known["name"] for known in group["template"]["spec"]["containers"][0]["env"]]
    assert "RAY_gcs_rpc_server_reconnect_timeout_s" in names
    assert "RAY_gcs_rpc_server_reconnect_timeout_s" in (ROOT / "infra/ray.env").read_text()


# -- secure by default -------------------------------------------------------------------------------------------------


def test_no_pod_may_more_than_it_needs():
    """What the namespace's label `restricted` would refuse; the token of Kubernetes, which the autoscaler needs.

    KubeRay adds two containers that are in no file: `autoscaler` has autoscalerOptions.securityContext, and
    `wait-gcs-ready` of workers the Ray container's own (its DefaultWorkerPodTemplate copies that).
    """
    base = [d for name in ("raycluster", "mlflow", "postgres") for d in documents_of(f"base/{name}.yaml")]
    seen = []
    for what, _, spec in pods([*base, *SUBMITTERS]):
        seen.append(what)
        assert spec["securityContext"]["runAsNonRoot"], what
        assert spec["securityContext"]["runAsUser"] > 0, what
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, what
        assert what == "head" or spec["automountServiceAccountToken"] is False, what
        assert spec["enableServiceLinks"] is False, what  # MLFLOW_PORT=tcp://... would be read as a setting
        for container in spec["containers"]:
            tight = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == tight, what
            assert {"requests", "limits"} <= set(container["resources"]), what
        assert not [v for v in spec.get("volumes", []) if "hostPath" in v], what
    assert {"head", "worker", "mlflow", "postgres", "submitter"} == set(seen)
    assert CLUSTER["spec"]["autoscalerOptions"]["securityContext"] == tight


def test_who_submits_has_the_clusters_token_as_a_file():
    """Not in the environment, and readable for the pod's user by its group: a secret's files are root's."""
    for job in SUBMITTERS:
        spec = job["spec"]["submitterPodTemplate"]["spec"]
        [container], [volume] = spec["containers"], spec["volumes"]
        [mount] = container["volumeMounts"]
        known = {known["name"]: known["value"] for known in container["env"]}
        assert known == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{mount['mountPath']}/auth_token"}
        assert volume["secret"] == {"secretName": CLUSTER["spec"]["authOptions"]["secretName"], "defaultMode": 0o440}
        assert (volume["name"], spec["securityContext"]["fsGroup"]) == (mount["name"], 1000)


def test_a_submitter_is_the_same_in_every_job():
    """Each job is one file, to be copied and created; what they have in common is written in each."""
    first, *others = (job["spec"]["submitterPodTemplate"] for job in SUBMITTERS)
    assert [other for other in others if other != first] == []


def test_whoever_submits_reaches_no_artifacts_of_mlflow():
    """Its claim is its own: all Ray pods may write theirs."""
    base = [d for name in ("raycluster", "mlflow", "postgres") for d in documents_of(f"base/{name}.yaml")]
    claims: dict[str, set[str]] = {}
    for what, _, spec in pods(base):
        named = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
        claims[what] = set(named)
    assert claims["mlflow"] == {"mlflow"}
    assert claims["head"] == claims["worker"] == {"shared"}


def test_rays_logs_are_where_kuberay_looks_for_them():
    """By this name it mounts them into the autoscaler's container; under another it makes a second volume for that."""
    for _, _, spec in pods([CLUSTER]):
        mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts["/tmp/ray"] == "ray-logs"


def test_no_secret_is_written_down():
    for name in FILES:
        for document in documents((FOLDER / name).read_text()):
            assert document["kind"] != "Secret", name
    for name, value in {**shipped(FOLDER / "base/ray.env"), **shipped(FOLDER / "base/place.env")}.items():
        assert not re.search("TOKEN|PASSWORD|SECRET_", name), (name, value)
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}


# A cluster that keeps secrets in $STORE, and says $BROKEN where that is set.
KUBECTL = """#!/bin/sh
echo "$@" >> "$CALLS"
kept=$STORE/$5
case "$3" in
get) [ -z "$BROKEN" ] || { echo "$BROKEN" >&2; exit 1; }; [ ! -e "$kept" ] || cat "$kept" ;;
create)
    kept=$STORE/$6 data=
    for word; do case "$word" in --from-*) data="$data$(cat "${word##*=}")" ;; esac; done
    case "$*" in *--dry-run=client*) printf %s "$data" ;; *) printf %s "$data" > "$kept" ;; esac ;;
esac
"""


class Secrets:
    """secrets.sh, with a cluster that answers."""

    def __init__(self, home: Path) -> None:
        self.folder, self.store, self.calls = home / "secrets", home / "store", home / "calls"
        self.store.mkdir()
        (home / "kubectl").write_text(KUBECTL)
        (home / "kubectl").chmod(0o755)
        self._path = f"{home}{os.pathsep}{os.environ['PATH']}"

    def run(self, broken: str = "") -> subprocess.CompletedProcess:
        self.calls.write_text("")
        shell = {"PATH": self._path, "CALLS": str(self.calls), "STORE": str(self.store), "BROKEN": broken}
        return subprocess.run([FOLDER / "secrets.sh", self.folder], env=shell, capture_output=True, text=True)

    def created(self) -> list[str]:
        """The secrets that the last run made."""
        lines = self.calls.read_text().splitlines()
        return [line.split()[5] for line in lines if " create " in line and "--dry-run" not in line]

    def files(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in self.folder.iterdir()}


@pytest.fixture
def made(tmp_path):
    """After a first run that went well."""
    cluster = Secrets(tmp_path)
    assert cluster.run().returncode == 0
    return cluster


def test_secrets_are_made_once_as_files_that_nobody_else_reads(made):
    assert made.created() == list(secrets())
    files = made.files()
    assert all(stat.S_IMODE((made.folder / name).stat().st_mode) == 0o600 for name in files)
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    for name in ("ray_token", "postgres_password", "mlflow_password"):
        assert re.fullmatch("[0-9a-f]{64}", files[name])
    assert not [value for value in re.findall("[0-9a-f]{64}", str(files)) if value in made.calls.read_text()]
    server, user = (shipped(made.folder / name) for name in ("mlflow.env", "mlflow_user.env"))
    assert server["PGPASSWORD"] == files["postgres_password"]
    assert user == {"MLFLOW_TRACKING_USERNAME": "skiplane", "MLFLOW_TRACKING_PASSWORD": files["mlflow_password"]}
    assert len({files["ray_token"], *server.values(), *user.values()}) == 6
    again = made.run()
    assert (again.returncode, made.created(), made.files()) == (0, [], files)


def test_where_kubernetes_has_secrets_and_the_folder_is_elsewhere_no_token_is_told(made):
    made.folder.rename(made.folder.with_name("elsewhere"))
    done = made.run()
    assert (done.returncode, done.stdout, made.files()) == (2, "", {})
    assert done.stderr.startswith(
        f"error: Kubernetes has the secret ray-token and {made.folder} has no ray_token; copy"
    )
    assert done.stderr.count("\n") == 1


def test_a_folder_of_another_cluster_is_refused(made):
    (made.folder / "ray_token").write_text("0" * 64)
    done = made.run()
    assert (done.returncode, made.created()) == (2, [])
    assert done.stderr.startswith(f"error: the secret ray-token in Kubernetes is not what {made.folder} holds; copy")
    assert "is the cluster's token" not in done.stdout


@pytest.mark.parametrize("first", [True, False])
def test_a_kubectl_that_cannot_tell_is_not_taken_for_no(tmp_path, first):
    cluster, said = Secrets(tmp_path), "Error from server (Forbidden): secrets is forbidden"
    assert first or cluster.run().returncode == 0
    done = cluster.run(said)
    assert (done.returncode, cluster.created()) == (2, [])
    assert done.stderr.startswith(f"{said}\nerror: kubectl could not tell whether there is a secret ray-token; ")
    assert bool(cluster.files()) != first  # no file is made before it is known whether there is a secret


@needs_kubectl
def test_kubectl_itself_says_what_it_would_create(tmp_path):
    """What secrets.sh compares, by the kubectl that is here; it asks no cluster."""
    (tmp_path / "a").write_text("token")
    line = ["kubectl", "--namespace", "skiplane", "create", "secret", "generic", "ray-token"]
    more = [f"--from-file=auth_token={tmp_path}/a", "--dry-run=client", "--output", "jsonpath={.data}"]
    assert subprocess.run([*line, *more], capture_output=True, text=True).stdout == '{"auth_token":"dG9rZW4="}'


POD = """#!/bin/sh
echo "$@" >> "$CALLS"
while [ "$1" != -- ]; do shift; done
exec bash -c "$(echo "$4" | sed "s,/run/secrets/mlflow,$FOLDER,")"
"""
PYTHON = """#!/bin/sh
echo "$1 $MLFLOW_TRACKING_USERNAME $MLFLOW_TRACKING_PASSWORD"
echo "$2"
cat
"""


def test_the_user_of_runs_is_made_without_a_word_that_others_could_read(tmp_path):
    """With a kubectl that runs what it was given here, and a python that says what it got."""
    for name, script in {"kubectl": POD, "python": PYTHON}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mlflow.env").write_text("MLFLOW_AUTH_ADMIN_PASSWORD=admins\n")
    (tmp_path / "mlflow_user.env").write_text("MLFLOW_TRACKING_USERNAME=skiplane\nMLFLOW_TRACKING_PASSWORD=theirs\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    shell = {"PATH": path, "CALLS": str(tmp_path / "calls"), "FOLDER": str(tmp_path)}
    done = subprocess.run([FOLDER / "mlflow-user.sh", tmp_path], env=shell, check=True, capture_output=True, text=True)
    first, program, *given = done.stdout.splitlines()
    assert first == "-c admin admins"
    compile(program, "its program", "exec")
    assert "create_user(" in program
    assert given == ["skiplane theirs"]
    assert "theirs" not in (tmp_path / "calls").read_text()
    assert "admins" not in (tmp_path / "calls").read_text()


# -- jobs, and the end of a pod ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_command_is_one(name, monkeypatch, tmp_path, capsys):
    words = shlex.split(documents_of(name)[0]["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    assert [words[i + 1].split("/")[1] for i, word in enumerate(words) if word in ("--data.root", "--out")] == [
        "shared"
    ]
    check_job(words, monkeypatch, tmp_path)


def test_a_pod_has_longer_than_its_node_drains():
    """The drain is real in test_pod_ends.py."""
    for group in CLUSTER["spec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        drain = {known["name"]: known.get("value") for known in container["env"]}[
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        ]
        assert 0 < int(drain) <= spec["terminationGracePeriodSeconds"] - 15
        assert "lifecycle" not in container  # `ray stop` before SIGTERM would end the workers first


BYTES = {"Mi": 2**20, "Gi": 2**30}


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS[:3])
def test_memory_holds_the_object_store_and_two_checkpoints(overlay):
    """Of ResNet-152, whose weights and momentum are 60 million parameters twice, four bytes each."""
    [cluster] = [d for d in rendered(overlay) if d["kind"] == "RayCluster"]
    [group] = cluster["spec"]["workerGroupSpecs"]
    [memory] = [v["emptyDir"]["sizeLimit"] for v in group["template"]["spec"]["volumes"] if v["name"] == "memory"]
    left = int(memory[:-2]) * BYTES[memory[-2:]] - int(group["rayStartParams"]["object-store-memory"])
    assert left > (0.5e9 if overlay == "overlays/cpu-demo" else 2 * 60.2e6 * 2 * 4)


def test_postgres_is_the_one_of_compose():
    compose = yaml.safe_load((ROOT / "infra/compose/compose.yaml").read_text())
    [spec] = [spec for _, _, spec in pods(documents_of("base/postgres.yaml"))]
    assert spec["containers"][0]["image"] == compose["services"]["postgres"]["image"]


def test_the_image_has_what_kuberay_probes_with():
    """Before KubeRay 1.6, or with a Ray before 2.53, a probe is `wget ... | grep success` in the container."""
    installed = re.findall(r"apt-get install .*", (ROOT / "infra/Dockerfile").read_text())
    assert re.search(r"\bwget=", " ".join(installed))


def test_versions_are_those_that_are_installed():
    assert CLUSTER["spec"]["rayVersion"] == importlib.metadata.version("ray")
    assert manifests.STRICT.is_dir()


def test_no_readme_command_is_made_up():
    text = (FOLDER / "README.md").read_text()
    for path in re.findall(r"infra/kubernetes/[\w./-]+", text):
        assert Path(ROOT / path.rstrip(".")).exists(), path
