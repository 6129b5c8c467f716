"""The door to MLflow. Importing it imports no vendor; `open_tracker` does."""

from orchestrator.tracking.address import answers
from orchestrator.tracking.records import DatasetRef, Metric, NullTracker, Tracker
from orchestrator.tracking.runs import open_tracker

__all__ = ["DatasetRef", "Metric", "NullTracker", "Tracker", "answers", "open_tracker"]
