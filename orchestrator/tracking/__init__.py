"""The door to MLflow. A driver imports no vendor here: MLflow lives in a process of its own, the shipper."""

from orchestrator.tracking.left import Others, add_last, left_line, run_id_of
from orchestrator.tracking.records import RUN_ID, DatasetRef, Metric, NullTracker, Shipped, Tracker
from orchestrator.tracking.tracker import Place, look_for_server, open_tracker
from orchestrator.tracking.views import View, study_view, sweep_view

__all__ = [
    "RUN_ID",
    "DatasetRef",
    "Metric",
    "NullTracker",
    "Others",
    "Place",
    "Shipped",
    "Tracker",
    "View",
    "add_last",
    "left_line",
    "look_for_server",
    "open_tracker",
    "run_id_of",
    "study_view",
    "sweep_view",
]
