"""Remedies: overrides to paste, for the config of a run."""

from collections.abc import Mapping
from typing import Any


def longer_warmup(config: Mapping[str, Any]) -> int:
    """Return a warm-up of a tenth of the run, in epochs, at least 1."""
    return max(1, int(config["trainer"].get("max_epochs") or 10) // 10)


def without_regularisation(config: Mapping[str, Any]) -> list[str]:
    """Return overrides that switch off the regularisation that is on."""
    remedies = []
    if config["model"].get("dropout"):
        remedies.append("model.dropout=0")
    if config.get("augment"):
        remedies.append("augment=none")
    if (config["optimizer"].get("weight_decay") or 0) > 1e-3:
        remedies.append(f"optimizer.weight_decay={config['optimizer']['weight_decay'] / 10:g}")
    if (config["loss"].get("label_smoothing") or 0) > 0.1:
        remedies.append("loss.label_smoothing=0")
    return remedies


def strong_regularisation(config: Mapping[str, Any]) -> list[str]:
    """Return overrides that weaken each regularisation that is strong enough to prevent learning."""
    remedies = []
    if (config["model"].get("dropout") or 0) > 0.6:
        remedies.append("model.dropout=0.2")
    optimizer = config["optimizer"]
    decay = optimizer.get("weight_decay") or 0.0
    is_decoupled = any(name in str(optimizer["_target_"]) for name in ("AdamW", "Muon", "muon"))
    if decay >= (0.5 if is_decoupled else 0.01):
        remedies.append(f"optimizer.weight_decay={decay / 100:g}")
    if (config["trainer"].get("l1") or 0) >= 0.001:
        remedies.append(f"trainer.l1={config['trainer']['l1'] / 100:g}")
    if (config["loss"].get("label_smoothing") or 0) > 0.4:
        remedies.append("loss.label_smoothing=0.1")
    return remedies


def larger_model(config: Mapping[str, Any]) -> list[str]:
    """Return an override that gives a larger model."""
    hidden = config["model"].get("hidden")
    if isinstance(hidden, list) and hidden:
        return [f"'model.hidden=[{','.join(str(2 * int(width)) for width in hidden)}]'"]
    return ["model=resnet20"] if config["choices"]["model"] in ("mlp", "lenet5", "lenet", "vgg_tiny") else []


def against_overfitting(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return overrides that regularise more, the most effective first."""
    remedies = []
    if not config.get("augment"):
        is_mirrored = config["data"].get("mirror", True)
        remedies.append("augment=crop_flip" if is_mirrored else "augment=affine")
    if "dropout" in config["model"] and not config["model"]["dropout"]:
        remedies.append("model.dropout=0.3")
    decay = config["optimizer"].get("weight_decay") or 0.0
    remedies.append(f"optimizer.weight_decay={10 * decay if decay else 5e-4:g}")
    if not config["loss"].get("label_smoothing") and "label_smoothing" in config["loss"]:
        remedies.append("loss.label_smoothing=0.1")
    return tuple(remedies)
