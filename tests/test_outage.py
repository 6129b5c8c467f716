"""One run through killed servers, a killed driver, a killed shipper and a server that hangs: all points, each once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import outage
from tests.mlflow_servers import PASSWORD, why_no_postgres
from tests.outage import KEYS, PARAMS, Told, curve

SERVERS = [(kind, auth) for kind in ("sqlite", "postgres") for auth in (False, True)]
AWAY_S, HANGS_S = 2.0, 12.0  # longer than a request may take: 10 s


@dataclass(frozen=True)
class Ended:
    folder: Path
    told: Told


def run(kind: str, auth: bool, folder: Path) -> Ended:
    with outage.running(kind, auth, folder) as server:
        return Ended(folder, outage.story(server, folder, AWAY_S, HANGS_S))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, bool], Future[Ended]]]:
    """All at once: most of the time they wait."""
    with ThreadPoolExecutor(len(SERVERS)) as pool:
        yield {
            (kind, auth): pool.submit(run, kind, auth, tmp_path_factory.mktemp(kind))
            for kind, auth in SERVERS
            if kind != "postgres" or not why_no_postgres()
        }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "auth"), SERVERS)
def test_nothing_is_missing_nothing_doubled(
    stories: dict[tuple[str, bool], Future[Ended]], kind: str, auth: bool
) -> None:
    if (kind, auth) not in stories:
        pytest.skip(why_no_postgres())
    ended = stories[kind, auth].result()
    told = ended.told
    assert told.steps > 300
    assert {key: sorted(points) for key, points in told.points.items()} == {key: curve(key, told.steps) for key in KEYS}
    assert (told.runs, told.status, told.params, told.files) == (1, "FINISHED", PARAMS, ["figures/newest.txt"])
    assert told.shipped["refused"] == 0
    assert told.shipped["shipped"] == told.shipped["records"] > told.steps
    written = [path for path in (ended.folder / "run").rglob("*") if path.is_file()]
    assert len(written) > 2
    assert not [path for path in [*written, ended.folder / "driver.log"] if PASSWORD.encode() in path.read_bytes()]
