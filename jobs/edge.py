"""The edge of every command: argv in, exit code out, one line on stderr for what went wrong."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from pipelines.errors import SkiplaneError


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command; a SkiplaneError becomes `error: ...` and its exit code, Ctrl-C exits 130, SIGTERM 143.

    SIGTERM unwinds as Ctrl-C does, so that what is half-written is cleared away. A run takes both signals over while
    it trains, to leave a checkpoint.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(sys.argv[1:])
    except SkiplaneError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr, flush=True)
        code = 128 + (signal.SIGTERM if stop.args == (signal.SIGTERM,) else signal.SIGINT)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python complains when it flushes at the end
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _terminate(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number))


def say(text: str) -> None:
    """A line for people, at once: `ray job logs` shows it while the job runs."""
    print(text, flush=True)
