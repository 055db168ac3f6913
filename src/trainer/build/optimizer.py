"""The optimizer of a training."""

from collections.abc import Collection

import torch
from torch import nn

from core.errors import ConfigError
from core.options.declarations import OptimizerOptions
from trainer.build.instantiate import construct, parameters_of, resolve
from trainer.optim.muon import Muon
from trainer.optim.parameter_groups import fill_momentum, group_parameters


def build_optimizer(
    node: OptimizerOptions, model: nn.Module, *, decayed: Collection[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer over its parameter groups; parameters that are not `decayed` get no weight decay."""
    if "lr" not in node:
        raise ConfigError("optimizer.lr", "missing: the learning rate, a number > 0")
    target, extra = resolve("optimizer", node["_target_"]), {}
    is_torchs = str(getattr(target, "__module__", "")).startswith("torch.optim")
    takes_fused = is_torchs and "fused" in (parameters_of(target) or {}) and not node.get("foreach")
    # One kernel a step: 2.5 to 4 times as fast on a CPU, and on CUDA it can be told on the device to skip. Adagrad's is
    # for the CPU alone in older versions of torch.
    if takes_fused and (device.type == "cpu" or target is not torch.optim.Adagrad):
        extra = {"fused": True}
    make = construct({**extra, **node, "_partial_": True}, "optimizer")
    try:
        optimizer: torch.optim.Optimizer = make(group_parameters(model, decayed=decayed, with_muon=target is Muon))
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
