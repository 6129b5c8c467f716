"""One run's way from its journal to the server: in order, at least once, through outages, deaths and refusals."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, refusals
from orchestrator.tracking.failures import Unreachable, Unstored, Waiting
from orchestrator.tracking.journal import Ack, Writer
from orchestrator.tracking.journals import places
from orchestrator.tracking.records import File, Model, Open, Points, Record, Status, Tags, to_line
from orchestrator.tracking.refusals import SetAside
from orchestrator.tracking.shipment import Opened, Sent, Shipment, storage_of
from pipelines.errors import ClusterError, ConfigError, DataError
from tests import faults as bucket_faults
from tests.receivers import FakeServer, away
from tests.servers import CREDENTIALS, S3Server

OPEN = Open("1", "digits", "a", {"lr": "0.1"}, {})


def point(step: int) -> Points:
    return Points(step, 1000 + step, {"train/loss": 1 / (1 + step)})


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "runs" / "s1"))


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def written(storage: Storage, *records: Record, lease: int = 1) -> Writer:
    writer = Writer(storage, lease)
    writer.append([to_line(record) for record in records])
    return writer


def all_sent(storage: Storage, server: FakeServer) -> list[Opened | Sent]:
    """A process from its start until nothing is left; returns what it told."""
    told = list[Opened | Sent]()
    shipment = Shipment(storage, server, told.append)
    while shipment.step():
        pass
    return told


# -- what goes well ----------------------------------------------------------------------------------------------------


def test_a_run_is_opened_and_its_records_follow(storage: Storage, server: FakeServer) -> None:
    written(storage, OPEN, point(0), Tags({"a": "b"}), Status("FINISHED", 9))
    assert all_sent(storage, server) == [Opened("7", "R1"), Sent(4, 0, [])]
    assert server.opened == [(OPEN, None, None)]
    assert server.taken == [("R1", 1, point(0)), ("R1", 2, Tags({"a": "b"})), ("R1", 3, Status("FINISHED", 9))]
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 4, 0, 1)


def test_nothing_is_sent_where_nothing_is_new(storage: Storage, server: FakeServer) -> None:
    assert all_sent(storage, server) == []
    written(storage, OPEN, point(0))
    all_sent(storage, server)
    asked = server.requests
    assert all_sent(storage, server) == []  # by another process
    assert server.requests == asked


def test_every_submission_opens_the_run_in_its_place(storage: Storage, server: FakeServer) -> None:
    """What stood before is sent before: the run ends before it is taken up again."""
    again = replace(OPEN, params={"lr": "0.2"})
    written(storage, OPEN, point(0), Status("FAILED", 5), again, point(1), lease=1)
    written(storage, OPEN, point(2), lease=2)
    told = all_sent(storage, server)
    opened = Opened("7", "R1")
    assert told == [opened, Sent(3, 0, []), opened, Sent(5, 0, []), opened, Sent(7, 0, [])]
    assert server.opened == [(OPEN, None, None), (again, None, "R1"), (OPEN, None, "R1")]
    assert [record for _, _, record in server.taken] == [point(0), Status("FAILED", 5), point(1), point(2)]


def test_a_part_belongs_to_the_run_of_the_folder_above(storage: Storage, server: FakeServer) -> None:
    child = Storage(f"{storage.place}/t001")
    written(child, replace(OPEN, id="2", child=True))
    with pytest.raises(Waiting, match=r"s1/t001 waits for that in .*/s1, whose part it is"):
        all_sent(child, server)
    assert server.opened == []
    written(storage, OPEN)
    all_sent(storage, server)
    all_sent(child, server)
    assert [(record.id, parent) for record, parent, _ in server.opened] == [("1", None), ("2", "R1")]


def test_a_run_that_moved_to_another_server_keeps_its_id(storage: Storage, server: FakeServer) -> None:
    written(storage, OPEN, point(0))
    all_sent(storage, server)
    written(storage, OPEN, point(1), lease=2)
    all_sent(storage, moved := FakeServer(shown="http://new:5000"))
    assert moved.opened == [(OPEN, None, "R1")]
    assert [number for _, number, _ in moved.taken] == [3]
    assert journal.read_ack(storage) == Ack("http://new:5000", "7", "R1", 4, 0, 2)


# -- outages -----------------------------------------------------------------------------------------------------------


def test_an_outage_leaves_the_position_where_it_is(storage: Storage, server: FakeServer) -> None:
    written(storage, OPEN, point(0))
    shipment = Shipment(storage, server, lambda _: None)
    server.answers = [away, away, lambda: None, away]
    for following in (0, 0, 1, 1, 2):  # the number of the next record after each try
        with suppress(Unreachable):
            shipment.step()
        assert shipment.next == following
    assert [number for _, number, _ in server.taken] == [1]


def test_an_answer_lost_means_sent_again(storage: Storage, server: FakeServer) -> None:
    written(storage, OPEN, point(0), point(1))
    server.lose_answer = True
    with pytest.raises(Unreachable):
        all_sent(storage, server)
    all_sent(storage, server)
    assert [number for _, number, _ in server.taken] == [1, 2, 1, 2]  # MLflow drops the doubles


def test_a_process_that_died_before_it_told_opens_again(storage: Storage, server: FakeServer) -> None:
    """Else the driver would wait for ever to hear of it."""
    written(storage, OPEN)
    with pytest.raises(SystemExit):
        Shipment(storage, server, lambda _: (_ for _ in ()).throw(SystemExit)).step()
    assert all_sent(storage, server) == [Opened("7", "R1")]
    assert [record.id for record, _, _ in server.opened] == ["1", "1"]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    faults=st.lists(st.sampled_from(["", "", "away", "lost", "dead"]), max_size=25),
    size=st.integers(1, 500),
)
@settings(max_examples=100, deadline=None)
def test_all_records_arrive_in_order_whatever_happens(tmp_path_factory, sizes, faults, size: int) -> None:
    """Drivers come one after the other; requests fail before or after they are fulfilled; the process dies."""
    storage, server, faults = Storage(str(tmp_path_factory.mktemp("run") / "run")), FakeServer(), [*faults]

    def step(shipment: Shipment) -> Shipment:
        fault = faults.pop() if faults else ""
        server.answers, server.lose_answer = ([away] if fault == "away" else []), fault == "lost"
        with suppress(Unreachable):
            shipment.step()
        return Shipment(storage, server, lambda _: None) if fault == "dead" else shipment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SEGMENT_BYTES", size)
        shipment, count = Shipment(storage, server, lambda _: None), 0
        for lease, records in enumerate(sizes, 1):
            writer = written(storage, OPEN, lease=lease)
            for _ in range(records):
                writer.append([to_line(point(count := count + 1))])
                shipment = step(shipment)
        while shipment.next < journal.end(storage):
            shipment = step(shipment)
    firsts = list(dict.fromkeys(record.step for _, _, record in server.taken if isinstance(record, Points)))
    assert firsts == list(range(1, count + 1))
    assert len(server.opened) >= len(sizes)
    assert {run for run, _, _ in server.taken} == {"R1"}


def test_a_journal_in_a_bucket_that_fails_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 300)
    with S3Server() as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        study, server = Storage(f"{bucket.url}/demo"), FakeServer()
        run = Storage(f"{study.place}/resnet-18-s0")
        written(study, OPEN)
        writer = written(run, replace(OPEN, id="2", child=True))
        for step in range(12):
            writer.append([to_line(point(step))])
        assert places(study.place) == [study.place, run.place]
        all_sent(study, server)
        bucket.fault = lambda request, nth: bucket_faults.Status(503) if (nth + len(request.path)) % 3 == 0 else None
        shipment, failures = Shipment(storage_of(run.place), server, lambda _: None), list[str]()
        while shipment.next < 13:
            try:
                shipment.step()
            except ClusterError as error:
                failures.append(str(error))
        bucket.behave()
        assert len(failures) > 3
        assert all(text.startswith("cluster.storage: ") for text in failures)
        assert {(record.id, parent) for record, parent, _ in server.opened} == {("1", None), ("2", "R1")}
        firsts = dict.fromkeys(record.step for _, _, record in server.taken if isinstance(record, Points))
        assert list(firsts) == list(range(12))
        assert journal.read_ack(run) == Ack("http://h:5000", "7", "R2", 13, 0, 1)


def test_records_of_a_driver_that_was_passed_do_not_hide_those_of_the_next(
    storage: Storage, server: FakeServer
) -> None:
    """A driver stood still; the next one has begun, with the same numbers, when late records are on their way."""
    first = written(storage, OPEN, point(0))
    second = Writer(storage, 2)
    first.append([to_line(point(step)) for step in (91, 92, 93)])
    all_sent(storage, server)
    second.append([to_line(OPEN), to_line(point(1))])
    all_sent(storage, server)
    assert [record.step for _, _, record in server.taken if isinstance(record, Points)] == [0, 91, 92, 93, 1]
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 4, 0, 2)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_refused_is_set_aside_and_holds_nothing_up(storage: Storage, server: FakeServer) -> None:
    server.refuses = lambda record: isinstance(record, Tags)
    written(storage, OPEN, point(0), Tags({"a": "b"}), point(1), Tags({"c": "d"}), point(2))
    told = all_sent(storage, server)
    aside = [SetAside(2, "I do not like it", Tags({"a": "b"})), SetAside(4, "I do not like it", Tags({"c": "d"}))]
    assert told == [Opened("7", "R1"), Sent(6, 2, aside)]
    assert [number for _, number, _ in server.taken] == [1, 3, 5]
    assert refusals.kept(storage) == aside
    written(storage, OPEN, Tags({"e": "f"}), lease=2)
    assert all_sent(storage, server)[-1] == Sent(8, 3, [SetAside(7, "I do not like it", Tags({"e": "f"}))])
    assert [line.number for line in refusals.kept(storage)] == [2, 4, 7]


def test_points_of_one_record_count_as_one(storage: Storage, server: FakeServer, monkeypatch) -> None:
    parts = [SetAside(1, "no", Points(0, 1, {key: 1.0})) for key in ("a", "b")]
    monkeypatch.setattr(server, "deliver", lambda *_: parts)
    written(storage, OPEN, Points(0, 1, {"a": 1.0, "b": 1.0, "c": 1.0}))
    assert all_sent(storage, server)[-1] == Sent(2, 1, parts)


def test_a_damaged_line_is_set_aside_as_it_is(storage: Storage, server: FakeServer) -> None:
    writer = written(storage, OPEN)
    writer.append([b'["a list"]\n', to_line(point(0)), b"\xff\n"])
    all_sent(storage, server)
    assert [(line.number, line.record) for line in refusals.kept(storage)] == [(1, '["a list"]'), (3, "�")]
    assert [number for _, number, _ in server.taken] == [2]
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 4, 2, 1)


def test_a_record_of_a_newer_version_is_not_passed(storage: Storage, server: FakeServer) -> None:
    """What stands before it arrives; what stands after it waits for that version."""
    written(storage, OPEN, point(0)).append([b'{"kind": "wish", "for": "snow"}\n', to_line(point(1))])
    with pytest.raises(DataError, match=r"record 2 of .*/s1: 'wish' is no record .*; use the version that wrote it$"):
        all_sent(storage, server)
    assert [number for _, number, _ in server.taken] == [1]
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 2, 0, 1)
    assert storage.read(journal.REFUSED) is None


def test_a_submission_is_found_behind_a_record_of_a_newer_version(storage: Storage, server: FakeServer) -> None:
    written(storage, point(0)).append([b'{"kind": "wish"}\n', to_line(OPEN)])
    with pytest.raises(DataError, match="record 1 of"):
        all_sent(storage, server)
    assert [record for record, _, _ in server.opened] == [OPEN]


# -- artifacts that cannot be stored -----------------------------------------------------------------------------------

FIGURE, MODEL = File("a.svg", "a" * 64), Model("checkpoints/step-9")


def full() -> None:
    """An answer."""
    raise Unstored("the disk is full")


def test_points_do_not_wait_for_files(storage: Storage, server: FakeServer) -> None:
    written(storage, OPEN, FIGURE, point(0), Tags({"a": "b"}))
    server.answers = [lambda: None, lambda: None, full]
    with pytest.raises(Unstored):
        all_sent(storage, server)
    assert [number for _, number, _ in server.taken] == [2, 3]
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 1, 0, 1)
    all_sent(storage, server)
    assert server.taken[-1] == ("R1", 1, FIGURE)


def test_files_that_cannot_be_stored_are_set_aside_after_a_while(storage: Storage, server: FakeServer) -> None:
    """By time in which the server itself answered: an outage of both begins anew."""
    now = [0.0]
    shipment = Shipment(storage, server, lambda _: None, clock=lambda: now[0])
    written(storage, OPEN, FIGURE, point(0), MODEL)
    shipment.step()
    tries = [(0.0, full), (599.0, full), (700.0, away), (701.0, full), (1300.0, full)]
    for now[0], last in tries:
        server.answers = [away] if last is away else [lambda: None, last]
        with pytest.raises(Unreachable):
            shipment.step()
    now[0], server.answers = 1301.0, [lambda: None, full]
    assert shipment.step()
    assert refusals.kept(storage) == [SetAside(1, "the disk is full", FIGURE)]
    assert server.taken[-1] == ("R1", 3, MODEL)  # which was tried for itself
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 4, 1, 1)


def test_what_was_refused_is_tried_again(storage: Storage, server: FakeServer) -> None:
    """Not what a later record replaced, and no status; what is refused still stays."""
    server.refuses = lambda record: not isinstance(record, Points)
    old, new = File("b.svg", "b" * 64), File("b.svg", "c" * 64)
    records = [FIGURE, Tags({"a": "old"}), Tags({"c": "d"}), old, Tags({"a": "new"}), new, MODEL, Status("FAILED", 1)]
    written(storage, OPEN, point(0), *records)
    all_sent(storage, server)
    assert len(refusals.kept(storage)) == 8
    before = list(server.taken)
    server.refuses = lambda record: record == MODEL
    Shipment(storage, server, lambda _: None).retry()
    assert sorted(number for _, number, _ in server.taken[len(before) :]) == [2, 4, 6, 7]
    assert [(aside.number, aside.record) for aside in refusals.kept(storage)] == [(8, MODEL), (9, Status("FAILED", 1))]
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 10, 2, 1)


# -- all of it again ---------------------------------------------------------------------------------------------------


def test_all_is_sent_again_to_a_server_that_lost_it(storage: Storage, server: FakeServer) -> None:
    server.refuses = lambda record: isinstance(record, Tags)
    again = replace(OPEN, params={"lr": "0.2"})
    written(storage, OPEN, point(0), Tags({"a": "b"}), again, point(1))
    all_sent(storage, server)
    shipment = Shipment(storage, empty := FakeServer(), lambda _: None, again=True)
    while shipment.step():
        pass
    assert empty.opened == [(OPEN, None, None), (again, None, "R1")]  # the first by its own id alone
    assert [number for _, number, _ in empty.taken] == [1, 2, 4]
    assert refusals.kept(storage) == []
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 5, 0, 1)


def test_a_part_waits_for_a_run_above_that_is_elsewhere(storage: Storage, server: FakeServer) -> None:
    """Of a run at another server it would be no part."""
    child = Storage(f"{storage.place}/t001")
    written(child, replace(OPEN, id="2", child=True))
    written(storage, OPEN)
    all_sent(storage, FakeServer(shown="http://old:5000"))
    with pytest.raises(Waiting, match=r"to be made in MLflow at http://h:5000$"):
        all_sent(child, server)


def test_a_file_of_refusals_that_is_damaged_is_named(storage: Storage) -> None:
    refusals.keep(storage, [SetAside(1, "no", "x")])
    storage.write(journal.REFUSED, (storage.read(journal.REFUSED) or b"") + b'{"number": 2}\n')
    with pytest.raises(DataError, match=r"tracking/refused\.jsonl is damaged .*remove it"):
        refusals.kept(storage)


@pytest.mark.parametrize("when", ["before", "in mid-run"])
def test_a_run_that_was_deleted_waits_until_it_is_restored(storage: Storage, server: FakeServer, when: str) -> None:
    writer = written(storage, OPEN, point(0))
    all_sent(storage, server)
    server.deleted = {"R1"}
    writer.append([to_line(record) for record in ([OPEN] if when == "before" else []) + [point(1), point(2)]])
    for _ in range(2):  # two processes, one after the other
        with pytest.raises(ConfigError, match="R1 was deleted"):
            all_sent(storage, server)
    assert journal.read_ack(storage) == Ack("http://h:5000", "7", "R1", 2, 0, 1)
    assert storage.read(journal.REFUSED) is None  # it is the run, not the records
    server.deleted = set()
    all_sent(storage, server)
    assert [record.step for _, _, record in server.taken if isinstance(record, Points)] == [0, 1, 2]


def test_a_journal_without_its_beginning_goes_by_the_next_submission(storage: Storage, server: FakeServer) -> None:
    """Power loss. Nobody knows whose points these are until the run is submitted again."""
    written(storage, point(0), point(1))
    with pytest.raises(DataError, match=r"lost its beginning, .* submit the run again"):
        all_sent(storage, server)
    written(storage, OPEN, point(2), lease=2)
    all_sent(storage, server)
    assert server.opened == [(OPEN, None, None), (OPEN, None, "R1")]
    assert [number for _, number, _ in server.taken] == [0, 1, 3]


# -- the file of refusals ----------------------------------------------------------------------------------------------


def test_refusals_are_lines_of_json(storage: Storage) -> None:
    refusals.keep(storage, [])
    assert storage.read(journal.REFUSED) is None
    refusals.keep(storage, [SetAside(3, "bad name", Points(0, 1, {"a%": 1.0}))])
    line = json.loads(storage.read(journal.REFUSED) or b"")
    assert line == {"number": 3, "reason": "bad name",
                    "record": {"kind": "points", "step": 0, "timestamp_ms": 1, "values": {"a%": 1.0}}}  # fmt: skip
