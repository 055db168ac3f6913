"""Evidence on an initialised model: initial loss, gradient of each layer, gradient check, one batch overfitted."""

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from analysis.check.gradient_check import without_dropout, wrong_gradients
from data.loading.loaders import TrainLoader
from diagnosis.start_evidence import LayerEvidence, ModelEvidence
from trainer.build.loss import auxiliary_weight
from trainer.optim.losses import Objective
from trainer.training import Training

SAMPLES = 16  # images of the batch that is overfitted
GRADIENT_SAMPLES = 4  # images of the gradient check
STEPS = 30


def measure_model(training: Training, config: dict[str, Any], *, seconds: float) -> ModelEvidence:
    """Return the evidence on the model of a training; the weights are restored.

    `seconds` limits the time of overfitting one batch, and of the search for wrong gradients.
    """
    loader = training.train_loader
    assert isinstance(loader, TrainLoader)
    batch = next(iter(loader.steps(0)))[0]
    images, labels = batch.images[:SAMPLES], batch.labels[:SAMPLES]
    model = training.state.model
    objective = Objective(training.loss_function, auxiliary_weight=auxiliary_weight(config["loss"], model))
    probe = copy.deepcopy(model).train()
    without_dropout(probe)
    minimised, loss, _ = objective(probe(images), labels)
    minimised.backward()
    few = slice(0, GRADIENT_SAMPLES)
    wrong = wrong_gradients(probe, objective, images[few], labels[few], seconds=seconds)
    return ModelEvidence(
        layers=layers_of(probe),
        initial_loss=loss.item(),
        overfit_loss=_overfit(training, objective, images, labels, seconds=seconds),
        wrong_gradients=wrong,
        smallest_batch=loader.smallest_batch,
        has_batch_norm=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
        input_mean=float(batch.images.float().mean()),
        input_std=float(batch.images.float().std()),
        num_classes=len(training.state.data["class_names"]),
        config=config,
    )


def layers_of(model: nn.Module) -> list[LayerEvidence]:
    """Return the layers with weight matrices or filters, in the order of the model, after a backward pass."""
    layers = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter.grad is None or not parameter.requires_grad:
            continue
        weights = parameter.detach().flatten(1)  # (units, weights of each)
        size, gradient = float(weights.pow(2).mean().sqrt()), float(parameter.grad.pow(2).mean().sqrt())
        layers.append(
            LayerEvidence(
                name=name.removesuffix(".weight"),
                gradient=gradient / size if size else 0.0,
                units_equal=len(weights) > 1 and bool((weights == weights[0]).all()),
            )
        )
    return layers


def _overfit(
    training: Training, objective: Objective, images: Tensor, labels: Tensor, *, seconds: float
) -> float | None:
    """Return the lowest loss of STEPS optimizer steps on one batch, within the time limit; the state is restored.

    The steps have the learning rate of the optimizer after warm-up. None if fewer than five steps were made.
    """
    state = training.state
    saved = copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict()))
    model, optimizer = state.model.train(), state.optimizer
    without_dropout(model)
    losses, began = [], time.monotonic()
    try:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            with training.autocast:
                minimised, loss, _ = objective(model(images), labels)
            minimised.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            losses.append(loss.item())
            if time.monotonic() - began > seconds:
                break
    finally:
        optimizer.zero_grad(set_to_none=True)
        state.model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    return min(losses[1:]) if len(losses) >= 5 else None
