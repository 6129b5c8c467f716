"""What a one-machine cluster's metrics ports say of a run, while it trains and afterwards."""

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

from orchestrator.cluster import local
from orchestrator.meters import RUN, WORKER
from tests.test_infra_observability import NODE

OFTEN = ("RAY_metrics_report_interval_ms", "1000")  # of the cluster: Ray passes on what was counted; 10 s otherwise
LIMIT_S = 60.0
GAUGES = {meter.shown_name for meter in RUN}
COUNTERS = {meter.shown_name for meter in WORKER if not meter.name.startswith(("cache_", "fetch"))}  # of files
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def pages(home: Path) -> str:
    """All that answer, one after the other, as a Prometheus on this machine reads them."""
    found = Path(local.load(home).ray_temp, "ray", "prom_metrics_service_discovery.json")
    read, opener = "", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for target in [target for group in json.loads(found.read_text()) for target in group["targets"]]:
        with suppress(URLError):  # the autoscaler and the dashboard have fixed ports, which another Ray may have now
            read += opener.open(f"http://{target}/metrics", timeout=10).read().decode()
    return read


def names(text: str) -> set[str]:
    """Of all metrics that have a value."""
    return {found[1] for line in text.splitlines() if (found := SAMPLE.match(line))}


def of_run(text: str, run: str) -> dict[str, float]:
    """Metric -> its value for a run, summed over ranks and processes."""
    sums: Counter[str] = Counter()
    for line in text.splitlines():
        if (found := SAMPLE.match(line)) and ("run", run) in LABEL.findall(found[2]):
            sums[found[1]] += float(found[3])
    return dict(sums)


def check_alive(home: Path, run: str, workers: int) -> None:
    """A run that trains shows all its gauges, its node all that the dashboard asks for."""
    text = _wait_for(home, lambda text: {*of_run(text, run)} >= GAUGES | COUNTERS)
    found = of_run(text, run)
    _wait_for(home, lambda text: names(text) >= NODE)  # set every few seconds, and gone two after that with OFTEN
    assert (found["ray_skiplane_workers"], found["ray_skiplane_restarts"]) == (workers, 0)
    assert found["ray_skiplane_steps_done"] <= found["ray_skiplane_steps_planned"]
    for name in ("goodput_ratio", "training_top1_ratio", "validation_top1_ratio"):
        assert 0 < found[f"ray_skiplane_{name}"] <= 1, name


def check_over(home: Path, run: str, workers: int, steps: int, images: int) -> None:
    """Of one that ended in its own time nothing looks alive, and all that it did was counted."""
    found = of_run(_wait_for(home, lambda text: not {*of_run(text, run)} & GAUGES), run)
    assert found.keys() == COUNTERS
    assert found["ray_skiplane_images_total"] == images
    assert found["ray_skiplane_steps_total"] == workers * steps
    assert found["ray_skiplane_bad_images_total"] < 1e-200  # see metering.NONE
    for name in ("step", "data_wait", "evaluation", "checkpoint"):
        assert found[f"ray_skiplane_{name}_seconds_total"] > 1e-6, name


def _wait_for(home: Path, is_so: Callable[[str], bool]) -> str:
    """The pages, once they are so."""
    limit = time.monotonic() + LIMIT_S
    while not is_so(text := pages(home)):
        assert time.monotonic() < limit, [name for name in names(text) if name.startswith(("ray_skiplane", "ray_node"))]
        time.sleep(0.2)
    return text
