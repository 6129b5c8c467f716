"""What the nets of a study show, computed from their results: pure arithmetic, thresholds named."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.figures import spread

# PAPER.md: over 51 runs of 17 recipes the deeper plain net's final training loss was above the shallower one's by at
# least 0.187 nat, and the deeper residual net's by at most 0.028.
DEGRADATION_NATS = 0.1


@dataclass(frozen=True)
class Row:
    """A trained net in result.json: losses in nats, the validation error in per cent, seconds of training."""

    name: str
    seed: int
    depth: int
    shortcut: str
    train_loss: float  # mean over the last epoch's steps
    val_error: float
    epochs: int
    seconds: float
    parameters: int
    multiply_adds: int
    weights_sha256: str
    data_digest: str
    mlflow_run_id: str | None
    train_loss_mean: float  # over all steps
    curve: list[dict[str, float]] = field(repr=False)

    @property
    def plain(self) -> bool:
        """Whether it has no shortcuts."""
        return self.shortcut == "none"


@dataclass(frozen=True)
class Verdict:
    """What the rows show; None where the nets to compare are not among them. `text`: why, with the numbers."""

    degradation: bool | None
    residual_converges_faster: bool | None
    text: str


def verdict(rows: Iterable[Row]) -> Verdict:
    """Whether the degradation shows, and whether the residual net converges faster: in every seed, or not.

    Degradation: the deepest plain net's final training loss is above the shallowest one's by more than DEGRADATION_NATS,
    and the deepest residual net's is not. Faster: of the shallowest depth that both kinds have, the residual net's
    training loss, averaged over all steps, is below the plain net's.
    """
    seeds: dict[int, list[Row]] = {}
    for row in rows:
        seeds.setdefault(row.seed, []).append(row)
    gaps = [(_gap(of, True), _gap(of, False)) for of in seeds.values()]
    leads = [_lead(of) for of in seeds.values()]
    degraded = None if any(p is None or r is None for p, r in gaps) else all(
        p > DEGRADATION_NATS and not r > DEGRADATION_NATS for p, r in gaps if p is not None and r is not None)  # fmt: skip
    faster = None if None in leads else all(lead > 0 for lead in leads if lead is not None)
    return Verdict(degraded, faster, _words(degraded, faster, gaps, leads))


def _gap(rows: list[Row], plain: bool) -> float | None:
    """Final training loss of the deepest net minus the shallowest one's; None where there is only one."""
    kind = sorted((row for row in rows if row.plain is plain), key=lambda row: row.depth)
    return kind[-1].train_loss - kind[0].train_loss if len(kind) > 1 else None


def _lead(rows: list[Row]) -> float | None:
    """By how much the residual net's mean training loss is below the plain net's of the same, least depth."""
    plain = {row.depth: row.train_loss_mean for row in rows if row.plain}
    residual = {row.depth: row.train_loss_mean for row in rows if not row.plain}
    common = sorted(plain.keys() & residual.keys())
    return plain[common[0]] - residual[common[0]] if common else None


def _words(degraded: bool | None, faster: bool | None, gaps: list[tuple[float | None, float | None]],
           leads: list[float | None]) -> str:  # fmt: skip
    if degraded is None:
        first = "Degradation: not judged; two depths of plain and of residual nets are needed."
    else:
        plain, residual = ([g for g in side if g is not None] for side in zip(*gaps, strict=True))
        first = (f"Degradation: {_yes(degraded)}. Final training loss, deepest minus shallowest net: plain "
                 f"{spread(plain, '{:+.3f}')}, residual {spread(residual, '{:+.3f}')} nat; "
                 f"more than {DEGRADATION_NATS} counts, in every seed.")  # fmt: skip
    if faster is None:
        return f"{first}\nFaster convergence: not judged; a plain and a residual net of one depth are needed."
    below = [lead for lead in leads if lead is not None]
    return (f"{first}\nResidual net converges faster: {_yes(faster)}. Training loss over all steps, plain minus residual "
            f"net of the same depth: {spread(below, '{:+.3f}')} nat; above 0 counts, in every seed.")  # fmt: skip


def _yes(value: bool) -> str:
    return "yes" if value else "no"
