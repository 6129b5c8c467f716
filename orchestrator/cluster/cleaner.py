"""Ray's helper on the head that gives back what a group has reserved when its controller dies, made to end then.

In Ray 2.60 it calls exit_actor from a thread, which Ray refuses there: 200 MB stayed on the head for each group whose
driver was killed. All of this is private to Ray Train.
"""

import os
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import placement_group_callback as theirs
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner


class Trainer(TorchTrainer):
    """Ray Train's trainer with that helper."""

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [_Callback() if isinstance(c, theirs.PlacementGroupCleanerCallback) else c for c in found]


class _Cleaner(PlacementGroupCleaner):
    def _exit(self) -> None:
        os._exit(0)


class _Callback(theirs.PlacementGroupCleanerCallback):
    def after_controller_start(self, train_run_context: Any) -> None:
        """In the controller's process, which has no other use for that name."""
        theirs.PlacementGroupCleaner = _Cleaner
        super().after_controller_start(train_run_context)
