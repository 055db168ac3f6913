"""What a new network starts from beside its own weights: training pictures, or another network's weights."""

from pathlib import Path

from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError
from trainer.storage.checkpoint import CheckpointFolder, load_weights_file


def fit_to(pictures: Tensor, model: nn.Module) -> None:
    """Let a network with a method `fit` see normalised pictures (N, C, H, W) of the training part."""
    try:
        model.fit(pictures)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError) as exception:
        explanation = f"cannot be fitted to pictures {tuple(pictures.shape)}: {exception}"
        raise ConfigError("model", explanation, value=type(model).__name__) from None


def init_from(source: Path, model: nn.Module, *, shown: str) -> list[str]:
    """Start from a run's best weights or a safetensors file; what fits is loaded. Returns the report, a line a fact,
    with `shown` for the source: a path from the environment is written nowhere."""
    if source.is_dir():
        folder = CheckpointFolder(source / "checkpoints")
        best = folder.files("best")
        weights = folder.load(*(["best"] if best else ["last", "step"]))[0].weights
    elif source.exists():
        weights = load_weights_file(source)
    else:
        raise CheckpointError(str(source), "no such run folder or file (init_from)")
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    if not any(own[name].ndim > 1 for name in fitting):
        raise CheckpointError(str(source), "none of its weights fits this network, by name and shape (init_from)")
    model.load_state_dict(fitting, strict=False)
    resized = [
        f"{name} {tuple(weights[name].shape)} -> {tuple(own[name].shape)}"
        for name in own
        if name in weights and name not in fitting
    ]
    report = [f"init_from {shown}: {len(fitting)} of {len(own)} tensors loaded"]
    for what, names in (
        ("of another shape, so these start anew", resized),
        ("not in the file, so these start anew", [name for name in own if name not in weights]),
        ("in the file but not in the network", [name for name in weights if name not in own]),
    ):
        if names:
            report.append(f"  {what}: {', '.join(names)}")
    return report
