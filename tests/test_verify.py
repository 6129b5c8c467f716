"""Journal and server compared point by point: what is missing, doubled, different or foreign, and nothing else."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.state.storage import Storage
from orchestrator.tracking import journal, refusals
from orchestrator.tracking.journal import Ack, Writer
from orchestrator.tracking.records import Open, Points, Status, Tags, to_line
from orchestrator.tracking.refusals import SetAside
from orchestrator.tracking.verify import Difference, Point, compare, verify

INF, NAN, MOST = math.inf, math.nan, sys.float_info.max


def kinds(written: list[Point], found: list[Point]) -> list[str]:
    return [difference.kind for difference in compare({"a": written}, {"a": found})]


@pytest.mark.parametrize(
    ("written", "found", "expected"),
    [
        ([], [], []),
        ([(1, 10, 0.5)], [(1, 10, 0.5)], []),
        ([(1, 10, 0.5), (1, 10, 0.5)], [(1, 10, 0.5)], []),  # written twice is taken once
        ([(1, 10, NAN)], [(1, 10, NAN)], []),
        ([(1, 10, INF), (2, 10, -INF)], [(1, 10, MOST), (2, 10, -MOST)], []),
        ([(1, 10, 0.5), (1, 11, 0.5)], [(1, 11, 0.5), (1, 10, 0.5)], ["doubled"]),  # in the journal, too
        ([(1, 10, 0.5)], [], ["missing"]),
        ([], [(1, 10, 0.5)], ["foreign"]),
        ([(1, 10, 0.5)], [(2, 10, 0.5)], ["missing", "foreign"]),
        ([(1, 10, 0.5)], [(1, 10, 0.25)], ["different"]),
        ([(1, 10, 0.5)], [(1, 11, 0.5)], ["different"]),
        ([(1, 10, NAN)], [(1, 10, 0.0)], ["different"]),
        ([(1, 10, 0.5)], [(1, 10, 0.5), (1, 11, 0.5)], ["doubled"]),
        ([(1, 10, 0.5)], [(1, 10, 0.5), (1, 10, 0.5)], ["doubled"]),
        ([(1, 10, 0.5), (1, 12, 0.6)], [(1, 11, 0.5)], ["doubled", "different", "missing"]),
        ([(1, 10, 0.5)], [(1, 11, 0.5), (1, 12, 0.5)], ["different", "doubled"]),
        ([(1, 10, 1e-320)], [(1, 10, 1e-320)], []),  # every bit
        ([(1, 10, 0.1 + 0.2)], [(1, 10, 0.3)], ["different"]),
    ],
)
def test_what_differs(written: list[Point], found: list[Point], expected: list[str]) -> None:
    assert kinds(written, found) == expected


def test_metrics_are_compared_by_name() -> None:
    point = (1, 10, 0.5)
    assert compare({"a": [point], "b": [point]}, {"b": [point], "c": [point]}) == [
        Difference("missing", "a", 1, (10, 0.5), None),
        Difference("foreign", "c", 1, None, (10, 0.5)),
    ]


def test_a_difference_names_its_point() -> None:
    assert str(Difference("missing", "val/top1", 1200, (10, 0.5), None)) == (
        "missing: val/top1 at step 1,200 (journal 0.5 at 10)"
    )
    assert str(Difference("different", "a", 1, (10, "nan"), (11, 0.25))) == (
        "different: a at step 1 (journal nan at 10, server 0.25 at 11)"
    )


POINTS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 3), st.floats()), max_size=30, unique_by=lambda point: point[0]
)


@given(points=POINTS, data=st.data())
def test_each_harm_is_found_once(points: list[Point], data: st.DataObject) -> None:
    """Of points of unlike steps each is left alone, lost, doubled, changed, or somebody else's."""
    harms = [data.draw(st.sampled_from(["", "missing", "doubled", "different", "foreign"])) for _ in points]
    written = [point for point, harm in zip(points, harms, strict=True) if harm != "foreign"]
    found = []
    for (step, when, value), harm in zip(points, harms, strict=True):
        if harm not in ("missing", "different"):
            found.append((step, when, value))
        if harm in ("doubled", "different"):
            found.append((step, when + 1, value))
    found = data.draw(st.permutations(found))
    named = {difference.step: difference.kind for difference in compare({"a": written}, {"a": found})}
    assert named == {point[0]: harm for point, harm in zip(points, harms, strict=True) if harm}


# -- a journal ---------------------------------------------------------------------------------------------------------


class Histories:
    """A server that has these points."""

    def __init__(self, found: dict[str, list[Point]]) -> None:
        self.found, self.asked = found, list[str]()

    def history(self, run_id: str) -> dict[str, list[Point]]:
        """Of the run."""
        self.asked.append(run_id)
        return self.found


@pytest.fixture
def storage(tmp_path) -> Storage:
    storage = Storage(str(tmp_path / "run"))
    records = [Open("1", "e", "a", {}, {}), Points(0, 10, {"a": 0.5, "b": NAN}), Tags({"x": "y"}),
               Points(1, 11, {"a": 0.25, "bad%": 1.0}), Points(1, 11, {"a": 0.25}), Status("FINISHED", 12)]  # fmt: skip
    writer = Writer(storage, 1)
    writer.append([*map(to_line, records), b'{"kind": "wish"}\n'])
    return storage


def test_of_a_run_that_was_never_sent_nothing_is_missing_yet(storage: Storage) -> None:
    verdict = verify(storage, None)
    assert (verdict.points, verdict.standing.waiting, verdict.differences) == (0, 7, [])
    assert not verdict.agree


def test_what_waits_is_neither_missing_nor_foreign(storage: Storage) -> None:
    """A run that goes on may have more at the server than was acknowledged a moment ago."""
    journal.write_ack(storage, Ack("http://h", "1", "r1", 2))
    found: dict[str, list[Point]] = {"a": [(0, 10, 0.5)], "b": [(0, 10, NAN)]}
    more: dict[str, list[Point]] = {"a": [(0, 10, 0.5), (1, 11, 0.25)], "b": [(0, 10, NAN)]}
    for had in (found, more):
        verdict = verify(storage, Histories(had))  # type: ignore[arg-type]
        assert (verdict.points, verdict.standing.waiting, verdict.differences) == (2, 5, [])
    strange: dict[str, list[Point]] = {"a": [(0, 10, 0.5), (1, 11, 0.125)]}
    verdict = verify(storage, Histories(strange))  # type: ignore[arg-type]
    assert [str(difference.kind) for difference in verdict.differences] == ["foreign", "missing"]
    assert not verdict.lost


def test_what_is_missing_although_nothing_waits_is_lost(storage: Storage) -> None:
    journal.write_ack(storage, Ack("http://h", "1", "r1", 7))
    assert verify(storage, Histories({})).lost  # type: ignore[arg-type]


def test_points_that_were_refused_may_be_absent(storage: Storage) -> None:
    journal.write_ack(storage, Ack("http://h", "1", "r1", 7, 2))
    refusals.keep(storage, [SetAside(3, "bad name", Points(1, 11, {"bad%": 1.0})), SetAside(6, "unknown", "a wish")])
    server = Histories({"a": [(0, 10, 0.5), (1, 11, 0.25)], "b": [(0, 10, NAN)]})
    verdict = verify(storage, server)  # type: ignore[arg-type]
    assert (verdict.points, verdict.differences, server.asked) == (3, [], ["r1"])
    assert (verdict.standing.shipped, verdict.standing.waiting, verdict.standing.refused) == (7, 0, 2)


def test_a_run_agrees_when_its_last_record_is_sent(storage: Storage) -> None:
    """Which may be its status: that is no point."""
    server = Histories({"a": [(0, 10, 0.5), (1, 11, 0.25)], "b": [(0, 10, NAN)], "bad%": [(1, 11, 1.0)]})
    for sent, agree in ((6, False), (7, True)):
        journal.write_ack(storage, Ack("http://h", "1", "r1", sent))
        verdict = verify(storage, server)  # type: ignore[arg-type]
        assert (verdict.differences, verdict.agree) == ([], agree)


def test_points_that_come_while_a_run_is_looked_at_are_not_foreign(storage: Storage) -> None:
    class Live(Histories):
        def history(self, run_id: str) -> dict[str, list[Point]]:
            Writer(storage, 2).append([to_line(Points(2, 12, {"a": 0.125}))])
            return self.found

    journal.write_ack(storage, Ack("http://h", "1", "r1", 7))
    server = Live({"a": [(0, 10, 0.5), (1, 11, 0.25), (2, 12, 0.125)], "b": [(0, 10, NAN)], "bad%": [(1, 11, 1.0)]})
    assert verify(storage, server).differences == []  # type: ignore[arg-type]


def test_a_server_that_lost_a_point_and_has_one_too_many(storage: Storage) -> None:
    journal.write_ack(storage, Ack("http://h", "1", "r1", 7))
    server = Histories({"a": [(0, 10, 0.5), (0, 13, 0.5)], "b": [(0, 10, NAN)], "bad%": [(1, 11, 1.0)]})
    verdict = verify(storage, server)  # type: ignore[arg-type]
    assert verdict.differences == [
        Difference("doubled", "a", 0, None, (13, 0.5)),
        Difference("missing", "a", 1, (11, 0.25), None),
    ]
