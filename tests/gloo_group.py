"""Plain `torch.distributed` processes that train with the product's own worker: no Ray, real processes, real kills.

Run as a module it is one of them; imported, it starts and watches a group.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.config import RunConfig
from orchestrator.state.checkpoints import Checkpoints
from orchestrator.state.storage import Storage

ROOT = Path(__file__).parent.parent


@dataclass
class GlooGroup:
    """`world` processes that train `config` from its latest checkpoint."""

    config: RunConfig
    world: int
    run_id: str = ""  # of copies in memory; "" = none
    processes: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self):
        found = Checkpoints(Storage(self.config.folder()), keep=2, warn=print).latest()
        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
        for rank in range(self.world):
            job = {
                "config": self.config.model_dump(mode="json"),
                "rank": rank,
                "world": self.world,
                "resume": found.name if found else None,
                "run_id": self.run_id,
                "rendezvous": str(rendezvous),
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.gloo_group", json.dumps(job)],
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def records(self):
        """What rank 0 tells, as it tells it."""
        for line in self.processes[0].stdout:
            yield json.loads(line)

    def finish(self) -> list[dict]:
        """Every rank's summary. Fails the test where one died."""
        ends = [process.communicate(timeout=120) for process in self.processes]
        for process, (_, errors) in zip(self.processes, ends, strict=True):
            assert process.returncode == 0, errors[-3000:]
        return [json.loads(out.splitlines()[-1]) for out, _ in ends]

    def kill(self, rank: int) -> None:
        """SIGKILL to one; the others lose their peer and end too."""
        self.processes[rank].kill()
        for process in self.processes:
            process.wait(timeout=120)


def train(config: RunConfig, world: int) -> list[dict]:
    """Trains to the end, undisturbed."""
    with GlooGroup(config, world) as group:
        return group.finish()


def main(argument: str) -> None:
    """One process of a group."""
    import torch
    import torch.distributed as dist

    from orchestrator import worker
    from orchestrator.context import LocalContext

    job = json.loads(argument)
    torch.set_num_threads(1)
    if job["world"] > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{job['rendezvous']}", rank=job["rank"], world_size=job["world"]
        )
    hear = lambda records: [print(json.dumps(r), flush=True) for r in records]  # noqa: E731
    context = LocalContext(job["rank"], job["world"], hear=hear)
    config = RunConfig.model_validate(job["config"])
    summary = worker.train(worker.Job(config, job["resume"], run_id=job["run_id"]), context)
    print(json.dumps(summary), flush=True)
    if job["world"] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
