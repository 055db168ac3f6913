"""Rules on an initialised model and its first batch: gradients, initial weights, normalisation, batch statistics."""

import math

from diagnosis.finding import Finding, ranked
from diagnosis.start_evidence import ModelEvidence

SMALL, LARGE = 1e-4, 1e4  # ratios of the gradients of the first and the last layer


def model_findings(evidence: ModelEvidence) -> list[Finding]:
    """Return the findings on a model before training, the most severe first; none for a healthy model."""
    rules = (
        wrong_gradient,
        symmetric_init,
        gradient_through_depth,
        initial_loss_off,
        cannot_overfit_batch,
        input_not_normalised,
        batchnorm_small_batch,
    )
    return ranked(finding for rule in rules if (finding := rule(evidence)) is not None)


def wrong_gradient(evidence: ModelEvidence) -> Finding | None:
    """The gradient of a layer is not the slope of the loss."""
    if not evidence.wrong_gradients:
        return None
    worst = sorted(evidence.wrong_gradients.items(), key=lambda item: -item[1])
    return Finding(
        id="wrong_gradient",
        severity="error",
        probability=0.95,
        explanation=f"The gradient of {', '.join(name for name, _ in worst[:5])} differs from the slope of the loss, "
        "measured by finite differences in float64. A backward pass of your own is wrong, or a value is detached.",
        evidence={name: round(error, 4) for name, error in worst[:5]},
    )


def symmetric_init(evidence: ModelEvidence) -> Finding | None:
    """All units of a hidden layer have the same weights, so they learn the same."""
    names = [layer.name for layer in evidence.layers[:-1] if layer.units_equal]
    if not names:
        return None
    return Finding(
        id="symmetric_init",
        severity="error",
        probability=0.95,
        explanation=f"All units of {', '.join(names[:5])} have equal weights. They get equal gradients and stay equal: "
        "such a layer computes one feature.",
        evidence={"layers": len(names)},
        remedy=("model.init=default",),
    )


def gradient_through_depth(evidence: ModelEvidence) -> Finding | None:
    """The gradients of the first layers are tiny or huge compared with those of the last layers."""
    ratios = [layer.gradient for layer in evidence.layers if not layer.units_equal]
    if not all(math.isfinite(ratio) for ratio in ratios):
        return _exploding("the gradients are not finite", math.inf)
    usable = [ratio for ratio in ratios if ratio > 0]
    if len(usable) < 4:
        return None
    first, last = sorted(usable[: len(usable) // 2])[len(usable) // 4], sorted(usable[-2:])[0]
    if first / last > LARGE:
        return _exploding("they grow from the last layer to the first", first / last)
    if first / last > SMALL:
        return None
    return Finding(
        id="vanishing_gradient",
        severity="warning",
        probability=0.8,
        explanation="Gradients vanish through the depth: relative to their weights, those of the first layers are less "
        "than 1/10,000 of those of the last. The first layers will hardly learn.",
        evidence={"gradient / weight of the first layers": first, "of the last layers": last},
        remedy=("model.activation=relu", "model.init=he_normal", "model.batch_norm=true"),
    )


def _exploding(reason: str, ratio: float) -> Finding:
    return Finding(
        id="exploding_gradient",
        severity="error",
        probability=0.8,
        explanation=f"Gradients explode through the depth: {reason}. The first steps will destroy the weights.",
        evidence={"first layers / last layers": ratio if math.isfinite(ratio) else "infinite"},
        remedy=("model.init=default", "model.batch_norm=true", "trainer.clip_norm=1"),
    )


def initial_loss_off(evidence: ModelEvidence) -> Finding | None:
    """The loss before training is far above that of a uniform prediction."""
    uniform = math.log(evidence.num_classes)
    if evidence.config["loss"]["_target_"].rpartition(".")[2] not in ("CrossEntropy", "CrossEntropyLoss"):
        return None
    if evidence.initial_loss < 2 * uniform + 1:
        return None
    return Finding(
        id="initial_loss_off",
        severity="warning",
        probability=0.6,
        explanation="The loss before the first step is far above log(classes), that of a uniform prediction: the "
        "initial logits are too large, through the initial weights or through images that are not normalised.",
        evidence={"initial loss": round(evidence.initial_loss, 3), "log(classes)": round(uniform, 3)},
        remedy=("model.init=default", "data.normalise=per_channel"),
    )


def cannot_overfit_batch(evidence: ModelEvidence) -> Finding | None:
    """Training on one batch alone hardly lowers its loss."""
    loss = evidence.overfit_loss
    if loss is None or loss < 0.98 * evidence.initial_loss:
        return None
    lr = float(evidence.config["optimizer"]["lr"])
    return Finding(
        id="cannot_overfit_batch",
        severity="warning",
        probability=0.6,
        explanation="Steps on one batch alone hardly lower its loss. The learning rate does not fit the model, or "
        "gradients do not arrive.",
        evidence={"initial loss": round(evidence.initial_loss, 3), "loss after the steps": round(loss, 3), "lr": lr},
        remedy=(f"optimizer.lr={lr / 10:g}", f"optimizer.lr={lr * 10:g}", "debug=overfit"),
    )


def input_not_normalised(evidence: ModelEvidence) -> Finding | None:
    """The input of the model has a mean or a standard deviation that is off by an order of magnitude."""
    if abs(evidence.input_mean) < 3 and 0.1 < evidence.input_std < 10:
        return None
    return Finding(
        id="input_not_normalised",
        severity="warning",
        probability=0.8,
        explanation="The input of the model should have mean 0 and standard deviation 1; it is off by an order of "
        "magnitude.",
        evidence={"mean": round(evidence.input_mean, 3), "standard deviation": round(evidence.input_std, 3)},
        remedy=("data.normalise=per_channel",),
    )


def batchnorm_small_batch(evidence: ModelEvidence) -> Finding | None:
    """Batch normalisation gets statistics of very few samples."""
    batch_size = int(evidence.config["data"]["batch_size"])
    if not evidence.has_batch_norm or min(batch_size, evidence.smallest_batch) >= 4:
        return None
    only_last = batch_size >= 4
    return Finding(
        id="batchnorm_small_batch",
        severity="info" if only_last else "warning",
        probability=0.7,
        explanation="Batch normalisation estimates mean and variance from fewer than four samples"
        + (" in the last batch of an epoch." if only_last else ", which is mostly noise."),
        evidence={"batch size": batch_size, "smallest batch": evidence.smallest_batch},
        remedy=("data.drop_last=true",) if only_last else ("data.batch_size=32",),
    )
