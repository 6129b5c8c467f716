"""Settings: refused with the sentence that helps; kinds decide what may change under one name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import settings
from orchestrator.config import IDENTITY, RunConfig, flatten, identity_difference, kinds, unflatten
from pipelines.errors import ConfigError


def load(*argv, edge=None, tmp="/nowhere"):
    from pathlib import Path

    surroundings = edge or settings.Edge(Path(tmp), cwd=Path("/work"))
    return settings.load(list(argv), settings.parser("", ""), surroundings)[1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model.depth", "33"], "model.depth is 33; the imagenet layout has 18, 34, 50, 101, 152"),
        (["--model.layout", "cifar", "--model.depth", "21"], "model.depth is 21; the cifar layout has 6n+2"),
        (["--model.dpeth", "34"], "model.dpeth: no such setting; did you mean model.depth?"),
        (["--recipe", "digitz"], "recipe 'digitz' does not exist; use one of cifar10,"),
        (["--train.global_batch", "33"], "data.lanes = 8 does not divide; the nearest that fit are 32 and 40"),
        (["--train.global_batch", "3"], "the nearest that fit are 8 and 8"),
        (["--data.streams", "3"], "use one of 1, 2, 4, 8"),
        (["--cluster.workers", "9"], "cluster.workers is 9, more than data.lanes = 8"),
        (["--cluster.workers", "4..2"], "least..most such as 2..8"),
        (["--cluster.workers", "x"], "cluster.workers is 'x'; a number such as 4"),
        (["--name", "../x"], "name is '../x'"),
        (["--train.epochs", "many"], "train.epochs is 'many'"),
        (["--data.augment", "blur"], "'none', 'resized_crop', 'short_side' or 'pad_crop'"),
        (["--config", "/no/such.yaml"], "config file /no/such.yaml cannot be read"),
        (["--optim.nesterov", "true", "--optim.momentum", "0"], "optim.nesterov is on with optim.momentum = 0"),
        (["--optim.milestones", "60,30"], "rising epochs are needed"),
        (["--data", "/x"], "a section's name alone is no setting"),
        (["--cluster.storage", "s3://"], "cluster.storage is 's3://'; use a folder, or s3://BUCKET/PATH"),
        (["--cluster.storage", "s3:/x"], "cluster.storage is 's3:/x'; use a folder, or s3://BUCKET/PATH"),
        (["--data.std", "0,1,1"], "three numbers above 0 are needed"),
        (["--data.eval_size", "300"], "above data.eval_resize = 256"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(argv, sentence):
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2


def test_two_wrong_settings_are_two_lines():
    with pytest.raises(ConfigError) as caught:
        load("--train.epochs", "0", "--optim.lr", "-1")
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["optim.lr", "train.epochs"]


def test_flags_win_over_file_over_recipe_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.5, momentum: 0.8}\n")
    config = load("--recipe", "digits", "--config", str(file), "--optim.lr", "0.25")
    assert (config.optim.lr, config.optim.momentum, config.optim.schedule, config.optim.gamma) == (
        0.25,
        0.8,
        "one_cycle",
        0.1,
    )


def test_the_shell_cannot_name_a_run(monkeypatch):
    monkeypatch.setenv("NAME", "stray")
    assert load("--recipe", "digits").name == ""


def test_places_follow_from_home_and_relative_paths_from_the_folder(tmp_path):
    config = load("--recipe", "digits", "--cluster.storage", "runs", tmp=str(tmp_path))
    assert config.data.root == str(tmp_path / "data" / "digits")
    assert config.cluster.storage == "/work/runs"
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize(
    "uri",
    [
        "http://anna:secret@h:5000",
        "http://anna:se/cret@h",
        "http://anna:se[cret@h",
        "postgresql+psycopg://a:secret@h/db",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_shown(monkeypatch, uri):
    """It would stand in run.json, in what --dry-run prints, in the arguments of processes."""
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        load("--recipe", "digits", "--tracking.uri", uri)
    assert "cret" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load("--recipe", "digits", edge=settings.Edge.of_environment())
    assert load("--recipe", "digits", "--tracking.uri", "http://anna@h:5000/p").tracking.uri == "http://anna@h:5000/p"


@pytest.mark.parametrize(
    ("variable", "flags", "expected"),
    [
        ("", [], "digits"),
        ("team", [], "team"),
        ("team", ["--tracking.experiment", "mine"], "mine"),
        ("", ["--tracking.experiment", "mine"], "mine"),
    ],
)
def test_experiment_of_the_environment_is_a_default(monkeypatch, variable, flags, expected):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", variable)
    edge = settings.Edge.of_environment()
    assert load("--recipe", "digits", *flags, edge=edge).tracking.experiment == expected


def test_a_job_refuses_a_relative_path(tmp_path):
    edge = settings.Edge(tmp_path, in_job=True)
    with pytest.raises(ConfigError, match=r"cluster.storage is 'runs'; inside a submitted job a path must be absolute"):
        load("--cluster.storage", "runs", edge=edge)
    assert load("--cluster.storage", "s3://bucket/runs", edge=edge).cluster.storage == "s3://bucket/runs"


@pytest.mark.parametrize("recipe", settings.recipe_names())
def test_every_recipe_is_whole(recipe):
    config = load("--recipe", recipe)
    assert RunConfig.model_validate(config.model_dump()) == config


def test_every_setting_has_a_kind_and_a_description():
    names = flatten(RunConfig())
    assert set(kinds()) == set(names)
    for section in RunConfig.model_fields.values():
        fields = getattr(section.annotation, "model_fields", {"": section})
        assert all(field.description for field in fields.values())


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"model.depth": 34}, ["model.depth was 50, is 34"]),
        ({"train.seed": 1, "optim.lr": 0.2}, ["optim.lr was 0.1, is 0.2", "train.seed was 0, is 1"]),
        ({"cluster.workers": "2..4", "data.threads": 3, "train.lanes_per_pass": 2}, []),  # placement
        ({"train.checkpoint_steps": 10, "tracking.log_steps": 7}, []),  # reporting
        ({"train.epochs": 100}, []),  # 'step' is the same function for any number of epochs
        ({"data.root": "/elsewhere"}, []),  # the content is identity, by its digest
    ],
)
def test_only_identity_binds_a_name(change, refused):
    base = RunConfig()
    assert identity_difference(flatten(base), base.replace(change)) == refused


def test_epochs_are_identity_where_the_schedule_depends_on_them():
    cosine = RunConfig().replace({"optim.schedule": "cosine"})
    assert identity_difference(flatten(cosine), cosine.replace({"train.epochs": 91})) == ["train.epochs was 90, is 91"]


@given(st.sampled_from(sorted(n for n, k in kinds().items() if k == IDENTITY)))
def test_flat_and_nested_are_the_same(name):
    config = RunConfig()
    assert RunConfig.model_validate(unflatten(flatten(config))) == config
    assert name in flatten(config)
