"""Show the facts of a new run before its first step: model, data, device, automatic choices, first batch, graph."""

import torch

from core.config import Config
from core.options.declarations import TrainConfig
from trainer.report.recorder import Recorder
from trainer.training import Training


def introduce(training: Training, recorder: Recorder, config: Config[TrainConfig]) -> None:
    """Log the facts of a new run."""
    samples, values = training.samples, config.values
    choices, state, folder = values["choices"], training.state, recorder.folder.path
    count = sum(parameter.numel() for parameter in state.model.parameters())
    splits = ", ".join(f"{split} {number:,}" for split, number in samples.items())
    if config.varied:
        recorder.say(f"job {config.job}: {' '.join(config.varied)}")
    recorder.say(
        f"{choices['model']} ({count:,} parameters) on {choices['data']} ({splits}), "
        f"{device_name(training.device)}, {training.settings.total_steps:,} steps -> {folder}"
    )
    recorder.say(f"  chosen automatically: {', '.join(automatic_choices(training))}")
    left_out = samples["train"] - training.train_loader.samples_per_epoch
    if left_out:
        text = f"{left_out} of {samples['train']:,} training samples are left out of each epoch (data.drop_last)"
        recorder.say(text)
    weights = getattr(training.loss_function, "class_weights", None)
    if weights is not None:
        pairs = zip(state.data["class_names"], weights.tolist(), strict=True)
        recorder.say(f"class weights: {', '.join(f'{name} {weight:.4g}' for name, weight in pairs)}")
    for text in training.weights_report:
        recorder.say(text)
        recorder.event("init_from", text=text)


def show_first_batch(training: Training, recorder: Recorder, *, images: bool, graph: bool) -> None:
    """Write the first augmented training batch and the model's graph to TensorBoard."""
    if not (images or graph):
        return
    first = next(iter(training.train_loader.augmented_batches(0)))[0]  # (B, C, H, W), 0 to 255
    if images:
        recorder.images("train/augmented", (first[:64] / 255).clamp(0, 1).cpu())
    if graph:
        recorder.graph(training.state.model, training.state.normalisation(first))


def device_name(device: torch.device) -> str:
    """Return the name of a CUDA device, or the type of another."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def automatic_choices(training: Training) -> list[str]:
    """Return the trainer's decisions on settings that the config leaves open, as text."""
    state, device = training.state, training.device
    fused = "fused" if state.optimizer.defaults.get("fused") else "not fused"
    synchronises = device.type == "cuda" and not state.guard.on_device
    # Only on CUDA, where the trainer sets them: reading them fails if other code uses torch's newer interface.
    has_tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    in_matmuls = has_tf32 and torch.get_float32_matmul_precision() == "high"
    return [
        f"threads {torch.get_num_threads()}",
        *([f"TF32 in convolutions{' and matrix products' * in_matmuls}"] if has_tf32 else []),
        *(["the CPU checks each step's loss (no fused update)"] if synchronises else []),
        "channels_last" if training.channels_last else "channels first",
        f"{type(state.optimizer).__name__} {fused}",
        training.train_loader.reading,
    ]
