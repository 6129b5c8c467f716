"""The one-machine cluster: `python -m jobs.local up | status | down`."""

import argparse
import datetime

from rich.console import Console
from rich.table import Table

from jobs import edge
from orchestrator.cluster import local
from orchestrator.settings import Edge
from pipelines.errors import ConfigError


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, or all is up; 1 `status` where something is down; 2 setting; 4 port taken, no answer."""
    args = _parser().parse_args(argv)
    home = Edge.of_environment().home.resolve()
    if args.command == "up":
        if args.host != local.HOST:
            raise ConfigError(f"--host is {args.host}; a local cluster listens on {local.HOST} alone, because MLflow "
                              f"asks nobody for a password; reach it from elsewhere by ssh -L, or see infra/mlflow for "
                              f"a server with passwords")  # fmt: skip
        asked = {name: port for name in local.DEFAULT_PORTS if (port := getattr(args, f"{name}_port"))}
        local.up(home, asked, edge.say)
    elif args.command == "down":
        local.down(home, edge.say)
    else:
        return status(local.load(home))
    return 0


def status(cluster: local.Cluster) -> int:
    """Prints a table of what runs; 0 where all of it does."""
    table = Table(box=None)
    for title in ("service", "state", "since", "address", "process", "log"):
        table.add_column(title, overflow="fold")
    for name, title in local.NAMES.items():
        up, started = cluster.running(name), cluster.services.get(name)
        if up and started:
            since = datetime.datetime.fromtimestamp(started.created).strftime("%Y-%m-%d %H:%M:%S")
            table.add_row(title, "up", since, cluster.url(name), str(started.pid), started.log)
        else:
            table.add_row(title, "ended" if started else "down", "", "", "", started.log if started else "")
    Console(width=None if Console().is_terminal else 160).print(table)
    return 0 if all(cluster.running(name) for name in local.NAMES) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.local", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a Ray head and an MLflow server on this machine", allow_abbrev=False)
    up.add_argument("--host", default=local.HOST, help=f"only {local.HOST} is accepted")
    for name, port in local.DEFAULT_PORTS.items():
        up.add_argument(f"--{name}-port", type=_port, metavar="PORT", help=f"default {port}")
    commands.add_parser("status", help="what runs, since when, where; exit 1 where something is down")
    commands.add_parser("down", help="end what `up` started, and nothing else")
    return parser


def _port(text: str) -> int:
    if not (text.isdigit() and 1024 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"'{text}' is no port; a number from 1024 to 65535 is needed")
    return int(text)


if __name__ == "__main__":
    edge.run(main)
