"""Warnings about a finished run that has learned nothing: it diverged, or a constant prediction is as accurate."""

import math
from collections.abc import Mapping

MIN_STEPS = 50  # shorter runs are not judged: they check a setup


def warnings_of(
    test: Mapping[str, float], *, steps: int, first_loss: float | None, constant_accuracy: float
) -> list[str]:
    """Return one line per problem of a finished run.

    test:               loss and accuracy on the test split
    first_loss:         loss of the first training batch, before any update
    constant_accuracy:  accuracy on the test split of always predicting its most frequent class
    """
    if steps < MIN_STEPS or not test:
        return []
    lines = []
    if first_loss is not None and (test["loss"] > first_loss or not math.isfinite(test["loss"])):
        lines.append(
            f"the run diverged: test loss {test['loss']:.3g}, above the loss of the first batch, {first_loss:.3g};"
            " try a lower optimizer.lr, trainer.clip_norm=1 or schedule.warmup_epochs=1"
        )
    if test["accuracy"] <= constant_accuracy:
        lines.append(
            f"the model has learned nothing that a constant prediction does not know: test accuracy"
            f" {test['accuracy']:.2%}, and the most frequent class has {constant_accuracy:.2%};"
            " try a lower optimizer.lr, and look at the images and labels with look.py"
        )
    return lines
