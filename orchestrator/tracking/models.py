"""A checkpoint as a model of MLflow: a traced graph (pt2) that executes no pickle, of a run that may have ended.

Not with `mlflow.pytorch.log_model`: it takes the server from the process, looks for an active run there, fetches every
metric's whole history, and makes another model where an answer was lost.
"""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.export import Exported
from orchestrator.tracking.address import without_password
from orchestrator.tracking.connection import connect
from orchestrator.tracking.failures import Denied, Refused, Unreachable, line, told
from pipelines.errors import ConfigError

CLASS_NAMES = "class_names.json"  # beside MLmodel
UPLOAD_S = 120  # for one file: a server may put a hundred megabytes into a bucket before it answers
SERVING = ("torch", "numpy")  # with mlflow, which MLflow adds itself, all that serving needs
VERSIONS = "mlflow.modelVersions"  # the tag that links a model to its versions on the model's page


def log_model(uri: str, run_id: str, exported: Exported, *, register: str = "", alias: str = "") -> str:
    """Logs a net to a run, whose status stays what it is; returns the model's URI, `models:/m-...`.

    register: a registered model that gets it as a new version; alias: of that version. What a run has already (the
    same weights, their version) is not made again, so a call whose answer was lost may be repeated.
    Raises Unreachable or Refused; ConfigError for an alias without a name.
    """
    if alias and not register:
        raise ConfigError(f"tracking.alias is '{alias}', of a registered model without a name; set tracking.register")
    with told():
        client = connect(uri)
        run = client.get_run(run_id)
        model = _known(client, run, exported)
    if model is None or not _ready(model):
        with tempfile.TemporaryDirectory() as folder:
            model = _log(client, run, exported, model, Path(folder, "model"))
    if register:
        _register(client, model, register, alias)
    return _uri(model)


def how_to_use(uri: str, model: str) -> tuple[str, str]:
    """(a line of Python that loads a model, a line for the shell that serves it at port 5001)."""
    place = without_password(uri)
    return (
        f'import mlflow; mlflow.set_tracking_uri("{place}"); net = mlflow.pytorch.load_model("{model}")',
        f"MLFLOW_TRACKING_URI={place} mlflow models serve --env-manager local --port 5001 --model-uri {model}",
    )


def _known(client: Any, run: Any, exported: Exported) -> Any | None:
    """The run's model of these weights, of several the one that is whole."""
    where = f"source_run_id = '{run.info.run_id}' AND tags.`skiplane.weights_sha256` = '{exported.weights_sha256}'"
    found = client.search_logged_models([run.info.experiment_id], where)
    return next(iter(sorted(found, key=_ready, reverse=True)), None)


def _log(client: Any, run: Any, exported: Exported, model: Any | None, folder: Path) -> Any:
    """Makes a model whole: `model` is one whose upload broke off. Nothing is begun that cannot be traced."""
    saved = _save(exported, folder)
    with told():
        model = model or _begun(client, run, exported)
        _complete(saved, run, model, folder)
    with told(artifacts=True), _patient():
        client.log_model_artifacts(model.model_id, str(folder))
    with told():
        _link(client, run, model, exported.step)
        return client.finalize_logged_model(model.model_id, "READY")


def _save(exported: Exported, folder: Path) -> Any:
    """Writes the model's files; returns what MLmodel says.

    The example is only traced: in a list MLflow does not keep it, which as JSON would be 2 MB at 224 px.
    """
    import numpy as np

    with warnings.catch_warnings(action="ignore"):  # it warns of its own type hints
        import mlflow.pyfunc.model
        import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = TensorSpec(np.dtype("uint8"), (-1, *exported.shape))
    logits = TensorSpec(np.dtype("float32"), (-1, exported.classes))
    saved = Model(metadata=exported.about())
    try:
        mlflow.pytorch.save_model(
            exported.module,
            str(folder),
            mlflow_model=saved,
            signature=ModelSignature(Schema([images]), Schema([logits])),
            input_example=[exported.example.numpy()],
            serialization_format="pt2",
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in SERVING],
        )
        Path(folder, CLASS_NAMES).write_text(json.dumps(exported.class_names))
    except Exception as error:
        kind = Unreachable if isinstance(error, OSError) else Refused  # a disk that is full is emptied one day
        raise kind(f"the net cannot be exported: {line(error)}") from error
    return saved


def _begun(client: Any, run: Any, exported: Exported) -> Any:
    """A new model, which has no files yet. It has its run's settings, as MLflow's own function gives them."""
    tags = {
        "skiplane.checkpoint": exported.checkpoint,
        "skiplane.weights_sha256": exported.weights_sha256,
        "skiplane.dataset_digest": exported.dataset_digest,
    }
    return client.create_logged_model(
        run.info.experiment_id,
        exported.net,
        source_run_id=run.info.run_id,
        tags=tags,
        params=dict(run.data.params),
        model_type="image classifier",
    )


def _complete(saved: Any, run: Any, model: Any, folder: Path) -> None:
    """Writes whose model this is into MLmodel, and that it is served on a CPU unless told otherwise.

    MLflow would try a GPU where there is one, and refuse: the graph was traced on a CPU.
    """
    saved.run_id, saved.artifact_path = run.info.run_id, model.artifact_location
    saved.model_id = saved.model_uuid = model.model_id
    saved.flavors["python_function"]["config"] = {"device": "cpu"}
    saved.save(str(folder / "MLmodel"))


def _link(client: Any, run: Any, model: Any, step: int) -> None:
    """The model among the run's outputs, and the run's validation at that step among the model's metrics."""
    from mlflow.entities import LoggedModelOutput, Metric

    run_id = run.info.run_id
    if model.model_id not in [output.model_id for output in run.outputs.model_outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    keys = [key for key in run.data.metrics if key.startswith("val/")]
    points = [point for key in keys for point in client.get_metric_history(run_id, key) if point.step == step]
    if points:  # the run has these points, and MLflow drops what it has
        values = [Metric(p.key, p.value, p.timestamp, p.step, model_id=model.model_id) for p in points]
        client.log_batch(run_id, metrics=values)


def _register(client: Any, model: Any, name: str, alias: str) -> None:
    """Who may log and not register waits for nobody: the model is there, and can be registered later."""
    try:
        with told():
            _registered(client, name)
            _versioned(client, model, name, alias)
    except (Refused, Denied) as error:
        raise Refused(f"{_uri(model)} is logged, but cannot be registered as '{name}': {error}") from error


def _versioned(client: Any, model: Any, name: str, alias: str) -> None:
    found = client.search_model_versions(f"name = '{name}'")
    versions = [known.version for known in found if known.source in (model.artifact_location, _uri(model))]
    number = versions[0] if versions else _new_version(client, model, name)
    if alias:
        client.set_registered_model_alias(name, alias, number)


def _registered(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


def _new_version(client: Any, model: Any, name: str) -> str:
    """Its source is a place: MLflow would look for a model's URI in the database that the process has by default."""
    made = client.create_model_version(name, model.artifact_location, model.source_run_id, model_id=model.model_id)
    versions = [*json.loads(model.tags.get(VERSIONS, "[]")), {"name": name, "version": made.version}]
    client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps(versions)})
    return str(made.version)


def _uri(model: Any) -> str:
    return f"models:/{model.model_id}"


def _ready(model: Any) -> bool:
    return str(model.status) == "READY"


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Requests may take longer meanwhile, in the whole process: MLflow knows no other way."""
    usual = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(UPLOAD_S)
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = usual
