"""Runs in turn in one driver, with one Crews and without, and what became of them: one JSON object for test_crews.

python -m tests.in_turn HOME STORAGE BROKEN     HOME has the digits packed, BROKEN is a dataset with a bad image

What Ray reads from the environment has to be there.
"""

import hashlib
import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import ray
import torch
from ray.util import placement_group_table
from ray.util.state import list_actors

from orchestrator import settings, supervise
from orchestrator.cluster import session
from orchestrator.cluster.crews import END_S, Crews
from orchestrator.stop import Stop
from pipelines.errors import DataError

HOME, STORAGE, BROKEN = map(Path, sys.argv[1:])
KEPT = ("status", "weights_sha256", "data_digest", "eval_digest", "train_loss", "top1", "restarts", "world_size")
A = ("--model.depth", "18", "--train.deterministic", "false", "--train.reduce", "exact", "--data.lanes", "8")
B = ("--model.depth", "34", "--model.shortcut", "none", "--train.global_batch", "32", "--train.reduce", "fast")
LIMIT_S = 60.0


class Noted(Crews):
    """Remembers its groups: for each run which one it took, and how often that one had been given work."""

    def __init__(self):
        super().__init__()
        self.groups, self.taken = [], []

    def take(self, *what):
        group = super().take(*what)
        if group not in self.groups:
            self.groups.append(group)
        self.taken.append((self.groups.index(group), group.works))
        return group


def run(name, workers, *flags, crews=None, at_epoch=None, stop=None):
    """A short run; at_epoch is called when its first epoch is done. What it came to, and what it said."""
    said = []

    def say(text):
        said.append(text)
        if at_epoch and text.startswith("epoch 1/") and " done" in text:
            at_epoch()

    line = ["--recipe", "digits-quick", "--name", name, "--cluster.storage", str(STORAGE), "--tracking.uri", "off"]
    small = ["--model.width", "4", "--train.epochs", "2", "--cluster.workers", str(workers), *flags]
    config = settings.load(line + small, settings.parser("", ""), settings.Edge(HOME))[1]
    try:
        done = supervise.run(config, say=say, crews=crews, stop=stop)
        return {name: getattr(done, name) for name in KEPT} | {"said": said}
    except DataError as error:
        return {"error": str(error), "said": said}


def workers_here():
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in title(p)]


def title(process):
    """ "" of one that has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill_one():
    workers_here()[-1].kill()


def leftovers(_, context):
    """What rank 0's process keeps, when nothing runs."""
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": [file.path for file in psutil.Process().open_files() if file.path.endswith((".tar", ".index"))],
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "torch_threads": torch.get_num_threads(),
    }


def look_into(crews):
    """The idle group's leftovers; it is idle again afterwards."""
    group = crews.take(crews.groups[-1].size, leftovers, None, "look")
    until(lambda: group.hear() is not None and group.done)
    crews.give_back(group)
    return group.outcome()


def until(true):
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def left():
    """What is there of groups, once Ray has noticed their end."""
    limit = time.monotonic() + END_S
    while any(there().values()) and time.monotonic() < limit:
        time.sleep(0.2)
    return there()


def there():
    """What Ray and the process table have of groups now."""
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "!=", "DEAD")])
    actors = [a.class_name for a in alive if "Coordinator" not in a.class_name]  # Ray's own, of all its groups
    return {"groups": len(groups), "actors": actors, "workers": len(workers_here())}


def main():
    told = {}
    with session.session(2):
        told["alone 2"] = run("alone-2", 2, *B)
        told["left alone"] = left()
        told["alone 1"] = run("alone-1", 1, *B)
        with Noted() as crews:
            told["a 2"] = run("a-2", 2, *A, crews=crews)
            told["before"] = look_into(crews)
            told["idle"] = there()
            stop = Stop()
            flags = ("--train.epochs", "90", "--train.memory_seconds", "0.01")
            told["stopped"] = run("s-2", 2, *A, *flags, crews=crews, stop=stop, at_epoch=lambda: stop.ask("the test"))
            told["b 2"] = run("b-2", 2, *B, crews=crews)
            told["after"] = look_into(crews)
            told["hurt"] = run("hurt-2", 2, *B, crews=crews, at_epoch=kill_one)
            kill_one()
            flags = ("--data.root", str(BROKEN), "--data.max_bad", "0")
            told["broken"] = run("broken-2", 2, *flags, crews=crews)
            told["a 1"] = run("a-1", 1, *A, crews=crews)
            told["b 1"] = run("b-1", 1, *B, crews=crews)
            until(lambda: sum(node["CPU"] for node in session.free().values()) == 2)
            told["expired"] = len(workers_here())
            told["taken"] = crews.taken
        told["left"] = left()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
