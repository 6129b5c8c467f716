"""A run's page as MLflow shows it: written without a server, sent later, and looked at in a browser."""

import json
from collections.abc import Iterator

import pytest

from orchestrator import page
from orchestrator.state.storage import Storage
from orchestrator.tracking import Place, journal, open_tracker
from orchestrator.tracking.server import Server
from orchestrator.tracking.shipment import Shipment
from tests import browser
from tests.mlflow_servers import MlflowServer, sqlite
from tests.test_page import CONFIG, COUNTS, DATASET, PLAN, RESULT, TAGS

# mlflow 3.17 maps its tables with an option that SQLAlchemy 2.1 deprecates.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
PICTURES = "[...document.querySelectorAll('img[src^=get-artifact]')].map(i => [i.getAttribute('src'), i.naturalWidth])"
UNFOLD = "[...document.querySelectorAll('button')].filter(b => b.innerText == 'Show more').map(b => b.click()).length"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    with MlflowServer(folder, sqlite(folder), auth=False) as made:
        yield made


@pytest.fixture(scope="module")
def sent(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> journal.Ack:
    """Where the run is: its page was written when nobody knew that."""
    storage = Storage(str(tmp_path_factory.mktemp("run")))
    tracker = open_tracker(Place(storage, 1), "offline", "pages", "a", id="0", params={}, tags={})
    page.publish(tracker, CONFIG, PLAN, DATASET, RESULT, COUNTS, TAGS, print, child=False)
    assert tracker.run_id is None
    tracker.finish("FINISHED")
    shipment = Shipment(storage, Server(server.uri), lambda _: None)
    while shipment.step():
        pass
    ack = journal.read_ack(storage)
    assert ack is not None
    return ack


def test_addresses_have_the_runs_id(server: MlflowServer, sent: journal.Ack) -> None:
    run = Server(server.uri).client.get_run(sent.run_id)
    note = run.data.tags["mlflow.note.content"]
    assert note.count(f"run_uuid={sent.run_id})") == 2
    assert "{" not in note
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "per_class.json", "type": "table"}]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")
def test_the_result_is_seen_first_and_the_picture_is_drawn(server: MlflowServer, sent: journal.Ack) -> None:
    with browser.opened(f"{server.uri}/#/experiments/{sent.experiment_id}/runs/{sent.run_id}") as shown:
        words = shown.until("document.body.innerText", lambda text: text and "Show more" in text)
        assert "Top-1 75.32%, top-5 92.51% of 50,000 validation images" in words
        assert shown.ask(UNFOLD) == 1
        [(address, _)] = shown.until(PICTURES, lambda found: found and found[0][1] > 0)
        assert address == f"get-artifact?path=curves.svg&run_uuid={sent.run_id}"
        assert "raysubmit_x" in shown.ask("document.body.innerText")
