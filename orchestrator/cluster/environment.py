"""What Ray reads from the environment, some of it while it is imported: `prepare` comes before the first `import ray`.

The settings of a driver are here, those of `ray start` in services.py. Each was measured: Ray 2.60 polls its workers
every 2 s and prints every line of theirs twice unless told otherwise.
"""

import os
import sys
from pathlib import Path

from orchestrator.cluster.services import HEALTH_CHECKS, ONE_MACHINE, token_file

DRIVER = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is seen this soon, and an end too
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less a group
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where their modules are
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **HEALTH_CHECKS,
    "RAY_worker_niceness": "0",  # of a cluster inside this process: by default its workers run at niceness 15
}


def prepare(home: Path) -> None:
    """Sets what is not set. Without a cluster to join, the one that is started inside this process listens on this
    machine alone, and Ray's token is on, in our own file of mode 0600."""
    if "ray" in sys.modules:
        raise RuntimeError("prepare(home) comes before the first import of ray")
    for_driver()
    if os.environ.get("RAY_ADDRESS"):
        return
    os.environ.update(ONE_MACHINE)
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file(home))
        os.environ["RAY_AUTH_MODE"] = "token"


def for_driver() -> None:
    """What a process that starts groups needs, where `prepare` was not its first word: a trial's, for one."""
    for name, value in DRIVER.items():
        os.environ.setdefault(name, value)
