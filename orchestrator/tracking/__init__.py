"""The door to MLflow. A driver imports no vendor here: MLflow lives in a process of its own, the shipper."""

from orchestrator.tracking.left import add_last, left_line, send_rest
from orchestrator.tracking.records import RUN_ID, DatasetRef, Metric, NullTracker, Shipped, Tracker
from orchestrator.tracking.tracker import Place, look_for_server, open_tracker
from orchestrator.tracking.views import View, study_view, sweep_view

__all__ = [
    "RUN_ID",
    "DatasetRef",
    "Metric",
    "NullTracker",
    "Place",
    "Shipped",
    "Tracker",
    "View",
    "add_last",
    "left_line",
    "look_for_server",
    "open_tracker",
    "send_rest",
    "study_view",
    "sweep_view",
]
