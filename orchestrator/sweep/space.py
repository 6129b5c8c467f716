"""What a sweep tries: dimensions, and the points that they span. Pure arithmetic.

A point is {dotted name: value}. The points of a grid are in a fixed order; drawn ones follow from the seed and their
number alone, so that a driver that starts again draws what it drew before.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.errors import ConfigError

Value = bool | int | float | str
Point = dict[str, Any]
DIGITS = 4  # significant ones of a drawn float: its text in names and commands is the value itself
SHUFFLED = 2**16  # points of the largest grid that is shuffled as a whole
ATTEMPTS = 1000  # to draw a point that was not drawn before
MUTABLE = ("optim.lr", "optim.weight_decay", "optim.momentum")  # what may change while a trial trains (pbt)
SHUFFLE, DRAW = 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class Values:
    """A list; each value is there once."""

    values: tuple[Value, ...]

    def __str__(self) -> str:
        return ",".join(map(text, self.values))

    @property
    def ends(self) -> tuple[Value, ...]:
        """What stands for the whole when it is checked: here every value."""
        return self.values

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.values)

    def draw(self, share: float) -> Value:
        """0 <= share < 1 -> a value, all alike."""
        return self.values[int(share * len(self.values))]


@dataclass(frozen=True)
class Range:
    """From low to high, both inside; log: alike in every octave (low > 0); whole: integers only."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return f"{text(self.low)}:{text(self.high)}{':log' if self.log else ''}"

    @property
    def ends(self) -> tuple[Value, ...]:
        """What stands for the whole when it is checked."""
        return (self.low, self.high)

    @property
    def size(self) -> float:
        """Integers in it; infinite for floats."""
        return int(self.high) - int(self.low) + 1 if self.whole else math.inf

    def draw(self, share: float) -> Value:
        """0 <= share < 1 -> a value; integers have the weight of the interval up to the next one."""
        if self.whole:
            return self.inside(math.floor(self._between(self.high + 1, share)))  # a logarithm is not exact at the ends
        return self.inside(self._between(self.high, share))

    def spread(self, count: int) -> Values:
        """`count` values, evenly spaced, ends included; integers are rounded, and may then be there twice."""
        inner = [self.inside(self._between(self.high, i / (count - 1))) for i in range(1, count - 1)]
        return Values((self.low, *inner, self.high))

    def inside(self, value: float) -> float:
        """The nearest value that may be drawn: whole, or of DIGITS digits, and not beyond the ends."""
        near = round(value) if self.whole else float(f"{value:.{DIGITS}g}")
        return min(max(near, self.low), self.high)

    def _between(self, high: float, share: float) -> float:
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(high) - math.log(self.low)))
        return self.low + share * (high - self.low)


@dataclass(frozen=True)
class By:
    """Another list or range for each value of another dimension."""

    other: str
    cases: tuple[tuple[Value, Values | Range], ...]

    def __str__(self) -> str:
        return f"by {self.other}: " + "; ".join(f"{text(value)} -> {case}" for value, case in self.cases)

    def case(self, value: Value) -> Values | Range:
        """What is tried where the other dimension has this value."""
        return next(case for known, case in self.cases if known == value)


Dimension = Values | Range | By


@dataclass(frozen=True)
class Space:
    """Dimensions by dotted name, in the order of declaration; conditional ones stand behind all others.

    Raises ConfigError where there is none, or where a condition does not fit the dimension that it looks at. A case
    for a value that the other dimension does not have is left out: a flag may have narrowed a file's list.
    """

    dimensions: Mapping[str, Dimension]

    def __post_init__(self) -> None:
        if not self.dimensions:
            raise ConfigError(
                "the sweep has no dimension; name a setting and its values, such as --sweep.depth 18,34, or a file "
                "with --sweep.space"
            )
        free = {name: d for name, d in self.dimensions.items() if not isinstance(d, By)}
        bound = {name: _met(name, d, free.get(d.other)) for name, d in self.dimensions.items() if isinstance(d, By)}
        object.__setattr__(self, "dimensions", free | bound)

    @property
    def listed(self) -> bool:
        """Whether it is all lists, so that it has a grid."""
        return not any(isinstance(one, Range) for name in self.dimensions for one in self.parts(name))

    def parts(self, name: str) -> tuple[Values | Range, ...]:
        """The list or range of a dimension; of a conditional one, each of them."""
        found = self.dimensions[name]
        return tuple(case for _, case in found.cases) if isinstance(found, By) else (found,)

    def at(self, name: str, point: Point) -> Values | Range:
        """The dimension's list or range, where the point has the dimensions before it."""
        found = self.dimensions[name]
        return found.case(point[found.other]) if isinstance(found, By) else found

    def lines(self) -> list[str]:
        """Each dimension in one line of text that says all of it: optim.lr 0.01:1.0:log."""
        return [f"{name} {dimension}" for name, dimension in self.dimensions.items()]


def text(value: Value) -> str:
    """As a flag takes it: true, 18, 0.1, none."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def grid(space: Space) -> list[Point]:
    """All points of a space of lists, the last dimension fastest."""
    return list(_walk(space, list(space.dimensions), {}))


def size(space: Space) -> int | None:
    """How many points there are; None where a range of floats makes them countless."""
    bound = [d for d in space.dimensions.values() if isinstance(d, By)]
    total: float = 1
    for name, found in space.dimensions.items():
        if isinstance(found, Values):
            total *= sum(math.prod(d.case(value).size for d in bound if d.other == name) for value in found.values)
        elif isinstance(found, Range):
            total *= found.size
    return None if math.isinf(total) else int(total)


def draws(space: Space, seed: int, count: int) -> list[Point]:
    """The first `count` points of a random search, each another one.

    A small grid is shuffled, so that all of it may be drawn. Elsewhere a point that was drawn before is drawn again,
    up to ATTEMPTS times; who asks for no more than `size` is all but sure never to see one twice.
    """
    if space.listed and (size(space) or 0) <= SHUFFLED:
        points = grid(space)
        order = np.random.Philox(key=[seed, SHUFFLE]).random_raw(len(points)).argsort(kind="stable")
        return [points[i] for i in order[:count]]
    found: dict[tuple[tuple[str, Any], ...], Point] = {}
    for number in range(count):
        attempts = (_draw(space, seed, number, attempt) for attempt in range(ATTEMPTS))
        point = next((p for p in attempts if tuple(p.items()) not in found), None)
        if point is None:
            break
        found[tuple(point.items())] = point
    return list(found.values())


def _draw(space: Space, seed: int, number: int, attempt: int) -> Point:
    """One number a dimension, in its order."""
    random = np.random.Philox(key=[seed, DRAW], counter=[0, number, attempt, 0])
    shares = (random.random_raw(len(space.dimensions)) >> np.uint64(11)) * 2.0**-53
    point: Point = {}
    for name, share in zip(space.dimensions, shares.tolist(), strict=True):
        point[name] = space.at(name, point).draw(share)
    return point


def _walk(space: Space, names: list[str], point: Point) -> Iterator[Point]:
    if not names:
        yield point
        return
    for value in space.at(names[0], point).ends:
        yield from _walk(space, names[1:], point | {names[0]: value})


def _met(name: str, bound: By, other: Dimension | None) -> By:
    """The condition with the cases that can be met."""
    if not isinstance(other, Values):
        raise ConfigError(
            f"sweep.{name} goes by {bound.other}, which is no list of values in this space; give one with "
            f"--sweep.{bound.other}, or name another dimension"
        )
    cases = dict(bound.cases)
    if missing := [text(value) for value in other.values if value not in cases]:
        raise ConfigError(
            f"sweep.{name} goes by {bound.other} and says nothing for {', '.join(missing)}; every value of "
            f"{bound.other} needs a case"
        )
    return By(bound.other, tuple((value, cases[value]) for value in other.values))
