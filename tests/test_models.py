"""A checkpoint as a model of MLflow: loaded by its own library, served by its own command, never made twice."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.cluster import processes
from orchestrator.export import Classifier, export
from orchestrator.publish import publish
from orchestrator.state.storage import Storage
from orchestrator.tracking import Place, open_tracker
from orchestrator.tracking.connection import artifacts, connect
from orchestrator.tracking.failures import Refused, Unreachable
from orchestrator.tracking.journal import Ack, write_ack
from orchestrator.tracking.models import CLASS_NAMES, how_to_use, log_model
from orchestrator.tracking.shipper import shipper
from pipelines.errors import ClusterError, ConfigError, DataError
from tests import saved
from tests.mlflow_servers import MlflowServer, sqlite

# mlflow 3.17 maps its tables with an option that SQLAlchemy 2.1 deprecates.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]

STEP, TOP1 = 7, 0.9


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A SQLite file's URI; its schema takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def exported(settings_for):
    torch.set_num_threads(1)
    config = settings_for("--name", "a", "--model.width", "4")
    saved.record(config)
    saved.checkpoint(config, STEP, TOP1)
    return export(config.folder())


def ended_run(uri):
    """A run in MLflow with two evaluations, that is over. Returns a client, and the run."""
    client = connect(uri)
    found = client.get_experiment_by_name("digits")
    experiment_id = found.experiment_id if found else client.create_experiment("digits", artifacts(uri))
    run_id = client.create_run(experiment_id, run_name="a").info.run_id
    client.log_param(run_id, "optim.lr", "0.1")
    for step, value in ((STEP, TOP1), (STEP + 1, 0.5)):
        client.log_metric(run_id, "val/top1", value, step=step, timestamp=10**12 + step)
        client.log_metric(run_id, "train/loss", value, step=step, timestamp=10**12 + step)
    client.set_terminated(run_id, "FINISHED", end_time=10**12)
    return client, client.get_run(run_id)


def models_of(client, run):
    where = f"source_run_id = '{run.info.run_id}'"
    return client.search_logged_models([run.info.experiment_id], where)


def pixels(count):
    return torch.randint(0, 256, (count, 16, 16, 3), generator=torch.Generator().manual_seed(count)).byte()


def at(uri, code):
    """What a program of somebody else prints who has mlflow alone, and allows no pickle."""
    allowed = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_TRACKING_URI": uri}
    return subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=allowed, check=True, capture_output=True, text=True
    ).stdout


LOGITS = """
import json, mlflow, torch
torch.set_num_threads(1)
images = lambda n: torch.randint(0, 256, (n, 16, 16, 3), generator=torch.Generator().manual_seed(n)).byte()
print(json.dumps([net(images(n)).tolist() for n in (1, 2, 5)]))
"""


def test_a_stranger_loads_it_by_number_and_by_alias(database, exported):
    """In a process that knows MLflow and no Skiplane, with the line that we print; logits are the same bits."""
    _, run = ended_run(database)
    uri = log_model(database, run.info.run_id, exported, register="digits", alias="champion")
    lines = [how_to_use(database, name)[0] for name in (uri, "models:/digits@champion")]
    told = at("sqlite:////nowhere/mlflow.db", "".join(line + LOGITS for line in lines)).splitlines()
    assert [json.loads(line) for line in told] == [[exported.module(pixels(n)).tolist() for n in (1, 2, 5)]] * 2


def test_what_the_model_says_of_itself(database, exported):
    client, run = ended_run(database)
    uri = log_model(database, run.info.run_id, exported)
    [model] = models_of(client, run)
    assert (uri, model.name, str(model.status)) == (f"models:/{model.model_id}", "resnet-18", "READY")
    assert (model.tags["skiplane.checkpoint"], model.params) == (exported.checkpoint, {"optim.lr": "0.1"})
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("val/top1", TOP1, STEP)]

    from mlflow.artifacts import download_artifacts
    from mlflow.models import Model

    folder = Path(download_artifacts(model.artifact_location))
    said = Model.load(folder)
    assert said.metadata["class_names"] == list("0123456789")
    assert said.metadata["weights_sha256"] == exported.weights_sha256
    assert said.metadata["top1"] == TOP1
    shapes = [schema.inputs[0].shape for schema in (said.get_input_schema(), said.get_output_schema())]
    types = [str(schema.inputs[0].type) for schema in (said.get_input_schema(), said.get_output_schema())]
    assert (shapes, types) == ([(-1, 16, 16, 3), (-1, 10)], ["uint8", "float32"])
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    environment = ["conda.yaml", "python_env.yaml", "requirements.txt"]
    assert files == sorted(["MLmodel", CLASS_NAMES, "data/model.pt2", *environment])  # no example as JSON
    assert json.loads((folder / CLASS_NAMES).read_text()) == list("0123456789")
    required = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == ["mlflow", "torch", "numpy"]
    assert not [line for line in required if "+" in line]


def test_the_run_stays_as_it_is_and_the_process_too(database, exported):
    import mlflow

    client, run = ended_run(database)
    before = mlflow.get_tracking_uri()
    uri = log_model(database, run.info.run_id, exported)
    now = client.get_run(run.info.run_id)
    assert (now.info.status, now.info.end_time, now.data.metrics) == ("FINISHED", 10**12, run.data.metrics)
    assert [m.value for m in client.get_metric_history(run.info.run_id, "val/top1")] == [TOP1, 0.5]
    assert [(o.model_id, o.step) for o in now.outputs.model_outputs] == [(uri.removeprefix("models:/"), STEP)]
    assert (mlflow.active_run(), mlflow.get_tracking_uri()) == (None, before)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def test_a_person_publishes_a_run_and_is_told_how_it_is_used(database, exported, settings_for):
    client, run = ended_run(database)
    place = settings_for("--name", "a").folder()
    with pytest.raises(DataError, match=f"the run in {place} has not been made in MLflow yet; .* sync {place}$"):
        publish(place, database)
    write_ack(Storage(place), Ack(database, run.info.experiment_id, run.info.run_id))
    made = publish(place, database, register="person", alias="best")
    assert made.what == f"models:/person@best is resnet-18 of 'a' at {exported.checkpoint}, top-1 90.00%"
    assert [f"models:/{model.model_id}" for model in models_of(client, run)] == [made.uri]
    assert (made.load, made.serve) == how_to_use(database, "models:/person@best")
    assert publish(place, database, checkpoint=exported.checkpoint).what.startswith(f"{made.uri} is resnet-18 of 'a'")
    with pytest.raises(ConfigError, match=r"MLflow at sqlite:////.*/mlflow.db refuses this: .*a/b"):
        publish(place, database, register="a/b")
    away = f"127.0.0.1:{processes.free_port()}"
    with pytest.raises(
        ClusterError, match=rf"^MLflow at http://{away}: connection refused; start it, or say where it is"
    ):
        publish(place, f"http://me:secret@{away}")


def test_the_process_that_sends_makes_it_once_the_run_has_ended(database, exported, settings_for):
    """Of one run after the other; a checkpoint that is gone is set aside, and holds up nothing."""
    gone, client = "checkpoints/step-000000099-0000.000", connect(database)
    try:
        for name, checkpoint in (("b", gone), ("a", exported.checkpoint)):
            storage = Storage(settings_for("--name", name).folder())
            tracker = open_tracker(
                Place(storage, 1), database, "digits", name, id=f"sent-{name}", params={}, tags={}, wait_s=200
            )
            tracker.model(checkpoint, "sent", "best")
            shipped = tracker.finish("FINISHED")
            assert (shipped.records, shipped.shipped, shipped.refused) == (3, 3, int(checkpoint == gone))
    finally:
        shipper().end()
        shipper.cache_clear()
    run = client.get_run(tracker.run_id)
    [model] = models_of(client, run)
    assert (run.info.status, model.tags["skiplane.checkpoint"]) == ("FINISHED", exported.checkpoint)
    assert client.get_model_version_by_alias("sent", "best").run_id == tracker.run_id


CALLS = [
    "create_logged_model",
    "log_model_artifacts",
    "log_outputs",
    "log_batch",
    "finalize_logged_model",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("call", CALLS)
def test_a_lost_answer_makes_nothing_twice(database, exported, monkeypatch, call):
    """Each request does what it should, and its answer is lost; then the whole is tried again."""
    import requests
    from mlflow import MlflowClient

    client, run = ended_run(database)
    whole, name = getattr(MlflowClient, call), f"lost-{call}"

    def lost(*args, **named):
        whole(*args, **named)
        monkeypatch.undo()
        raise requests.ConnectionError("Connection reset by peer")

    monkeypatch.setattr(MlflowClient, call, lost)
    with pytest.raises(Unreachable, match="connection reset"):
        log_model(database, run.info.run_id, exported, register=name, alias="champion")
    uri = log_model(database, run.info.run_id, exported, register=name, alias="champion")
    assert [f"models:/{model.model_id}" for model in models_of(client, run)] == [uri]
    assert len(client.get_run(run.info.run_id).outputs.model_outputs) == 1
    [version] = client.search_model_versions(f"name = '{name}'")
    assert client.get_model_version_by_alias(name, "champion").version == version.version
    assert log_model(database, run.info.run_id, exported, register=name) == uri


def test_other_weights_are_another_model_and_a_new_version(database, exported):
    client, run = ended_run(database)
    first = log_model(database, run.info.run_id, exported, register="two", alias="champion")
    other = log_model(database, run.info.run_id, replace(exported, weights_sha256="b" * 64), register="two")
    assert first != other
    assert len(models_of(client, run)) == 2
    assert [v.version for v in client.search_model_versions("name = 'two'")] in ([2, 1], ["2", "1"])
    assert str(client.get_model_version_by_alias("two", "champion").version) == "1"  # nobody moved it


def test_what_will_never_be_taken_is_refused(database, exported):
    client, run = ended_run(database)
    with pytest.raises(Refused, match="0123"):
        log_model(database, "0123", exported)
    with pytest.raises(
        ConfigError, match=r"tracking\.alias is 'champion', of a registered model without a name; set tr"
    ):
        log_model(database, run.info.run_id, exported, alias="champion")
    assert not models_of(client, run)
    with pytest.raises(Refused, match=r"^models:/m-\w+ is logged, but cannot be registered as 'a/b': "):
        log_model(database, run.info.run_id, exported, register="a/b")
    assert len(models_of(client, run)) == 1


def test_who_may_not_register_has_the_model_and_waits_for_nobody(database, exported, monkeypatch):
    """A 403 for the registry alone would else hold up the run's journal for ever."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def denied(*_, **__):
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    client, run = ended_run(database)
    monkeypatch.setattr(MlflowClient, "create_model_version", denied)
    with pytest.raises(Refused, match=r"is logged, but cannot be registered as 'theirs': .*Permission denied"):
        log_model(database, run.info.run_id, exported, register="theirs")
    assert [str(model.status) for model in models_of(client, run)] == ["READY"]


class Untraceable(Classifier):
    def forward(self, images):
        return super().forward(images) if images.float().mean() > 1 else images


def test_a_net_that_cannot_be_traced_leaves_nothing(database, exported):
    client, run = ended_run(database)
    net = Untraceable(exported.module.net, exported.mean, exported.std)
    with pytest.raises(Refused, match="the net cannot be exported: "):
        log_model(database, run.info.run_id, replace(exported, module=net))
    assert not models_of(client, run)


def test_a_full_disk_may_be_tried_again(database, exported, monkeypatch):
    import mlflow.pytorch

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    client, run = ended_run(database)
    monkeypatch.setattr(mlflow.pytorch, "save_model", full)
    with pytest.raises(Unreachable, match="No space left on device"):
        log_model(database, run.info.run_id, exported)
    assert not models_of(client, run)


def test_nobody_there_may_be_tried_again(exported):
    with pytest.raises(Unreachable, match="connection refused"):
        log_model(f"http://127.0.0.1:{processes.free_port()}", "0123", exported)


def test_it_is_served_on_the_cpu_of_a_machine_with_a_gpu_and_may_be_moved(database, exported, monkeypatch):
    """MLflow would choose the GPU and then refuse, since the graph was traced on a CPU."""
    import mlflow

    client, run = ended_run(database)
    log_model(database, run.info.run_id, exported)
    [model] = models_of(client, run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    served = mlflow.pyfunc.load_model(model.artifact_location)
    assert served.predict(pixels(2).numpy()).tolist() == exported.module(pixels(2)).tolist()
    net = mlflow.pytorch.load_model(model.artifact_location).to("meta")  # as to any other device
    assert net(pixels(3).to("meta")).shape == (3, 10)


@contextlib.contextmanager
def served(line, folder):
    """The port where the printed line serves."""
    port, log = processes.free_port(), folder / "serving.log"
    found = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    there = {**os.environ, "PATH": found, "OMP_NUM_THREADS": "1"}  # more threads would add in another order
    service = processes.start(["bash", "-c", line.replace("5001", str(port))], there, secrets.token_hex(16), log)
    try:
        while not answers(port):
            assert processes.alive(service), processes.tail(log, 20)
            time.sleep(0.1)
        yield port
    finally:
        processes.end(service)


def answers(port):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=10).status == 200
    return False


def scored(port, images):
    """(status, answer) of the scoring server."""
    body = json.dumps({"inputs": images.tolist()}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_server_keeps_it_and_mlflow_serves_it(exported, tmp_path, monkeypatch):
    """`mlflow server` that asks for a password and has the artifacts behind it; `mlflow models serve` as the printed
    line says, without pickle."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with MlflowServer(tmp_path, sqlite(tmp_path), auth=True) as server:
        for name, value in server.client.items():
            monkeypatch.setenv(name, value)
        client, run = ended_run(server.uri)
        uri = log_model(server.uri, run.info.run_id, exported, register="digits", alias="champion")
        assert log_model(server.uri, run.info.run_id, exported, register="digits", alias="champion") == uri
        assert len(client.search_model_versions("name = 'digits'")) == 1
        assert client.get_run(run.info.run_id).info.status == "FINISHED"
        load, serve = how_to_use(server.uri, "models:/digits@champion")
        assert json.loads(at(server.uri, load + LOGITS))[2] == exported.module(pixels(5)).tolist()
        with served(serve, tmp_path) as port:
            for count in (1, 2):
                status, answer = scored(port, pixels(count))
                assert (status, answer) == (200, {"predictions": exported.module(pixels(count)).tolist()})
            assert scored(port, pixels(2)[:, :8])[0] == 400  # images of another size
        server.kill()
        with pytest.raises(Unreachable):
            log_model(server.uri, run.info.run_id, exported)
