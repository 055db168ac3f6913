"""The step of a training, and how it calls the model: as it is, compiled, or recorded as a CUDA graph.

Compiling and recording happen while the training is built, on dummy images, so that they are finished before the first
step and before the clock starts. They change no weights, no statistics of batch norm and no random values of the run.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.options.declarations import TrainConfig, TrainerOptions
from trainer.build.generators import seeded
from trainer.build.loss import auxiliary_weight
from trainer.monitor.restorable import RestorableTensors
from trainer.optim.losses import Objective
from trainer.optim.parameter_groups import decayed_parameters, trainable_parameters_of
from trainer.state import TrainState
from trainer.steps import ClassificationStep

Forward = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def build_step(
    values: TrainConfig,
    state: TrainState,
    loss_function: nn.Module,
    precision: AbstractContextManager[object],
    *,
    steps: Callable[[str], int],
    images: Sequence[Tensor],
) -> ClassificationStep:
    """Return the object that makes one optimizer step.

    `steps` converts a duration; `images` are dummy batches, which the compiler needs.
    """
    settings, model = values["trainer"], state.model
    frozen_after = [
        (trainable_parameters_of(model, layer), steps(duration))
        for layer, duration in (settings["freeze_after"] or {}).items()
    ]
    forward = build_forward(
        model,
        settings,
        images=images,
        precision=precision,
        frozen_later=[parameters for parameters, _ in sorted(frozen_after, key=lambda item: item[1])],
    )
    return ClassificationStep(
        state,
        forward=forward,
        objective=Objective(loss_function, auxiliary_weight=auxiliary_weight(values["loss"], model)),
        autocast=precision,
        penalised=decayed_parameters(model, settings["weight_decay_on"]),
        frozen_after=frozen_after,
        l1=settings["l1"],
        clip_norm=settings["clip_norm"],
    )


def build_forward(
    model: nn.Module,
    settings: TrainerOptions,
    *,
    images: Sequence[Tensor],
    precision: AbstractContextManager[object],
    frozen_later: Sequence[Sequence[nn.Parameter]],
) -> Forward:
    """Return the function that training calls for the logits of a batch.

    `images` are dummy batches on the device, one for each size of batch that occurs, the usual size first.
    `frozen_later` are parameters that are frozen during the run, in the order in which that happens. Raises ConfigError
    if the model cannot be compiled, or if the options contradict each other.
    """
    device = images[0].device
    if settings["cuda_graphs"]:
        _check_cuda_graphs(settings, device)
        with seeded(0, device):
            return GraphedModel(model.train(), images[0], precision)
    if not settings["compile"]:
        return model
    # dynamic=False: one graph for each size. Otherwise torch computes full batches with a slower graph for all sizes
    # once it has seen an odd last batch.
    forward: Forward = torch.compile(model, dynamic=False)
    try:
        with seeded(0, device):
            warm_up(forward, model.train(), images, precision=precision, frozen_later=frozen_later)
    except Exception as exception:  # the compiler's own, and those of the C++ compiler or Triton that it calls
        explanation = f"torch.compile fails: {type(exception).__name__}: {exception}"
        raise ConfigError("trainer.compile", explanation, value=True) from exception
    return forward


def warm_up(
    forward: Forward,
    model: nn.Module,
    images: Sequence[Tensor],
    *,
    precision: AbstractContextManager[object],
    frozen_later: Sequence[Sequence[nn.Parameter]],
) -> None:
    """Compute outputs and gradients of dummy batches, before and after each set of parameters is frozen."""
    buffers = RestorableTensors(list(model.buffers()))
    buffers.remember()
    frozen: list[Tensor] = []
    for parameters in [(), *frozen_later]:
        frozen += [parameter.requires_grad_(False) for parameter in parameters]
        for batch in images:
            with precision:
                outputs = forward(batch)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad([output.sum() for output in outputs], trained, allow_unused=True)
    for parameter in frozen:
        parameter.requires_grad_(True)
    buffers.restore(torch.ones((), device=images[0].device))


class GraphedModel:
    """Replays the forward and backward pass of batches of one shape; other batches are computed by the model itself.

    A graph launches all kernels of a pass at once, so that the GPU does not wait for the CPU between them.
    """

    def __init__(self, model: nn.Module, images: Tensor, precision: AbstractContextManager[object]) -> None:
        self.model, self.shape = model, images.shape
        buffers = RestorableTensors(list(model.buffers()))
        buffers.remember()
        with _without_weight_cache(precision):
            # The wrapper, because this function replaces the `forward` of its argument.
            self.graphed = torch.cuda.make_graphed_callables(_Wrapped(model), (images,), allow_unused_input=True)
        buffers.restore(torch.ones((), device=images.device))

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the logits (B, K), and those of auxiliary heads, of images (B, C, H, W)."""
        if images.shape != self.shape:
            outputs: Tensor | tuple[Tensor, ...] = self.model(images)
            return outputs
        outputs = cast(Tensor | tuple[Tensor, ...], self.graphed(images))
        # Copies: the next replay writes its outputs to the same memory, and the running sums keep the logits.
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(output.clone() for output in outputs)


class _Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs: Tensor | tuple[Tensor, ...] = self.model(images)
        return outputs


def _without_weight_cache(precision: AbstractContextManager[object]) -> AbstractContextManager[object]:
    """Return the same autocast context without its cache of converted weights, which a graph must not use."""
    if not isinstance(precision, torch.autocast):
        return precision
    return torch.autocast(precision.device, dtype=precision.fast_dtype, cache_enabled=False)


def _check_cuda_graphs(settings: TrainerOptions, device: torch.device) -> None:
    for refused, explanation in (
        (device.type != "cuda", f"needs trainer.device=cuda; this run is on {device.type}"),
        (settings["compile"], "cannot be combined with trainer.compile=true"),
        (settings["accumulate"] > 1, "needs trainer.accumulate=1: each replay overwrites the gradients of the last"),
    ):
        if refused:
            raise ConfigError("trainer.cuda_graphs", explanation, value=True)
