"""Tables on a run's page, as MLflow's own `log_table` keeps them (seen in 3.17.2; a test reads one back with MLflow).

Not with `log_table` itself: it fetches the old table and appends, which takes four requests and doubles rows when a
delivery is repeated.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TAG = "mlflow.loggedArtifacts"  # which artifacts the page shows as tables


def content(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of the same keys, one at least, as the artifact's JSON."""
    columns = list(rows[0])
    return json.dumps({"columns": columns, "data": [[row[name] for name in columns] for row in rows]}).encode()


def tag(names: Iterable[str]) -> dict[str, str]:
    """The tag that lists all tables of a run."""
    return {TAG: json.dumps([{"path": name, "type": "table"} for name in names])}
