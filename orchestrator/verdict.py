"""What the nets of a study show, computed from their results: pure arithmetic, thresholds named."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.figures import spread

# Tried beforehand: over 51 runs of 17 recipes the deeper plain net's final training loss was above the shallower one's
# by at least 0.187 nat, and the deeper residual net's by at most 0.028.
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
    weights_sha256: str | None
    data_digest: str | None
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

    Degradation: the deepest plain net's final training loss is above the shallowest one's by more than
    DEGRADATION_NATS, and the deepest residual net's is not. Faster: of the least depth that both kinds have, the
    residual net's training loss, averaged over all steps, is below the plain net's.
    """
    seeds: dict[int, list[Row]] = {}
    for row in rows:
        seeds.setdefault(row.seed, []).append(row)
    plain = [_gap([row for row in same if row.plain]) for same in seeds.values()]
    residual = [_gap([row for row in same if not row.plain]) for same in seeds.values()]
    degraded, first = _degradation(plain, residual)
    faster, second = _convergence([_lead(same) for same in seeds.values()])
    return Verdict(degraded, faster, f"{first}\n{second}")


def _gap(rows: list[Row]) -> float | None:
    """Final training loss of the deepest net minus the shallowest one's; None where there is only one."""
    rows = sorted(rows, key=lambda row: row.depth)
    return rows[-1].train_loss - rows[0].train_loss if len(rows) > 1 else None


def _lead(rows: list[Row]) -> float | None:
    """By how much the residual net's mean training loss is below the plain net's of the same, least depth."""
    plain = {row.depth: row.train_loss_mean for row in rows if row.plain}
    residual = {row.depth: row.train_loss_mean for row in rows if not row.plain}
    common = sorted(plain.keys() & residual.keys())
    return plain[common[0]] - residual[common[0]] if common else None


def _degradation(plain: list[float | None], residual: list[float | None]) -> tuple[bool | None, str]:
    deeper, twins = [gap for gap in plain if gap is not None], [gap for gap in residual if gap is not None]
    if not plain or len(deeper) < len(plain) or len(twins) < len(residual):
        return None, "Degradation: not judged; two depths of plain and two of residual nets are needed."
    shows = all(gap > DEGRADATION_NATS for gap in deeper) and not any(gap > DEGRADATION_NATS for gap in twins)
    return shows, (f"Degradation: {_yes(shows)}. Final training loss, deepest minus shallowest net: plain "
                   f"{spread(deeper, '{:+.3f}')} nat,\n  residual {spread(twins, '{:+.3f}')}; more than "
                   f"{DEGRADATION_NATS} counts, in every seed.")  # fmt: skip


def _convergence(leads: list[float | None]) -> tuple[bool | None, str]:
    found = [lead for lead in leads if lead is not None]
    if not leads or len(found) < len(leads):
        return None, "Faster convergence: not judged; a plain and a residual net of one depth are needed."
    shows = all(lead > 0 for lead in found)
    return shows, (f"Residual net converges faster: {_yes(shows)}. Training loss over all steps, plain minus residual "
                   f"net of one\n  depth: {spread(found, '{:+.3f}')} nat; above 0 counts, in every seed.")  # fmt: skip


def _yes(value: bool) -> str:
    return "yes" if value else "no"
