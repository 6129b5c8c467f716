"""A sweep's flags and file: what they mean, and what is refused with the sentence that helps."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from orchestrator import settings
from orchestrator.config import IDENTITY, RunConfig, flatten, kinds
from orchestrator.sweep import notation
from orchestrator.sweep.config import SweepConfig, changing, difference, identity
from orchestrator.sweep.runs import flags, known_points, likely_points, title, trial_config, trial_id
from orchestrator.sweep.settings import load, read
from orchestrator.sweep.space import By, Range, Space, Values, draws, grid
from pipelines.errors import ConfigError

EDGE = settings.Edge(Path("/home/of/skiplane"), cwd=Path("/here"))
DIGITS = ("--recipe", "digits", "--name", "s1")
RANDOM = ("--sweep.lr", "0.01:1.0:log", "--sweep.trials", "4")


def loaded(*argv: str) -> tuple[RunConfig, SweepConfig, Space]:
    return load([*DIGITS, *argv], settings.parser("", ""), EDGE)[1:]


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


def file(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


# -- flags -------------------------------------------------------------------------------------------------------------


def test_the_sweep_of_the_readme() -> None:
    flags = "--sweep.depth 18,34 --sweep.model.shortcut none,A --sweep.lr 0.01:1.0:log:3 --optim.momentum 0.8"
    base, sweep, space = loaded(*flags.split())
    assert space.lines() == ["model.depth 18,34", "model.shortcut none,A", "optim.lr 0.01,0.1,1.0"]
    assert (sweep.search, sweep.trials, sweep.stop) == ("grid", 12, "asha")
    assert (base.name, base.optim.momentum, base.train.epochs) == ("s1", 0.8, 6)


def test_a_value_may_follow_an_equals_sign_and_dashes_are_underscores() -> None:
    _, sweep, space = loaded(
        "--sweep.max-failures=2", "--sweep.train.global-batch=64,128", "--sweep.concurrent", "2",
        "--sweep.metric=val/loss")  # fmt: skip
    assert (sweep.max_failures, sweep.concurrent, sweep.metric) == (2, 2, "val/loss")
    assert space == Space({"train.global_batch": Values((64, 128))})


def test_the_job_keeps_its_own_flags() -> None:
    own = settings.parser("", "")
    own.add_argument("--dry-run", action="store_true")
    args, *_ = load([*DIGITS, "--sweep.depth", "18,34", "--dry-run"], own, EDGE)
    assert args.dry_run is True
    assert not [name for name in vars(args) if name.startswith("sweep")]


def test_help_lists_the_sweeps_flags_and_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"], settings.parser("", ""), EDGE)
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for name, field in SweepConfig.model_fields.items():
        assert f"--sweep.{name} " in shown
        assert " ".join(str(field.description).split()) in shown.replace("- ", "-")
    assert "--optim.lr" in shown
    assert "--sweep.SECTION.SETTING" in shown


@pytest.mark.parametrize(
    ("argv", "search", "trials", "stop"),
    [
        (["--sweep.depth", "18,34"], "grid", 2, "asha"),
        (["--sweep.depth", "18,34", "--sweep.trials", "2"], "grid", 2, "asha"),  # as many as there are
        (["--sweep.depth", "18,34", "--sweep.search", "random", "--sweep.trials", "1"], "random", 1, "asha"),
        (RANDOM, "random", 4, "asha"),
        ([*RANDOM, "--sweep.search", "tpe", "--sweep.stop", "median"], "tpe", 4, "median"),
        ([*RANDOM, "--sweep.search", "pbt"], "pbt", 4, "none"),
        ([*RANDOM, "--sweep.search", "pbt", "--sweep.stop", "none"], "pbt", 4, "none"),
    ],
)
def test_what_is_not_said_follows_from_the_space(argv, search, trials, stop) -> None:
    _, sweep, _ = loaded(*argv)
    assert (sweep.search, sweep.trials, sweep.stop) == (search, trials, stop)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written", "dimension"),
    [
        ("model.depth", "18, 34,50", Values((18, 34, 50))),
        ("model.depth", "18", Values((18,))),
        ("model.shortcut", "none,A", Values(("none", "A"))),
        ("data.flip", "true,no", Values((True, False))),
        ("optim.lr", "1e-1,0.5,1", Values((0.1, 0.5, 1.0))),
        ("optim.lr", "0.01:1.0", Range(0.01, 1.0)),
        ("optim.lr", "0.01:1.0:log", Range(0.01, 1.0, log=True)),
        ("optim.lr", " 0.01 : 1 : log : 3 ", Values((0.01, 0.1, 1.0))),
        ("optim.lr", "0:1:5", Values((0.0, 0.25, 0.5, 0.75, 1.0))),
        ("optim.weight_decay", "0:1e-3", Range(0.0, 0.001)),
        ("model.width", "8:64", Range(8, 64, whole=True)),
        ("model.width", "8:64:log", Range(8, 64, True, True)),
        ("model.width", "8:64:log:4", Values((8, 16, 32, 64))),
        ("train.seed", "0,1", Values((0, 1))),
    ],
)
def test_values_by_flag(name, written, dimension) -> None:
    found = notation.named([(name, written)])
    assert found == {name: dimension}
    if isinstance(dimension, Values):
        assert [type(value) for value in found[name].values] == [type(value) for value in dimension.values]


@hypothesis(deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=5, unique=True))
def test_a_list_of_numbers_is_read_as_it_is_written(values: list[float]) -> None:
    assert notation.named([("lr", ",".join(map(repr, values)))]) == {"optim.lr": Values(tuple(values))}


def test_text_of_a_dimension_is_read_back() -> None:
    for dimension in (Values((0.1, 1.0)), Range(0.01, 1.0, log=True), Range(0.25, 0.5)):
        assert notation.dimension("optim.lr", str(dimension)) == dimension


def test_every_identity_of_numbers_switches_and_choices_can_be_swept() -> None:
    swept = set(notation.sweepable())
    assert swept - {"train.epochs"} < {name for name, kind in kinds().items() if kind == IDENTITY}
    assert {"model.depth", "model.width", "train.epochs", "train.seed", "data.flip", "optim.schedule"} < swept


# -- file --------------------------------------------------------------------------------------------------------------


def test_a_file_has_lists_ranges_and_conditions(tmp_path: Path) -> None:
    place = file(
        tmp_path,
        """
        train.global_batch: {by: depth, 18: 256, 50: [64, 128], 34: 32:64}
        model.depth: [18, 34, 50]
        lr: {low: 1e-2, high: 1.0, log: true}
        model.width: {low: 8, high: 64, log: true, points: 4}
        data.flip: [yes, no]
        model.shortcut: [none, A]
        optim.momentum: 0.8,0.9
        """,
    )
    assert read(place, []).dimensions == {
        "model.depth": Values((18, 34, 50)),
        "optim.lr": Range(0.01, 1.0, log=True),
        "model.width": Values((8, 16, 32, 64)),
        "data.flip": Values((True, False)),
        "model.shortcut": Values(("none", "A")),
        "optim.momentum": Values((0.8, 0.9)),
        "train.global_batch": By(
            "model.depth", ((18, Values((256,))), (34, Range(32, 64, whole=True)), (50, Values((64, 128))))
        ),
    }


def test_a_flag_adds_to_a_file_and_wins(tmp_path: Path) -> None:
    place = file(tmp_path, "model.depth: [18, 34]\noptim.lr: [0.1]\ntrain.global_batch: {by: depth, 18: 64, 34: 128}\n")
    _, sweep, space = loaded("--sweep.space", place, "--sweep.depth", "18", "--sweep.model.shortcut", "none,A")
    assert space.lines() == [
        "model.depth 18", "optim.lr 0.1", "model.shortcut none,A", "train.global_batch by model.depth: 18 -> 64",
    ]  # fmt: skip
    assert sweep.trials == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1, 2]", "space.yaml, which holds no dimensions; lines such as 'model.depth: [18, 34]' are"),
        ("", "which holds no dimensions"),
        ("a: [", "space.yaml, which cannot be read: while parsing"),
        ("model.depth: []", "sweep.model.depth is empty"),
        ("model.depth: ", "sweep.model.depth is empty"),
        ("model.depth: [18, '']", "sweep.model.depth is empty, or has an empty value; list them as in"),
        ("model.depth: [[18], 34]", "sweep.model.depth: a value is ['18']; it should be a valid integer"),
        ("optim.lr: {low: 0.1}", "sweep.optim.lr is {'low': '0.1'}; a list, {low: 0.01, high: 1.0, log: true}, or {by"),
        ("optim.lr: {low: 0.1, high: 1, step: 2}", "'step': '2'}; a list, {low: 0.01"),
        ("optim.lr: {low: [1], high: 1}", "a list, {low: 0.01"),
        ("optim.lr: {low: 0.1, high: 1, log: maybe}", "sweep.optim.lr: log is 'maybe'; it should be a valid boolean"),
        ("optim.lr: {low: 0.1, high: 1, points: many}", "sweep.optim.lr is '0.1:1:many'; a range is low:high"),
        ("{depth: [18], model.depth: [34]}", "sweep.model.depth is given twice; say all its values at once"),
        ("train.global_batch: {by: depth, 18: 64}", "goes by model.depth, which is no list of values in this space"),
        ("{depth: [18, 34], train.global_batch: {by: depth, 18: 64}}", "goes by model.depth and says nothing for 34"),
        ("{depth: [18], train.global_batch: {by: depth, 18: 64, '18 ': 32}}", "two cases for one value of model.depth"),
        ("{depth: [18], train.global_batch: {by: depth, x: 64}}", "sweep.model.depth: a value is 'x'; it should be"),
        ("{depth: [18], train.global_batch: {by: deep, 18: 64}}", "sweep.deep: no such setting; did you mean sweep.d"),
        (
            "{depth: [18], train.global_batch: {by: depth, 18: {by: lr, 1: 2}}}",
            "sweep.train.global_batch is {'by': 'lr'",
        ),
        ("model.depht: [18]", "sweep.model.depht: no such setting; did you mean sweep.model.depth?"),
        ("trials: 3", "sweep.trials: no such setting; did you mean sweep."),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in refused("--sweep.space", file(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "/no.yaml, which cannot be read: [Errno 2]" in refused("--sweep.space", f"{tmp_path}/no.yaml")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        # names
        (["--sweep.trails", "3"], "sweep.trails: no such setting; did you mean sweep.trials?"),
        (["--sweep.model.dpeth", "18"], "sweep.model.dpeth: no such setting; did you mean sweep.model.depth?"),
        (["--sweep.epochs", "4,8"], "sweep.epochs: no such setting; did you mean sweep.train.epochs?"),
        (["--sweep.model", "18"], "sweep.model: no such setting; did you mean sweep."),
        (["--sweep.xyzzy.quux", "1"], "sweep.xyzzy.quux: no such setting; --help lists them all"),
        (["--sweep.name", "a,b"], "sweep.name cannot be swept: it says what is kept and told, not what is trained; "
                                  "set --name once, for all trials"),
        (["--sweep.cluster.storage", "/a,/b"], "cannot be swept: it says where a run is and how fast, not what is"),
        (["--sweep.tracking.uri", "off"], "sweep.tracking.uri cannot be swept"),
        (["--sweep.data.root", "/a"], "sweep.data.root cannot be swept: it says where a run is and how fast"),
        (["--sweep.cluster.workers", "1,2"], "not what is trained; --sweep.workers 18=1,50=2 sets it by depth"),
        (["--sweep.data.scale", "0.1,1"], "sweep.data.scale cannot be swept: numbers, switches and choices can; set "
                                          "--data.scale once, for all trials"),
        (["--sweep.model.init", "a,b"], "sweep.model.init cannot be swept: numbers, switches and choices can"),
        (["--sweep.depth", "18", "--sweep.model.depth", "34"], "sweep.model.depth is given twice; say all its values"),
        (["--sweep.lr", "1", "--sweep.lr", "2"], "sweep.lr is given twice; say all its values at once"),
        (["--sweep.lr"], "sweep.lr has no value; give --sweep.lr VALUE"),
        (["--sweep.lr", "--sweep.depth", "18"], "sweep.lr has no value"),
        # values
        ([], "the sweep has no dimension; name a setting and its values, such as --sweep.depth 18,34"),
        (["--sweep.depth", ""], "sweep.model.depth is empty, or has an empty value; list them as in --sweep.depth"),
        (["--sweep.depth", "18,,34"], "sweep.model.depth is empty, or has an empty value"),
        (["--sweep.depth", "18,18"], "sweep.model.depth has the value 18 twice; leave one out"),
        (["--sweep.lr", "0.1,1e-1"], "sweep.optim.lr has the value 1e-1 twice"),
        (["--sweep.depth", "deep"], "sweep.model.depth: a value is 'deep'; it should be a valid integer"),
        (["--sweep.lr", "0.1,nan"], "sweep.optim.lr: a value is 'nan'; finite numbers are needed"),
        (["--sweep.lr", "inf"], "sweep.optim.lr: a value is 'inf'; finite numbers are needed"),
        (["--sweep.data.flip", "maybe"], "sweep.data.flip: a value is 'maybe'; it should be a valid boolean"),
        (["--sweep.model.shortcut", "A,D"], "sweep.model.shortcut: a value is 'D'; it should be 'none', 'A', 'B'"),
        (["--sweep.depth", "18,33"], "trial depth=33: model.depth is 33; the imagenet layout has 18, 34, 50, 101, 152"),
        (["--sweep.lr", "0.1,2000"], "trial lr=2000.0: optim.lr is 2000.0; it should be less than or equal to 1000"),
        (["--sweep.train.global_batch", "64,66"], "trial global_batch=66: train.global_batch is 66, which data.lanes"),
        (["--sweep.train.global_batch", "64,128", "--sweep.data.lanes", "4,48"],
         "trial global_batch=64 lanes=48: train.global_batch is 64, which data.lanes = 48 does not divide"),
        # ranges
        (["--sweep.lr", "1.0:0.1"], "sweep.optim.lr is '1.0:0.1', an empty range; the first number must be below"),
        (["--sweep.lr", "1:1"], "an empty range"),
        (["--sweep.lr", "0:1:log"], "sweep.optim.lr is '0:1:log'; a log range cannot touch zero: start above it, or"),
        (["--sweep.optim.weight_decay", "-1:1:log"], "a log range cannot touch zero"),
        (["--sweep.lr", "0.1:nan"], "sweep.optim.lr is '0.1:nan'; both ends must be finite numbers"),
        (["--sweep.lr", "0.1:inf"], "both ends must be finite numbers"),
        (["--sweep.lr", "0.1:x"], "sweep.optim.lr is '0.1:x'; its end is 'x'; it should be a valid number"),
        (["--sweep.lr", "0.1:"], "its end is ''; it should be a valid number"),
        (["--sweep.lr", "0.1:1:lin"], "sweep.optim.lr is '0.1:1:lin'; a range is low:high or low:high:log, with a"),
        (["--sweep.lr", "0.1:1:log:3:4"], "'0.1:1:log:3:4'; a range is low:high"),
        (["--sweep.lr", "0.1:1:log:1"], "sweep.optim.lr is '0.1:1:log:1' with 1 points; at least 2 are needed"),
        (["--sweep.model.width", "8:10:4"], "with 4 points; at least 2 and at most 3 are needed"),
        (["--sweep.model.width", "1:64:log:16"], "whose points fall together: 1,1,2,2,3,4,5,7,9,12,16,21,28,37,49,64"),
        (["--sweep.model.width", "8:16.5"], "sweep.model.width is '8:16.5'; model.width is a whole number, so"),
        (["--sweep.model.shortcut", "A:C"], "sweep.model.shortcut is 'A:C'; a range is for numbers: list the values"),
        (["--sweep.data.flip", "0:1"], "sweep.data.flip is '0:1'; a range is for numbers"),
        (["--sweep.lr", "0.1:2000", "--sweep.trials", "1"], "trial lr=2000.0: optim.lr is 2000.0; it should be less"),
        (["--sweep.model.depth", "18:34", "--sweep.trials", "9"], "the imagenet layout has 18, 34, 50, 101, 152"),
        # search and trials
        (["--sweep.search", "best"], "sweep.search is 'best'; it should be 'auto', 'grid', 'random', 'tpe' or 'pbt'"),
        (["--sweep.lr", "0.1:1", "--sweep.search", "grid"], "sweep.search is grid, and optim.lr 0.1:1.0 is a range; "
                                                            "put a number of points behind it, such as 0.01:1.0:log:5"),
        (["--sweep.depth", "18,34", "--sweep.trials", "3"], "sweep.trials is 3, more than the 2 points of the grid"),
        (["--sweep.depth", "18,34", "--sweep.trials", "1"], "fewer than the 2 points of the grid; leave it out for "
                                                            "all, or use --sweep.search random for some of them"),
        (["--sweep.lr", "0.1:1"], "sweep.trials is not set; search random needs to know how many, at least 1"),
        (["--sweep.depth", "18", "--sweep.search", "tpe"], "search tpe needs to know how many, at least 1"),
        (["--sweep.lr", "0.1:1", "--sweep.search", "pbt", "--sweep.trials", "1"],
         "sweep.trials is 1; search pbt needs to know how many, at least 2"),
        (["--sweep.depth", "18,34", "--sweep.search", "random", "--sweep.trials", "3"],
         "sweep.trials is 3, more than the 2 points of the space; ask for 2 at most"),
        (["--sweep.model.width", "8:10", "--sweep.trials", "4"], "more than the 3 points of the space"),
        (["--sweep.lr", "0.1:0.1002", "--sweep.trials", "4"],
         "sweep.trials is 4, and with 4 digits the space has but 3 points; widen a range, or ask for 3 at most"),
        (["--sweep.train.seed", "0:20000:20001"], "the grid has 20001 points, more than 10000; use --sweep.search"),
        (["--sweep.trials", "-1"], "sweep.trials is '-1'; it should be greater than or equal to 0"),
        (["--sweep.trials", "10001"], "sweep.trials is '10001'; it should be less than or equal to 10000"),
        # stopping
        (["--sweep.stop", "hyperband"], "sweep.stop is 'hyperband'; it should be 'none', 'asha' or 'median'"),
        (["--sweep.factor", "1"], "sweep.factor is '1'; it should be greater than 1"),
        (["--sweep.factor", "nan"], "sweep.factor is 'nan'; it should be"),
        (["--sweep.grace", "0"], "sweep.grace is '0'; it should be greater than or equal to 1"),
        (["--sweep.metric", "top1"],
         "sweep.metric is 'top1', which no trial reports; use one of val/top1, val/top5, val/loss, train/loss"),
        (["--sweep.max-failures", "-1"], "sweep.max_failures is '-1'; it should be greater than or equal to 0"),
        # pbt
        ([*RANDOM, "--sweep.search", "pbt", "--sweep.stop", "asha"],
         "sweep.stop is asha with sweep.search pbt, where poor trials take up good ones and go on; leave --sweep.stop"),
        (["--sweep.depth", "18,34", "--sweep.search", "pbt", "--sweep.trials", "2"],
         "sweep.search is pbt, which needs exactly one range, of optim.lr or optim.weight_decay or optim.momentum, and "
         "lists besides; this space has none"),
        ([*RANDOM, "--sweep.search", "pbt", "--sweep.optim.momentum", "0.8:0.9"], "has optim.lr, optim.momentum"),
        (["--sweep.model.width", "8:64", "--sweep.search", "pbt", "--sweep.trials", "2"], "this space has model.width"),
        # workers
        (["--sweep.depth", "18,34", "--sweep.workers", "18=1,50=2"],
         "sweep.workers is 18=1,50=2, and depth 50 is not swept; depths here: 18, 34"),
        (["--sweep.lr", "0.1,1", "--sweep.workers", "18=1"], "depths here: one, so a number such as 2 is enough"),
        (["--sweep.workers", "many"], "sweep.workers is 'many'; a number or least..most is needed, such as 2 or 1..2"),
        (["--sweep.workers", "18=1,18=2"], "sweep.workers is '18=1,18=2'; a number or least..most is needed"),
        (["--sweep.workers", "18=1,50"], "or one for each depth: 18=1,50=2..4"),
        (["--sweep.workers", "18=2..1"], "sweep.workers is '18=2..1'; a number or least..most is needed"),
        (["--sweep.workers", "18:1"], "sweep.workers is '18:1'; a number or least..most is needed"),
        (["--sweep.depth", "18,34", "--sweep.workers", "34=5"],
         "trial depth=34: cluster.workers is 5, more than data.lanes = 4"),
        # the run's own settings
        (["--sweep.depth", "18,34", "--name", ""], "name is not set; give the sweep a --name: the same name goes on"),
        (["--sweep.depth", "18,34", "--optim.lr", "-1"], "optim.lr is '-1'"),
        (["--sweep.depth", "18,34", "--modle.depth", "1"], "modle.depth: no such setting; did you mean model.depth?"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_is_allowed(argv, sentence) -> None:
    said = refused(*argv)
    assert sentence in said
    assert len(said.splitlines()) == 1


# -- trials ------------------------------------------------------------------------------------------------------------


def test_a_trial_is_a_run_in_the_sweeps_folder() -> None:
    base, sweep, space = loaded("--sweep.depth", "18,34", "--sweep.lr", "0.1,0.5", "--cluster.storage", "/runs")
    point = known_points(space, sweep)[3]
    config = trial_config(base, sweep, trial_id(4), point)
    assert config.folder() == "/runs/s1/t004"
    changed = {name for name, value in flatten(config).items() if value != flatten(base)[name]}
    assert changed == {"name", "cluster.storage", "model.depth", "optim.lr"}
    assert flatten(config)["optim.lr"] == 0.5


def test_its_flags_give_the_same_settings() -> None:
    base, sweep, space = loaded("--sweep.depth", "18,34", "--sweep.data.flip", "true,false",
                                "--sweep.lr", "1e-5:1:log:4", "--sweep.model.shortcut", "none,A")  # fmt: skip
    for point in known_points(space, sweep):
        config = trial_config(base, sweep, "t001", point)
        again = settings.load([*DIGITS, *flags(point)], settings.parser("", ""), EDGE)[1]
        assert again.replace({"name": config.name, "cluster.storage": config.cluster.storage}) == config


def test_flags_are_words_of_a_command() -> None:
    point = {"model.depth": 34, "optim.lr": 0.1, "data.flip": True, "model.shortcut": "none"}
    assert " ".join(flags(point)) == "--model.depth 34 --optim.lr 0.1 --data.flip true --model.shortcut none"


@pytest.mark.parametrize(
    ("workers", "given"),
    [
        ("", {18: "1..3", 34: "1..3"}),  # as the run's own
        ("2", {18: "2", 34: "2"}),
        ("1..2", {18: "1..2", 34: "1..2"}),
        ("34=2..4", {18: "1..3", 34: "2..4"}),
        ("18=1, 34=2", {18: "1", 34: "2"}),
    ],
)
def test_deep_nets_may_have_more_workers(workers, given) -> None:
    argv = ["--sweep.depth", "18,34", "--cluster.workers", "1..3", *(["--sweep.workers", workers] if workers else [])]
    base, sweep, space = loaded(*argv)
    runs = [trial_config(base, sweep, "t001", point) for point in known_points(space, sweep)]
    assert {run.model.depth: run.cluster.workers for run in runs} == given


@pytest.mark.parametrize(
    ("swept", "point", "shown"),
    [
        ("depth 18,34 lr 0.1,1", {"model.depth": 34, "optim.lr": 0.1}, "resnet-34 lr=0.1"),
        ("depth 18,34", {"model.depth": 18}, "resnet-18"),
        ("lr 0.1,1", {"optim.lr": 1.0}, "resnet-18 lr=1.0"),
        ("model.shortcut none,A", {"model.shortcut": "none"}, "plain-18"),  # the net's name says it
        ("model.shortcut none,A,B", {"model.shortcut": "A"}, "resnet-18 shortcut=A"),  # here it does not
        (
            "model.shortcut none,A model.width 16,32 train.epochs 4,8 lr 0.05,0.1",
            {"model.shortcut": "none", "model.width": 32, "train.epochs": 8, "optim.lr": 0.05},
            "plain-18 width=32 epochs=8 lr=0.05",
        ),
        ("data.flip true,false", {"data.flip": False}, "resnet-18 flip=false"),
        (
            "data.size 16,32 data.eval_size 8,16",
            {"data.size": 32, "data.eval_size": 8},
            "resnet-18 size=32 eval_size=8",
        ),
    ],
)
def test_a_trial_is_called_by_what_differs(swept, point, shown) -> None:
    words = swept.split()
    flags = [word for name, values in zip(words[::2], words[1::2], strict=True) for word in (f"--sweep.{name}", values)]
    base, sweep, space = loaded(*flags)
    assert title(trial_config(base, sweep, "t001", point), space) == shown


def test_no_two_settings_that_can_be_swept_end_alike() -> None:
    ends = [name.rpartition(".")[2] for name in notation.sweepable()]
    assert len(ends) == len(set(ends))


def test_points_that_are_known_before_any_has_run() -> None:
    for search in ("random", "tpe", "pbt"):
        _, sweep, space = loaded(*RANDOM, "--sweep.search", search, "--sweep.seed", "5")
        assert likely_points(space, sweep) == draws(space, 5, 4)
        assert known_points(space, sweep) == ([] if search == "tpe" else draws(space, 5, 4))
    _, sweep, space = loaded("--sweep.depth", "18,34")
    assert known_points(space, sweep) == likely_points(space, sweep) == grid(space)


def test_a_random_trial_that_cannot_be_is_refused_before_any_begins() -> None:
    said = refused("--sweep.train.global_batch", "64:128", "--sweep.trials", "8")  # both ends could be
    assert said.startswith("trial global_batch=")
    assert "which data.lanes = 4 does not divide" in said


def test_a_condition_is_checked_with_what_it_looks_at(tmp_path: Path) -> None:
    place = file(
        tmp_path, "model.layout: [imagenet, cifar]\nmodel.depth: {by: model.layout, imagenet: 18, cifar: 20}\n"
    )
    _, sweep, _ = loaded("--sweep.space", place)  # cifar would not have the run's own depth of 18
    assert sweep.trials == 2
    place = file(
        tmp_path, "model.layout: [imagenet, cifar]\nmodel.depth: {by: model.layout, imagenet: 18, cifar: 18}\n"
    )
    for more in ((), ("--sweep.search", "random", "--sweep.trials", "1")):
        said = refused("--sweep.space", place, *more)
        assert said.startswith("trial layout=cifar depth=18: model.depth is 18; the cifar layout has 6n+2")


def test_pbt_changes_one_range_while_trials_train() -> None:
    _, _, space = loaded(*RANDOM, "--sweep.search", "pbt", "--sweep.depth", "18,34")
    assert changing(space) == "optim.lr"


# -- identity ----------------------------------------------------------------------------------------------------------


def test_what_a_sweeps_name_stands_for() -> None:
    _, sweep, space = loaded(*RANDOM, "--sweep.depth", "18,34")
    found = identity(space, sweep)
    assert found == json.loads(json.dumps(found))
    assert found == {
        "space": ["optim.lr 0.01:1.0:log", "model.depth 18,34"],
        "search": "random",
        "trials": 4,
        "stop": "asha",
        "grace": 1,
        "factor": 3.0,
        "metric": "val/top1",
        "seed": 0,
        "interval": 1,
    }


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        ([], []),
        (["--sweep.concurrent", "3", "--sweep.max-failures", "1", "--sweep.workers", "2"], []),  # placement
        (["--sweep.search", "random"], []),  # what 'auto' means there
        (["--sweep.seed", "1"], ["sweep.seed was 0, is 1"]),
        (["--sweep.trials", "5", "--sweep.stop", "none"], ["sweep.trials was 4, is 5", "sweep.stop was asha, is none"]),
        (["--sweep.depth", "18,34"],
         ["sweep.space was optim.lr 0.01:1.0:log, is optim.lr 0.01:1.0:log | model.depth 18,34"]),
    ],
)  # fmt: skip
def test_what_differs_from_the_sweep_of_that_name(argv, lines) -> None:
    old = {"--sweep.lr": "0.01:1.0:log", "--sweep.trials": "4"}
    new = old | dict(zip(argv[::2], argv[1::2], strict=True))
    before, after = (identity(space, sweep) for _, sweep, space in (
        loaded(*(word for pair in flags.items() for word in pair)) for flags in (old, new)))  # fmt: skip
    assert difference(before, after) == lines


def test_every_setting_of_a_sweep_has_a_kind_and_a_description() -> None:
    assert set(kinds(SweepConfig)) == set(SweepConfig.model_fields)
    assert all(field.description for field in SweepConfig.model_fields.values())
