"""Trials of a sweep as they stand after a while, for tests of what is made of them."""

from typing import Any

from orchestrator.sweep.trial import Report, Trial

# net -> multiply-adds of one image, parameters: the digits recipe's, at 16 px
NETS = {"plain-18": (8_893_440, 690_266), "plain-34": (18_330_624, 1_326_746),
        "resnet-18": (8_893_440, 690_266), "resnet-34": (18_330_624, 1_326_746)}  # fmt: skip


def trial(number: int, net: str = "resnet-18", top1: float | None = None, **changes: Any) -> Trial:
    """A trial that has finished its six epochs at `top1` in 12 s; with None nothing was heard of it yet."""
    state = changes.pop("state", "waiting" if top1 is None else "finished")
    epoch = changes.pop("epoch", 6)
    seconds = changes.pop("seconds", 0.0 if top1 is None else 12.0)
    lr = changes.pop("lr", 0.1)
    config = {"model.depth": int(net.split("-")[1]), "model.shortcut": "none" if net < "q" else "A", "optim.lr": lr}
    reports = () if top1 is None else tuple(
        Report(number * 100 + e, e, 1437 * e, {"val/top1": top1 * e / epoch, "val/loss": 3.0 - top1 * e / epoch},
               seconds * e / epoch)
        for e in range(1, epoch + 1))  # fmt: skip
    known: dict[str, Any] = {"config": config, "title": f"{net} lr={lr:g}", "net": net, "epochs": 6, "state": state,
                             "multiply_adds": NETS[net][0], "parameters": NETS[net][1], "reports": reports,
                             "seconds": seconds}  # fmt: skip
    return Trial(f"t{number:03}", **known | changes)


def twelve() -> list[Trial]:
    """Depth 18 and 34, plain and residual, at three rates: two stopped, one failed."""
    scores = {"plain-18": (0.90, 0.95, 0.42), "plain-34": (0.61, 0.72, 0.11),
              "resnet-18": (0.93, 0.972, 0.96), "resnet-34": (0.94, 0.983, None)}  # fmt: skip
    trials = [trial(3 * row + column + 1, net, top1, lr=(0.01, 0.1, 1.0)[column])
              for row, (net, of_net) in enumerate(scores.items()) for column, top1 in enumerate(of_net)]  # fmt: skip
    stopped = {"state": "stopped", "seconds": 4.1, "reason": "rung of 2 epochs: 0.420 is below 0.500"}
    trials[2] = trial(3, "plain-18", 0.42, lr=1.0, epoch=2, **stopped)
    trials[5] = trial(6, "plain-34", 0.11, lr=1.0, epoch=2, **stopped)
    trials[11] = trial(12, "resnet-34", None, lr=1.0, state="failed", seconds=1.0, reason="loss is nan at step 21")
    return trials
