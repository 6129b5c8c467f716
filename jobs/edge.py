"""The edge of every command: argv in, exit code out, one line on stderr for what went wrong."""

import sys
from collections.abc import Callable
from typing import NoReturn

from pipelines.errors import SkiplaneError


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command; a SkiplaneError becomes `error: ...` and its exit code, Ctrl-C exits 130."""
    try:
        code = main(sys.argv[1:])
    except SkiplaneError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def say(text: str) -> None:
    """A line for people, at once: `ray job logs` shows it while the job runs."""
    print(text, flush=True)
