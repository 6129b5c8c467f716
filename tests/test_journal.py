"""The tracking journal: records as lines, segments of drivers that take a run over, and what late ones still write."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal
from orchestrator.tracking.journal import Ack, Segment, Writer
from orchestrator.tracking.records import (
    DatasetRef,
    ExperimentTag,
    File,
    Model,
    Open,
    Points,
    Record,
    Status,
    Tags,
    from_line,
    to_line,
)
from pipelines.errors import ClusterError, DataError
from tests.servers import CREDENTIALS, S3Server

TEXT, WHEN = st.text(max_size=20), st.integers(0, 2**53)
PAIRS = st.dictionaries(TEXT, TEXT, max_size=3)
RECORDS = st.one_of(
    st.builds(Open, TEXT, TEXT, TEXT, PAIRS, PAIRS, st.none() | st.builds(DatasetRef, TEXT, TEXT, TEXT), st.booleans()),
    st.builds(Points, st.integers(0, 2**40), WHEN, st.dictionaries(TEXT, st.floats(), max_size=4)),
    st.builds(Tags, PAIRS),
    st.builds(File, TEXT, TEXT),
    st.builds(ExperimentTag, TEXT, TEXT),
    st.builds(Status, st.sampled_from(["FINISHED", "FAILED", "KILLED"]), WHEN),
    st.builds(Model, TEXT, TEXT, TEXT),
)


def line(text: str) -> bytes:
    """A record that can be told from every other."""
    return to_line(Tags({"is": text}))


def told(storage: Storage) -> list[bytes]:
    return [said for _, said in journal.lines(storage)]


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "run"))


# -- lines -------------------------------------------------------------------------------------------------------------


@given(record=RECORDS)
def test_a_record_comes_back_from_its_line(record: Record) -> None:
    """Bit for bit: a value's text is its shortest, which names no other number."""
    said = to_line(record)
    assert said.count(b"\n") == 1
    assert said.endswith(b"\n")
    assert repr(from_line(said)) == repr(record)  # in repr NaN equals NaN


def test_numbers_that_json_lacks_are_strings() -> None:
    said = to_line(Points(3, 4, {"a": math.nan, "b": math.inf, "c": -math.inf}))
    assert b'"values": {"a": "nan", "b": "inf", "c": "-inf"}' in said


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"null\n",
        b"[]\n",
        b"{}\n",
        b'{"kind": "points"}\n',
        b'{"kind": "status", "status": "FINISHED"}\n',  # without its time
        b'{"kind": "tags", "values": {}, "more": 1}\n',  # by a later version
        b'{"kind": "wish", "values": {}}\n',
        b'{"kind": "tags", "valu',  # torn
        b"\xff\n",
    ],
)
def test_what_is_no_record_is_refused(said: bytes) -> None:
    with pytest.raises(DataError, match=r"no record of a tracking journal .* use the version that wrote it"):
        from_line(said)


# -- segments ----------------------------------------------------------------------------------------------------------


def name(start: int, lease: int) -> str:
    return Segment(start, lease).name


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        ([], []),
        ([(0, 1), (50, 1), (90, 1)], [(0, 1), (50, 1), (90, 1)]),
        ([(0, 1), (50, 2)], [(0, 1), (50, 2)]),
        ([(0, 1), (50, 2), (60, 1)], [(0, 1), (50, 2)]),  # begun by a driver that did not know yet
        ([(0, 1), (50, 2), (60, 1), (70, 2)], [(0, 1), (50, 2), (70, 2)]),
        ([(0, 1), (50, 1), (50, 3)], [(0, 1), (50, 3)]),  # the older one died after it began
        ([(0, 3)], [(0, 3)]),
        ([(0, 1), (999_999_999_999, 1)], [(0, 1), (999_999_999_999, 1)]),
    ],
)
def test_segments_that_count(names: list[tuple[int, int]], counted: list[tuple[int, int]]) -> None:
    others = [
        "tracking/journal/readme.txt",
        "tracking/journal/000000000000-000000001.jsonl.tmp",
        "tracking/server.json",
    ]
    found = journal.segments([*others, *(name(*of) for of in names)])
    assert [(segment.start, segment.lease) for segment in found] == counted


def test_empty_journal(storage: Storage) -> None:
    piece = journal.read(storage, 0)
    assert (piece.start, piece.lines, told(storage), journal.end(storage)) == (0, [], [], 0)


def test_segments_are_small_and_a_piece_is_of_one(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 3 * len(line("00")))
    writer = Writer(storage, 1)
    for i in range(10):
        writer.append([line(f"{i:02}")])
    starts = [segment.start for segment in journal.segments(storage.names(journal.FOLDER))]
    assert starts == [0, 3, 6, 9]
    assert [len(journal.read(storage, start).lines) for start in (0, 1, 3, 8, 9, 10)] == [3, 2, 3, 1, 1, 0]
    assert (writer.next, journal.end(storage)) == (10, 10)


def test_late_lines_of_a_driver_that_was_passed_do_not_count(storage: Storage) -> None:
    first = Writer(storage, 1)
    first.append([line("a"), line("b")])
    second = Writer(storage, 2)
    first.append([line("too late for the second to see")])
    assert len(told(storage)) == 3  # nobody knows better yet
    second.append([line("c"), line("d")])
    first.append([line("late")])
    second.append([line("e")])
    assert told(storage) == [line(text) for text in "abcde"]
    assert journal.end(storage) == second.next == 5


def test_who_takes_over_with_power_lost_goes_on_behind_the_last_whole_line(storage: Storage) -> None:
    Writer(storage, 1).append([line("a"), line("b"), line("c")])
    whole = storage.read(name(0, 1))
    assert whole is not None
    storage.write(name(0, 1), whole[: -len(line("c")) // 2])
    assert told(storage) == [line("a"), line("b")]
    second = Writer(storage, 2)
    second.append([line("d")])
    assert told(storage) == [line(text) for text in "abd"]


def test_a_gap_is_passed_over(storage: Storage) -> None:
    """Power loss emptied a segment that has one behind it."""
    storage.write(name(0, 1), line("a"))
    storage.write(name(5, 1), b"")
    storage.write(name(9, 1), line("z"))
    assert list(journal.lines(storage)) == [(0, line("a")), (9, line("z"))]
    piece = journal.read(storage, 1)
    assert (piece.start, piece.next) == (9, 10)


def test_a_failed_append_is_no_append(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(storage, 1)
    writer.append([line("a")])
    with monkeypatch.context() as away:
        away.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(ClusterError("full")))
        with pytest.raises(ClusterError):
            writer.append([line("b"), line("c")])
    assert (told(storage), writer.next) == ([line("a")], 1)
    writer.append([line("b")])
    assert told(storage) == [line("a"), line("b")]


def test_a_bucket_is_as_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 100)
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    with S3Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        bucket = Storage(f"{server.url}/run")
        first, second = Writer(bucket, 1), None
        for i in range(10):
            first.append([line(f"{i}")])
        second = Writer(bucket, 2)
        second.append([line("10")])
        first.append([line("late")])
        assert told(bucket) == [line(f"{i}") for i in range(11)]
        journal.write_ack(bucket, Ack("http://h", "1", "r", 7))
        assert journal.read_ack(bucket) == Ack("http://h", "1", "r", 7)


# -- all that drivers and readers may do -------------------------------------------------------------------------------

# take: a driver comes, and writes its first record later; put: driver i writes n records; read: one piece.
MOVES = st.one_of(
    st.just(("take", 0, 0)), st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 4)), st.just(("read", 0, 0))
)


@given(moves=st.lists(MOVES, max_size=25), size=st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_readers_get_what_the_newest_driver_knows(tmp_path_factory, moves, size: int) -> None:
    """A driver that comes knows what was there then; from its first record on that is the truth, whatever older ones
    add. Who has read on meanwhile, as far as an older driver's late lines, still gets every record of the truth."""
    storage = Storage(str(tmp_path_factory.mktemp("run") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SEGMENT_BYTES", size)
        drivers, truth, wrote = [Writer(storage, 1)], list[bytes](), 1  # wrote: how many drivers have, oldest first
        at, lease, got = 0, 0, dict[int, bytes]()

        def read() -> bool:
            nonlocal at, lease
            piece = journal.read(storage, at, lease)
            got.update(enumerate(piece.lines, piece.start))
            at, lease = piece.next, piece.lease
            return bool(piece.lines)

        for count, (move, who, records) in enumerate(moves):
            if move == "take" and wrote == len(drivers):
                drivers.append(Writer(storage, len(drivers) + 1))
            elif move == "read":
                read()
            elif move == "put" and who < len(drivers):
                lines = [line(f"{count} {i}") for i in range(records)]
                if who == len(drivers) - 1:  # the newest; it may be its first
                    truth = truth[: drivers[who].next] + lines
                    wrote = len(drivers)
                elif who == wrote - 1:  # it was passed, and nobody can know yet
                    truth += lines
                drivers[who].append(lines)
        while read():
            pass
        assert told(storage) == truth
        assert [got[number] for number in range(len(truth))] == truth


# -- what was acknowledged ---------------------------------------------------------------------------------------------

ACK = Ack("http://h:5000", "3", "r" * 32, 12, 1, 2)


def test_ack_comes_back(storage: Storage) -> None:
    assert journal.read_ack(storage) is None
    journal.write_ack(storage, ACK)
    journal.write_ack(storage, replace(ACK, next=15))
    assert journal.read_ack(storage) == replace(ACK, next=15)


@pytest.mark.parametrize("torn", [b"", b'{"uri": "http', b"null", b"[]", b'{"uri": "http://h"}', b'{"other": 1}'])
def test_torn_ack_is_none(storage: Storage, torn: bytes) -> None:
    """Everything is sent again then, and the run is found by its id."""
    storage.write(journal.SERVER, torn)
    assert journal.read_ack(storage) is None
