"""Where a run's code came from: content hash always, git commit and Ray's ids when they are known."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("jobs", "orchestrator", "pipelines")
TAGS = {  # of a job's metadata
    "job_submission_id": "ray.submission_id",
    "git_commit": "mlflow.source.git.commit",
    "git_dirty": "skiplane.git_dirty",
    "user": "mlflow.user",
}


def content_sha256(root: Path = ROOT) -> str:
    """Hash of every module and recipe: known even in a job, where .git is absent."""
    digest = hashlib.sha256()
    for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def tags() -> dict[str, str]:
    """Tags for MLflow: command, package hash, git commit and dirty state when known, Ray job and submission id."""
    command = getattr(sys.modules["__main__"].__spec__, "name", "")  # jobs.train; MLflow shows the commit beside it
    found = {"mlflow.source.name": command, "skiplane.package_sha256": content_sha256()}
    for said in (git(), _job()):  # the submitter knows better
        found |= {tag: said[name] for name, tag in TAGS.items() if said.get(name)}
    return {tag: value for tag, value in found.items() if value}


def _job() -> dict[str, str]:
    """What the submitter passed on: metadata of the job, such as git_commit by --metadata-json."""
    raw = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return json.loads(raw).get("metadata", {}) if raw else {}


def git() -> dict[str, str]:
    """git_commit and git_dirty as a submitter passes them on; nothing where there is no repository."""
    if not (ROOT / ".git").exists():
        return {}
    commit, status = _run("rev-parse", "HEAD"), _run("status", "--porcelain")
    return {} if commit is None else {"git_commit": commit, "git_dirty": str(bool(status)).lower()}


def _run(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
