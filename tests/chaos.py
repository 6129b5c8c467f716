"""Faults at random steps of one run on real hosts; in the end its weights are those of a run that nobody disturbed.

    python -m tests.chaos --faults 20 --seed 1      (or: make chaos N=20 SEED=1)

The run is `python -m jobs.train` on three hosts of this machine (see hosts.py): a head without workers, where the
driver runs, and two with room for one worker each. `train.reduce = exact`, so the weights are the same at any number
of workers; the undisturbed run has one worker, and no hosts.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines.pack import pack
from pipelines.sources.digits import digits
from tests.hosts import ROOT, Hosts, supported
from tests.ordeal import KINDS, Failed, Fault, Ordeal, Suffered

GAP = (15, 40)  # new steps between a fault's end and the next fault
STEPS_PER_EPOCH = 22  # of digits-quick
AWAY = ("node", "cut")  # take a host away
SLACK, BACK = 25, 300  # steps that pass besides: in each fault, and while a host comes back
NAME = "chaos"
EQUAL = {  # fields of result.json that have to be, and what they stand for
    "weights_sha256": "weights", "data_digest": "data", "eval_digest": "evaluation", "top1": "top-1",
    "train_loss": "training loss", "steps": "steps",
}  # fmt: skip


def draw(count: int, kinds: Sequence[str], rng: random.Random) -> list[Fault]:
    """Each kind as often as the others, or once more, in any order; hosts come back while something else fails."""
    drawn = list(kinds) * (count // len(kinds)) + rng.sample(list(kinds), count % len(kinds))
    rng.shuffle(drawn)
    return [Fault(kind, rng.randint(*GAP)) for kind in spread(drawn, rng)]


def spread(kinds: Sequence[str], rng: random.Random) -> list[str]:
    """The same kinds; of those that take a host away no two in a row, where there are enough of the others."""
    away, others = ([k for k in kinds if (k in AWAY) == taken] for taken in (True, False))
    slots = sorted(rng.sample(range(len(others) + 1), min(len(away), len(others) + 1)), reverse=True)
    for slot in slots:
        others.insert(slot, away.pop())
    return others + away


def epochs_for(faults: Sequence[Fault]) -> int:
    """Enough for all of them to come before the run ends."""
    away = [fault.kind in AWAY for fault in faults]
    in_a_row = sum(a and b for a, b in pairwise(away))
    steps = sum(fault.gap for fault in faults) + SLACK * len(faults) + BACK * (sum(away) + in_a_row)
    return steps // STEPS_PER_EPOCH + 2


def command(data: Path, runs: Path, epochs: int, workers: str) -> list[str]:
    """Of both runs; every step is a line."""
    settings = {
        "recipe": "digits-quick", "name": NAME, "data.root": data, "cluster.storage": runs, "train.epochs": epochs,
        "cluster.workers": workers, "train.reduce": "exact", "train.checkpoint_steps": 15, "train.memory_seconds": 1,
        "cluster.grow_seconds": 3, "tracking.uri": "off", "tracking.log_steps": 1, "tracking.progress_seconds": 1e-6,
    }  # fmt: skip
    return ["-m", "jobs.train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def differences(undisturbed: Mapping[str, Any], disturbed: Mapping[str, Any]) -> list[str]:
    """What is not equal, and should be."""
    return [
        f"{what}: {undisturbed[field]} undisturbed, {disturbed[field]} here"
        for field, what in EQUAL.items()
        if undisturbed[field] != disturbed[field]
    ]


def line_of(number: int, count: int, suffered: Suffered) -> str:
    """A fault, for a person."""
    effect = suffered.effect
    noticed = "nobody had to notice" if effect.noticed is None else f"noticed after {effect.noticed:.1f} s"
    return (
        f"fault {number}/{count} at step {suffered.step}: {suffered.what}; {noticed}, training again after "
        f"{effect.stall:.1f} s, {effect.repeated} steps repeated"
    )


def table(suffered: Sequence[Suffered]) -> str:
    """One line a kind: how often, and its stalls."""
    lines = [f"{'kind':<8}{'times':>6}{'shortest stall':>16}{'longest':>9}{'steps repeated':>16}"]
    for kind in KINDS:
        if effects := [s.effect for s in suffered if s.kind == kind]:
            stalls, repeated = [e.stall for e in effects], sum(e.repeated for e in effects)
            lines.append(f"{kind:<8}{len(effects):>6}{min(stalls):>14.1f} s{max(stalls):>7.1f} s{repeated:>16}")
    return "\n".join(lines)


def summary(suffered: Sequence[Suffered], unequal: Sequence[str]) -> str:
    """The last line."""
    told = [
        f"{what} {'differ' if any(u.startswith(what) for u in unequal) else 'equal'}" for what in ("weights", "data")
    ]
    longest = max((s.effect.stall for s in suffered), default=0.0)
    repeated = sum(s.effect.repeated for s in suffered)
    return f"chaos: {len(suffered)} faults, {', '.join(told)}, longest stall {longest:.1f} s, {repeated} steps repeated"


# -- the two runs ------------------------------------------------------------------------------------------------------


def undisturbed(folder: Path, epochs: int) -> dict[str, Any]:
    """The result of a run in one process on this machine."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    words = command(folder / "digits", folder / "runs", epochs, "1")
    with (folder / "undisturbed.log").open("w") as log:
        environment = inherited | {"SKIPLANE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
    if ended.returncode:
        raise Failed(f"the undisturbed run ended with exit code {ended.returncode}, see {log.name}")
    return read_result(folder / "runs")


def disturbed(folder: Path, faults: Sequence[Fault], epochs: int, rng: random.Random, suffered: list[Suffered]):
    """The result of a run that suffers all faults, which are added to `suffered` as they come."""

    def hear(number: int, fault: Suffered) -> None:
        suffered.append(fault)
        say(line_of(number, len(faults), fault))

    with Hosts(cpus=(0, 1, 1), shared_mb=64) as hosts, (folder / "run.log").open("w") as log:
        shutil.copytree(folder / "digits", hosts.shared / "digits")
        hosts.wait(hosts.count)
        words = command(hosts.shared / "digits", hosts.shared / "runs", epochs, "1..2")
        Ordeal(hosts, words, rng, log).suffer(faults, hear)
        return read_result(hosts.shared / "runs")


def read_result(runs: Path) -> dict[str, Any]:
    """result.json of a run that is finished."""
    result = json.loads((runs / NAME / "result.json").read_text())
    if result["status"] != "finished":
        raise Failed(f"the run is {result['status']}, not finished: {result['reason']}")
    return result


def trial(folder: Path, faults: Sequence[Fault], epochs: int, rng: random.Random) -> tuple[list[Suffered], list[str]]:
    """(faults as they came, what differs in the end). Raises Failed."""
    pack(digits(), folder / "digits", seed=0, shard_samples=180, progress=lambda *_: None)
    say(f"undisturbed run: {epochs} epochs of {STEPS_PER_EPOCH} steps")
    wanted, suffered = undisturbed(folder, epochs), list[Suffered]()
    say(f"disturbed run: {len(faults)} faults; its words go to {folder}/run.log")
    return suffered, differences(wanted, disturbed(folder, faults, epochs, rng, suffered))


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 all equal, 1 not, or the run failed, 2 hosts cannot be made here, 130 Ctrl-C."""
    args = _arguments(argv)
    if reason := supported():
        say(reason)
        return 2
    rng = random.Random(args.seed)
    faults = draw(args.faults, args.faults_list, rng)
    epochs = args.epochs or epochs_for(faults)
    folder = Path(tempfile.mkdtemp(prefix="skiplane-chaos-"))
    good = False
    try:
        suffered, unequal = trial(folder, faults, epochs, rng)
        say("\n".join([table(suffered), *unequal, summary(suffered, unequal)]))
        if args.json:
            args.json.write_text(json.dumps({"faults": [asdict(s) for s in suffered], "unequal": unequal}, indent=1))
        good = not unequal
    except Failed as failed:
        tail = (folder / "run.log").read_text().splitlines()[-40:] if (folder / "run.log").exists() else []
        say("\n".join([*tail, f"chaos: failed: {failed}"]))
    except KeyboardInterrupt:
        say("stopped")
        return 128 + signal.SIGINT
    finally:
        if good and not args.keep:
            shutil.rmtree(folder)
        else:
            say(f"kept: {folder}")
    return 0 if good else 1


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the faults, their steps and their victims")
    parser.add_argument("--faults-list", type=_kinds, default=KINDS, help=f"kinds to draw from: {','.join(KINDS)}")
    parser.add_argument("--epochs", type=int, default=0, help="of the run; default: as the faults need")
    parser.add_argument("--keep", action="store_true", help="keep logs and digits of a trial that went well, too")
    parser.add_argument("--json", type=Path, help="write the faults to a file")
    return parser.parse_args(argv)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := set(kinds) - set(KINDS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    return kinds


say = partial(print, flush=True)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
