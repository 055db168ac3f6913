"""The optimizer of a training."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from core.errors import ConfigError
from core.options.declarations import OptimizerOptions
from trainer.build.instantiate import construct, parameters_of, resolve
from trainer.optim.muon import Muon
from trainer.optim.parameter_groups import fill_momentum, group_parameters


def build_optimizer(
    node: OptimizerOptions,
    model: nn.Module,
    *,
    decayed: Collection[nn.Parameter],
    frozen_later: Mapping[str, Sequence[nn.Parameter]],
    device: torch.device,
) -> torch.optim.Optimizer:
    """Return the optimizer over its parameter groups; parameters that are not `decayed` get no weight decay.

    `frozen_later` maps the layers of `trainer.freeze_after` to their parameters. Raises ConfigError for an argument or
    class that does not suit the model.
    """
    if "lr" not in node:
        raise ConfigError("optimizer.lr", "missing: the learning rate, a number > 0")
    target, extra = resolve("optimizer", node["_target_"]), {}
    is_torchs = str(getattr(target, "__module__", "")).startswith("torch.optim")
    takes_fused = is_torchs and "fused" in (parameters_of(target) or {}) and not node.get("foreach")
    # One kernel per step: 2.5 to 4 times as fast on a CPU. On CUDA, a fused update obeys a flag on the device; Adagrad
    # has none there in torch 2.11.
    has_fused = device.type == "cpu" or (device.type == "cuda" and target is not torch.optim.Adagrad)
    if takes_fused and has_fused:
        extra = {"fused": True}
    make = construct({**extra, **node, "_partial_": True}, "optimizer")
    try:
        groups = group_parameters(model, decayed=decayed, with_muon=target is Muon, frozen_later=frozen_later)
        optimizer: torch.optim.Optimizer = make(groups)
    except ConfigError as error:
        raise error.under("optimizer") from None
    except (TypeError, ValueError, RuntimeError) as exception:
        raise ConfigError("optimizer", str(exception), value=node["_target_"]) from None
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "optimizer._target_", "must be an optimizer that steps without a closure", value=node["_target_"]
        )
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:
        fill_momentum(optimizer)
    return optimizer
