"""Which metrics, labels and functions an expression of PromQL names: enough to see a typo in any of them."""

import re

FUNCTIONS = {"rate", "sum", "max", "min", "changes", "min_over_time", "label_values"}
WORDS = {"by", "on", "and", "or", "unless"}
WORD = re.compile(r"[a-zA-Z_:][\w:]*")
LABELS = re.compile(r"\b(?:by|on) \(([^)]*)\)")


def names(expression: str) -> set[str]:
    """Every word that is no label, no function of Prometheus and no number with a unit: names of metrics."""
    bare = LABELS.sub(" ", re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression))
    bare = re.sub(r"(label_values\([^,]*), *\w+\)", r"\1)", bare)
    return set(WORD.findall(re.sub(r"\b[\d.]+\w*", " ", bare))) - FUNCTIONS - WORDS


def labels(expression: str) -> set[str]:
    """Labels that it selects or groups by."""
    selected = [label for one in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)\s*!?=", one)]
    grouped = [label for one in LABELS.findall(expression) for label in WORD.findall(one)]
    return {*selected, *grouped, *re.findall(r"label_values\([^,]*, *(\w+)\)", expression)}
