"""The door to MLflow. Importing it imports no vendor; `open_tracker` does."""

from orchestrator.tracking.address import answers
from orchestrator.tracking.records import DatasetRef, Metric, NullTracker, Tracker
from orchestrator.tracking.runs import child_runs, end_run, new_run, open_tracker
from orchestrator.tracking.views import View, study_view, sweep_view

__all__ = [
    "DatasetRef",
    "Metric",
    "NullTracker",
    "Tracker",
    "View",
    "answers",
    "child_runs",
    "end_run",
    "new_run",
    "open_tracker",
    "study_view",
    "sweep_view",
]
