"""The door to MLflow. Importing it imports no vendor; `open_tracker` does."""

from orchestrator.tracking.records import DatasetRef, Metric, NullTracker, Tracker
from orchestrator.tracking.runs import open_tracker

__all__ = ["DatasetRef", "Metric", "NullTracker", "Tracker", "open_tracker"]
