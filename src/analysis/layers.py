"""The layers of a model as a table: output shape, parameters, multiply-adds, memory of the output, receptive field.

Receptive field: the side of the square of input pixels on which one output value depends,

    r_out = r_in + (kernel - 1) x dilation x jump_in,    jump_out = jump_in x stride

(Araujo et al. 2019, Computing Receptive Fields of Convolutional Neural Networks). Where branches join, it is the
largest one of the branches. A linear layer or a mean over all pixels depends on the entire image.
"""

import copy
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with parameters or a window. `shape` is that of the output without the batch: (C, H, W) or (C,).

    `memory` is the size of the output for one image, in bytes of float32. The receptive field is None if it is the
    entire image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    memory: int
    receptive_field: int | None


class _Fields:
    """Receptive field and jump of each tensor that a layer returned, in the order of execution."""

    def __init__(self, image: Tensor) -> None:
        self._known: list[tuple[Tensor, float, float]] = [(image, 1.0, 1.0)]  # holds the tensors: ids stay unique

    def of(self, values: Tensor) -> tuple[float, float]:
        """Return (receptive field, jump) of a tensor; if no layer returned it, the largest of the same map size."""
        for tensor, field, jump in reversed(self._known):
            if tensor is values:
                return field, jump
        if values.ndim < 4:
            return math.inf, 1.0
        alike = [item for item in self._known if item[0].ndim == 4 and item[0].shape[2:] == values.shape[2:]]
        return max(((field, jump) for _, field, jump in alike), default=(math.inf, 1.0))

    def add(self, values: Tensor, field: float, jump: float) -> None:
        """Store the field of a tensor."""
        self._known.append((values, field, jump))


def layers_of(model: nn.Module, image_shape: Sequence[int]) -> list[Layer]:
    """Return the layers of a model in the order of execution, for one image (C, H, W); nothing is computed.

    A copy of the model without values is used (torch's `meta` device). A layer that is called twice has one row.
    """
    model = _on_meta(model).eval()
    image = torch.empty(1, *image_shape, device="meta")
    known = _Fields(image)
    calls: list[tuple[str, nn.Module, tuple[int, ...], float]] = []
    handles = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
                field, jump = _after(module, *known.of(inputs[0]), inputs[0], output)
                known.add(output, field, jump)
                if any(True for _ in module.parameters(recurse=False)) or isinstance(module, WINDOWS):
                    calls.append((name, module, tuple(output.shape[1:]), field))

        return hook

    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(record(name)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    for handle in handles:
        handle.remove()
    counts, root = counter.get_flop_counts(), type(model).__name__
    rows: dict[str, Layer] = {}
    for name, module, shape, field in calls:
        rows.setdefault(
            name,
            Layer(
                name=name,
                kind=type(module).__name__,
                shape=shape,
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                multiply_adds=sum(counts.get(f"{root}.{name}", {}).values()) // 2,
                memory=4 * math.prod(shape),
                receptive_field=None if math.isinf(field) else round(field),
            ),
        )
    return list(rows.values())


def total_of(model: nn.Module, layers: Sequence[Layer]) -> tuple[int, int]:
    """Return the parameters of the model, and those of its layers that evaluation does not use: auxiliary heads."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, parameters - sum(layer.parameters for layer in layers)


def table_of(layers: Sequence[Layer], *, most: int = 40) -> Table:
    """Return the table of layers for the terminal; of more than `most` layers, the first and the last ones."""
    table = Table("layer", "kind", "output", title="Layers", title_justify="left")
    for title in ("parameters", "multiply-adds", "output KiB", "receptive field"):
        table.add_column(title, justify="right")
    shown = list(layers) if len(layers) <= most else [*layers[: most - 10], None, *layers[-9:]]
    for layer in shown:
        if layer is None:
            table.add_row(f"... {len(layers) - most + 1} more", "", "", "", "", "", "")
            continue
        shape = " x ".join(str(side) for side in layer.shape)
        field = "image" if layer.receptive_field is None else f"{layer.receptive_field}"
        counts = (f"{layer.parameters:,}", f"{layer.multiply_adds:,}", f"{layer.memory / 1024:,.1f}", field)
        table.add_row(escape(layer.name), layer.kind, shape, *counts)
    table.add_section()
    sums = (sum(layer.parameters for layer in layers), sum(layer.multiply_adds for layer in layers))
    memory = sum(layer.memory for layer in layers) / 1024
    table.add_row("all", "", "", *(f"{number:,}" for number in sums), f"{memory:,.1f}", "")
    return table


def csv_of(layers: Sequence[Layer]) -> str:
    """Return the layers as CSV text; the receptive field of the entire image is empty."""
    content = io.StringIO(newline="")
    writer = csv.writer(content)
    names = [field.name for field in fields(Layer)]
    writer.writerow(names)
    for layer in layers:
        values = {name: getattr(layer, name) for name in names}
        values["shape"] = " x ".join(str(side) for side in layer.shape)
        writer.writerow(["" if values[name] is None else values[name] for name in names])
    return content.getvalue()


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the `meta` device."""
    return copy.deepcopy(model).to("meta")


def _after(module: nn.Module, field: float, jump: float, values: Tensor, output: Tensor) -> tuple[float, float]:
    """Return (receptive field, jump) after a layer."""
    if isinstance(module, WINDOWS):
        kernel, stride = _side(module.kernel_size), _side(module.stride or module.kernel_size)
        dilation = _side(getattr(module, "dilation", 1))
        return field + (kernel - 1) * dilation * jump, jump * stride
    if values.ndim == 4 and (output.ndim < 4 or output.shape[2:] != values.shape[2:]):
        return math.inf, 1.0  # flattened, or averaged over all pixels
    return (math.inf, 1.0) if isinstance(module, nn.Linear) else (field, jump)


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)
