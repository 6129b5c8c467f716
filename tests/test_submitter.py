"""What is decided once a job is submitted: a log that breaks off, a server that is away, a head that is lost."""

from pathlib import Path

import pytest

from orchestrator import submitter as decisions
from orchestrator.cluster.jobs import Away, Job, NoTail
from orchestrator.submission import RuntimeEnv, Submission
from pipelines.errors import ClusterError
from tests.dashboard import Clock, Cluster, Recorder

TRAIN = ("python", "-m", "jobs.train", "--recipe", "digits", "--name", "a")
WHAT = Submission("a", "a", TRAIN, RuntimeEnv(env_vars={"A": "1"}), {"run": "a"}, {"driver": 0.01})
RUNNING, DONE = Job("a", "RUNNING"), Job("a", "SUCCEEDED")
AWAY = Away("http://c does not answer (Connection refused)")


def seen_through(cluster, retries=2, wait_s=10):
    clock, screen = Clock(), Recorder()
    one = decisions.Submitter(cluster, screen, wait_s, clock.pause, clock)
    one.submit(WHAT, Path("a.zip"))
    return one.see_through(WHAT, Path("a.zip"), retries), screen


def test_a_broken_log_goes_on_where_it_was():
    """Chunks are cut differently each time, and once the beginning alone comes."""
    cluster = Cluster([["a\nb", "c\n"], ["a\n"], ["a", "\nbc\nd", "e"], ["a\nbc\nde", "f\n"]], [RUNNING] * 3 + [DONE])
    code, screen = seen_through(cluster)
    assert (code, screen.text) == (0, "a\nbc\ndef\n")
    assert screen.lines == ["job a is submitted to http://c", "job a: it has finished"]
    entry = "python -m jobs.train --recipe digits --name a"
    assert cluster.submitted == [("a", entry, Path("a.zip"), {"A": "1"}, {}, {"run": "a"}, {"driver": 0.01})]


def test_a_port_forward_that_drops_costs_nothing():
    cluster = Cluster([["a\n"], [NoTail("refused")], ["a\nb\n"]], [RUNNING, AWAY, AWAY, AWAY, RUNNING, DONE])
    code, screen = seen_through(cluster)
    assert (code, screen.text) == (0, "a\nb\n")
    assert screen.lines[1:-1] == [
        "http://c does not answer (Connection refused); waiting for it, 10 s at most",
        "http://c answers again, after 3 s",
    ]


def test_a_server_that_stays_away():
    cluster = Cluster(ends=[AWAY] * 100)
    words = r"refused\), for 10 s .--wait-seconds.; job a may go on: follow it with --follow a, or give the same"
    with pytest.raises(ClusterError, match=words):
        seen_through(cluster)


def test_last_words_that_did_not_come_are_fetched_at_the_end():
    cluster = Cluster([["a\n", "b"]], [DONE])
    cluster.whole = "a\nb\nthe last\n"
    assert seen_through(cluster)[1].text == "a\nb\nthe last\n"


def test_last_words_that_cannot_be_read_cost_no_code():
    """As those of a driver whose node is gone."""
    cluster = Cluster([["a\n"]], [DONE])
    cluster.whole = Away("http://c has no answer now (HTTP 500: no agent)")
    code, screen = seen_through(cluster)
    assert (code, screen.text) == (0, "a\n")
    assert screen.lines[1] == "the end of its log may be missing: http://c has no answer now (HTTP 500: no agent)"


def test_a_way_without_websockets_is_told_once_and_costs_no_word():
    cluster = Cluster([[NoTail("no websocket to http://c (HTTP 502)")]] * 3, [RUNNING, RUNNING, DONE])
    cluster.whole = "a\nb\n"
    _, screen = seen_through(cluster)
    why = "no websocket to http://c (HTTP 502); it is shown when the job has ended"
    assert screen.lines[1:-1] == [f"the log of job a does not come as it is written: {why}"]
    assert screen.text == "a\nb\n"


@pytest.mark.parametrize("ends", [[RUNNING, *[AWAY] * 100], [None, *[None] * 100]])
def test_a_server_that_answers_all_but_one_question_is_told_of_once_and_not_for_ever(ends):
    cluster = Cluster(ends=ends)
    answers = iter([None, *[AWAY] * 100])

    def submit(id, *rest):
        if error := next(answers):
            raise error

    cluster.submit = submit
    clock, screen = Clock(), Recorder()
    one = decisions.Submitter(cluster, screen, 10, clock.pause, clock)
    one.submit(WHAT, Path("a.zip"))
    with pytest.raises(ClusterError, match=r"refused\), for 10 s"):
        one.see_through(WHAT, Path("a.zip"), 2)
    assert len([line for line in screen.lines if "waiting for it, 10 s at most" in line]) == 1
    assert clock.now in (10, 11)


LOST = [None, Job("a", "FAILED", error="JOB_SUPERVISOR_ACTOR_DIED"), Job("a", "FAILED", exit_code=-9)]


@pytest.mark.parametrize("end", LOST)
def test_a_lost_head_leads_to_the_same_command_under_the_next_id(end):
    known = [Job("a", "STOPPED", " ".join(TRAIN)), Job("a-3", "FAILED")]
    cluster = Cluster([["x\n"], ["y\n"]], [end, DONE], known)
    code, screen = seen_through(cluster)
    assert (code, screen.text) == (0, "x\ny\n")
    (first, *rest), (second, *same) = cluster.submitted
    assert (first, second, rest) == ("a-2", "a-4", same)
    assert screen.lines[:2] == ["job a-2 is submitted to http://c", "  a was the id of an earlier job"]
    assert screen.lines[3:] == [
        "the same command is submitted again, 1 more times at most; it goes on from what it has saved",
        "job a-4 is submitted to http://c",
        "job a-4: it has finished",
    ]


@pytest.mark.parametrize(("retries", "ids"), [(0, ["a"]), (2, ["a", "a-2", "a-3"])])
@pytest.mark.parametrize(("end", "code"), list(zip(LOST, [4, 4, 137], strict=True)))
def test_retries_come_to_an_end(retries, ids, end, code):
    cluster = Cluster(ends=[end] * 3)
    cluster.submit = lambda id, *rest: (cluster.submitted.append(id), cluster.known.append(Job(id, "FAILED")))
    found, screen = seen_through(cluster, retries)
    assert (found, cluster.submitted) == (code, ids)
    assert screen.lines[-1] == (
        f"job {ids[-1]} is not submitted again: --retries {retries} are used up; the same command goes on with the run"
    )


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 130, 143])
def test_what_the_driver_said_is_not_tried_again(code):
    cluster = Cluster(ends=[Job("a", "FAILED", exit_code=code)])
    assert seen_through(cluster)[0] == code
    assert len(cluster.submitted) == 1


def test_a_new_head_that_is_not_ready_is_waited_for():
    cluster = Cluster(ends=[None, None, DONE])
    answers = iter([None, Away("http://c has no answer now (HTTP 500: No available agent)"), None])

    def submit(id, *rest):
        if error := next(answers):
            raise error
        cluster.submitted.append(id)

    cluster.submit = submit
    code, screen = seen_through(cluster)
    assert (code, cluster.submitted) == (0, ["a", "a-2"])
    assert "http://c has no answer now (HTTP 500: No available agent); waiting for it, 10 s at most" in screen.lines


def test_a_job_that_was_taken_although_the_answer_was_lost_is_not_taken_twice():
    cluster = Cluster([[], ["x\n"]], ends=[None, Job("a-2", "RUNNING"), Job("a-2", "SUCCEEDED")])
    answers = iter([None, AWAY])

    def submit(id, *rest):
        cluster.submitted.append(id)
        if error := next(answers):
            raise error

    cluster.submit = submit
    code, screen = seen_through(cluster)
    assert (code, cluster.submitted, screen.text) == (0, ["a", "a-2"], "x\n")


def test_an_answer_that_is_lost_at_once_is_told():
    cluster = Cluster()
    cluster.submit = lambda *_: (_ for _ in ()).throw(AWAY)
    words = r"does not answer \(Connection refused\); whether it has taken job a is told by --follow a$"
    with pytest.raises(ClusterError, match=words):
        seen_through(cluster)


def test_a_job_that_waits_is_told():
    waiting = Job("a", "PENDING", message="It may be waiting for resources.")
    _, screen = seen_through(Cluster(ends=[waiting, RUNNING, DONE]))
    assert screen.lines[1:-1] == ["job a has not started yet: It may be waiting for resources."]


@pytest.mark.parametrize(
    "job",
    [
        Job("a", "PENDING", "python other.py"),  # this very id
        Job("b", "RUNNING", "python -m jobs.study --name a"),  # this very run
    ],
)
def test_a_name_that_runs_now(job):
    cluster = Cluster(known=[Job("c", "RUNNING", "python -m jobs.train --name c"), job])
    words = (
        f"job {job.id} .{job.status.lower()}. has the name a now; follow it with --follow {job.id}, end it with `ray"
    )
    with pytest.raises(ClusterError, match=words):
        seen_through(cluster)
    assert not cluster.submitted
