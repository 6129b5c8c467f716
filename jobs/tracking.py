"""What was tracked and the server: `python -m jobs.tracking sync | status | verify | model FOLDER`."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs import edge
from jobs.bar import Bar
from orchestrator.settings import Edge
from orchestrator.state.storage import Storage
from orchestrator.tracking import journals
from orchestrator.tracking.address import without_password
from orchestrator.tracking.failures import Unreachable
from orchestrator.tracking.journal import REFUSED
from orchestrator.tracking.server import Server
from orchestrator.tracking.sync import sync
from orchestrator.tracking.verify import Verdict, verify
from pipelines.errors import ClusterError, SkiplaneError
from pipelines.remote.url import is_url

COUNTS = ("records", "shipped", "waiting", "refused")
SHOWN = 10  # differences that are named


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, or all agrees; 1 `verify` where it does not; 2 setting; 3 damaged; 4 no answer, or a driver
    that lives."""
    args = _parser().parse_args(argv)
    act: Callable[[argparse.Namespace], int] = args.act
    return act(args)


def _sync(args: argparse.Namespace) -> int:
    """Sends each journal, parents first."""
    with Bar() as bar:

        def send(place: str, server: Callable[[str], Server]) -> None:
            uri = _uri(place, args.uri)
            show = partial(bar.show_records, place.rpartition("/")[2])
            done = sync(place, server(uri), edge.say, show, again=args.again, refused=args.refused)
            aside = f", but {done.refused:,} that it refused: see {place}/{REFUSED}; --refused tries them again"
            refused = aside if done.refused else ""
            edge.say(f"{place}: {done.records:,} records are at {without_password(uri)}{refused}")

        return _each(args.folder, send)


def _status(args: argparse.Namespace) -> int:
    """How far behind: no server is asked."""
    found = [journals.standing(Storage(place)) for place in journals.places(_folder(args.folder))]
    if args.json:
        edge.say(json.dumps([standing.to_dict() for standing in found], indent=1))
        return 0
    table = Table(box=None)
    for title in ("run", "records", "shipped", "waiting", "refused", "server", "MLflow run", "page"):
        table.add_column(title, overflow="fold", justify="right" if title in COUNTS else "left")
    for standing in found:
        counts = (f"{count:,}" for count in (standing.records, standing.shipped, standing.waiting, standing.refused))
        where = (standing.ack.uri, standing.ack.run_id) if standing.ack else ("none yet", "")
        table.add_row(standing.place, *counts, *where, standing.url)
    Console(width=None if Console().is_terminal else 300).print(table)
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Journal beside server, point by point."""
    verdicts = list[Verdict]()

    def compare(place: str, server: Callable[[str], Server]) -> None:
        storage = Storage(place)
        known = journals.standing(storage).ack
        try:
            verdicts.append(verify(storage, server(_uri(place, args.uri)) if known else None))
        except Unreachable as error:
            raise ClusterError(str(error)) from error

    code = _each(args.folder, compare)
    if args.json:
        edge.say(json.dumps([_plain(verdict) for verdict in verdicts], indent=1))
    else:
        _show(verdicts)
    return code or (0 if all(verdict.agree for verdict in verdicts) else 1)


def _model(args: argparse.Namespace) -> int:
    """A checkpoint becomes a model now, of a run that MLflow has."""
    from orchestrator.publish import publish  # torch takes seconds to import

    place = _folder(args.folder)
    uri = _uri(place, args.uri)
    made = publish(place, uri, checkpoint=args.checkpoint, register=args.register, alias=args.alias, warn=edge.say)
    edge.say("\n".join((made.what, made.uri, made.load, made.serve)))
    return 0


def _show(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        at, points = verdict.standing, f"{verdict.points:,} points"
        aside = f" ({at.refused:,} records were refused)" if at.refused else ""
        wait = f"; {at.waiting:,} records wait: python -m jobs.tracking sync {at.place}" if at.waiting else ""
        wait += f"; to send all of it again: python -m jobs.tracking sync {at.place} --again" if verdict.lost else ""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in verdict.counts.items())
        found = f"differ: {counts}" if verdict.differences else "agree"
        edge.say(f"{at.place}: {points}, journal and server {found}{aside}{wait}")
        for difference in verdict.differences[:SHOWN]:
            edge.say(f"  {difference}")
        if left := len(verdict.differences[SHOWN:]):
            edge.say(f"  and {left:,} more")


def _plain(verdict: Verdict) -> dict[str, object]:
    named = [vars(difference) for difference in verdict.differences]
    return {**verdict.standing.to_dict(), "points": verdict.points, **verdict.counts, "differences": named}


def _each(folder: str, act: Callable[[str, Callable[[str], Server]], None]) -> int:
    """Acts on each journal, parents first; returns the first error's exit code, or 0.

    One that is held, deleted or damaged does not hold up the others. After it the server is asked anew whether it is
    there: one that is not ends it all.
    """
    code, server = 0, cache(_server)
    for place in journals.places(_folder(folder)):
        try:
            act(place, server)
        except SkiplaneError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = code or error.exit_code
            server.cache_clear()
            if isinstance(error, _Away):
                break
    return code


class _Away(ClusterError):
    """The server does not answer."""


def _server(uri: str) -> Server:
    try:
        return Server(uri)
    except Unreachable as error:
        raise _Away(f"{error}; start it, or say with --uri where it is now") from error


def _uri(place: str, asked: str) -> str:
    return journals.address(place, asked, Edge.of_environment().tracking_uri)


def _folder(named: str) -> str:
    return named if is_url(named) else str(Path(named).expanduser().absolute())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.tracking", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    helps = {
        "sync": "send what the server does not have yet, such as what an offline cluster kept",
        "status": "how far each journal has been sent; asks no server",
        "verify": "compare journal and server point by point; exit 1 where they differ",
        "model": "make a run's best checkpoint, or another, a model of MLflow; prints how to load and serve it",
    }
    for name, act in {"sync": _sync, "status": _status, "verify": _verify, "model": _model}.items():
        command = commands.add_parser(name, help=helps[name], allow_abbrev=False)
        command.set_defaults(act=act)
        command.add_argument(
            "folder", metavar="FOLDER", help="of a run, or of a study or sweep with its runs; or a URL"
        )
        if name != "status":
            command.add_argument(
                "--uri", default="", help="of MLflow; default: where the run went, MLFLOW_TRACKING_URI"
            )
        if name == "model":
            command.add_argument("--checkpoint", default="", metavar="NAME", help="default: the best, else the newest")
            command.add_argument("--register", default="", metavar="NAME", help="also as a version of this model")
            command.add_argument("--alias", default="", metavar="NAME", help="of that version, such as champion")
        elif name == "sync":
            command.add_argument("--refused", action="store_true", help="also what the server did not take before")
            command.add_argument("--again", action="store_true", help="all of it, to a server that has lost it")
        else:
            command.add_argument("--json", action="store_true", help="for scripts")
    return parser


if __name__ == "__main__":
    edge.run(main)
