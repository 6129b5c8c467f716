"""`python -m jobs.tracking`: what it says of a run, a study and a server, in which words, and with which exit code."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from jobs import tracking
from orchestrator.state import lease as leases
from orchestrator.state.lease import lease
from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, journals, refusals, sync
from orchestrator.tracking.failures import Unstored
from orchestrator.tracking.journal import Ack, Writer
from orchestrator.tracking.journals import Standing, address, places
from orchestrator.tracking.records import File, Open, Points, Record, Status, Tags, to_line
from orchestrator.tracking.server import Server
from pipelines.errors import ClusterError, ConfigError
from tests.receivers import FakeServer, away

slow = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
NOBODY = "http://me:secret@127.0.0.1:1"  # where nothing listens
PAGE = f"http://127.0.0.1:1/#/experiments/3/runs/{'r' * 32}?workflowType=machine_learning"


def point(step: int) -> Points:
    return Points(step, 10**12 + step, {"train/loss": 1 / (1 + step)})


def run_of(place: Path, steps: int = 20, *more: Record, child: bool = False) -> Storage:
    """A run that was trained, and of which nothing was sent."""
    storage = Storage(str(place))
    opening = Open(f"id of {place.name}", "digits", place.name, {"lr": "0.1"}, {}, child=child)
    records = [opening, *map(point, range(steps)), *more, Status("FINISHED", 10**12 + steps)]
    Writer(storage, 1).append([to_line(record) for record in records])
    return storage


def run_id_of(storage: Storage) -> str:
    known = journal.read_ack(storage)
    assert known
    return known.run_id


def study_of(place: Path) -> Path:
    run_of(place, 0)
    for name in ("plain-18-s0", "resnet-18-s0"):
        run_of(place / name, child=True)
    return place


@pytest.fixture(autouse=True)
def _no_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# -- which journals ----------------------------------------------------------------------------------------------------


def test_a_study_comes_before_its_runs(tmp_path: Path) -> None:
    study = study_of(tmp_path / "demo")
    (study / "figures" / "tracking").mkdir(parents=True)
    (study / "figures" / "tracking" / "journal").write_bytes(b"no folder")
    found = [str(study), str(study / "plain-18-s0"), str(study / "resnet-18-s0")]
    assert places(str(study)) == places(f"{study}/") == found
    assert places(found[1]) == found[1:2]
    assert places(str(tmp_path)) == found


@pytest.mark.parametrize("folder", ["nothing", "untracked"])
def test_a_folder_without_a_journal(tmp_path: Path, folder: str) -> None:
    Storage(str(tmp_path / "untracked")).write("run.json", b"{}")
    with pytest.raises(ConfigError) as caught:
        tracking.main(["status", str(tmp_path / folder)])
    assert str(caught.value) == (
        f"FOLDER is {tmp_path / folder}, and there is no tracking journal in it; name the folder of a run, a study or "
        f"a sweep that was tracked: <cluster.storage>/<name>"
    )


# -- where to ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "parent", "asked", "environment", "expected"),
    [
        ("http://h", "", "", "", "http://h"),
        ("http://h", "", "", "http://other", "http://h"),  # the run is there, whatever the shell says
        ("http://h", "", "", "http://me:secret@h", "http://me:secret@h"),
        ("http://h", "", "http://new", "http://other", "http://new"),
        ("", "", "", "http://env", "http://env"),
        ("", "", "http://new", "http://env", "http://new"),
        ("", "http://h", "", "http://env", "http://h"),  # beside its parent
        ("http://h", "http://parent", "", "", "http://h"),
    ],
)
def test_where_a_journal_goes(tmp_path, own: str, parent: str, asked: str, environment: str, expected: str) -> None:
    for uri, place in ((parent, tmp_path / "s"), (own, tmp_path / "s" / "t001")):
        if uri:
            journal.write_ack(Storage(str(place)), Ack(uri, "1", "r"))
    assert address(str(tmp_path / "s" / "t001"), asked, environment) == expected


@pytest.mark.parametrize("secret", ["", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "a file"])
def test_a_password_goes_where_the_user_says(tmp_path: Path, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """server.json may be anybody's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if secret == "a file":
        (tmp_path / ".mlflow").mkdir()
        (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\nmlflow_tracking_username = me\n")
    elif secret:
        monkeypatch.setenv(secret, "s")
    place = str(tmp_path / "a")
    journal.write_ack(Storage(place), Ack("http://h:80", "1", "r"))
    assert address(place, "", "http://me:x@h/") == "http://h:80"
    assert address(place, "http://h:80", "") == "http://h:80"
    for environment in ("", "https://h:80", "http://h:81", "http://other"):
        if secret:
            with pytest.raises(ConfigError, match=r"a went to http://h:80, .* give --uri http://h:80 or set MLFLOW_TR"):
                address(place, "", environment)
        else:
            assert address(place, "", environment) == "http://h:80"
    journal.write_ack(Storage(place), Ack("sqlite:////a.db", "1", "r"))
    assert address(place, "", "") == "sqlite:////a.db"


@pytest.mark.usefixtures("_hasty")
def test_sync_sets_aside_what_cannot_be_stored(tmp_path: Path) -> None:
    def passes() -> None:
        pass

    def full() -> None:
        raise Unstored("the disk is full")

    figure = File("a.svg", "a" * 64)
    storage, server = run_of(tmp_path / "a", 1, figure), FakeServer()
    server.answers = [passes, passes, full, passes, full, passes, full]
    standing, _ = synced(storage, server)
    assert (standing.waiting, standing.refused) == (0, 1)
    server.answers = [full]
    standing = sync.sync(storage.place, server, lambda _: None, lambda *_: None, refused=True)
    assert standing.refused == 1
    standing = sync.sync(storage.place, server, lambda _: None, lambda *_: None, refused=True)
    assert (standing.refused, server.taken[-1]) == (0, ("Rid of a", 2, figure))


def test_a_run_that_was_tracked_offline_needs_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path / "a")
    assert tracking.main(["sync", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err == (
        f"error: the run in {tmp_path}/a was tracked offline, so it is not known where it goes; give --uri, or set "
        f"MLFLOW_TRACKING_URI\n"
    )


# -- status ------------------------------------------------------------------------------------------------------------


def test_status_asks_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(tmp_path / "demo")
    journal.write_ack(Storage(str(study)), Ack("http://127.0.0.1:1", "3", "r" * 32, 2))
    journal.write_ack(Storage(str(study / "plain-18-s0")), Ack("sqlite:////a.db", "1", "s" * 32, 12, 2))
    assert tracking.main(["status", str(study), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == [
        {"run": str(study), "records": 2, "shipped": 2, "waiting": 0, "refused": 0, "server": "http://127.0.0.1:1",
         "mlflow_run_id": "r" * 32, "url": PAGE},
        {"run": str(study / "plain-18-s0"), "records": 22, "shipped": 12, "waiting": 10, "refused": 2,
         "server": "sqlite:////a.db", "mlflow_run_id": "s" * 32, "url": None},
        {"run": str(study / "resnet-18-s0"), "records": 22, "shipped": 0, "waiting": 22, "refused": 0, "server": None,
         "mlflow_run_id": None, "url": None},
    ]  # fmt: skip


def test_status_is_a_table(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path / "demo")
    journal.write_ack(Storage(str(study)), Ack("http://127.0.0.1:1", "3", "r" * 32, 1))
    monkeypatch.chdir(tmp_path)
    assert tracking.main(["status", "demo"]) == 0
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["run", "records", "shipped", "waiting", "refused", "server", "MLflow", "run", "page"]
    assert rows[0][1:] == ["2", "1", "1", "0", "http://127.0.0.1:1", "r" * 32, PAGE]
    assert rows[1] == [str(study / "plain-18-s0"), "22", "0", "22", "0", "none", "yet"]
    assert len(rows) == 3


# -- sync, over a server in memory -------------------------------------------------------------------------------------


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "PAUSE_S", 0.001)
    monkeypatch.setattr(leases, "RENEW_S", 0.05)


def synced(storage: Storage, server: FakeServer) -> tuple[Standing, list[tuple[int, int]]]:
    shown = list[tuple[int, int]]()
    return sync.sync(storage.place, server, lambda _: None, lambda *far: shown.append(far)), shown


@pytest.mark.usefixtures("_hasty")
def test_sync_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1)
    storage = Storage(str(tmp_path / "a"))
    writer = Writer(storage, 1)
    for record in (Open("1", "e", "a", {}, {}), point(0), point(1), Tags({"a": "b"})):
        writer.append([to_line(record)])
    server = FakeServer(refuses=lambda record: isinstance(record, Tags))
    standing, shown = synced(storage, server)
    assert shown == [(2, 4), (3, 4), (4, 4)]
    assert (standing.shipped, standing.waiting, standing.refused) == (4, 0, 1)


@pytest.mark.usefixtures("_hasty")
def test_sync_gives_a_server_a_moment_and_then_says_what_is_left(tmp_path: Path) -> None:
    storage, server = run_of(tmp_path / "a"), FakeServer()
    server.answers = [away, away, lambda: None, away, away, away]
    with pytest.raises(ClusterError) as caught:
        synced(storage, server)
    assert str(caught.value) == (
        f"MLflow at http://h:5000 does not answer (connection refused); 21 of 22 records in {tmp_path}/a wait; when it "
        f"answers, run the same command again"
    )
    assert server.requests == 6
    assert synced(storage, server)[0].waiting == 0


@pytest.mark.usefixtures("_hasty")
def test_sync_keeps_away_from_a_run_that_is_being_trained(tmp_path: Path) -> None:
    storage, server = run_of(tmp_path / "a"), FakeServer()
    refused = pytest.raises(ClusterError, match=r"run 'a' is being trained by process \d+ on .*; wait for it, stop it")
    with lease(Storage(storage.place), "a", lambda _: None), refused:
        synced(storage, server)
    assert server.requests == 0
    assert synced(storage, server)[0].waiting == 0
    with lease(Storage(storage.place), "a", lambda _: None) as held:  # a driver may come now
        assert held.number == 3


@pytest.mark.usefixtures("_hasty")
def test_a_run_whose_study_was_not_sent_waits(tmp_path: Path) -> None:
    study = study_of(tmp_path / "demo")
    refused = r"plain-18-s0 waits for that in .*/demo, whose part it is, .*; send that first: .*tracking sync .*/demo$"
    with pytest.raises(ConfigError, match=refused):
        synced(Storage(str(study / "plain-18-s0")), FakeServer())
    journal.write_ack(Storage(str(study)), Ack("http://old", "1", "r", 2))
    with pytest.raises(ConfigError, match=r"tracking sync .*/demo --again --uri http://h:5000$"):
        synced(Storage(str(study / "plain-18-s0")), FakeServer())


# -- the command, over SQLite ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, which take 6 s to make."""
    place = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Server(f"sqlite:///{place}")
    return place


class TestSqlite:
    pytestmark = slow

    @pytest.fixture
    def uri(self, tmp_path: Path, empty: Path) -> str:
        return f"sqlite:///{shutil.copy(empty, tmp_path)}"

    def test_a_study_from_an_offline_cluster(
        self, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = study_of(tmp_path / "demo")
        assert tracking.main(["verify", str(study)]) == 1
        assert capsys.readouterr().out.splitlines()[1] == (
            f"{study}/plain-18-s0: 0 points, journal and server agree; 22 records wait: "
            f"python -m jobs.tracking sync {study}/plain-18-s0"
        )
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for _ in range(2):  # the second time there is nothing to do
            assert tracking.main(["sync", str(study)]) == 0
            assert capsys.readouterr().out.splitlines() == [
                f"{study}: 2 records are at {uri}",
                f"{study}/plain-18-s0: 22 records are at {uri}",
                f"{study}/resnet-18-s0: 22 records are at {uri}",
            ]
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert tracking.main(["verify", str(study)]) == 0
        assert capsys.readouterr().out.splitlines()[1] == f"{study}/plain-18-s0: 20 points, journal and server agree"
        client = Server(uri).client
        runs = {run.info.run_name: run for run in client.search_runs(["1"])}
        assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
            ("demo", "plain-18-s0", "resnet-18-s0"), "FINISHED"
        )
        parents = {run.data.tags.get("mlflow.parentRunId") for run in runs.values()}
        assert parents == {None, runs["demo"].info.run_id}

    def test_verify_names_what_differs(self, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        from mlflow.entities import Metric as Point

        storage = run_of(tmp_path / "a", 20, Points(3, 10**12, {"bad%": 1.0}))
        assert tracking.main(["sync", storage.place, "--uri", uri]) == 0
        told = capsys.readouterr().out
        assert told == (
            f"{storage.place}: 23 records are at {uri}, but 1 that it refused: see {storage.place}/{journal.REFUSED}; "
            f"--refused tries them again\n"
        )
        assert [line.number for line in refusals.kept(storage)] == [21]
        assert tracking.main(["verify", storage.place]) == 0
        assert "20 points, journal and server agree (1 records were refused)" in capsys.readouterr().out
        run_id, client = run_id_of(storage), Server(uri).client
        others = [Point("train/loss", 0.5, 10**12 + 99, step) for step in range(12)]
        client.log_batch(run_id, metrics=[*others, Point("x", 1.0, 1, 1)])
        assert tracking.main(["verify", storage.place]) == 1
        head, *lines = capsys.readouterr().out.splitlines()
        assert "journal and server differ: 0 missing, 12 doubled, 0 different, 1 foreign (1 records were" in head
        assert lines[0] == "  doubled: train/loss at step 0 (server 0.5 at 1000000000099)"
        assert len(lines) == 11
        assert lines[-1] == "  and 3 more"
        assert tracking.main(["verify", storage.place, "--json"]) == 1
        (verdict,) = json.loads(capsys.readouterr().out)
        assert (verdict["points"], verdict["doubled"], verdict["foreign"], verdict["missing"]) == (20, 12, 1, 0)
        assert verdict["differences"][-1] == {
            "kind": "foreign", "key": "x", "step": 1, "journal": None, "server": [1, 1.0]}  # fmt: skip

    def test_a_server_that_lost_its_database_gets_all_of_it_again(
        self, tmp_path: Path, uri: str, empty: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        study = study_of(tmp_path / "demo")
        assert tracking.main(["sync", str(study), "--uri", uri]) == 0
        shutil.copy(empty, Path(uri.removeprefix("sqlite:///")))
        Server(uri).open(Open("strange", "digits", "strange", {}, {}), None, None)
        assert tracking.main(["verify", str(study)]) == 2
        assert "python -m jobs.tracking sync FOLDER --again" in capsys.readouterr().err
        assert tracking.main(["sync", str(study), "--again"]) == 0
        assert tracking.main(["verify", str(study)]) == 0
        runs = {run.info.run_name: run for run in Server(uri).client.search_runs(["1"])}
        assert runs["plain-18-s0"].data.tags["mlflow.parentRunId"] == runs["demo"].info.run_id
        assert tracking.main(["sync", str(study), "--again"]) == 0  # finds them by their ids
        assert len(Server(uri).client.search_runs(["1"])) == 4

    def test_verify_of_a_backup_names_the_way_back(
        self, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        storage, database = run_of(tmp_path / "a", 0), Path(uri.removeprefix("sqlite:///"))
        assert tracking.main(["sync", storage.place, "--uri", uri]) == 0
        backup = database.read_bytes()
        Writer(storage, 2).append([to_line(point(0))])
        assert tracking.main(["sync", storage.place]) == 0
        database.write_bytes(backup)
        capsys.readouterr()
        assert tracking.main(["verify", storage.place]) == 1
        assert f"; to send all of it again: python -m jobs.tracking sync {storage.place} --again\n" in (
            capsys.readouterr().out
        )
        assert tracking.main(["sync", storage.place, "--again"]) == 0
        assert tracking.main(["verify", storage.place]) == 0

    def test_what_was_refused_is_tried_again_when_asked(self, tmp_path: Path, uri: str) -> None:
        content = b"<svg/>"
        digest = hashlib.sha256(content).hexdigest()
        storage = run_of(tmp_path / "a", 1, File("a.svg", digest))
        assert tracking.main(["sync", storage.place, "--uri", uri]) == 0
        assert [line.number for line in refusals.kept(storage)] == [2]  # its content is not there
        storage.write(f"{journal.FILES}/{digest}", content)
        assert tracking.main(["sync", storage.place]) == 0
        assert len(refusals.kept(storage)) == 1
        assert tracking.main(["sync", storage.place, "--refused"]) == 0
        assert (refusals.kept(storage), journals.standing(storage).refused) == ([], 0)
        assert [item.path for item in Server(uri).client.list_artifacts(run_id_of(storage))] == ["a.svg"]

    @pytest.mark.usefixtures("_hasty")
    def test_runs_that_are_held_or_damaged_do_not_hold_up_the_others(
        self, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs = tmp_path / "runs"
        held, damaged, _ = (run_of(runs / name) for name in "abc")
        assert tracking.main(["sync", str(runs), "--uri", uri]) == 0
        damaged.write(journal.REFUSED, b"no line\n")
        Writer(damaged, 2).append([b'{"kind": "wish"}\n'])
        capsys.readouterr()
        with lease(held, "a", lambda _: None):
            assert tracking.main(["sync", str(runs)]) == 4  # the first one's
        told = capsys.readouterr()
        assert [line[:20] for line in told.err.splitlines()] == ["error: run 'a' is be", "error: record 22 of "]
        assert f"{runs}/c: 22 records are at {uri}" in told.out
        assert tracking.main(["verify", str(runs)]) == 3
        told = capsys.readouterr()
        assert told.err.startswith(f"error: {damaged.place}/tracking/refused.jsonl is damaged")
        assert told.out.count("20 points, journal and server agree") == 2

    def test_a_run_that_was_deleted_does_not_hold_up_the_others(
        self, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("a", "b"):
            run_of(tmp_path / "runs" / name)
        assert tracking.main(["sync", str(tmp_path / "runs" / "a"), "--uri", uri]) == 0
        run_id = run_id_of(Storage(str(tmp_path / "runs" / "a")))
        Server(uri).client.delete_run(run_id)
        Writer(Storage(str(tmp_path / "runs" / "a")), 2).append([to_line(Tags({"a": "b"}))])
        capsys.readouterr()
        assert tracking.main(["sync", str(tmp_path / "runs"), "--uri", uri]) == 2
        told = capsys.readouterr()
        assert f"error: MLflow run {run_id} was deleted at {uri}; restore it" in told.err
        assert f"{tmp_path}/runs/b: 22 records are at {uri}" in told.out


def test_a_server_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is asked once."""
    storage = run_of(tmp_path / "a")
    run_of(tmp_path / "b")
    for command in ("sync", "verify"):
        assert tracking.main([command, str(tmp_path), "--uri", NOBODY]) == 4
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith("error: MLflow at http://127.0.0.1:1 does not answer (")
        assert told.endswith("); start it, or say with --uri where it is now")
        journal.write_ack(storage, Ack("http://127.0.0.1:1", "1", "r"))  # else there is nothing to compare with
