"""Learning rates as pure functions: step -> lr, steps counted from 0.

Each maker takes numbers and returns a function; nothing is kept between calls, so that resuming needs no state. A step
outside 0 <= step < total is a ValueError. The tables are run as tests.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

Schedule = Callable[[int], float]


def constant(lr: float, total: int) -> Schedule:
    """lr(s) = lr

    >>> table(constant(0.1, 4), 0, 3)
    '0: 0.1000  3: 0.1000'
    """

    def at(step: int) -> float:
        _check(step, total)
        return lr

    return at


def step(lr: float, total: int, milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """lr(s) = lr * gamma ** (number of milestones m <= s)

    The paper divides by 10 at plateaus; torchvision every 30 of 90 epochs; Goyal et al. at epochs 30, 60 and 80.

    >>> table(step(0.1, 90, [30, 60]), 0, 29, 30, 59, 60, 89)
    '0: 0.1000  29: 0.1000  30: 0.0100  59: 0.0100  60: 0.0010  89: 0.0010'
    """
    marks = tuple(milestones)
    if any(a >= b for a, b in pairwise(marks)):
        raise ValueError(f"milestones are {list(marks)}; they must rise")

    def at(step: int) -> float:
        _check(step, total)
        return lr * gamma ** sum(mark <= step for mark in marks)

    return at


def cosine(lr: float, total: int, final: float = 0.0) -> Schedule:
    """lr(s) = final + (lr - final) * (1 + cos(pi * s / total)) / 2    (Loshchilov and Hutter 2017, one period)

    >>> table(cosine(1.0, 8), 0, 2, 4, 6, 7)
    '0: 1.0000  2: 0.8536  4: 0.5000  6: 0.1464  7: 0.0381'
    """

    def at(step: int) -> float:
        _check(step, total)
        return _cosine(lr, final, step / total)

    return at


def linear(lr: float, total: int, final: float = 0.0) -> Schedule:
    """lr(s) = lr + (final - lr) * s / total

    >>> table(linear(1.0, 8), 0, 2, 4, 7)
    '0: 1.0000  2: 0.7500  4: 0.5000  7: 0.1250'
    """

    def at(step: int) -> float:
        _check(step, total)
        return lr + (final - lr) * step / total

    return at


def one_cycle(peak: float, total: int, up: float = 0.3, div: float = 25.0, final_div: float = 1e4) -> Schedule:
    """From peak / div up to peak at s = up * total - 1, then down to peak / div / final_div at s = total - 1.

    Both ways follow half a cosine (Smith and Topin 2019, as torch's OneCycleLR computes it).

    >>> table(one_cycle(0.1, 10), 0, 1, 2, 3, 6, 9)
    '0: 0.0040  1: 0.0520  2: 0.1000  3: 0.0950  6: 0.0389  9: 0.0000'
    """
    start, end = peak / div, peak / div / final_div
    top, last = up * total - 1, total - 1

    def at(step: int) -> float:
        _check(step, total)
        if step <= top:
            return _cosine(start, peak, step / top if top else 1.0)
        return _cosine(peak, end, (step - top) / (last - top))

    return at


def warmup(after: Schedule, steps: int, first: float = 0.0) -> Schedule:
    """lr(s) = first + (after(0) - first) * s / steps for s < steps, then after(s - steps)

    `after` is made for the steps that are left; milestones in it count from the warm-up's end (see `build`).

    >>> table(warmup(linear(1.0, 4), 4, first=0.2), 0, 1, 3, 4, 5, 7)
    '0: 0.2000  1: 0.4000  3: 0.8000  4: 1.0000  5: 0.7500  7: 0.2500'
    """

    def at(step: int) -> float:
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        return first + (after(0) - first) * step / steps if step < steps else after(step - steps)

    return at


def build(
    kind: str,
    lr: float,
    total: int,
    *,
    warmup_steps: int = 0,
    warmup_from: float = 0.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    final: float = 0.0,
) -> Schedule:
    """The schedule `kind` (constant, step, cosine, linear, one_cycle) over `total` steps, warm-up included.

    `milestones` count from step 0 of the run, also where a warm-up comes first (Goyal et al. do so). Cosine and linear
    spread over the steps after the warm-up. ValueError names what does not fit.

    >>> table(build("step", 0.8, 10, warmup_steps=2, warmup_from=0.1, milestones=[5, 8]), 0, 1, 2, 4, 5, 8)
    '0: 0.1000  1: 0.4500  2: 0.8000  4: 0.8000  5: 0.0800  8: 0.0080'
    """
    if not 0 <= warmup_steps < total:
        raise ValueError(f"warm-up lasts {warmup_steps} of {total} steps; it must be at least 0 and leave one step")
    if kind == "one_cycle" and warmup_steps:
        raise ValueError("one_cycle warms up by itself: set the warm-up to 0")
    if milestones and milestones[0] < warmup_steps:
        raise ValueError(f"the first milestone, step {milestones[0]}, lies inside the warm-up of {warmup_steps} steps")
    rest = total - warmup_steps
    makers: dict[str, Callable[[], Schedule]] = {
        "constant": lambda: constant(lr, rest),
        "step": lambda: step(lr, rest, [mark - warmup_steps for mark in milestones], gamma),
        "cosine": lambda: cosine(lr, rest, final),
        "linear": lambda: linear(lr, rest, final),
        "one_cycle": lambda: one_cycle(lr, rest),
    }
    if kind not in makers:
        raise ValueError(f"schedule is {kind!r}; allowed: {', '.join(makers)}")
    return warmup(makers[kind](), warmup_steps, warmup_from) if warmup_steps else makers[kind]()


def table(schedule: Schedule, *steps: int) -> str:
    """A schedule's values as one line, for people."""
    return "  ".join(f"{s}: {schedule(s):.4f}" for s in steps)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _check(step: int, total: int) -> None:
    if not 0 <= step < total:
        raise ValueError(f"step is {step}; the schedule has steps 0 to {total - 1}")
