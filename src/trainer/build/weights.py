"""The weights that a new run starts from, beside random ones: fitted to images, or those of another run."""

from pathlib import Path

from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError
from core.options.declarations import TrainConfig
from core.seeding import fold
from data.sources.splits import Splits, sample
from trainer.storage.checkpoint import CheckpointFolder, load_weights_file

FITTED = 5000  # training images that a model may fit itself to, if their pixels fit into FITTED_VALUES
FITTED_VALUES = 1000 * 3 * 224**2  # 600 MB


def initialise(model: nn.Module, values: TrainConfig, splits: Splits, *, shown: str | None) -> list[str]:
    """Give a new run's model the weights that it starts from; returns the report of `init_from`, one fact per line.

    A model with a method `fit` sees training images first. `shown` is the source as it may be written to disk.
    """
    if hasattr(model, "fit"):
        size, seed = values["data"]["image_size"], fold(values["seed"], "fit")
        count = min(FITTED, FITTED_VALUES // (values["data"]["channels"] * size**2))
        images = sample(splits.train, count=max(1, count), image_size=size, seed=seed)
        fit_to(splits.normalisation(images), model)
    if not values["init_from"]:
        return []
    return init_from(Path(values["init_from"]), model, shown=str(shown))


def fit_to(images: Tensor, model: nn.Module) -> None:
    """Call `fit` of a model with normalised images (N, C, H, W) of the train split."""
    try:
        model.fit(images)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError) as exception:
        explanation = f"cannot be fitted to images {tuple(images.shape)}: {exception}"
        raise ConfigError("model", explanation, value=type(model).__name__) from None


def init_from(source: Path, model: nn.Module, *, shown: str) -> list[str]:
    """Load what fits of a run's best weights or of a safetensors file, and return the report, one fact per line.

    The report names the source `shown`: a path that comes from the environment is not written anywhere.
    """
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
        raise CheckpointError(str(source), "none of its weights fits this model, by name and shape (init_from)")
    model.load_state_dict(fitting, strict=False)
    resized = [
        f"{name} {tuple(weights[name].shape)} -> {tuple(own[name].shape)}"
        for name in own
        if name in weights and name not in fitting
    ]
    report = [f"init_from {shown}: {len(fitting)} of {len(own)} tensors loaded"]
    for what, names in (
        ("of another shape, so these keep their initial values", resized),
        ("not in the file, so these keep their initial values", [name for name in own if name not in weights]),
        ("in the file but not in the model", [name for name in weights if name not in own]),
    ):
        if names:
            report.append(f"  {what}: {', '.join(names)}")
    return report
