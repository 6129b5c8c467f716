"""`jobs.submit`: what is refused before anything is sent, what is decided afterwards, and real jobs."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp.web
import psutil
import pytest
from ray._private.runtime_env.packaging import get_uri_for_package

from jobs import submit
from orchestrator import submitter as decisions
from orchestrator.cluster import gate, local, processes, services
from orchestrator.cluster import jobs as door
from orchestrator.cluster.jobs import Away, Job
from orchestrator.submission import RuntimeEnv, Submission
from pipelines.errors import ClusterError, ConfigError

ROOT = Path(__file__).parent.parent
SECRET = "0123456789abcdef0123456789abcdef"
TRAIN = ("python", "-m", "jobs.train", "--recipe", "digits", "--name", "a")


@pytest.fixture
def token_file(tmp_path) -> Path:
    path = tmp_path / "token"
    services.create_private(path, SECRET + "\n")
    return path


@pytest.fixture
def shell(token_file, monkeypatch, tmp_path):
    """The environment of a user who may submit."""
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_file))
    monkeypatch.setenv("SKIPLANE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    return monkeypatch


# -- the address and the token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "api", "ray", "found"),
    [
        ("http://a:8265/", "http://b", "http://c", "http://a:8265"),
        ("", "https://b/ray", "http://c", "https://b/ray"),
        ("", "", "http://c:1", "http://c:1"),
        ("", "", "127.0.0.1:6379", None),
        ("", "", "", None),
        ("a:8265", "", "", None),
        ("http://me:pw@a", "", "", None),
        ("ray://a:10001", "", "", None),
    ],
)
def test_the_address(asked, api, ray, found):
    environ = {"RAY_API_SERVER_ADDRESS": api, "RAY_ADDRESS": ray}
    if found:
        assert gate.address(asked, environ) == found
        return
    name = "--address" if asked or not ray else "RAY_ADDRESS"
    with pytest.raises(ConfigError, match=f"^{name} is '{asked or ray}'; give --address http://HOST:8265"):
        gate.address(asked, environ)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "RAY_AUTH_MODE is ''; a cluster is used with its token: .* --insecure does without"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled'"),
        ({"RAY_AUTH_TOKEN": SECRET}, "RAY_AUTH_TOKEN is set, and every process that this shell starts can read it"),
        ({"RAY_AUTH_TOKEN_PATH": "/none"}, r"RAY_AUTH_TOKEN_PATH is /none, which cannot be read \(No such file"),
        ({"mode": 0o640}, "of mode 0640, which lets others read the token; chmod 600 it"),
        ({"mode": 0o604}, "of mode 0604"),
        ({"text": ""}, "which holds no token"),
        ({"text": "two words"}, "which holds no token"),
    ],
)
def test_tokens_that_are_refused(token_file, environ, words):
    environ = {"RAY_AUTH_TOKEN_PATH": str(token_file)} | environ
    if "text" in environ:
        token_file.write_text(environ["text"])
    token_file.chmod(environ.get("mode", 0o600))
    if not words.startswith("RAY_AUTH_MODE"):
        environ["RAY_AUTH_MODE"] = "token"
    with pytest.raises(ConfigError, match=words) as caught:
        gate.token(environ, insecure=False)
    assert SECRET not in str(caught.value)


def test_tokens_that_are_taken(token_file, monkeypatch, tmp_path):
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    assert gate.token(environ, insecure=False) == gate.Token(SECRET, str(token_file))
    assert gate.token({}, insecure=True).headers == {}
    token_file.chmod(0o644)
    assert gate.token(environ, insecure=True).secret == SECRET
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    services.create_private(tmp_path / ".ray" / "auth_token", "other")
    assert gate.token({"RAY_AUTH_MODE": "token"}, insecure=False).headers == {"Authorization": "Bearer other"}


# -- a server that is none ---------------------------------------------------------------------------------------------


class Server:
    """Answers as it is told to, in a thread. answers: path -> (status, text), or what serves a request."""

    def __init__(self) -> None:
        self.answers: dict = {"/api/version": (200, '{"ray_version": "2.60.0"}')}
        self.asked: list[tuple[str, str, str]] = []  # method, path, token
        self._loop, self._up = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(30)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        app = aiohttp.web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = aiohttp.web.AppRunner(app, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._up.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):  # answers that never came
            task.cancel()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request):
        self.asked.append((request.method, request.path, request.headers.get("Authorization", "")))
        found = self.answers.get(request.path, (404, "404: Not Found"))
        if callable(found):
            return await found(request)
        return aiohttp.web.Response(status=found[0], text=found[1], content_type="application/json")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


OPEN, CLOSED = (200, '{"authentication_mode": "disabled"}'), (200, '{"authentication_mode": "token"}')
TOKEN, NONE = gate.Token(SECRET, "/t"), gate.Token()


@pytest.mark.parametrize(
    ("mode", "token", "insecure", "words"),
    [
        (CLOSED, TOKEN, False, ""),
        (CLOSED, TOKEN, True, ""),
        (OPEN, NONE, True, "^warning: the cluster at .* asks for no token: whoever reaches it can run commands"),
        (
            OPEN,
            TOKEN,
            False,
            "asks for no token: .*; start its nodes with infra/start.sh, .* accept that with --insecure",
        ),
        (CLOSED, NONE, True, "asks for a token, and --insecure without RAY_AUTH_MODE=token gives none"),
        ((404, "<html>"), TOKEN, False, r"answers, but not as Ray's dashboard does \(HTTP 404 .* not MLflow's"),
        ((200, "<html>"), TOKEN, False, r"not as Ray's dashboard does \(HTTP 200"),
        ((302, ""), TOKEN, False, r"not as Ray's dashboard does \(HTTP 302"),
        ((401, "Basic"), TOKEN, False, r"not as Ray's dashboard does \(HTTP 401"),
        ((200, "[]"), TOKEN, False, "not as Ray's dashboard does"),
    ],
)
def test_a_server_is_asked_before_it_is_shown_the_token(server, mode, token, insecure, words):
    server.answers[gate.MODE] = mode
    if not words or words.startswith("^warning"):
        assert re.search(words, gate.ask(server.url, token, insecure))
    else:
        with pytest.raises(ClusterError, match=words):
            gate.ask(server.url, token, insecure)
    assert server.asked == [("GET", gate.MODE, "")]


def test_nobody_answers():
    with pytest.raises(ClusterError, match=r"nobody answers at http://127.0.0.1:1 \(Connection refused\); start the"):
        gate.ask("http://127.0.0.1:1", TOKEN, False)


def test_a_silent_server_is_not_waited_for_for_ever(server, monkeypatch):
    async def sleep(_):
        await asyncio.sleep(60)

    server.answers[gate.MODE] = sleep
    monkeypatch.setattr(gate, "ANSWER_S", 0.2)
    with pytest.raises(ClusterError, match=r"nobody answers at .* \(ReadTimeout\)"):
        gate.ask(server.url, TOKEN, False)


# -- the door ----------------------------------------------------------------------------------------------------------

DETAILS = {"type": "SUBMISSION", "submission_id": "a", "status": "FAILED", "entrypoint": "x", "driver_exit_code": 3,
           "runtime_env": {"env_vars": {"A": "1"}}}  # fmt: skip


@pytest.fixture
def jobs(server, shell) -> door.Jobs:
    return door.Jobs(server.url, TOKEN)


def test_jobs_as_the_server_has_them(server, jobs):
    by_hand = {"type": "DRIVER", "submission_id": None, "status": "RUNNING", "entrypoint": "y"}
    server.answers |= {"/api/jobs/": (200, json.dumps([DETAILS, by_hand])), "/api/jobs/a": (200, json.dumps(DETAILS))}
    expected = Job("a", "FAILED", "x", exit_code=3, env_vars={"A": "1"})
    assert (jobs.all(), jobs.find("a")) == ([expected], expected)
    assert {token for _, _, token in server.asked} == {f"Bearer {SECRET}"}


def test_an_address_that_the_shell_says_otherwise_does_not_win(server, jobs):
    assert os.environ["RAY_API_SERVER_ADDRESS"] == server.url


@pytest.mark.parametrize(("status", "known"), [(401, "Missing"), (403, "Invalid")])
def test_a_wrong_token(server, shell, status, known):
    server.answers["/api/version"] = (status, known)
    with pytest.raises(
        ClusterError, match=r"refuses the token in /t; take the one that its `ray start` was given"
    ) as e:
        door.Jobs(server.url, TOKEN)
    assert not isinstance(e.value, Away)  # another one is needed: waiting does not help
    with pytest.raises(ClusterError, match="refuses a request without a token"):
        door.Jobs(server.url, NONE)


def test_the_server_does_not_know_the_job(server, jobs):
    server.answers["/api/jobs/a"] = (404, "Job a does not exist")
    assert jobs.find("a") is None


@pytest.mark.parametrize(
    "answer", [(404, "default backend - 404"), (502, "Bad Gateway"), (500, "Traceback\nGCS is gone")]
)
def test_a_proxy_without_its_server_and_a_head_that_ends_are_no_answers(server, jobs, answer):
    server.answers["/api/jobs/a"] = answer
    with pytest.raises(Away, match=f"has no answer now .HTTP {answer[0]}: {answer[1].splitlines()[-1]}"):
        jobs.find("a")


def test_a_server_that_is_gone(server, jobs):
    server.close()
    with pytest.raises(Away, match=r"does not answer \(Connection refused\)"):
        jobs.all()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (
            (500, "Traceback\nValueError: Job with submission_id a already exists."),
            ClusterError,
            "does not take job a: .*",
        ),
        ((400, "no such field"), ClusterError, "does not take job a: HTTP 400: no such field"),
        ((500, "No available agent to submit job, please try again later."), Away, "has no answer now"),
    ],
)
def test_a_job_that_is_not_taken(server, jobs, tmp_path, answer, kind, words):
    package = tmp_path / "a.zip"
    door.pack(ROOT / "infra", [], package)

    async def take(request):
        return aiohttp.web.Response(status=200 if request.method == "PUT" else 404)

    name = get_uri_for_package(package).removeprefix("gcs://")
    server.answers |= {f"/api/packages/gcs/{name}": take, "/api/jobs/": answer}
    with pytest.raises(ClusterError, match=words) as caught:
        jobs.submit("a", "x", package, {}, {}, {}, {})
    assert type(caught.value) is kind


def test_a_log_that_falls_silent_or_breaks_ends(server, jobs, monkeypatch):
    sent = [["a\n", "b"], ["a\n"]]

    async def tail(request):
        socket = aiohttp.web.WebSocketResponse()
        await socket.prepare(request)
        for text in sent.pop(0):
            await socket.send_str(text)
        if sent:
            await asyncio.sleep(60)  # a connection that is cut off and does not know it
        request.transport.abort()
        return socket

    server.answers["/api/jobs/a/logs/tail"] = tail
    monkeypatch.setattr(door, "SILENT_S", 0.3)
    assert list(jobs.tail("a")) == ["a\n", "b"]
    assert list(jobs.tail("a")) == ["a\n"]
    assert list(jobs.tail("none")) == []


# -- decisions ---------------------------------------------------------------------------------------------------------


class Cluster:
    """A stand-in for the door. tails: of each reading of a log, in turn. ends: what `find` says, in turn."""

    address = "http://c"

    def __init__(self, tails=(), ends=(), known=()) -> None:
        self.tails, self.ends, self.known = iter(tails), iter(ends), list(known)
        self.submitted: list[tuple] = []
        self.away: list[bool] = []  # for each further call of `all`, whether the server is away

    def all(self) -> list[Job]:
        if self.away and self.away.pop(0):
            raise Away("http://c does not answer (Connection refused)")
        return self.known

    def find(self, id):
        found = next(self.ends)
        if isinstance(found, BaseException):
            raise found
        return found

    def submit(self, id, *rest) -> None:
        self.submitted.append((id, *rest))

    def tail(self, id):
        for chunk in next(self.tails, ()):
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


class Recorder:
    def __init__(self) -> None:
        self.lines, self.text = [], ""

    def say(self, line) -> None:
        self.lines.append(line)

    def write(self, text) -> None:
        self.text += text


class Clock:
    """Time that passes by pauses alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds) -> None:
        self.now += seconds


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
    cluster = Cluster([["a\n"], ["a\nb\n"]], [AWAY, DONE])
    cluster.away = [False, True, True, False]
    code, screen = seen_through(cluster)
    assert (code, screen.text) == (0, "a\nb\n")
    assert screen.lines[1:-1] == [
        "http://c does not answer (Connection refused); waiting for it, 10 s at most",
        "http://c answers again, after 3 s",
    ]


def test_a_server_that_stays_away():
    cluster = Cluster(ends=[AWAY])
    cluster.away = [False] + [True] * 100
    words = "has not answered for 10 s .--wait-seconds.; job a may go on: follow it with --follow a, or give the same"
    with pytest.raises(ClusterError, match=words):
        seen_through(cluster)


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


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(shell, monkeypatch) -> Cluster:
    """The command finds this one behind the door, and may enter."""
    found = Cluster()
    monkeypatch.setattr(door, "Jobs", lambda *_: found)
    monkeypatch.setattr(door, "pack", lambda folder, excludes, file: file.write_bytes(b"zip"))
    monkeypatch.setattr(gate, "ask", lambda *_: "")
    return found


def test_no_follow(cluster, capsys, token_file):
    assert submit.main(["--address", "http://h:1", "--no-follow", "--env", "A=1", "--", *TRAIN]) == 0
    out = capsys.readouterr().out
    assert "  to follow it  python -m jobs.submit --address http://h:1 --follow a\n" in out
    assert "  to stop it    ray job stop --address http://h:1 a\n" in out
    [(id, entry, _, env_vars, rest, metadata, resources)] = cluster.submitted
    assert (id, entry, rest, resources) == ("a", " ".join(TRAIN), {}, {})
    assert env_vars == {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30", "A": "1"}
    assert metadata["run"] == "a"
    assert {"user", "run"} <= set(metadata) <= {"user", "run", "git_commit", "git_dirty"}
    assert SECRET not in json.dumps([out, env_vars, metadata])


def test_an_id_of_ones_own(cluster):
    assert submit.main(["--id", "b", "--no-follow", "--resources", '{"driver": 1}', "--", *TRAIN]) == 0
    [(id, *_, metadata, resources)] = cluster.submitted
    assert (id, metadata["run"], resources) == ("b", "a", {"driver": 1})


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143)])
def test_ctrl_c_leaves_the_job_alone(cluster, capsys, stop, code):
    cluster.tails = iter([["a line\nhalf a li", stop]])
    assert submit.main(["--", *TRAIN]) == code
    end = "half a li\njob a goes on without this command\n  to follow it  python -m jobs.submit --follow a\n"
    assert end in capsys.readouterr().out


def test_follow_a_job_that_is_there(cluster, capsys):
    cluster.tails, cluster.ends = iter([["x\n"]]), iter([RUNNING, Job("a", "FAILED", exit_code=3)])
    assert submit.main(["--follow", "a"]) == 3
    assert capsys.readouterr().out == "x\njob a: it ended with exit code 3\n"
    assert not cluster.submitted


def test_follow_a_job_that_is_not_there(cluster):
    cluster.ends, cluster.known = iter([None]), [Job(id, "FAILED") for id in "bcdefg"]
    with pytest.raises(
        ConfigError, match=r"--follow is a, and the cluster at http://c has no such job; it has b, c, d, e, f$"
    ):
        submit.main(["--follow", "a"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--", "ls"], "the command is 'ls'"),
        ([], "there is no command"),
        (["--retries", "-1", "--", *TRAIN], "--retries: it is '-1'; a whole number is needed"),
        (["--wait-seconds", "x", "--", *TRAIN], "--wait-seconds: it is 'x'"),
        (["--env", "KEY=1", "--", *TRAIN], "--env KEY looks like a secret"),
        (["--runtime-env", "/none", "--", *TRAIN], "--runtime-env /none cannot be read"),
        (["--resources", "1", "--", *TRAIN], "--resources is '1'"),
        (["--address", "h:8265", "--", *TRAIN], "--address is 'h:8265'"),
        (["--follow", "a", "--", *TRAIN], "--follow shows a job that was submitted before"),
        (["--follow", "a", "--no-follow"], "--follow shows a job that was submitted before"),
        (["--recipe", "digits", "--", *TRAIN], "recipe: no such setting"),
    ],
)
def test_settings_that_are_refused_before_anybody_is_asked(cluster, monkeypatch, argv, words):
    asked = []
    monkeypatch.setattr(gate, "ask", lambda *_: asked.append(1))
    with pytest.raises(ConfigError, match=re.escape(words)):
        submit.main(argv)
    assert (asked, cluster.submitted) == ([], [])


def test_no_token_is_refused_before_anybody_is_asked(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(gate, "ask", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is 'disabled'"):
        submit.main(["--", *TRAIN])


def test_a_repository_that_is_too_large(cluster, monkeypatch):
    monkeypatch.setattr(submit, "PACKAGE_BYTES", 2)
    with pytest.raises(ConfigError, match="the repository packs into 0 MB, and Ray takes 0; name what is no code in"):
        submit.main(["--", *TRAIN])
    assert not cluster.submitted


# -- real jobs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Path]:
    """The home of a one-machine cluster, without MLflow, whose `ray start` says nothing of how jobs are stopped."""
    home = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "NAMES", {"ray": "Ray"})
        for name in ("RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"):
            patch.delitem(services.RAY_SETTINGS, name, raising=False)
            patch.delenv(name, raising=False)
        ports = iter(free_ports(3))
        local.up(home, {name: next(ports) for name in services.DEFAULT_PORTS}, print)
        yield home
        local.down(home, print)


def free_ports(count: int) -> list[int]:
    """Ports that are free now; they differ, as good as surely."""
    return [processes.free_port() for _ in range(count)]


@pytest.fixture
def in_shell(real, home):
    """Starts a command as in a shell that has read env.sh, its output in one pipe."""
    cluster, started = local.load(real), []
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(real / "local" / "token"), "PYTHONUNBUFFERED": "1"}
    environ |= {"RAY_API_SERVER_ADDRESS": cluster.url("ray"), "SKIPLANE_HOME": str(real)}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"

    def start(*line: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def submit_line(*line: str) -> list[str]:
    return [sys.executable, "-m", "jobs.submit", *line]


def training(home: Path, storage: Path, name: str, *more: str) -> list[str]:
    return ["python", "-m", "jobs.train", "--recipe", "digits-quick", "--name", name, "--tracking.uri", "off",
            "--data.root", str(home / "data" / "digits"), "--cluster.storage", str(storage), *more]  # fmt: skip


def until(process: subprocess.Popen[str], words: str) -> str:
    """The output so far, once these words have come."""
    lines = list[str]()
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"'{words}' has not come: {''.join(lines)[-3000:]}")


@pytest.mark.slow
def test_real_codes(in_shell, home):
    """Two jobs at once: 0 and 2; and Ray's own line, with the file that ships."""
    show = "import os; print('seen:', *sorted(os.listdir()), os.environ['RAY_JOB_STOP_SIGNAL'])"
    good = in_shell(
        *submit_line("--id", "info", "--", "python", "-m", "jobs.pack", "info", str(home / "data" / "digits"))
    )
    bad = in_shell(*submit_line("--", "python", "-m", "jobs.train", "--recipe", "nope", "--name", "bad"))
    environment = ("--runtime-env", "infra/runtime-env.yaml", "--working-dir", ".")
    ray = in_shell("ray", "job", "submit", *environment, "--", "python", "-c", show)
    out = [process.communicate(timeout=120)[0] for process in (good, bad, ray)]
    assert [process.returncode for process in (good, bad, ray)] == [0, 2, 0], out
    assert "1,437 images in 8 shards" in out[0]
    assert out[0].endswith("job info: it has finished\n")
    assert "error: recipe 'nope' does not exist" in out[1]
    assert out[1].endswith("job bad: it ended with exit code 2\n")
    found = set(re.search("seen: (.*)", out[2])[1].split())
    assert {"jobs", "orchestrator", "pipelines", "infra", "SIGINT"} <= found
    assert not found & {"tests", ".git", ".venv", "data", "runs"}


@pytest.mark.slow
def test_a_stop_leaves_a_checkpoint_although_the_cluster_says_nothing_of_it(in_shell, home, tmp_path):
    process = in_shell(*submit_line("--", *training(home, tmp_path, "s", "--train.epochs", "200")))
    until(process, "epoch 1/200 done")
    busy = in_shell(*submit_line("--", *training(home, tmp_path, "s")))
    second = in_shell(*submit_line("--follow", "s"))
    until(second, "epoch 1/200 done")  # from the log's beginning
    second.send_signal(signal.SIGINT)
    assert "job s goes on without this command" in second.communicate(timeout=30)[0]
    stop = in_shell("ray", "job", "stop", "s")
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 130, out
    assert "stopped; the same command goes on from the last checkpoint" in out
    assert out.endswith("job s: it was stopped; the same command goes on\n")
    result = json.loads((tmp_path / "s" / "result.json").read_text())
    assert (result["status"], result["resumable"]) == ("stopped", True)
    assert "has the name s now; follow it with --follow s" in busy.communicate(timeout=60)[0]
    assert (second.returncode, busy.returncode, stop.wait(timeout=60)) == (130, 4, 0)


@pytest.mark.slow
@pytest.mark.long
def test_a_head_that_is_killed_and_started_anew_costs_no_bit(in_shell, real, home, tmp_path):
    """The machine loses all of Ray at once; the run goes on, and ends with the weights of one undisturbed."""
    epochs = ("--train.epochs", "16")
    alone = in_shell(*submit_line("--", *training(home, tmp_path / "alone", "u", *epochs)))
    assert alone.wait(timeout=240) == 0, alone.stdout.read()
    process = in_shell(*submit_line("--", *training(home, tmp_path, "k", *epochs)))
    until(process, "epoch 3/16 done")
    for member in processes.members(local.load(real).services["ray"]):
        with suppress(psutil.Error):
            member.send_signal(signal.SIGKILL)
    shutil.rmtree(local.load(real).ray_temp)  # nor is anything left on its disk
    local.up(real, {}, print)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    assert "job k: the head was lost: the server knows this job no more" in out
    assert re.search(r"job k-2 is submitted to .*\n(.*\n)*k: .* from epoch \d+ step", out)
    assert out.endswith("job k-2: it has finished\n")
    weights = [json.loads((folder / "result.json").read_text())["weights_sha256"]
               for folder in (tmp_path / "alone" / "u", tmp_path / "k")]  # fmt: skip
    assert weights[0] == weights[1]
