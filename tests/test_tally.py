"""The sums that continue: what a run says of itself does not begin anew with a new driver."""

from orchestrator.state.packed import Progress
from orchestrator.tally import Tally
from orchestrator.training.evaluate import EvalSums


def tally(curve):
    return Tally(Progress(step=22, epoch=1, digest=0, sums={}, total={}, curve=curve, bad=0, seconds=0.0))


def test_the_best_accuracy_survives_a_new_submission():
    resumed = tally([{"epoch": 1, "val_top1": 0.9}, {"epoch": 2}])
    resumed.close_epoch(2, EvalSums(top1=5, top5=10, count=10))
    assert resumed.best() == {"val_top1_best": 0.9}
    resumed.close_epoch(3, EvalSums(top1=10, top5=10, count=10))
    assert resumed.best() == {"val_top1_best": 1.0}


def test_without_an_evaluation_there_is_no_best():
    fresh = tally([])
    fresh.close_epoch(0, None)
    assert fresh.best() == {}
