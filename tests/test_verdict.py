"""The verdict, on tables of small numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.verdict import DEGRADATION_NATS, Row, verdict


def row(name: str, train_loss: float, seed: int = 0, mean: float = 1.0) -> Row:
    kind, depth = name.rsplit("-", 1)
    return Row(name, seed, int(depth), "none" if kind == "plain" else "A", train_loss, val_error=5.0, epochs=6,
               seconds=10.0, parameters=1, multiply_adds=1, weights_sha256="w", data_digest="d", mlflow_run_id=None,
               train_loss_mean=mean, curve=[])  # fmt: skip


def four(plain18: float, plain34: float, resnet18: float, resnet34: float, seed: int = 0) -> list[Row]:
    losses = {"plain-18": plain18, "plain-34": plain34, "resnet-18": resnet18, "resnet-34": resnet34}
    return [row(name, loss, seed) for name, loss in losses.items()]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (four(0.036, 0.69, 0.015, 0.016), True),  # PAPER.md, seed 0
        (four(0.0, 0.1, 0.0, 0.0), False),  # exactly the threshold does not count
        (four(0.0, 0.11, 0.0, 0.0), True),
        (four(0.0, 0.11, 0.0, 0.11), False),  # the residual net degrades, too
        (four(0.0, 0.11, 0.0, 0.1), True),
        (four(0.7, 0.04, 0.0, 0.0), False),  # deeper is better
        (four(0.0, 0.7, 0.0, 0.0) + four(0.0, 0.05, 0.0, 0.0, seed=1), False),  # every seed has to show it
        (four(0.0, 0.7, 0.0, 0.0) + four(0.0, 0.7, 0.0, 0.2, seed=1), False),
        (four(0.0, 0.7, 0.0, 0.0) + four(0.0, 0.2, 0.0, 0.0, seed=1), True),
        (four(0.0, 0.7, 0.0, 0.0)[:2], None),  # no residual nets
        (four(0.0, 0.7, 0.0, 0.0)[:3], None),  # one residual net
        ([], None),
    ],
)
def test_degradation(rows: list[Row], expected: bool | None) -> None:
    assert verdict(rows).degradation is expected


def test_the_deepest_is_held_against_the_shallowest() -> None:
    """Between them, plain-34 is better than plain-18 here: it does not matter."""
    losses = {"plain-18": 0.2, "plain-34": 0.1, "plain-50": 0.4, "resnet-18": 0.1, "resnet-50": 0.1}
    rows = [row(name, loss) for name, loss in losses.items()]
    assert verdict(rows).degradation is True
    assert verdict(rows[::-1]).degradation is True  # nor does the order


@pytest.mark.parametrize(
    ("plain", "residual", "expected"),
    [([1.0], [0.9], True), ([1.0], [1.0], False), ([1.0, 1.0], [0.9, 1.1], False), ([1.0, 1.0], [0.9, 0.8], True)],
)
def test_faster_convergence_in_every_seed(plain: list[float], residual: list[float], expected: bool) -> None:
    rows = [row("plain-18", 0.1, seed, mean) for seed, mean in enumerate(plain)]
    rows += [row("resnet-18", 0.1, seed, mean) for seed, mean in enumerate(residual)]
    assert verdict(rows).residual_converges_faster is expected


def test_faster_convergence_needs_a_common_depth() -> None:
    assert verdict([row("plain-18", 0.1), row("resnet-34", 0.1)]).residual_converges_faster is None
    # The least common depth decides: at 34 the residual net is faster, at 50 it is not.
    rows = [row("plain-18", 0.1), row("plain-34", 0.1, mean=1.0), row("plain-50", 0.1, mean=0.5)]
    rows += [row("resnet-34", 0.1, mean=0.9), row("resnet-50", 0.1, mean=0.9)]
    assert verdict(rows).residual_converges_faster is True


def test_words_carry_numbers_and_threshold() -> None:
    text = verdict(four(0.036, 0.69, 0.015, 0.016) + four(0.040, 0.58, 0.008, 0.018, seed=1)).text
    assert "Degradation: yes." in text
    assert "plain +0.597 (+0.540..+0.654) nat" in text
    assert f"more than {DEGRADATION_NATS} counts, in every seed" in text
    assert "Residual net converges faster: no." in text
    assert "not judged" in verdict([]).text


@given(losses=st.lists(st.tuples(*[st.floats(0, 3) for _ in range(4)]), min_size=1, max_size=4))
def test_true_only_if_true_of_each_seed_alone(losses: list[tuple[float, float, float, float]]) -> None:
    seeds = [four(*values, seed=seed) for seed, values in enumerate(losses)]
    together = verdict([row for rows in seeds for row in rows]).degradation
    assert together is all(verdict(rows).degradation for rows in seeds)
