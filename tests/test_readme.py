"""The README's commands, settings, tree and links are true."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from jobs import submit
from orchestrator import settings, submission
from orchestrator.config import RunConfig, flatten
from orchestrator.plan import plan_counts
from orchestrator.sweep import settings as sweeps
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.outlook import planned
from pipelines.errors import DataError, SkiplaneError
from pipelines.remote import objects

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


def check_make(words):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert words[1] in targets


def check_job(words, monkeypatch, tmp_path):
    """Parses a job's command line with the job's own parser; a train or study as a dry run, whole."""
    module, flags = words[2], words[3:]
    monkeypatch.setenv("SKIPLANE_HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    if module in ("jobs.train", "jobs.study"):
        job = __import__(module, fromlist=["main"])
        line = [*flags, *([] if "--dry-run" in flags else ["--dry-run"])]
        if any(word.startswith("s3://") for word in flags):  # every flag is known, and then there is no such bucket
            monkeypatch.setattr(objects, "ASKING_S", 0.0)
            with pytest.raises(
                DataError, match=r"^s3://bucket/imagenet/dataset\.json cannot be read: connection refused"
            ):
                job.main([*line, "--data.endpoint", "http://127.0.0.1:1"])
        else:
            assert job.main(line) == 0
    elif module == "jobs.sweep":
        own = settings.parser("", "")
        own.add_argument("--dry-run", action="store_true")
        _, config, sweep, space = sweeps.load(flags, own, settings.Edge(tmp_path))
        assert planned(config, sweep, space, plan_counts(config))
    elif module == "jobs.evaluate":
        from jobs import evaluate

        with pytest.raises(SkiplaneError) as caught:  # there is nothing to score: but every flag is known
            evaluate.main(flags)
        assert "no such setting" not in str(caught.value)
        assert "arguments" not in str(caught.value)
    elif module == "jobs.pack":
        from jobs.pack import _parser

        assert _parser().parse_args(flags)
    elif module == "jobs.tracking":
        from jobs.tracking import _parser

        assert _parser().parse_args(flags).act
    elif module == "jobs.submit":
        args, command = submit.parse(flags)
        assert args.follow or submission.check_command(command, args.id)
        if command:
            check_job(command, monkeypatch, tmp_path)
    elif module == "jobs.local":
        assert flags[0] in ("up", "status", "down")
    else:
        assert module.startswith("benchmarks.")
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_exists(command, monkeypatch, tmp_path, capsys):
    words = shlex.split(command)
    if words[:3] == ["ray", "job", "submit"]:
        assert words[3:5] == ["--working-dir", "."]
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        check_make(words)
    elif words[:2] == ["python", "-m"]:
        check_job(words, monkeypatch, tmp_path)
    else:
        assert words in (["source", "~/.skiplane/local/env.sh"], ["source", ".venv/bin/activate"]), (
            f"README has a command nobody checks: {command}"
        )


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 12


def test_the_dry_run_is_what_the_readme_shows(monkeypatch, tmp_path, capsys):
    from jobs import train

    monkeypatch.setenv("SKIPLANE_HOME", str(tmp_path))
    train.main(["--recipe", "tv1", "--cluster.workers", "8", "--dry-run"])
    shown = next(b for b in re.findall(r"```text\n(.*?)```", README, re.S) if "not packed yet" in b)
    assert shown.strip() in capsys.readouterr().out


def test_every_setting_it_names_exists():
    sections = "|".join(name for name in RunConfig.model_fields if name != "name")
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.[a-z_]+)", README)) - {"data.name"}
    assert named
    assert named <= set(flatten(RunConfig()))


def test_the_space_in_a_file_is_one(tmp_path):
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", README, re.S) if "by:" in b)
    (tmp_path / "space.yaml").write_text(block)
    space = sweeps.read(str(tmp_path / "space.yaml"), [])
    assert list(space.dimensions) == ["model.depth", "optim.lr", "train.global_batch"]


def test_every_setting_of_a_sweep_exists():
    named = {name.replace("-", "_") for name in re.findall(r"--sweep\.([a-z_-]+)(?![a-z_.-])", README)}
    assert named - {"depth", "lr"} <= set(SweepConfig.model_fields)


def test_every_recipe_is_in_the_table():
    table = README[README.index("| recipe |") :]
    assert all(f"`{name}`" in table.split("\n\n")[0] for name in settings.recipe_names())


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("infra/**/*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert "://" in target or (ROOT / page).parent.joinpath(target).exists(), target


def tree():
    """Paths of the README's tree, from its indentation."""
    block = README[README.index("## The tree") :]
    stack: list[str] = []
    for line in re.search(r"```text\n(.*?)```", block, re.S)[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth:] = [line.split()[0]]
        yield "".join(stack)


def test_the_tree_is_the_tree():
    shown = list(tree())
    for path in shown:
        assert (ROOT / path).exists(), f"README's tree has {path}, which is not there"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = [p for p in shown if p.endswith("/")]
    for path in tracked:
        if path.endswith(".py") and not path.endswith("__init__.py"):
            in_leaf = any(path.startswith(f) and not any(o.startswith(f) and o != f for o in shown) for f in folders)
            assert path in shown or in_leaf, f"README's tree lacks {path}"


def test_the_environment_for_clusters_is_the_local_clusters_own():
    from orchestrator.cluster.services import RAY_SETTINGS

    lines = [line for line in (ROOT / "infra" / "ray.env").read_text().splitlines() if not line.startswith("#")]
    shipped = dict(line.split("=", 1) for line in lines)
    assert shipped.pop("RAY_AUTH_MODE") == "token"
    assert shipped.items() <= RAY_SETTINGS.items()
