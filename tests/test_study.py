"""The study's logic, with training and tracking replaced by what they return; real ones run in the end-to-end tests."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jobs import study as job
from orchestrator import study
from orchestrator.config import RunConfig
from orchestrator.state.records import Result
from orchestrator.tracking import NullTracker, Shipped, View
from pipelines.errors import ConfigError, TrainingError

LOSSES = {"plain-18": 0.04, "plain-34": 0.7, "resnet-18": 0.01, "resnet-34": 0.02}
NETS = study.parse_nets(study.DEFAULT_NETS)


class Tracker(NullTracker):
    """Remembers what it was told."""

    run_id = "parent"

    def __init__(self) -> None:
        self.tagged: dict[str, str] = {}
        self.opened: list[str] = []  # the study's id, each time
        self.noted, self.files, self.ended = "", list[str](), list[str]()

    def tags(self, values: Mapping[str, str]) -> None:
        self.tagged |= values

    def note(self, markdown: str) -> None:
        self.noted = markdown

    def file(self, content: bytes, name: str) -> None:
        self.files.append(name)

    def view(self, view: View) -> str | None:
        return f"http://view/{view.name}/{view.runs}"

    def finish(self, status: str | None) -> Shipped:
        self.ended.append(status)
        return Shipped()


class Training:
    """supervise.run, as far as a study sees it: trains once, then returns the result at once."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.asked: list[tuple[str, bool]] = []
        self.fails: dict[str, BaseException] = {}

    def __call__(self, config: RunConfig, *, child: bool, **_: Any) -> Result:
        self.asked.append((config.folder(), child))
        if config.name in self.fails:
            raise self.fails.pop(config.name)
        if config.name not in self.trained:
            self.trained.append(config.name)
        loss = LOSSES[config.name.rsplit("-s", 1)[0]]
        curve = [{"epoch": e, "train_top1": 1 - loss / e, "val_top1": 1 - loss / e} for e in (1, 2)]
        mean = loss + 0.5 + 0.1 * (config.model.shortcut == "none")
        return Result(
            config.name, "finished", 2, 44, top1=1 - loss / 2, train_loss=loss, train_loss_mean=mean, seconds=9.0,
            parameters=690_266, multiply_adds=8_893_440, weights_sha256="w", data_digest="d",
            mlflow_run_id=f"id-{config.name}", curve=curve)  # fmt: skip


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    made = Tracker()

    def opened(*_: Any, id: str, **__: Any) -> Tracker:
        made.opened.append(id)
        return made

    monkeypatch.setattr(study, "open_tracker", opened)
    return made


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    changes = {"name": "demo", "cluster.storage": str(tmp_path), "tracking.uri": "http://h", "data.lanes": 4}
    return RunConfig().replace(changes | {"model.shortcut": "A"})


class Stopped(Exception):
    """As supervise raises it when a run was asked to stop, and did."""


class Studies:
    """Calls study.run with the stand-ins, and keeps what it says."""

    def __init__(self, tmp_path: Path) -> None:
        self.training, self.said = Training(), list[str]()

    def run(self, config: RunConfig, nets: list[tuple[str | None, int]] = NETS, seeds: int = 1) -> study.Study:
        say, train, stops = self.said.append, self.training, (KeyboardInterrupt, Stopped)
        return study.run(config, nets, seeds, say=say, train=train, cluster=nullcontext, stops=stops)


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    return Studies(tmp_path)


# -- names -------------------------------------------------------------------------------------------------------------


def test_nets_by_name() -> None:
    assert study.parse_nets("plain-18, resnet-34") == [("none", 18), (None, 34)]


@pytest.mark.parametrize("text", ["", "vgg-16", "plain18", "plain-", "resnet--18", "plain-18;resnet-18", "plain-18,"])
def test_no_net(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--nets: '.*' is no net; use plain-DEPTH"):
        study.parse_nets(text)


def test_net_twice() -> None:
    with pytest.raises(ConfigError, match=r"'plain-18' is there twice; use --seeds"):
        study.parse_nets("plain-18,plain-18")


def test_runs_of_a_study(config: RunConfig, tmp_path: Path) -> None:
    runs = study.children(config.replace({"train.seed": 5}), NETS[1:3], 2)
    assert [(r.name, r.model.depth, r.model.shortcut, r.train.seed) for r in runs] == [
        ("plain-34-s5", 34, "none", 5),
        ("resnet-18-s5", 18, "A", 5),
        ("plain-34-s6", 34, "none", 6),
        ("resnet-18-s6", 18, "A", 6),
    ]
    assert runs[0].folder() == f"{tmp_path}/demo/plain-34-s5"


@pytest.mark.parametrize(
    ("changes", "nets", "seeds", "message"),
    [
        ({}, "plain-33", 1, r"--nets: model\.depth is 33; .*18, 34, 50, 101, 152"),
        ({"name": ""}, "plain-18", 1, "name is not set"),
        ({}, "plain-18", 0, "--seeds is 0"),
        ({"model.shortcut": "none"}, "resnet-18", 1, "model.shortcut is none, and --nets has residual nets"),
    ],
)
def test_impossible_studies(config: RunConfig, changes: dict[str, Any], nets: str, seeds: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study.children(config.replace(changes), study.parse_nets(nets), seeds)


def test_refused_before_anything_is_contacted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--nets: 'vgg-16' is no net"):
        job.main(["--recipe", "digits", "--name", "a", "--nets", "vgg-16"])


def test_dry_run_shows_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--recipe", "digits", "--name", "a", "--seeds", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{net}-s{seed}\n" in shown for net in LOSSES for seed in (0, 1))


# -- life --------------------------------------------------------------------------------------------------------------


def test_first_run(studies: Studies, config: RunConfig, tracker: Tracker, tmp_path: Path) -> None:
    made = studies.run(config)
    assert studies.training.trained == ["plain-18-s0", "plain-34-s0", "resnet-18-s0", "resnet-34-s0"]
    assert {child for _, child in studies.training.asked} == {True}
    assert (made.degradation, made.residual_converges_faster, made.mlflow_url) == (True, True, "http://view/demo/4")
    assert tracker.tagged["skiplane.degradation"] == tracker.tagged["skiplane.residual_converges_faster"] == "true"
    assert "| plain-34 | 0.700 | 35.0 | 28.54 |" in tracker.noted
    assert tracker.files == ["figure4.svg", "figure4.png", "result.json"]
    assert tracker.ended == ["FINISHED"]
    folder = tmp_path / "demo"
    assert Path(made.figure) == folder / "figure4.svg"
    assert (folder / "figure4.svg").read_text().startswith("<?xml")
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["degradation"], result["mlflow_url"]) == ("finished", True, "http://view/demo/4")
    assert result["nets"][1].items() >= {
        "name": "plain-34", "seed": 0, "depth": 34, "shortcut": "none", "train_loss": 0.7, "epochs": 2, "seconds": 9.0,
        "parameters": 690_266, "multiply_adds": 8_893_440, "weights_sha256": "w", "data_digest": "d",
        "mlflow_run_id": "id-plain-34-s0"}.items()  # fmt: skip
    assert result["nets"][1]["val_error"] == pytest.approx(35.0)
    said = "\n".join(studies.said)
    assert "[2/4] plain-34-s0" in said
    assert "Degradation: yes." in said
    assert "Curves: http://view/demo/4" in said


def test_second_run_shows_it_again(studies: Studies, config: RunConfig, tracker: Tracker, tmp_path: Path) -> None:
    first = studies.run(config)
    tracker.ended.clear()
    studies.said.clear()
    assert studies.run(config) == first
    assert tracker.ended == []  # no server was contacted
    said = "\n".join(studies.said)
    assert "study demo is finished; another --name trains anew (make demo NAME=other)" in said
    assert "plain-34" in said
    assert first.figure in said
    assert "http://view/demo/4" in said


def test_study_goes_on_where_it_was(studies: Studies, config: RunConfig, tracker: Tracker, tmp_path: Path) -> None:
    studies.training.fails["resnet-18-s0"] = TrainingError("diverged")
    with pytest.raises(TrainingError, match="diverged"):
        studies.run(config)
    assert tracker.ended == ["FAILED"]
    assert not (tmp_path / "demo" / "result.json").exists()
    assert studies.run(config).degradation is True
    assert studies.training.trained == ["plain-18-s0", "plain-34-s0", "resnet-18-s0", "resnet-34-s0"]
    assert len(tracker.opened) == 2
    assert len(set(tracker.opened)) == 1  # the same parent in MLflow


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stopped])
def test_stop_marks_the_parent_killed(
    studies: Studies, config: RunConfig, tracker: Tracker, stop: type[BaseException]
) -> None:
    studies.training.fails["plain-34-s0"] = stop()
    with pytest.raises(stop):
        studies.run(config)
    assert tracker.ended == ["KILLED"]


def test_study_grows_by_seeds(studies: Studies, config: RunConfig, tracker: Tracker) -> None:
    studies.run(config)
    made = studies.run(config, seeds=2)
    assert [(row.name, row.seed) for row in made.nets] == [(net, seed) for seed in (0, 1) for net in LOSSES]
    assert made.mlflow_url == "http://view/demo/8"


def test_tracking_off(studies: Studies, config: RunConfig) -> None:
    made = studies.run(config.replace({"tracking.uri": "off"}))
    assert made.mlflow_url is None
    assert "Curves: no MLflow server to open them in: see tracking.uri" in studies.said


def test_other_settings_under_the_same_name_are_refused(studies: Studies, config: RunConfig, tracker: Tracker) -> None:
    """Also when it is finished: each run is asked."""
    studies.run(config)
    studies.training.fails["plain-18-s0"] = ConfigError("name 'plain-18-s0' belongs to another run")
    with pytest.raises(ConfigError, match="belongs to another run"):
        studies.run(config.replace({"optim.lr": 0.5}))
