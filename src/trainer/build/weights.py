"""Initial weights of a new run that are not random: fitted to images, or loaded from a run or a file."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError, PreceptorError
from core.options.declarations import TrainConfig
from core.run_config import read_run_config
from core.seeding import fold
from data.sources.splits import Splits, sample
from trainer.storage.checkpoint import CheckpointFolder, load_weights_file

# Added by DataParallel and DistributedDataParallel, torch.compile, Lightning, and wrappers of users.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "student.", "ema.")
FITTED = 5000  # training images that a model may fit itself to, if their pixels fit into FITTED_VALUES
FITTED_VALUES = 1000 * 3 * 224**2  # 600 MB


def initialise(model: nn.Module, values: TrainConfig, splits: Splits, *, shown: str | None) -> list[str]:
    """Set the initial weights of a new run's model; return the report of `init_from`, one fact per line.

    A model with a method `fit` gets training images first. `shown` is the source as it may be written to disk.
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
    """Load the tensors of a run's best weights or of a safetensors file that fit; return the report, a fact per line.

    A tensor fits if name and shape are the model's. The report names the source `shown`: a path from the environment is
    not written anywhere. Raises CheckpointError if the source does not exist, is damaged, or no tensor fits.
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
    weights, prefix = without_prefix(weights, own)
    fitting = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    if not any(own[name].ndim > 1 for name in fitting):
        explanation = "none of its weights fits this model, by name and shape (init_from)"
        both = f"its first names: {_first(weights)}; the model's: {_first(own)}"
        raise CheckpointError(str(source), f"{explanation}{_model_of(source)}; {both}")
    model.load_state_dict(fitting, strict=False)
    resized = [
        f"{name} {tuple(weights[name].shape)} -> {tuple(own[name].shape)}"
        for name in own
        if name in weights and name not in fitting
    ]
    report = [f"init_from {shown}: {len(fitting)} of {len(own)} tensors loaded"]
    if prefix:
        report.append(f"  the prefix {prefix!r} of its names was removed")
    for what, names in (
        ("of another shape, so these keep their initial values", resized),
        ("not in the file, so these keep their initial values", [name for name in own if name not in weights]),
        ("in the file but not in the model", [name for name in weights if name not in own]),
    ):
        if names:
            report.append(f"  {what}: {', '.join(names)}")
    return report


def without_prefix(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return weights without the prefix that other trainers add to their names, and the prefix ("" for none).

    Prefixes of PREFIXES are removed, several if they follow each other, as long as more names agree with the model's.
    """
    best, removed = dict(weights), ""

    def agreeing(names: Mapping[str, Tensor]) -> int:
        return len(names.keys() & own.keys())

    while True:
        shorter = {
            prefix: {name.removeprefix(prefix): tensor for name, tensor in best.items()}
            for prefix in PREFIXES
            if any(name.startswith(prefix) for name in best)
        }
        prefix = max(shorter, key=lambda prefix: agreeing(shorter[prefix]), default="")
        # Two prefixes may have to be removed before any name agrees.
        if not prefix or (agreeing(shorter[prefix]) <= agreeing(best) and agreeing(best) > 0):
            return (best, removed) if agreeing(best) else (dict(weights), "")
        best, removed = shorter[prefix], removed + prefix


def _first(names: Mapping[str, Tensor]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _model_of(source: Path) -> str:
    """Return the override that chooses the model of a run folder, as a hint; "" for a file or a damaged config."""
    with suppress(PreceptorError, KeyError, TypeError):
        return f"; it is a run of model={read_run_config(source)['choices']['model']}" if source.is_dir() else ""
    return ""
