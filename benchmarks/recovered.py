"""What the lines of a run say of its recovery: pure arithmetic on events."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.watched import Event

ASKED = re.compile(r"[\w.-]+: \d+ workers, ")
# What the time goes into, in its order; each ends with a line of the log.
Stretch = {
    "until noticed": "restart 1: ...",
    "until a group is asked for": "NAME: 2 workers, ...",
    "until it is restored": "resumed ..., or resize ...",
    "until the first step": "a step that may be repeated",
    "until a new step": "the first that is not",
}


@dataclass(frozen=True)
class Recovered:
    """What a fault cost. Seconds and steps."""

    stall_s: float  # from the fault to the first new step
    repeated: int
    stretches: dict[str, float] = field(default_factory=dict)  # of those that the run tells


def recovered(before: Event, began: float, heard: Sequence[Event]) -> Recovered | None:
    """None while the run has not gone on: begun anew, and beyond where it was.

    before: the newest step when the fault came, at `began`; heard: all since. Steps that were done before the fault
    may be heard after it: those before the run begins anew count as done.
    """
    anew = next((event for event in heard if event.kind == "anew"), None)
    if anew is None:
        return None
    reached = max([before.step, *(e.step for e in heard if e.kind == "step" and e.at <= anew.at)])
    steps = [event for event in heard if event.kind == "step" and event.at > anew.at]
    fresh = next((event for event in steps if event.step > reached), None)
    if fresh is None:
        return None
    moments = [
        next((e.at for e in heard if e.kind == "notice"), None),
        next((e.at for e in heard if ASKED.match(e.text)), None),
        anew.at,
        steps[0].at,
        fresh.at,
    ]
    stretches, last = {}, began
    for name, at in zip(Stretch, moments, strict=True):
        if at is not None:
            stretches[name], last = at - last, at
    return Recovered(fresh.at - began, reached - steps[0].step + 1, stretches)


def useful(events: Sequence[Event], began: float, step_s: float) -> dict[str, float]:
    """Shares of the time since `began`. training: in which new steps came, one after the other, none later than ten
    times the usual; full_speed: new steps done, times what one takes undisturbed (step_s), to the time."""
    reached, new = 0, []
    for event in events:
        if event.kind == "step" and event.step > reached:
            reached = event.step
            new.append(event.at)
    new = [at for at in new if at >= began]
    total = new[-1] - new[0]
    training = sum(gap for gap in (b - a for a, b in pairwise(new)) if gap < 10 * step_s)
    return {"training": training / total, "full_speed": (len(new) - 1) * step_s / total, "seconds": total}
