"""The table of layers: against torch's counter of operations, the paper of AlexNet, and the support of gradients."""

import csv
import io
import json

import pytest
import torch
from torch import nn

from analysis import model_table
from analysis.layers import csv_of, layers_of, table_of, total_of
from models.resnet import ResNet

GOLDENS = json.loads(model_table.GOLDENS.read_text())


@pytest.mark.parametrize("name", GOLDENS)
def test_sums_over_layers_are_those_of_the_model(name):
    entry = GOLDENS[name]
    with torch.device("meta"):
        model = model_table.build(name, entry)
    layers = layers_of(model, entry["input"])
    parameters, unused = total_of(model, layers)
    assert sum(layer.multiply_adds for layer in layers) == entry["multiply_adds"]
    assert parameters == entry["parameters"] == sum(layer.parameters for layer in layers) + unused
    assert (unused > 0) == (name in ("googlenet", "inception_v3"))  # auxiliary heads, in training only
    assert table_of(layers).row_count <= 41


def test_table_of_alexnet_is_that_of_the_paper():
    """Krizhevsky et al. 2012, section 3.5: the classic counts of parameters and multiply-adds."""
    entry = GOLDENS["alexnet"]
    with torch.device("meta"):
        model = model_table.build("alexnet", entry)
    layers = [layer for layer in layers_of(model, entry["input"]) if layer.parameters]
    counts = [(round(layer.parameters / 1e3), round(layer.multiply_adds / 1e6)) for layer in layers]
    assert counts[:3] == [(35, 105), (307, 224), (885, 150)]
    assert layers[5].kind == "Linear" and layers[5].parameters / 1e6 == pytest.approx(37.8, abs=0.06)
    assert [layer.shape for layer in layers[:3]] == [(96, 55, 55), (256, 27, 27), (384, 13, 13)]
    rows = list(csv.DictReader(io.StringIO(csv_of(layers))))
    assert (
        rows[0]["shape"] == "96 x 55 x 55" and rows[0]["receptive_field"] == "11" and rows[5]["receptive_field"] == ""
    )


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5, padding=2, dilation=1)

    def forward(self, images):
        return torch.cat([self.small(images), self.large(images)], dim=1)


MODELS = {
    "chain": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2),
        nn.Conv2d(4, 2, 3, stride=2),
    ),
    "branches": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Branches(), nn.Conv2d(8, 2, 3, padding=1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_receptive_field_is_the_support_of_the_gradient(name):
    """With positive weights and images, the middle output depends on exactly the pixels of its receptive field."""
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    output = model(image)
    if name == "chain":  # max pooling passes the gradient to one pixel of its window only: use the mean
        model[1] = nn.AvgPool2d(2)
        output = model(image)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    rows = image.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert layers_of(model, (3, 64, 64))[-1].receptive_field == int(rows[-1] - rows[0]) + 1


def test_receptive_field_of_resnet20_follows_its_longest_path():
    """Three stages of six 3x3 convolutions after the first one; the second and third stage start with stride 2."""
    field, jump = 3, 1
    for stage in range(3):
        for convolution in range(6):
            field += 2 * jump
            jump *= 2 if stage and convolution == 0 else 1
    with torch.device("meta"):
        model = model_table.build("resnet20", GOLDENS["resnet20"])
    assert isinstance(model, ResNet)
    convolutions = [layer for layer in layers_of(model, (3, 32, 32)) if layer.kind == "Conv2d"]
    assert max(layer.receptive_field or 0 for layer in convolutions) == field
