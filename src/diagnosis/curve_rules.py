"""Rules on the learning curves of a run: divergence, learning rate, length, evaluation mode."""

import itertools
import math

from diagnosis.finding import Finding
from diagnosis.remedies import longer_warmup
from diagnosis.run_evidence import RunEvidence


def diverged(evidence: RunEvidence) -> Finding | None:
    """The loss became NaN or infinite, or ends far above that of a model that knows nothing."""
    losses = evidence.curve("train/loss")
    uniform, lr = evidence.uniform_loss, evidence.lr
    not_finite = "NaN" in evidence.failure or "not finite" in evidence.failure or "infinite" in evidence.failure
    not_finite = not_finite or any(not math.isfinite(loss) for loss in losses)
    grows = bool(losses) and losses[-1] > 2 * max(uniform, min(losses))
    if not (not_finite or grows):
        return None
    return Finding(
        id="diverged",
        severity="error",
        probability=0.9,
        explanation="The loss became NaN or infinite, or grew far above log(classes), that of a uniform prediction. "
        "The most frequent cause is a learning rate that is too high for this model.",
        evidence={"last train/loss": losses[-1] if losses else None, "log(classes)": round(uniform, 4), "lr": lr},
        remedy=(
            f"optimizer.lr={lr / 10:g}",
            "trainer.clip_norm=1",
            f"schedule.warmup_epochs={longer_warmup(evidence.config)}",
        ),
    )


def lr_too_high(evidence: RunEvidence) -> Finding | None:
    """After the first evaluation, the train loss is above that of a uniform prediction, or it rises again and again."""
    losses, lr, uniform = evidence.curve("train/loss"), evidence.lr, evidence.uniform_loss
    if len(losses) < 4:
        return None
    early = losses[: max(3, 3 * len(losses) // 4)]  # later, the schedule has lowered the learning rate
    rises = sum(after > 1.1 * before for before, after in itertools.pairwise(early)) / (len(early) - 1)
    above = sum(loss > 1.15 * uniform for loss in early) / len(early)
    if rises < 0.34 and above < 0.5:
        return None
    return Finding(
        id="lr_too_high",
        severity="warning",
        probability=0.7,
        explanation="While the learning rate is high, the train loss rises again and again, or stays above "
        "log(classes), the loss of a uniform prediction: the steps are too large.",
        evidence={"share of rises": round(rises, 3), "share above log(classes)": round(above, 3), "lr": lr},
        remedy=(f"optimizer.lr={lr / 10:g}", f"optimizer.lr={lr / 3:g}", "trainer.clip_norm=1"),
    )


def lr_too_low(evidence: RunEvidence) -> Finding | None:
    """The train loss falls at nearly every evaluation, but is still near that of a uniform prediction."""
    losses, train = evidence.curve("train/loss"), evidence.errors.get("train")
    if len(losses) < 4 or train is None or evidence.progress < 0.5:
        return None
    uniform, lr = evidence.uniform_loss, evidence.lr
    falls = sum(after < before for before, after in itertools.pairwise(losses)) / (len(losses) - 1)
    saturates = losses[0] - losses[len(losses) // 4] > 0.6 * (losses[0] - losses[-1])  # most of the fall comes early
    if falls < 0.9 or saturates or losses[-1] < 0.6 * min(uniform, losses[0] * 1.25):
        return None
    return Finding(
        id="lr_too_low",
        severity="warning",
        probability=0.7,
        explanation="The train loss falls at every evaluation without noise, but by little: the steps are too small.",
        evidence={"share of falls": round(falls, 3), "last train/loss": round(losses[-1], 4), "lr": lr},
        remedy=(f"optimizer.lr={lr * 100:g}", f"optimizer.lr={lr * 10:g}"),
    )


def stopped_too_early(evidence: RunEvidence) -> Finding | None:
    """The loss still falls quickly: at the end of the run, or before the schedule lowers the learning rate."""
    losses, val = evidence.curve("train/loss"), evidence.curve("val/loss") or evidence.curve("train/loss")
    train = evidence.errors.get("train")
    if len(losses) < 3 or train is None or evidence.status is None:
        return None
    quarter = max(1, len(losses) // 4)
    falls = [
        (losses[end - quarter] - losses[end]) / losses[end - quarter]
        for end in (len(losses) - 1, len(losses) - 1 - quarter)
        if end >= quarter and losses[end - quarter] > 0
    ]
    has_room = train.share - (evidence.human_error or 0.0) > 0.03
    if not falls or max(falls) < 0.15 or val[-1] > 1.01 * min(val) or not has_room:
        return None
    epochs, steps = (evidence.config["trainer"].get(key) for key in ("max_epochs", "max_steps"))
    longer = f"trainer.max_epochs={3 * int(epochs)}" if epochs else f"trainer.max_steps={3 * int(steps or 1000)}"
    return Finding(
        id="stopped_too_early",
        severity="warning" if train.share > 0.25 * evidence.chance_error else "info",
        probability=0.6,
        explanation="The train loss still falls quickly at the end of the run, or did until the schedule lowered the "
        "learning rate, and the validation loss is at its minimum. A longer run would reach a lower error.",
        evidence={
            "fall of train/loss over a quarter of the run": round(max(falls), 4),
            "train error": round(train.share, 4),
        },
        remedy=(longer,),
    )


def train_eval_mismatch(evidence: RunEvidence) -> Finding | None:
    """In evaluation mode, the loss on the train split is far above the loss that the epoch's steps measured."""
    running, measured = evidence.train_loss_of_steps, evidence.losses.get("train")
    if running is None or measured is None or measured < 2 * running + 0.1:
        return None
    return Finding(
        id="train_eval_mismatch",
        severity="warning",
        probability=0.6,
        explanation="On the train split, the loss in evaluation mode is far above that of the steps of the same "
        "epoch. The statistics of batch normalisation (small batches, few steps) or the moving average of the weights "
        "(few steps) do not fit.",
        evidence={"loss in evaluation mode": round(measured, 4), "loss of the steps": round(running, 4)},
        remedy=("data.batch_size=64", "trainer.ema_decay=null"),
    )
