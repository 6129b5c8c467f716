"""infra/SECURITY.md says what every port answers, with the token and without: its tables are what a scan finds.

The page is read like a test's table: of each row the process, the port, where it listens, and the questions (tests/
ports.py) with their answers. A port in no row, and a row with no port, are both wrong.
"""

import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.machines import ROOT, Machines, supported
from tests.ports import TOKENS, ask

PAGE = (ROOT / "infra" / "SECURITY.md").read_text()
machines = pytest.mark.skipif(bool(supported()), reason=supported())
Seen = Mapping[str, Any]
LIMIT_S = 300.0
COLUMNS = ["service", "process", "port", "listens on", "without the token", "with it", "what it means"]


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    service: str
    process: str
    ports: range  # empty: any
    kinds: frozenset[str]
    answers: Mapping[str, tuple[str, str]]  # question -> without the token, with it

    def is_for(self, seen: Seen) -> bool:
        """Whether a port that was found is this row's, by everything but the answers."""
        return (self.process in seen["command"] and (seen["port"] in self.ports or not self.ports)
                and set(seen["kinds"]) == self.kinds)  # fmt: skip

    def is_answered(self, seen: Seen) -> bool:
        """Whether it answers so. A wrong token is like none; HTTP says 403 for it instead of 401."""
        found = {q: tuple(seen["answers"][q][t] for t in TOKENS) for q in self.answers}
        return found == {
            q: (none, "403" if none == "401" else none, right) for q, (none, right) in self.answers.items()
        }


def table(title: str) -> list[Row]:
    """The table below a heading of the page."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert lines[0] == COLUMNS
    return [_row(*cells[:6]) for cells in lines[2:]]


def _row(service: str, process: str, port: str, place: str, none: str, right: str) -> Row:
    without, with_it = (dict(re.findall(r"`([^`]+)` (\w+)", cell)) for cell in (none, right))
    assert without.keys() == with_it.keys(), f"{service}: the same questions in both columns"
    assert without, service
    first, _, last = port.partition("-")
    ports = range(0) if port == "random" else range(int(first), int(last or first) + 1)
    return Row(service, process.strip("`"), ports, frozenset(place.split(", ")),
               {q: (without[q], with_it[q]) for q in without})  # fmt: skip


def complaints(rows: Sequence[Row], seen: Sequence[Seen]) -> list[str]:
    """Where page and scan differ."""
    wrong = []
    for one in seen:
        found = [row for row in rows if row.is_for(one) and row.is_answered(one)]
        if len(found) != 1:
            wrong.append(f"port {one['port']} is in {len(found)} rows: {one}")
    silent = [row for row in rows if not any(row.is_for(one) and row.is_answered(one) for one in seen)]
    return wrong + [f"no port is as the row says: {row}" for row in silent]


# -- the comparison itself ---------------------------------------------------------------------------------------------

IDLE, WORK, NODES = "One machine", "One machine, while a job trains", "A cluster"


def as_told(row: Row) -> dict[str, Any]:
    """What a scan finds where the row is right."""
    answers = {q: dict(zip(TOKENS, (none, "403" if none == "401" else none, right), strict=True))
               for q, (none, right) in row.answers.items()}  # fmt: skip
    return {"command": f"/bin/{row.process} -x", "port": row.ports[0] if row.ports else 40000, "kinds": row.kinds,
            "answers": answers}  # fmt: skip


def scanned(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A scan that finds what the rows say; a process is asked what any row asks it."""
    asked = {q for row in rows for q in row.answers}
    nothing = dict.fromkeys(TOKENS, "nothing")
    return [{**(told := as_told(row)), "answers": dict.fromkeys(asked, nothing) | told["answers"]} for row in rows]


@pytest.mark.parametrize("title", [IDLE, WORK, NODES])
def test_comparing_finds_every_kind_of_difference(title):
    rows = table(title)
    assert len({row.service for row in rows}) == len(rows) >= 3
    seen = scanned(rows)
    assert complaints(rows, seen) == []
    assert len(complaints(rows, [])) == len(rows)  # an empty scan is wrong in every row
    for i, (row, one) in enumerate(zip(rows, seen, strict=True)):
        others = seen[:i] + seen[i + 1 :]
        assert complaints(rows[:i] + rows[i + 1 :], seen), f"{row.service}: a port that is in no row"
        assert complaints(rows, others), f"{row.service}: a row without a port"
        assert complaints(rows, [*others, {**one, "kinds": {"all", "node"}}]), f"{row.service}: listens elsewhere"
        assert complaints(rows, [*seen, {**one, "command": "sshd"}]), f"{row.service}: somebody else's port"
        for question, told in row.answers.items():
            for token in TOKENS:
                other = one["answers"] | {question: {**one["answers"][question], token: "something"}}
                assert complaints(rows, [*others, {**one, "answers": other}]), (row.service, question, token, told)


@pytest.mark.parametrize("keys", [1, 3])
def test_a_store_is_known_by_its_answer(keys):
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, 1, True)
    for key in range(keys):
        store.set(str(key), "value")
    assert ask("127.0.0.1", store.port, "TCPStore", None) == "OK"


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK", bytes.fromhex("000018040000000000")])
def test_others_are_no_store(says):
    """The last one is how gRPC greets."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, "127.0.0.1", server.getsockname()[1], "TCPStore", None)
        peer, _ = server.accept()
        with peer:
            peer.sendall(says)
            assert answer.result() == "nothing"


# -- scans -------------------------------------------------------------------------------------------------------------


class Scanned(Machines):
    """Machine 0 is looked at; machine 1 is an attacker's, on the same network."""

    def begin(self) -> None:
        for i in range(2):
            self.boot(i)

    def say(self, i: int, *command: str, **environment: str) -> str:
        """What a command says on machine i."""
        out, err = (started := self.run(i, command, environment)).communicate(timeout=LIMIT_S)
        assert started.returncode == 0, f"{out}\n{err}"
        return str(out)

    def reached(self) -> set[int]:
        """The ports of machine 0 that machine 1 reaches. One that is opened to everybody is among them, so that a scan
        that cannot reach anything is no proof."""
        decoy = self.run(0, [sys.executable, "-m", "tests.ports", "listen"])
        port = int(decoy.stdout.readline())
        found = set(json.loads(self.say(1, sys.executable, "-m", "tests.ports", "scan", self.address(0))))
        self.process(decoy).kill()
        decoy.communicate()
        assert port in found
        return found - {port}

    def seen(self, rows: Sequence[Row], token: str) -> list[Seen]:
        """What listens on machine 0, with the answers to the rows' questions."""
        questions: dict[str, list[str]] = {}
        for row in rows:
            questions.setdefault(row.process, []).extend(row.answers)
        command = [sys.executable, "-m", "tests.ports", "ask", token, json.dumps(questions)]
        said = json.loads(self.say(0, *command, GRPC_VERBOSITY="NONE"))
        # Both ways of looking agree, as far as processes stay.
        before, after = {one["port"] for one in said["seen"] if one["kinds"] != ["node"]}, set(said["after"])
        assert before & after <= set(said["scan"]) <= before | after
        return list(said["seen"])


@contextmanager
def one_machine() -> Iterator[tuple[Scanned, str, Path]]:
    """The machines, with `jobs.local up` on machine 0; the path of its token there, and Ray's folder."""
    with Scanned(2) as found:
        found.say(0, sys.executable, "-m", "jobs.local", "up")
        noted = json.loads((found.disk(0) / "home" / "local" / "cluster.json").read_text())
        try:
            yield found, f"{found.own}/home/local/token", Path(noted["ray_temp"]) / "ray"
        finally:
            found.kill(0)
            shutil.rmtree(noted["ray_temp"])  # not on the machine's disk: its sockets have short names


@machines
@pytest.mark.slow
def test_one_machine():
    """From beside nothing is reached; from inside every port is in the table, and every row is answered so."""
    with one_machine() as (found, token, _):
        rows = table(IDLE)
        assert found.reached() == set()
        assert complaints(rows, found.seen(rows, token)) == []


# A job of two workers that goes on for as long as it is looked at.
TRAIN = """
python -m jobs.pack digits --out "$SKIPLANE_HOME/data/digits"
ray job submit --no-wait --submission-id ports --working-dir . -- \
    python -m jobs.train --recipe digits --name ports --cluster.workers 2 --train.epochs 500 --tracking.uri off
"""


def train(found: Scanned, temp: Path, before: str = "", **environment: str) -> None:
    """Submits it, and waits until it trains. temp: Ray's folder; before: what the submitting shell does first."""
    found.say(0, "bash", "-ec", before + TRAIN, **environment)
    limit = time.monotonic() + LIMIT_S
    while "epoch 1/500 done" not in (said := "".join(p.read_text() for p in temp.glob("*/logs/job-driver-ports.log"))):
        assert time.monotonic() < limit, said
        time.sleep(0.5)


@machines
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_machine_while_a_job_trains():
    """The same with what workers open for one another, which asks nobody for a token."""
    with one_machine() as (found, token, temp):
        train(found, temp, before='. "$SKIPLANE_HOME/local/env.sh"\n')
        rows = table(IDLE) + table(WORK)
        assert found.reached() == set()
        assert complaints(rows, found.seen(rows, token)) == []


START = """
umask 077
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH"
exec infra/start.sh head --block --node-ip-address="$ADDRESS" --num-cpus=2 --object-store-memory=100000000 \
    --temp-dir="$HOME/ray" > "$HOME/head.log" 2>&1
"""
READY = "import sys; from tests.ports import ask; print(ask(sys.argv[1], 52365, 'GET /api/healthz', None))"


@machines
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_of_a_cluster():
    """A head that also works, started as our files start it: from beside, every port but loopback's is reached."""
    with Scanned(2) as found:
        address, token = found.address(0), f"{found.own}/token"
        place = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token, "ADDRESS": address}
        head = found.run(0, ["bash", "-ec", START], place)
        limit = time.monotonic() + LIMIT_S
        while "200" not in found.say(0, sys.executable, "-c", READY, address):
            assert time.monotonic() < limit, (found.disk(0) / "head.log").read_text()
            time.sleep(0.5)
        train(found, found.disk(0) / "ray", **place, RAY_API_SERVER_ADDRESS="http://127.0.0.1:8265")
        rows = table(NODES)
        reached, seen = found.reached(), found.seen(rows, token)
        assert complaints(rows, seen) == []
        assert reached == {one["port"] for one in seen if one["kinds"] != ["loopback"]}
        found.kill(0)
        head.communicate()
