"""Rules on the errors of a run per split: chance, bias, variance, overfitting to validation."""

import math

from diagnosis.finding import Finding
from diagnosis.remedies import against_overfitting, larger_model, strong_regularisation, without_regularisation
from diagnosis.run_evidence import RunEvidence, SplitError

Z = 1.96  # standard errors of a difference that is called significant: 95%, two-sided


def constant_predictor(evidence: RunEvidence) -> Finding | None:
    """Nearly all images get the same class, and the train error is no better than chance."""
    train = evidence.errors.get("train")
    if train is None or evidence.predicted_share is None:
        return None
    if evidence.predicted_share < 0.98 or not is_at_chance(train, evidence):
        return None
    lr = evidence.lr
    return Finding(
        id="constant_predictor",
        severity="error",
        probability=0.8,
        explanation="The model predicts one class for nearly all images, also on the images it was trained on. It has "
        "learned nothing: units are dead, the learning rate is far too high or too low, or gradients do not arrive.",
        evidence={"share of the predicted class": round(evidence.predicted_share, 4), "train error": train.share},
        remedy=(
            f"optimizer.lr={lr / 10:g}",
            f"optimizer.lr={lr * 10:g}",
            "python scripts/check.py with the same options",
        ),
    )


def labels_shuffled(evidence: RunEvidence) -> Finding | None:
    """The model has memorised the train split, and its validation error is that of chance."""
    train, val = evidence.errors.get("train"), evidence.held_out
    if train is None or val is None or evidence.predicted_share is None:
        return None
    # The best weights may be those of the first epoch, as no epoch is better on the validation split.
    last = evidence.curve("train/accuracy")[-1:]
    train_error = min([train.share, *(1 - accuracy for accuracy in last)])
    learned = train_error < 0.8 * evidence.chance_error - Z * math.sqrt(train.variance)
    at_chance = val.share > evidence.chance_error - 0.03 - Z * math.sqrt(val.variance)
    if not (learned and at_chance):
        return None
    return Finding(
        id="labels_shuffled",
        severity="error",
        probability=0.8,
        explanation="The model fits the labels of the train split, but on other images it is no better than chance. So "
        "the labels do not depend on the images: they were assigned in another order, or the splits differ in classes.",
        evidence={
            "train error": round(train_error, 4),
            "held-out error": round(val.share, 4),
            "chance": round(evidence.chance_error, 4),
        },
    )


def regularisation_too_strong(evidence: RunEvidence) -> Finding | None:
    """The train error is high, and the config has a regularisation that is known to be strong."""
    train, strong = evidence.errors.get("train"), strong_regularisation(evidence.config)
    if train is None or not strong or not is_underfit(evidence):
        return None
    return Finding(
        id="regularisation_too_strong",
        severity="error" if is_at_chance(train, evidence) else "warning",
        probability=0.85,
        explanation="The error on the train split is high, and the config regularises strongly: the model is kept from "
        "fitting even the images that it is trained on.",
        evidence={"train error": round(train.share, 4), "chance": round(evidence.chance_error, 4)},
        remedy=tuple(strong),
    )


def underfit_capacity(evidence: RunEvidence) -> Finding | None:
    """The train error is high and larger than the generalisation gap; no more specific rule explains it."""
    train, losses = evidence.errors.get("train"), evidence.curve("train/loss")
    if train is None or not losses or not is_underfit(evidence):
        return None
    certain = evidence.human_error is not None or train.share > 0.25 * evidence.chance_error
    return Finding(
        id="underfit_capacity",
        severity="warning" if certain else "info",
        probability=0.5,
        explanation="The error on the train split is high: high bias. A larger model, less regularisation or another "
        "learning rate can lower it; more images cannot.",
        evidence={
            "train error": round(train.share, 4),
            "human error": evidence.human_error,
            "chance": round(evidence.chance_error, 4),
        },
        remedy=(
            *larger_model(evidence.config),
            *without_regularisation(evidence.config),
            f"optimizer.lr={evidence.lr * 3:g}",
        ),
    )


def overfit(evidence: RunEvidence) -> Finding | None:
    """The validation loss rises while the train loss falls, or the generalisation gap dominates the error."""
    train, val = evidence.errors.get("train"), evidence.held_out
    val_losses, train_losses = evidence.curve("val/loss"), evidence.curve("train/loss")
    if train is None or val is None or len(val_losses) < 3:
        return None
    gap = val.share - train.share
    error = math.sqrt(train.variance + val.variance)
    best = min(range(len(val_losses)), key=val_losses.__getitem__)
    rise = val_losses[-1] / max(val_losses[best], 1e-9) - 1
    rises = (
        rise > 0.2 and best < len(val_losses) - 2 and train_losses[-1] < train_losses[min(best, len(train_losses) - 1)]
    )
    if gap < max(0.05, Z * error) or not (rises or gap > 2 * train.share + 0.05):
        return None
    return Finding(
        id="overfit",
        severity="warning",
        probability=0.8 if rises else 0.6,
        explanation="The model fits the train split much better than other images: high variance. More images, "
        "augmentation and regularisation can lower the validation error; a larger model cannot.",
        evidence={
            "train error": round(train.share, 4),
            "held-out error": round(val.share, 4),
            "rise of val/loss since its minimum": round(rise, 4),
        },
        remedy=against_overfitting(evidence.config),
    )


def overfit_to_validation(evidence: RunEvidence) -> Finding | None:
    """The test error is significantly above the validation error."""
    val, test = evidence.errors.get("val"), evidence.errors.get("test")
    if val is None or test is None:
        return None
    difference = test.share - val.share
    error = math.sqrt(val.variance + test.variance)
    if difference < 3 * error or difference < 0.25 * val.share:
        return None
    return Finding(
        id="overfit_to_validation",
        severity="warning",
        probability=0.5,
        explanation="The test error is above the validation error by more than chance explains. Options were chosen on "
        "the validation split too often, it is too small, or the test split has another distribution.",
        evidence={
            "val error": round(val.share, 4),
            "test error": round(test.share, 4),
            "standard error": round(error, 4),
        },
        remedy=("data.val_fraction=0.2",),
    )


def is_at_chance(error: SplitError, evidence: RunEvidence) -> bool:
    """Return whether an error is not significantly below that of always predicting the most frequent class."""
    return error.share >= evidence.chance_error - Z * math.sqrt(error.variance)


def is_underfit(evidence: RunEvidence) -> bool:
    """Return whether the avoidable bias is at least 5 points, and larger than the generalisation gap."""
    train, held_out = evidence.errors["train"], evidence.held_out
    avoidable = train.share - (evidence.human_error or 0.0)
    gap = max(0.0, held_out.share - train.share) if held_out else 0.0
    return avoidable >= 0.05 and avoidable - train.margin > gap
