"""The loss of a training."""

import torch
from torch import nn

from core.errors import ConfigError, suggest
from core.options.declarations import LossOptions
from data.sources.splits import Splits
from trainer.build.instantiate import construct, parameters_of, resolve
from trainer.optim.losses import balanced_weights


def build_loss(node: LossOptions, splits: Splits, *, mixes: bool) -> nn.Module:
    """Return the loss, after a dry run on labels as augmentation makes them.

    The class weights `balanced` are computed from the train split.
    """
    count, weights = len(splits.class_names), class_weights(node, splits)
    if weights is not None:
        node = {**node, "class_weights": weights}
    takes = parameters_of(resolve("loss", node["_target_"])) or {}
    # Another loss class need not take the arguments of the built-in ones that are not set.
    given = {key: value for key, value in node.items() if key != "auxiliary_weight" and (value or key in takes)}
    loss = construct(given, "loss")
    if not isinstance(loss, nn.Module):
        raise ConfigError("loss._target_", "must build a torch.nn.Module", value=node["_target_"])
    targets = torch.full((2, count), 1 / count) if mixes else torch.zeros(2, dtype=torch.long)
    try:
        value = loss(torch.zeros(2, count), targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as exception:
        kind = "probabilities, which mixing augmentations make of labels" if mixes else "logits and labels"
        raise ConfigError("loss", f"does not take {kind}: {exception}", value=node["_target_"]) from None
    if not isinstance(value, torch.Tensor) or value.ndim > 0:
        raise ConfigError("loss", "must return one number per batch, as a tensor", value=node["_target_"])
    return loss


def class_weights(node: LossOptions, splits: Splits) -> list[float] | None:
    """Return one weight per class, in the order of the classes, or None if all are equal."""
    weights, names = node.get("class_weights"), splits.class_names
    if weights is None:
        return None
    if isinstance(weights, str):  # balanced
        return balanced_weights(splits.train.labels, len(names))
    if isinstance(weights, dict):
        for name in weights:
            if name not in names:
                hint = suggest(name, names) or f"its classes: {', '.join(names)}"
                raise ConfigError(f"loss.class_weights.{name}", f"the data has no such class; {hint}")
        return [float(weights.get(name, 1.0)) for name in names]
    if len(weights) != len(names):
        order = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        explanation = f"must be a list of {len(names)}, one per class: {order}"
        raise ConfigError("loss.class_weights", explanation, value=weights)
    return [float(weight) for weight in weights]


def auxiliary_weight(node: LossOptions, model: nn.Module) -> float:
    """Return the weight of each auxiliary head's loss: the config's, else the model's own, else GoogLeNet's."""
    weight = node.get("auxiliary_weight")
    return getattr(model, "auxiliary_weight", 0.3) if weight is None else weight
