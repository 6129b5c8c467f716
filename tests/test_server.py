"""The door to MLflow over SQLite: runs are made once, taken up, and given what they lack; what is refused is found."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.state.storage import Storage
from orchestrator.tracking.delivery import in_batches
from orchestrator.tracking.failures import Denied, Refused, Unreachable, Unstored, told
from orchestrator.tracking.journal import FILES, Ack
from orchestrator.tracking.records import DatasetRef, ExperimentTag, File, Model, Open, Points, Status, Tags
from orchestrator.tracking.server import Server
from pipelines.errors import ClusterError, ConfigError
from tests.mlflow_servers import Postgres, why_no_postgres

# mlflow 3.17 maps its tables with an option that SQLAlchemy 2.1 deprecates.
slow = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
OPEN = Open("id-1", "digits", "a", {"lr": "0.1", "epochs": "6"}, {"skiplane.kind": "train"},
            DatasetRef("digits", "d" * 64, "/data/digits"))  # fmt: skip


# -- what a refused batch loses ----------------------------------------------------------------------------------------


@given(bad=st.sets(st.integers(0, 249), max_size=6), size=st.integers(1, 300))
def test_only_the_culprits_of_a_refused_batch_are_lost(bad: set[int], size: int) -> None:
    """A server takes a batch whole or not at all."""
    arrived: list[int] = []

    def send(part: list[int]) -> None:
        if culprits := bad & set(part):
            raise Refused(f"not {min(culprits)}")
        arrived.extend(part)

    assert in_batches(send, list(range(250)), size) == [(i, f"not {i}") for i in sorted(bad)]
    assert arrived == [i for i in range(250) if i not in bad]


def test_nothing_to_send_is_not_sent() -> None:
    assert in_batches(lambda part: pytest.fail("sent"), [], 0) == []


# -- what failures mean ------------------------------------------------------------------------------------------------


def of_mlflow(code: str, why: str = "why") -> Exception:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    return MlflowException(f"{why}\nand a stack", error_code=ErrorCode.Value(code))


def of_database(error: str, why: str) -> Exception:
    """As MLflow's server passes them on: all of them as a bad request."""
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    kind = getattr(sqlalchemy.exc, error)
    said = kind(why, code="3o7r") if error == "TimeoutError" else kind("INSERT INTO ...", {}, Exception(why))
    return MlflowException(said, error_code=BAD_REQUEST)


def of_http(status: int) -> Exception:
    import requests

    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status}", response=response)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "points", "artifacts"),
    [
        (lambda: of_mlflow("INVALID_PARAMETER_VALUE"), Refused, Refused),
        (lambda: of_mlflow("RESOURCE_DOES_NOT_EXIST"), Refused, Refused),
        (lambda: of_mlflow("UNAUTHENTICATED"), Denied, Denied),
        (lambda: of_mlflow("PERMISSION_DENIED"), Denied, Denied),
        (lambda: of_mlflow("INTERNAL_ERROR"), Unreachable, Unreachable),
        (lambda: of_mlflow("TEMPORARILY_UNAVAILABLE"), Unreachable, Unreachable),
        (lambda: of_mlflow("REQUEST_LIMIT_EXCEEDED"), Unreachable, Unreachable),
        (lambda: of_database("DataError", "text fields cannot contain NUL"), Refused, Refused),
        (lambda: of_database("TimeoutError", "QueuePool limit of size 5 reached"), Unreachable, Unreachable),
        (lambda: of_database("InterfaceError", "the connection is closed"), Unreachable, Unreachable),
        (lambda: of_mlflow("INTERNAL_ERROR", "failed with error code 413 != 200"), Refused, Refused),
        (lambda: of_http(503), Unreachable, Unreachable),
        (lambda: of_http(403), Denied, Denied),
        (lambda: of_http(401), Denied, Denied),
        (lambda: of_http(500), Unreachable, Unreachable),
        (lambda: of_http(400), Unreachable, Refused),
        (lambda: of_http(413), Unreachable, Refused),
        (lambda: OSError(28, "No space left on device"), Unreachable, Unreachable),
        (lambda: ConnectionResetError("Connection reset by peer"), Unreachable, Unreachable),
        (lambda: ValueError("Value out of range: 2"), Refused, Unreachable),  # of protobuf
        (lambda: "\udc80".encode(), Refused, Unreachable),
        (lambda: json.loads("<html>"), Unreachable, Unreachable),
        (lambda: KeyError("a bug"), Unreachable, Unreachable),
        (lambda: ConfigError("said already"), ConfigError, ConfigError),
    ],
)
def test_failures_that_pass_and_failures_that_stay(
    error: Callable[[], Any], points: type[Exception], artifacts: type[Exception]
) -> None:
    for kind, of_artifacts in ((points, False), (artifacts, True)):
        with pytest.raises(kind) as caught, told(of_artifacts):
            raise error()
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)


# -- a run is opened ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, which take 6 s to make."""
    place = tmp_path_factory.mktemp("mlflow") / "new" / "mlflow.db"
    Server(f"sqlite:///{place}")
    return place


@pytest.fixture
def server(tmp_path: Path, empty: Path) -> Server:
    return Server(f"sqlite:///{shutil.copy(empty, tmp_path)}")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def ack(server: Server, where: tuple[str, str]) -> Ack:
    return Ack(server.shown, *where)


class TestOpen:
    pytestmark = slow

    def test_a_new_run(self, server: Server) -> None:
        experiment_id, run_id = server.open(OPEN, "p" * 32, None)
        run = server.client.get_run(run_id)
        assert (run.info.experiment_id, run.info.run_name, run.info.status) == (experiment_id, "a", "RUNNING")
        assert run.data.params == OPEN.params
        tags = {"skiplane.id": "id-1", "skiplane.kind": "train", "mlflow.parentRunId": "p" * 32}
        assert tags.items() <= run.data.tags.items()
        (dataset,) = (found.dataset for found in run.inputs.dataset_inputs)
        assert (dataset.name, dataset.digest, dataset.source_type) == ("digits", "d" * 36, "local")

    @pytest.mark.parametrize("lost", ["the answer to making it", "everything after it"])
    def test_a_lost_answer_makes_no_second_run(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, lost: str
    ) -> None:
        def fails(*_: Any, **__: Any) -> None:
            raise ConnectionResetError("Connection reset by peer")

        with monkeypatch.context() as broken:
            if lost == "everything after it":
                broken.setattr(server.client, "log_batch", fails)
            else:
                make = server.client.create_run
                broken.setattr(server.client, "create_run", lambda *a, **k: (make(*a, **k), fails()))
            with pytest.raises(Unreachable, match=r"MLflow at sqlite:.* does not answer \(connection reset\)"):
                server.open(OPEN, None, None)
        experiment_id, run_id = server.open(OPEN, None, None)
        (run,) = server.client.search_runs([experiment_id])
        assert (run.info.run_id, run.data.params) == (run_id, OPEN.params)
        assert len(run.inputs.dataset_inputs) == 1

    def test_a_run_that_is_known_gets_what_it_lacks(self, server: Server) -> None:
        known = server.open(OPEN, None, None)
        server.client.set_terminated(known[1], "FAILED")
        params = {"lr": "0.2", "epochs": "6"} | {f"new.{i}": str(i) for i in range(250)}
        again = replace(OPEN, experiment="another", name="b", params=params, tags={"x": "y"})
        for _ in range(2):
            assert server.open(again, None, ack(server, known)) == known
        run = server.client.get_run(known[1])
        assert (run.info.run_name, run.info.status) == ("a", "RUNNING")
        assert run.data.params == params | {"lr": "0.1"}  # a parameter of MLflow never changes
        assert {"now.lr": "0.2", "x": "y", "skiplane.kind": "train"}.items() <= run.data.tags.items()
        assert "now.epochs" not in run.data.tags
        assert len(run.inputs.dataset_inputs) == 1

    def test_a_parameter_that_goes_back_to_what_it_was_is_seen(self, server: Server) -> None:
        known = server.open(OPEN, None, None)
        for epochs in ("10", "6"):
            server.open(replace(OPEN, params={"epochs": epochs}), None, ack(server, known))
            assert server.client.get_run(known[1]).data.tags["now.epochs"] == epochs

    def test_a_run_that_is_gone(self, server: Server) -> None:
        known = server.open(OPEN, None, None)
        server.client.delete_run(known[1])
        restore = rf"MLflow run {known[1]} was deleted at sqlite:.*mlflow runs restore --run-id {known[1]}"
        for record in (ack(server, known), None):  # also where it is found by its id
            with pytest.raises(ConfigError, match=restore):
                server.open(OPEN, None, record)
        with pytest.raises(ConfigError, match=r"run f+ is not at sqlite:.*; set tracking\.uri to where"):
            server.open(OPEN, None, Ack("", "1", "f" * 32))
        server.client.restore_run(known[1])
        assert server.open(OPEN, None, None) == known

    def test_an_experiment_that_was_deleted(self, server: Server) -> None:
        server.client.delete_experiment(server.open(OPEN, None, None)[0])
        with pytest.raises(ConfigError, match=r"tracking\.experiment 'digits' was deleted at .*experiments restore"):
            server.open(replace(OPEN, id="id-2"), None, None)

    def test_what_mlflow_does_not_like(self, server: Server) -> None:
        with pytest.raises(ConfigError, match=r"refuses run 'a' \(.*top1%.*\); look at tracking\.uri and"):
            server.open(replace(OPEN, params={"top1%": "1"}), None, None)

    def test_who_may_not_open_is_told_and_who_may_not_send_waits(
        self, server: Server, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(*_: Any, **__: Any) -> None:
            raise of_mlflow("PERMISSION_DENIED")

        monkeypatch.setattr(server.client, "get_experiment_by_name", denied)
        monkeypatch.setattr(server.client, "log_batch", denied)
        with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            server.open(OPEN, None, None)
        with pytest.raises(Unreachable, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            server.deliver("r", [(1, Tags({"a": "b"}))], storage)


# -- records are delivered ---------------------------------------------------------------------------------------------


class TestDeliver:
    pytestmark = slow

    @pytest.fixture
    def run_id(self, server: Server) -> str:
        return server.open(OPEN, None, None)[1]

    def test_each_kind_twice(self, server: Server, storage: Storage, run_id: str) -> None:
        """Nothing is doubled. NaN is, for MLflow, another value than itself, twice in one request."""
        content = b"<svg/>"
        digest = hashlib.sha256(content).hexdigest()
        storage.write(f"{FILES}/{digest}", content)
        points = [Points(s, 10**12 + s, {"a": 1 / (1 + s), "nan": math.nan, "inf": math.inf}) for s in range(700)]
        tags = {f"tag.{i}": "old" for i in range(250)}
        records = [*points, points[0], Tags(tags), Tags({"tag.7": "new"}), File("figures/deep/a.svg", digest),
                   ExperimentTag("view", "v"), Status("KILLED", 10**12 + 777)]  # fmt: skip
        for _ in range(2):
            assert server.deliver(run_id, list(enumerate(records)), storage) == []
        history = server.history(run_id)
        assert sorted(history["a"]) == [(s, 10**12 + s, 1 / (1 + s)) for s in range(700)]
        assert [(s, math.isnan(value)) for s, _, value in sorted(history["nan"])] == [(s, True) for s in range(700)]
        assert {value for _, _, value in history["inf"]} == {1.7976931348623157e308}
        run = server.client.get_run(run_id)
        assert (tags | {"tag.7": "new"}).items() <= run.data.tags.items()
        assert (run.info.status, run.info.end_time) == ("KILLED", 10**12 + 777)
        assert server.client.get_experiment(run.info.experiment_id).tags["view"] == "v"
        assert [item.path for item in server.client.list_artifacts(run_id, "figures/deep")] == ["figures/deep/a.svg"]

    def test_a_thousand_points_are_one_request(
        self, server: Server, storage: Storage, run_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes, log_batch = list[int](), server.client.log_batch
        monkeypatch.setattr(
            server.client, "log_batch", lambda run, metrics: (sizes.append(len(metrics)), log_batch(run, metrics))
        )
        records = [(s, Points(s, s, {"a": 1.0, "b": 2.0, "c": 3.0})) for s in range(700)]
        assert server.deliver(run_id, records, storage) == []
        assert sizes == [1000, 1000, 100]

    def test_a_server_that_takes_too_long_gets_less_at_once(
        self, server: Server, storage: Storage, run_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else it would be sent the same thousand for ever; points that it has already take it longer than new ones."""
        sizes = list[int]()

        def slow(run: str, metrics: list[Any]) -> None:
            sizes.append(len(metrics))
            if len(metrics) > 200:
                raise ConnectionError("Read timed out. (read timeout=10)")

        monkeypatch.setattr(server.client, "log_batch", slow)
        records = [(s, Points(s, s, {"a": 1.0})) for s in range(400)]
        for _ in range(2):
            with pytest.raises(Unreachable, match="read timed out"):
                server.deliver(run_id, records, storage)
        server.deliver(run_id, records, storage)
        assert sizes == [400, 250, 100, 100, 100, 100]
        server.deliver(run_id, records[:10], storage)
        server.deliver(run_id, records[:200], storage)
        assert sizes[-1] == 200

    def test_the_culprits_are_named_and_the_others_arrive(self, server: Server, storage: Storage, run_id: str) -> None:
        bad = {13, 14, 1400}
        records = [(100 + s, Points(s, 10**12, {"a": 1.0, ("b%" if s in bad else "b"): 2.0})) for s in range(1500)]
        aside = server.deliver(run_id, [*records, (9999, Tags({"t": "x", "u" * 300: "y"}))], storage)
        assert [(part.number, part.record) for part in aside] == [
            *((100 + s, Points(s, 10**12, {"b%": 2.0})) for s in sorted(bad)),
            (9999, Tags({"u" * 300: "y"})),
        ]
        assert all("b%" in part.reason for part in aside[:3])
        history = server.history(run_id)
        assert (len(history["a"]), len(history["b"])) == (1500, 1497)
        assert server.client.get_run(run_id).data.tags["t"] == "x"

    @pytest.mark.parametrize(
        "record", [Tags({"a": "\udc80"}), Points(2**70, 1, {"a": 1.0}), Points(1, 2**70, {"a": 1.0})]
    )
    def test_what_the_database_cannot_hold(self, server: Server, storage: Storage, run_id: str, record: Any) -> None:
        """It holds nothing up."""
        records = [(1, Points(1, 1, {"a": 1.0})), (2, record), (3, Tags({"t": "x"}))]
        assert [(part.number, part.record) for part in server.deliver(run_id, records, storage)] == [(2, record)]
        assert server.history(run_id) == {"a": [(1, 1, 1.0)]}
        assert server.client.get_run(run_id).data.tags["t"] == "x"

    def test_files_and_models_that_are_not_there(self, server: Server, storage: Storage, run_id: str) -> None:
        storage.write(f"{FILES}/{'a' * 64}", b"torn")
        records = [(1, File("a.svg", "a" * 64)), (2, File("b.svg", "b" * 64)), (3, Model("checkpoints/step-9"))]
        aside = server.deliver(run_id, [*records, (4, Status("FINISHED", 10**12))], storage)
        assert [(part.number, part.record) for part in aside] == records
        assert "its content is damaged: " in aside[0].reason
        assert "its content is not there: " in aside[1].reason
        assert server.client.get_run(run_id).info.status == "FINISHED"

    def test_of_a_run_that_was_deleted_no_record_is_refused(
        self, server: Server, storage: Storage, run_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is known after one request, and not after each record has been tried alone."""
        server.client.delete_run(run_id)
        sent, log_batch = list[str](), server.client.log_batch
        monkeypatch.setattr(server.client, "log_batch", lambda run, **what: (sent.append(run), log_batch(run, **what)))
        with pytest.raises(ConfigError, match="was deleted at sqlite"):
            server.deliver(run_id, [(s, Points(s, s, {"a": 1.0})) for s in range(1000)], storage)
        assert sent == [run_id]
        with pytest.raises(ConfigError, match=r"run f+ is not at sqlite"):
            server.deliver("f" * 32, [(0, Tags({"a": "b"}))], storage)

    @pytest.mark.parametrize("server_too", [False, True])
    def test_a_full_disk_is_not_the_servers_fault(
        self, server: Server, storage: Storage, run_id: str, monkeypatch: pytest.MonkeyPatch, server_too: bool
    ) -> None:
        """What goes without it has arrived by then."""

        def full(*_: Any) -> None:
            if server_too:
                monkeypatch.setattr(server.client, "get_run", gone)
            raise OSError(28, "No space left on device")

        def gone(*_: Any) -> None:
            raise ConnectionError("Connection refused")

        content = b"<svg/>"
        digest = hashlib.sha256(content).hexdigest()
        storage.write(f"{FILES}/{digest}", content)
        monkeypatch.setattr(server.client, "log_artifact", full)
        records = [(1, File("a.svg", digest)), (2, Points(1, 1, {"a": 1.0})), (3, Status("FINISHED", 10**12))]
        with pytest.raises(Unreachable, match="connection refused" if server_too else "No space left") as caught:
            server.deliver(run_id, records, storage)
        assert type(caught.value) is (Unreachable if server_too else Unstored)
        monkeypatch.undo()
        assert server.history(run_id) == {"a": [(1, 1, 1.0)]}
        assert server.client.get_run(run_id).info.status == "FINISHED"

    def test_storage_that_is_away_is_not_the_servers_fault(
        self, server: Server, storage: Storage, run_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any) -> None:
            raise ClusterError("cluster.storage: it cannot be read")

        monkeypatch.setattr(storage, "read", fails)
        with pytest.raises(ClusterError, match=r"cluster\.storage"):
            server.deliver(run_id, [(1, File("a.svg", "a" * 64))], storage)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
@pytest.mark.skipif(bool(why_no_postgres()), reason=why_no_postgres())
def test_what_postgresql_cannot_hold(tmp_path: Path, storage: Storage) -> None:
    """MLflow calls it a bad request, as it does when the database has run out of connections. In one server: making
    the tables takes 10 s."""
    bad = [Tags({"a": "x\0y"}), Tags({"b": "\udc80"}), Points(2**70, 1, {"a": 1.0}), Points(1, 2**70, {"a": 1.0})]
    with Postgres(tmp_path) as postgres:
        postgres.database("runs")
        uri = f"postgresql+psycopg://mlflow:{{}}@127.0.0.1:{postgres.port}/runs"
        with pytest.raises(Unreachable, match="password authentication failed") as caught:  # at once
            Server(uri.format("a-secret"))
        assert "a-secret" not in str(caught.value)
        server = Server(uri.format(postgres.password))
        _, run_id = server.open(OPEN, None, None)
        good = [Tags({"t": "x"}), Points(1, 1, {"a": math.nan, "b": math.inf, "c": 1e-320})]
        for _ in range(2):
            aside = server.deliver(run_id, list(enumerate([*bad, *good])), storage)
            assert {part.number for part in aside} == {0, 1, 2, 3}
        history = server.history(run_id)
        assert repr(history["a"]) == "[(1, 1, nan)]"
        assert (history["b"], history["c"]) == ([(1, 1, 1.7976931348623157e308)], [(1, 1, 1e-320)])
        assert server.client.get_run(run_id).data.tags["t"] == "x"
        server.client._tracking_client.store.engine.dispose()


def test_an_address_that_nobody_answers_at() -> None:
    with pytest.raises(Unreachable, match=r"^MLflow at http://127\.0\.0\.1:1 does not answer \([^;]*\)$") as caught:
        Server("http://me:secret@127.0.0.1:1")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"tracking\.uri is \./mlruns"):
        Server("./mlruns")
