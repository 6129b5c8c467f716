"""Where a run's code came from: of a checkout git says it, of a job its submitter."""

import json
import subprocess

import pytest

from orchestrator import provenance

COMMIT, DIRTY = "mlflow.source.git.commit", "skiplane.git_dirty"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one module in one commit; what the shell says of git, and of jobs, is not looked at."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", JOB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("1\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (["init", "-q"], ["add", "a.py"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def head(folder):
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True).stdout[
        :-1
    ]


def test_a_checkout_without_a_job_knows_its_commit_and_whether_it_is_clean(checkout):
    found = provenance.tags()
    assert (found[COMMIT], found[DIRTY]) == (head(checkout), "false")
    assert found["mlflow.source.name"].startswith("pytest")  # the command
    assert len(found["skiplane.package_sha256"]) == 64
    assert "ray.submission_id" not in found
    (checkout / "a.py").write_text("2\n")
    assert provenance.tags()[DIRTY] == "true"


def test_in_a_job_the_submitter_knows_better(checkout, monkeypatch):
    metadata = {"job_submission_id": "raysubmit_x", "git_commit": "c0ffee", "git_dirty": "true"}
    monkeypatch.setenv(JOB, json.dumps({"metadata": metadata}))
    found = provenance.tags()
    assert (found[COMMIT], found[DIRTY], found["ray.submission_id"]) == ("c0ffee", "true", "raysubmit_x")


def test_a_package_without_git_and_job_knows_its_content_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.tags().keys() - {"mlflow.source.name"} == {"skiplane.package_sha256"}
