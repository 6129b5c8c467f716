"""Submits a job, follows it, and exits with its code: `python -m jobs.submit -- python -m jobs.train --name a ...`."""

import getpass
import os
import signal
import sys
import tempfile
from argparse import ArgumentTypeError, Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import edge
from orchestrator import provenance, submission
from orchestrator.cluster import gate, local
from orchestrator.settings import Edge, Parser
from orchestrator.submission import RuntimeEnv, Submission
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.submitter import Submitter

USAGE = (
    "python -m jobs.submit [--address URL] [--id ID] [--retries N] [--wait-seconds S] [--env NAME=VALUE ...] "
    "[--runtime-env FILE] [--resources JSON] [--no-follow] [--insecure] -- python -m jobs.train --name NAME ...\n"
    "       python -m jobs.submit [--address URL] [--wait-seconds S] [--insecure] --follow ID"
)
RUNTIME_ENV = provenance.ROOT / "infra" / "runtime-env.yaml"
PACKAGE_BYTES = 100 * 2**20  # that Ray's dashboard takes


class Screen:
    """Lines of our own and a job's words, each from the beginning of a line."""

    def __init__(self) -> None:
        self._open = False  # whether a line of the job's is not ended

    def say(self, line: str) -> None:
        """A line of our own."""
        edge.say(f"\n{line}" if self._open else line)
        self._open = False

    def write(self, text: str) -> None:
        """Words of a job, as they come."""
        sys.stdout.write(text)
        sys.stdout.flush()
        self._open = not text.endswith("\n")


def main(argv: list[str]) -> int:
    """Exit codes: the job's own, or 2 setting, 4 cluster; 130 and 143 also where this command was stopped alone."""
    args, command = parse(argv)
    url = gate.address(args.address, os.environ)
    token = gate.token(os.environ, args.insecure)
    prepared = None if args.follow else prepare(args, command, url)
    screen = Screen()
    if warning := gate.ask(url, token, args.insecure):
        screen.say(warning)
    from orchestrator.cluster.jobs import Jobs  # Ray is imported once the rest is right
    from orchestrator.submitter import Submitter

    submitter = Submitter(Jobs(url, token), screen, args.wait_seconds)
    try:
        return submitter.follow(args.follow) if prepared is None else _run(args, *prepared, submitter, screen)
    except KeyboardInterrupt as stop:
        if not submitter.id:
            raise
        known = "goes on without this command" if submitter.taken else "may have been taken, and goes on then"
        screen.say(f"job {submitter.id} {known}\n{lines(submitter.id, args)}")
        return 128 + (signal.SIGTERM if stop.args == (signal.SIGTERM,) else signal.SIGINT)


def prepare(args: Namespace, command: list[str], url: str) -> tuple[Submission, str]:
    """What is submitted, and a line on where it tracks: everything that can be wrong without a cluster.

    Raises ConfigError.
    """
    name = submission.check_command(command, args.id)
    brought = _brought(args.runtime_env)
    asked = brought.env_vars | submission.env_vars(args.env)
    tracked, line = submission.tracking(os.environ.get(submission.TRACKING, ""), command, asked, _local(url))
    metadata = provenance.git() | {"run": name}
    with suppress(OSError, KeyError):  # a container may know no user
        metadata["user"] = getpass.getuser()
    environment, amounts = replace(brought, env_vars=asked | tracked), submission.resources(args.resources)
    return Submission(name, args.id or name, tuple(command), environment, metadata, amounts), line


def _brought(path: Path) -> RuntimeEnv:
    brought = submission.read_runtime_env(path)
    if not brought.rest:
        return brought
    from orchestrator.cluster.jobs import parsed

    return replace(brought, rest=parsed(brought.rest, path))


def _run(args: Namespace, prepared: Submission, tracked: str, submitter: "Submitter", screen: Screen) -> int:
    from orchestrator.cluster.jobs import pack

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "skiplane.zip"
        pack(provenance.ROOT, prepared.environment.excludes, package)
        _check_size(package)
        submitter.submit(prepared, package)
        for line in (_code(prepared, package), tracked):
            if line:
                screen.say(f"  {line}")
        if args.no_follow:
            screen.say(lines(submitter.id, args))
            return 0
        return submitter.see_through(prepared, package, args.retries)


def lines(id: str, args: Namespace) -> str:
    """How to follow a job and how to stop it."""
    where = f" --address {args.address}" if args.address else ""
    follow = f"python -m jobs.submit{where}{' --insecure' * args.insecure} --follow {id}"
    return f"  to follow it  {follow}\n  to stop it    ray job stop{where} {id}"


def _local(url: str) -> bool:
    """Whether that is the one-machine cluster of this user."""
    cluster = local.load(Edge.of_environment().home)
    return cluster.running("ray") and url.replace("//localhost:", f"//{local.HOST}:") == cluster.url("ray")


def _code(prepared: Submission, package: Path) -> str:
    commit = prepared.metadata.get("git_commit", "")[:7] or "unknown"
    changed = ", with changes" if prepared.metadata.get("git_dirty") == "true" else ""
    return f"its code: {package.stat().st_size / 1e6:.1f} MB, commit {commit}{changed}"


def _check_size(package: Path) -> None:
    if (size := package.stat().st_size) > PACKAGE_BYTES:
        most = PACKAGE_BYTES / 2**20
        raise ConfigError(f"the repository packs into {size / 2**20:.0f} MB, and Ray takes {most:.0f}; name what is no "
                          f"code in .rayignore (data and runs belong elsewhere)")  # fmt: skip


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Our own flags, and the command behind `--`. Raises ConfigError."""
    at = argv.index("--") if "--" in argv else len(argv)
    args, command = _parser().parse_args(argv[:at]), argv[at + 1 :]
    if args.follow and (command or args.no_follow):
        raise ConfigError("--follow shows a job that was submitted before; give it without a command and --no-follow")
    return args, command


def _parser() -> Parser:
    made = Parser(prog="python -m jobs.submit", description=__doc__, usage=USAGE, allow_abbrev=False)
    made.add_argument("--address", default="", metavar="URL", help="of the dashboard; default $RAY_API_SERVER_ADDRESS")
    made.add_argument("--id", default="", help="of the job; default the run's --name. One that was used gets a number")
    made.add_argument("--retries", type=_count, default=3, metavar="N", help="submissions after a lost head; default 3")
    made.add_argument(
        "--wait-seconds", type=_count, default=600, metavar="S", help="for a server that is away; default 600"
    )
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the job; no secrets")
    made.add_argument(
        "--runtime-env", type=Path, default=RUNTIME_ENV, metavar="FILE", help="as `ray job submit` takes it"
    )
    made.add_argument(
        "--resources", default="", metavar="JSON", help="that the driver asks for, as '{\"driver\": 0.01}'"
    )
    made.add_argument("--no-follow", action="store_true", help="end as soon as the job is submitted; no retries")
    made.add_argument("--follow", default="", metavar="ID", help="show a job that was submitted before; no retries")
    made.add_argument("--insecure", action="store_true", help="also to a cluster that asks nobody for a token")
    return made


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ArgumentTypeError(f"it is '{text}'; a whole number is needed")
    return int(text)


if __name__ == "__main__":
    edge.run(main)
