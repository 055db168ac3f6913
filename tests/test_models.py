"""Models compared with counts from papers, formulas, torchvision and second implementations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from analysis import model_table
from core.errors import ConfigError
from core.options.files import comments_of
from models.adapter import adapt
from models.airbench import Airbench
from models.alexnet import AlexNet
from models.blocks import ACTIVATIONS, SCHEMES, LocalResponseNorm, Maxout, activation, initialise
from models.lenet import LeNet, LeNet5
from models.maxout import MaxoutNet
from models.mlp import MLP
from models.nin import NIN
from models.resnet import PaddedShortcut, ResNet
from models.vgg import VGG, average

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "model").glob("[!_]*.yaml"))
GOLDENS = json.loads((ROOT / "tests" / "goldens.json").read_text())

DIGITS: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": 28}
CIFAR: dict[str, Any] = {"num_classes": 10, "in_channels": 3}
SMALL: dict[str, Any] = {**CIFAR, "depths": [1, 1, 1], "widths": [4, 8, 16], "stem": "small"}  # quick to run
SMALL_VGG: dict[str, Any] = {**CIFAR, "stages": [[4], [8, 8]], "head": "small"}
SMALL_NIN: dict[str, Any] = {**CIFAR, "widths": [[6, 5], [8, 7, 6]], "kernel_sizes": [5, 3]}
ARGUMENTS: dict[Any, dict[str, Any]] = {  # of a small model of each class
    **dict.fromkeys((MLP, LeNet5, LeNet), DIGITS),
    ResNet: SMALL,
    VGG: SMALL_VGG,
    NIN: SMALL_NIN,
    MaxoutNet: {**DIGITS, "widths": [4, 8]},
    Airbench: {**CIFAR, "widths": [8, 16]},
    AlexNet: {**CIFAR, "image_size": 67},  # 18 million parameters: its linear layers have one width
}
# Larger models take seconds each: `make test-slow` trains every config at its own size.
CHEAP = [name for name in NAMES if GOLDENS[name]["parameters"] < 15e6]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def randomise_norms(model: nn.Module) -> nn.Module:
    """Set scales, shifts and running statistics of norms to random values, as after training; return the model."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            for values in (layer.weight, layer.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (layer.bias, layer.running_mean):
                nn.init.uniform_(values, -0.5, 0.5)
    return model.eval()


# ---- Every config


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_counts_of_its_golden(name: str) -> None:
    assert model_table.measure(name, GOLDENS[name]) == GOLDENS[name]


def test_goldens_contain_exactly_the_models_of_the_configs() -> None:
    assert sorted(GOLDENS) == NAMES


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("mlp", 269_322, 784 * 256 + 256 * 256 + 256 * 10),
        ("lenet5", 61_706, 28**2 * 6 * 25 + 10**2 * 16 * 6 * 25 + 400 * 120 + 120 * 84 + 84 * 10),
        ("lenet", 233_196, 24**2 * 20 * 25 + 8**2 * 50 * 20 * 25 + 800 * 256 + 256 * 10),
        # All stages do the same work, except that the first convolution of a later stage reads half the channels.
        ("resnet20", 269_722, 32**2 * 16 * 27 + (6 + 5.5 + 5.5) * 32**2 * 16 * 144 + 64 * 10),
        ("resnet32", 464_154, 32**2 * 16 * 27 + (10 + 9.5 + 9.5) * 32**2 * 16 * 144 + 64 * 10),
        ("resnet44", 658_586, 32**2 * 16 * 27 + (14 + 13.5 + 13.5) * 32**2 * 16 * 144 + 64 * 10),
        ("resnet56", 853_018, 32**2 * 16 * 27 + (18 + 17.5 + 17.5) * 32**2 * 16 * 144 + 64 * 10),
        ("resnet110", 1_727_962, 32**2 * 16 * 27 + (36 + 35.5 + 35.5) * 32**2 * 16 * 144 + 64 * 10),
        ("plain20", 269_722, 32**2 * 16 * 27 + (6 + 5.5 + 5.5) * 32**2 * 16 * 144 + 64 * 10),
        ("plain110", 1_727_962, 32**2 * 16 * 27 + (36 + 35.5 + 35.5) * 32**2 * 16 * 144 + 64 * 10),
        ("resnet18", 11_689_512, 1_814_073_344),
        ("resnet34", 21_797_672, 3_663_761_408),
        ("resnet50", 25_557_032, 4_089_184_256),
        ("resnet101", 44_549_160, 7_801_405_440),
        ("resnet152", 60_192_808, 11_513_626_624),
        # Computed from figure 2: a unit of convolution 2, 4 or 5 reads half of the channels.
        (
            "alexnet",
            60_965_224,
            55**2 * 96 * 3 * 121
            + 27**2 * 256 * 48 * 25
            + 13**2 * (384 * 256 + 384 * 192 + 256 * 192) * 9
            + 9216 * 4096
            + 4096 * 4096
            + 4096 * 1000,
        ),
        ("vgg11", 132_863_336, 7_609_090_048),
        ("vgg13", 133_047_848, 11_308_466_176),
        ("vgg16", 138_357_544, 15_470_264_320),
        ("vgg19", 143_667_240, 19_632_062_464),
        ("vgg11_bn", 132_868_840, 7_609_090_048),
        ("vgg13_bn", 133_053_736, 11_308_466_176),
        ("vgg16_bn", 138_365_992, 15_470_264_320),
        ("vgg19_bn", 143_678_248, 19_632_062_464),
        # VGG-16's convolutions, at a 49th of the pixels.
        ("vgg16_small", 14_728_266, (15_470_264_320 - 25_088 * 4096 - 4096 * 4096 - 4096 * 1000) // 49 + 512 * 10),
        (
            "vgg_tiny",
            140_778,
            28**2 * (32 + 32 * 32) * 9 + 14**2 * (32 * 64 + 64 * 64) * 9 + 7**2 * 64 * 128 * 9 + 128 * 10,
        ),
        (
            "nin",
            966_986,
            32**2 * (192 * 75 + 160 * 192 + 96 * 160)
            + 16**2 * (192 * 96 * 25 + 192 * 192 + 192 * 192)
            + 8**2 * (192 * 192 * 9 + 192 * 192 + 10 * 192),
        ),
        ("maxout", 165_706, 28**2 * 64 * 25 + 14**2 * 64 * 32 * 25 + 7**2 * 128 * 32 * 25 + 1024 * 10),
        ("googlenet", 13_378_280, 1_582_671_872),
        ("inception_v3", 27_161_264, 5_713_216_096),
    ],
)
def test_goldens_equal_the_counts_of_the_papers(name: str, parameters: int, multiply_adds: int) -> None:
    """The counts are written here again, so that `zoo.py --write` cannot hide an error."""
    assert (GOLDENS[name]["parameters"], GOLDENS[name]["multiply_adds"]) == (parameters, multiply_adds)


def test_docs_models_page_is_up_to_date() -> None:
    assert model_table.PAGE.read_text() == model_table.page(GOLDENS), "python scripts/zoo.py --write"


@pytest.mark.parametrize("name", CHEAP)
def test_each_config_gives_finite_gradients_and_forward_is_head_of_features(name: str) -> None:
    """Builds the model from its composed node only and runs a batch on the CPU; every parameter gets a finite gradient.

    The input is in colour if the golden is grey, and grey if the golden is in colour.
    """
    channels, side = 4 - GOLDENS[name]["input"][0], 64 if name == "googlenet" else 32
    model = model_table.build(name, {"input": [channels, side, side], "num_classes": 7, "overrides": []}).train()
    images = torch.randn(2, channels, side, side)
    outputs = model(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # auxiliary heads give logits in training mode
    assert all(logits.shape == (2, 7) for logits in outputs)
    sum(functional.cross_entropy(logits, torch.arange(2)) for logits in outputs).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name

    if name != "torchvision":
        model.eval()
        assert torch.equal(model(images), model.head(model.features(images)))


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_config_has_a_comment(name: str) -> None:
    path = ROOT / "configs" / "model" / f"{name}.yaml"
    comments = comments_of(path)
    assert [key for key in yaml.safe_load(path.read_text()) if not comments.get(key)] in ([], ["defaults"])


@pytest.mark.parametrize("model_class", ARGUMENTS)
def test_minimum_size_of_each_model_is_the_smallest_valid_input(model_class: Any) -> None:
    """Only shapes are computed, on the meta device."""
    arguments = ARGUMENTS[model_class]

    def run(side: int) -> torch.Size:
        sized = {"image_size": side} if "image_size" in arguments else {}
        with torch.device("meta"):
            model = model_class(**{**arguments, **sized}).eval()
            return model(torch.empty(1, arguments["in_channels"], side, side)).shape

    smallest = model_class(**arguments).minimum_size
    for side in (smallest, smallest + 1, smallest + 5):
        assert run(side) == (1, 10)
    if smallest > 1:
        with pytest.raises((ConfigError, RuntimeError)) as error:
            run(smallest - 1)
        if "image_size" in arguments:
            name = model_class.__name__
            message = f"error[config] image_size = {smallest - 1}: {name} needs at least {smallest} px"
            assert str(error.value) == message


# ---- MLP


@pytest.mark.parametrize(("hidden", "parameters"), [([64], 50_890), ([256, 256], 269_322), ([], 7_850)])
def test_mlp_has_the_expected_parameter_counts(hidden: list[int], parameters: int) -> None:
    assert count(MLP(**DIGITS, hidden=hidden)) == parameters


def test_mlp_equals_matrix_products_with_activations_between() -> None:
    model = MLP(**DIGITS, hidden=[9, 5], activation="gelu")
    images = torch.randn(3, 1, 28, 28)
    first, second = (layer for layer in model.features if isinstance(layer, nn.Linear))
    hidden = functional.gelu(images.reshape(3, 784) @ first.weight.T + first.bias)
    hidden = functional.gelu(hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(model(images), hidden @ model.head.weight.T + model.head.bias)


def test_mlp_without_hidden_layers_is_linear() -> None:
    model = MLP(**DIGITS, hidden=[])
    images = torch.randn(3, 1, 28, 28)
    expected = images.reshape(3, 784) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


def test_mlp_orders_norm_activation_dropout() -> None:
    layers = MLP(**DIGITS, hidden=[8], batch_norm=True, dropout=0.25).features
    assert [type(layer) for layer in layers] == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert layers[1].bias is None
    assert layers[4].p == 0.25


# ---- LeNet


def test_lenet5_equals_a_second_implementation() -> None:
    """The shapes of the second implementation determine the order of the layers."""
    model = LeNet5(num_classes=10, in_channels=1, image_size=32)
    first, second = model.features[0], model.features[3]
    images = torch.randn(2, 1, 32, 32)
    maps = functional.avg_pool2d(torch.tanh(functional.conv2d(images, first.weight, first.bias)), 2)
    maps = functional.avg_pool2d(torch.tanh(functional.conv2d(maps, second.weight, second.bias)), 2)
    assert maps.shape == (2, 16, 5, 5)
    values = maps.reshape(2, 400)
    for index in (1, 3):
        values = torch.tanh(functional.linear(values, model.head[index].weight, model.head[index].bias))
    assert values.shape == (2, 84)
    expected = functional.linear(values, model.head[5].weight, model.head[5].bias)
    torch.testing.assert_close(model(images), expected)


def test_lenet_equals_relu_before_the_pool_bit_identically() -> None:
    """Logits and gradients are bit-identical to those of the textbook order of the layers."""
    model = LeNet(**DIGITS)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    images = torch.randn(4, 1, 28, 28)

    maps = functional.max_pool2d(functional.relu(functional.conv2d(images, *parameters[0:2])), 2)
    maps = functional.max_pool2d(functional.relu(functional.conv2d(maps, *parameters[2:4])), 2)
    assert maps.shape == (4, 50, 4, 4)
    hidden = functional.relu(functional.linear(maps.flatten(1), *parameters[4:6]))
    expected = functional.linear(hidden, *parameters[6:8])
    assert torch.equal(model(images), expected)

    labels = torch.tensor([3, 1, 4, 1])
    functional.cross_entropy(model(images), labels).backward()
    functional.cross_entropy(expected, labels).backward()
    for parameter, reference in zip(model.parameters(), parameters, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, reference.grad)


def test_lenet_drops_hidden_units_in_training_only() -> None:
    model = LeNet(**DIGITS, dropout=0.5)
    images = torch.randn(1, 1, 28, 28)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


# ---- ResNet


@pytest.mark.parametrize("depth", ["resnet18", "resnet50"])
def test_resnet_equals_torchvision(depth: str) -> None:
    """Both blocks, the stem and every parameter name: the state dict loads strictly, the logits are equal."""
    import torchvision

    reference = randomise_norms(getattr(torchvision.models, depth)(num_classes=1000))
    model = model_table.build(depth, {"input": [3, 64, 64], "num_classes": 1000, "overrides": []}).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "parameters"), [(3, 269_722), (5, 464_154), (7, 658_586), (9, 853_018), (18, 1_727_962)]
)
def test_small_resnets_have_the_parameter_counts_of_the_paper(blocks: int, parameters: int) -> None:
    """He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million for 20, 32, 44, 56 and 110 layers."""
    with torch.device("meta"):
        model = ResNet(**CIFAR, depths=[blocks] * 3, widths=[16, 32, 64], stem="small", shortcut="A")
    assert count(model) == parameters
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in model.modules()) == 6 * blocks + 2


def test_shortcut_options_differ_only_by_their_projections() -> None:
    plain, padded, projected = (count(ResNet(**SMALL, shortcut=option)) for option in ("none", "A", "B"))
    assert plain == padded
    assert projected - padded == (4 * 8 + 2 * 8) + (8 * 16 + 2 * 16)  # a 1x1 convolution and a norm, twice


@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("shortcut", ["A", "none"])
def test_small_resnet_equals_a_second_implementation(shortcut: str, side: int) -> None:
    """Plain functional operations on the state dict with torchvision's names; odd sizes round as in convolutions."""
    model = randomise_norms(ResNet(**SMALL, shortcut=shortcut))
    state = model.state_dict()

    def convolve(maps: torch.Tensor, name: str, number: int, stride: int = 1) -> torch.Tensor:
        maps = functional.conv2d(maps, state[f"{name}conv{number}.weight"], stride=stride, padding=1)
        mean, variance, weight, bias = (
            state[f"{name}bn{number}.{key}"].reshape(1, -1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (maps - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    images = torch.randn(2, 3, side, side)
    maps = functional.relu(convolve(images, "", 1))
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        name = f"layer{stage}.0."
        out = convolve(functional.relu(convolve(maps, name, 1, stride)), name, 2)
        if shortcut == "A":
            shortcut_maps = torch.zeros_like(out)
            for row in range(out.shape[2]):
                for column in range(out.shape[3]):
                    shortcut_maps[:, : maps.shape[1], row, column] = maps[:, :, row * stride, column * stride]
            out = out + shortcut_maps
        maps = functional.relu(out)
    expected = functional.linear(maps.flatten(2).mean(2), state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_padded_shortcut_has_no_state_and_passes_gradients_of_the_kept_pixels() -> None:
    shortcut = PaddedShortcut(extra_channels=3, stride=2)
    maps = torch.arange(1.0, 2 * 5 * 5 + 1).reshape(1, 2, 5, 5).requires_grad_()
    out = shortcut(maps)
    assert out.shape == (1, 5, 3, 3)
    assert not shortcut.state_dict()
    assert torch.equal(out[0, 0], torch.tensor([[1.0, 3, 5], [11, 13, 15], [21, 23, 25]]))
    assert not out[:, 2:].any()
    out.sum().backward()
    assert maps.grad is not None
    assert maps.grad.sum() == 2 * 9


def test_plain_resnet_depends_on_every_block() -> None:
    """Without shortcuts, a block that outputs zeros makes all features zero; with shortcuts, it is skipped."""
    for shortcut, is_zero in (("none", True), ("A", False), ("B", False)):
        model = ResNet(**SMALL, shortcut=shortcut).eval()
        nn.init.zeros_(model.get_submodule("layer1.0.bn2").weight)
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(model.features(images), torch.zeros(2, 16, 2, 2)) is is_zero


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_keeps_channels_last(shortcut: str) -> None:
    model = randomise_norms(ResNet(**SMALL, shortcut=shortcut))
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    assert model.features(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


# ---- VGG


VGGS = ["vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]


def assert_same_logits_and_gradients(model: nn.Module, reference_model: nn.Module, side: int) -> None:
    """Load the state of the reference strictly and compare logits and gradients."""
    randomise_norms(reference_model)
    model.eval().load_state_dict(reference_model.state_dict(), strict=True)
    images = torch.randn(2, 3, side, side)
    logits, expected = model(images), reference_model(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), reference in zip(model.named_parameters(), reference_model.parameters(), strict=True):
        assert torch.allclose(parameter.grad, reference.grad, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(("height", "width", "side"), [(1, 1, 7), (3, 5, 7), (9, 10, 7), (14, 14, 7), (2, 3, 1)])
def test_vgg_average_equals_adaptive_average_pooling(height: int, width: int, side: int) -> None:
    maps = torch.randn(2, 3, height, width)
    expected = functional.adaptive_avg_pool2d(maps, side)
    torch.testing.assert_close(average(maps, side=side), expected, rtol=1e-6, atol=1e-6)


def test_vgg_gives_the_same_logits_in_deterministic_mode() -> None:
    model = VGG(num_classes=3, in_channels=3, stages=[[4]], head="imagenet").eval()
    images = torch.randn(2, 3, 10, 10)
    expected = model(images)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", VGGS)
def test_vgg_has_the_state_names_and_shapes_of_torchvision(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        reference = getattr(torchvision.models, name)(init_weights=False).state_dict()
        state = model_table.build(name, {"input": [3, 224, 224], "num_classes": 1000, "overrides": []}).state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in reference.items()
    }


@pytest.mark.parametrize(("batch_norm", "side"), [(True, 28), (False, 20)])
def test_narrow_vgg_equals_torchvision(batch_norm: bool, side: int) -> None:
    """Two stages and the large head, on maps of 7x7 and on maps of 5x5 that it resizes to 7x7."""
    from torchvision.models.vgg import VGG as TorchvisionVGG
    from torchvision.models.vgg import make_layers

    with torch.device("meta"):  # its first linear layer reads 512 channels: 100 million weights
        reference = TorchvisionVGG(make_layers([8, "M", 12, 16, "M"], batch_norm=batch_norm), num_classes=10)
        reference.classifier[0] = nn.Linear(16 * 7 * 7, 4096)
    reference.to_empty(device="cpu")
    for layer in reference.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.uniform_(layer.bias, -0.1, 0.1)
    model = VGG(**CIFAR, stages=[[8], [12, 16]], batch_norm=batch_norm)
    assert_same_logits_and_gradients(model, reference, side)


@pytest.mark.slow
@pytest.mark.parametrize("name", VGGS)
def test_vgg_equals_torchvision(name: str) -> None:
    import torchvision

    reference = getattr(torchvision.models, name)(num_classes=10)
    for layer in reference.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    model = model_table.build(name, {"input": [3, 64, 64], "num_classes": 10, "overrides": []})
    assert_same_logits_and_gradients(model, reference, 64)


@pytest.mark.parametrize("side", [32, 33, 40])
def test_small_vgg_equals_a_second_implementation(side: int) -> None:
    """The head reads the mean over pixels: 40 px leave more than one pixel after the three pools."""
    model = VGG(**CIFAR, stages=[[4], [8, 8], [6]], head="small").eval()
    weights = list(model.parameters())
    images = torch.randn(2, 3, side, side)
    maps = images
    for index, pooled in enumerate((True, False, True, True)):
        maps = functional.relu(functional.conv2d(maps, weights[2 * index], weights[2 * index + 1], padding=1))
        maps = functional.max_pool2d(maps, 2) if pooled else maps
    assert maps.shape[2] == side // 8
    expected = maps.flatten(2).mean(2) @ weights[8].T + weights[9]
    torch.testing.assert_close(model(images), expected)


def test_vgg_orders_norm_activation_pool_and_has_dropout_in_its_head() -> None:
    model = VGG(**SMALL_VGG, batch_norm=True, dropout=0.25)
    block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in model.features] == [*block, nn.MaxPool2d, *block, *block, nn.MaxPool2d]
    for head, dropout_layers in (("small", [0]), ("imagenet", [2, 5])):
        with torch.device("meta"):
            classifier = VGG(**{**SMALL_VGG, "head": head}, dropout=0.25).classifier
        rates = {index: layer.p for index, layer in enumerate(classifier) if isinstance(layer, nn.Dropout)}
        assert rates == dict.fromkeys(dropout_layers, 0.25)


# ---- AlexNet


def test_local_response_norm_equals_the_formula_of_the_paper() -> None:
    """The formula of section 3.3: the sum is over at most n maps and is not divided by n."""
    layer = LocalResponseNorm(size=5, alpha=0.1, beta=0.75, k=2.0)
    maps = torch.randn(2, 8, 2, 3, dtype=torch.float64).requires_grad_()
    expected = torch.empty_like(maps)
    for sample in range(2):
        for channel in range(8):
            for row in range(2):
                for column in range(3):
                    total = 0.0
                    for neighbour in range(max(0, channel - 2), min(7, channel + 2) + 1):
                        total += maps[sample, neighbour, row, column].item() ** 2
                    value = maps[sample, channel, row, column].item()
                    expected[sample, channel, row, column] = value / (2.0 + 0.1 * total) ** 0.75
    torch.testing.assert_close(layer(maps), expected)
    assert torch.autograd.gradcheck(layer, maps)


@pytest.mark.parametrize("switches", [{}, {"groups": 1, "local_response_norm": False}], ids=["paper", "neither"])
def test_alexnet_equals_a_second_implementation(switches: dict[str, Any]) -> None:
    """The reference uses torch's norm, which divides alpha by n, and separate halves, as on two GPUs."""
    model = AlexNet(**ARGUMENTS[AlexNet], init="he_normal", **switches).eval()
    weights = list(model.parameters())
    groups = switches.get("groups", 2)

    def convolve(maps: torch.Tensor, number: int, halves: int, **options: int) -> torch.Tensor:
        kernels, biases = (parameter.chunk(halves) for parameter in weights[2 * number - 2 : 2 * number])
        outputs = map(lambda *inputs: functional.conv2d(*inputs, **options), maps.chunk(halves, dim=1), kernels, biases)
        return functional.relu(torch.cat(list(outputs), dim=1))

    def normalise(maps: torch.Tensor) -> torch.Tensor:
        return functional.local_response_norm(maps, 5, alpha=5e-4, beta=0.75, k=2.0) if not switches else maps

    images = 100 * torch.randn(2, 3, 67, 67)  # large enough that the norm matters
    maps = functional.max_pool2d(normalise(convolve(images, 1, 1, stride=4)), 3, stride=2)
    maps = functional.max_pool2d(normalise(convolve(maps, 2, groups, padding=2)), 3, stride=2)
    maps = convolve(convolve(maps, 3, 1, padding=1), 4, groups, padding=1)
    values = functional.max_pool2d(convolve(maps, 5, groups, padding=1), 3, stride=2).flatten(1)
    for number in (6, 7):
        values = functional.relu(functional.linear(values, *weights[2 * number - 2 : 2 * number]))
    expected = functional.linear(values, *weights[14:])
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head(maps.new_ones(2, 256, 1, 1)).shape, expected.shape)


def test_alexnet_head_fits_the_image_size_and_groups_change_the_parameter_count() -> None:
    """6x6 maps at the paper's 227 px, 5x5 at 224 px. Without groups there are 1.4 million more weights."""
    with torch.device("meta"):
        for image_size, side in ((227, 6), (224, 5), (128, 2)):
            model = AlexNet(num_classes=1000, in_channels=3, image_size=image_size)
            assert model.features(torch.empty(1, 3, image_size, image_size)).shape == (1, 256, side, side)
            assert model.head[1].in_features == 256 * side**2
        assert count(AlexNet(num_classes=1000, in_channels=3, groups=1)) == 62_378_344
        assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.5, 0.5]


# ---- Network in network


@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_nin_equals_a_second_implementation(batch_norm: bool, side: int) -> None:
    """The reference has 1x1 convolutions as matrix products at each pixel, and pools that round up."""
    model = randomise_norms(NIN(**SMALL_NIN, batch_norm=batch_norm, init="he_normal"))
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(convolutions) == 6 and len(norms) == (5 if batch_norm else 0)

    images = torch.randn(2, 3, side, side)
    maps = images
    for index, layer in enumerate(convolutions):
        if index in (0, 2):
            maps = functional.conv2d(maps, layer.weight, padding=layer.weight.shape[-1] // 2)
        else:
            maps = torch.einsum("oc,bchw->bohw", layer.weight.flatten(1), maps)
        if layer.bias is not None:
            maps = maps + layer.bias.reshape(1, -1, 1, 1)
        if index < 5:
            maps = functional.relu(norms[index](maps) if batch_norm else maps)
        if index == 1:
            maps = functional.max_pool2d(functional.pad(maps, (1, 1, 1, 1), value=-torch.inf), 3, stride=2)
            assert maps.shape[2] == 4
    torch.testing.assert_close(model(images), maps.flatten(2).mean(2), rtol=1e-5, atol=1e-5)


def test_nin_has_dropout_between_its_blocks() -> None:
    layers = list(NIN(**CIFAR, dropout=0.3).features)
    dropout_layers = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Dropout)]
    assert len(dropout_layers) == 2
    assert all(layers[index].p == 0.3 and isinstance(layers[index - 1], nn.MaxPool2d) for index in dropout_layers)


# ---- Maxout


def test_maxout_returns_the_largest_piece_and_passes_the_gradient_only_to_it() -> None:
    values = torch.randn(2, 6, 3, 2).requires_grad_()
    out = Maxout(pieces=3)(values)
    assert out.shape == (2, 2, 3, 2)
    out.sum().backward()
    for sample in range(2):
        for channel in range(2):
            for row in range(3):
                for column in range(2):
                    pieces = values[sample, channel::2, row, column]  # channels c, c + C and c + 2C
                    assert out[sample, channel, row, column] == pieces.max()
                    gradient = values.grad[sample, channel::2, row, column]
                    assert torch.equal(gradient, functional.one_hot(pieces.argmax(), 3).float())


def test_maxout_of_opposite_pieces_is_the_absolute_value() -> None:
    values = torch.randn(4, 5)
    assert torch.equal(Maxout(pieces=2)(torch.cat([values, -values], dim=1)), values.abs())
    assert torch.equal(Maxout(pieces=2)(torch.cat([values, 0 * values], dim=1)), functional.relu(values))
    assert torch.equal(Maxout(pieces=1)(values), values)


@pytest.mark.parametrize("pieces", [2, 5])
def test_mlp_of_maxout_units_equals_maxima_of_matrix_products(pieces: int) -> None:
    model = MLP(**DIGITS, hidden=[9, 4], activation="maxout", pieces=pieces)
    images = torch.randn(3, 1, 28, 28)
    values = images.flatten(1)
    for layer, units in zip((layer for layer in model.features if isinstance(layer, nn.Linear)), (9, 4)):
        weights, biases = layer.weight.reshape(pieces, units, -1), layer.bias.reshape(pieces, units)
        values = (torch.einsum("kui,bi->bku", weights, values) + biases).amax(dim=1)
    expected = values @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)
    assert count(model) == 785 * 9 * pieces + 10 * 4 * pieces + 5 * 10


@pytest.mark.parametrize("side", [28, 27])
def test_maxout_model_equals_a_second_implementation(side: int) -> None:
    model = MaxoutNet(num_classes=10, in_channels=1, image_size=side, widths=[4, 6], pieces=3).eval()
    weights = list(model.parameters())
    images = torch.randn(2, 1, side, side)
    maps = images
    for index, width in enumerate((4, 6)):
        maps = functional.conv2d(maps, weights[2 * index], weights[2 * index + 1], padding=2)
        maps = torch.stack([maps[:, piece * width : (piece + 1) * width] for piece in range(3)]).amax(dim=0)
        maps = functional.max_pool2d(functional.pad(maps, (1, 1, 1, 1), value=-torch.inf), 3, stride=2)
    assert maps.shape == (2, 6, 7, 7)
    torch.testing.assert_close(model(images), maps.flatten(1) @ weights[4].T + weights[5])


def test_maxout_and_response_norm_keep_channels_last() -> None:
    maps = torch.randn(2, 8, 4, 4)
    for layer in (Maxout(pieces=2), LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0)):
        out = layer(maps.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, layer(maps))


# ---- The compiler


@pytest.mark.parametrize(
    "model",
    [
        LeNet(**DIGITS),
        LeNet5(**DIGITS),
        ResNet(**SMALL, shortcut="A"),
        VGG(**SMALL_VGG),
        Airbench(**CIFAR, widths=[8, 16]),
        nn.Sequential(LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0), Maxout(pieces=3)),
    ],
    ids=type,
)
def test_model_compiles_to_one_graph(model: nn.Module) -> None:
    images = torch.randn(2, 1 if isinstance(model, LeNet | LeNet5) else 3, 28, 28)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


# ---- Activations


def test_every_activation_equals_its_formula_and_gradient() -> None:
    formulas = {
        "relu": lambda x: x.clamp(min=0),
        "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
        "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
        "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "sigmoid": lambda x: 1 / (1 + (-x).exp()),
        "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
        "silu": lambda x: x / (1 + (-x).exp()),
    }
    assert formulas.keys() == ACTIVATIONS.keys()
    values = torch.linspace(-3, 3, 50)  # an even number of values: none is 0, where ReLU has no unique gradient
    for name, formula in formulas.items():
        inputs, reference_inputs = values.clone().requires_grad_(), values.clone().requires_grad_()
        out, expected = activation(name)(inputs * 1), formula(reference_inputs)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(inputs.grad, reference_inputs.grad)


# ---- Initial weights


def deviation(init: str, fan_in: int, fan_out: int) -> float:
    return {"he": 2 / fan_in, "xavier": 2 / (fan_in + fan_out)}[init.split("_")[0]] ** 0.5


@pytest.mark.parametrize("init", ["he_normal", "he_uniform", "xavier_normal", "xavier_uniform"])
def test_named_inits_have_the_standard_deviation_of_their_formula(init: str) -> None:
    """Wide layers give about 3e5 random values, so that the estimate is within one percent."""
    model = nn.Sequential(nn.Conv2d(64, 200, 5), nn.BatchNorm2d(200), nn.Linear(800, 400))
    initialise(model, init)
    for layer, fan_in, fan_out in ((model[0], 64 * 25, 200 * 25), (model[2], 800, 400)):
        expected = deviation(init, fan_in, fan_out)
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.01)
        assert abs(layer.weight.mean().item()) < expected / 50
        largest = layer.weight.abs().max().item() / expected
        assert largest == pytest.approx(3**0.5, rel=0.01) if init.endswith("uniform") else largest > 3.5
        assert not layer.bias.any()
    assert (model[1].weight == 1).all()
    assert not model[1].bias.any()


@pytest.mark.parametrize("init", SCHEMES)
@pytest.mark.parametrize("model_class", [name for name in ARGUMENTS if name is not AlexNet])
def test_every_model_accepts_every_init(model_class: Any, init: str) -> None:
    model = model_class(**ARGUMENTS[model_class], init=init)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    biases = [layer.bias.abs().sum().item() for layer in layers if layer.bias is not None]
    assert all(bias > 0 for bias in biases) if init == "default" else not any(biases)
    if init.startswith(("he", "xavier")):
        for weight in (layer.weight for layer in layers if layer.weight.numel() > 5_000):
            pixels = weight[0, 0].numel()
            expected = deviation(init, weight.shape[1] * pixels, weight.shape[0] * pixels)
            assert weight.std().item() == pytest.approx(expected, rel=0.05)


def test_default_init_equals_torch() -> None:
    model = LeNet5(**DIGITS, init="default")
    torch.manual_seed(0)
    assert torch.equal(model.features[0].weight, nn.Conv2d(1, 6, 5).weight)


def test_paper_inits_have_the_deviations_and_biases_of_the_papers() -> None:
    lenet5 = LeNet5(num_classes=10, in_channels=1, image_size=32, init="paper")
    for layer, fan_in in ((lenet5.features[3], 150), (lenet5.head[1], 400), (lenet5.head[3], 120)):
        largest = layer.weight.abs().max().item()
        assert 0.98 * 2.4 / fan_in < largest <= 2.4 / fan_in
        assert layer.weight.std().item() == pytest.approx(2.4 / fan_in / 3**0.5, rel=0.05)

    resnet = ResNet(**CIFAR, depths=[1, 1], widths=[64, 128], init="paper")
    for name, fan_out in (("conv1", 64 * 49), ("layer2.0.conv1", 128 * 9), ("layer2.0.downsample.0", 128)):
        weight = resnet.get_submodule(name).weight
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), name
    torch.manual_seed(0)
    assert not torch.equal(resnet.fc.weight, torch.zeros_like(resnet.fc.weight))

    vgg = VGG(**CIFAR, stages=[[64], [128]], head="small", init="paper")
    for layer, fan_in, fan_out in ((vgg.features[3], 64 * 9, 128 * 9), (vgg.classifier[1], 128, 10)):
        assert layer.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.05)
        assert layer.weight.abs().max().item() == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=0.05)

    alexnet = AlexNet(**ARGUMENTS[AlexNet], init="paper")
    layers = [layer for layer in alexnet.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, bias in zip(layers, (0, 1, 0, 1, 1, 1, 1, 0), strict=True):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert (layer.bias == bias).all()

    for layer in (layer for layer in NIN(**CIFAR, init="paper").modules() if isinstance(layer, nn.Conv2d)):
        assert layer.weight.std().item() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize(("init", "are_equal"), [("equal_anyway", True), ("xavier_normal", False)])
def test_equal_weights_of_a_layer_stay_equal_during_training(init: str, are_equal: bool) -> None:
    """The loss decreases, because the classes differ, but the hidden units of a layer remain copies of each other."""
    model = MLP(**DIGITS, hidden=[6, 5], init=init).double()
    images, labels = torch.rand(40, 1, 28, 28).double(), torch.arange(40) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer in (layer for layer in model.features if isinstance(layer, nn.Linear)):
        for values in (layer.weight, layer.bias):
            assert values.grad.abs().max() > 1e-5
            assert ((values - values[:1]).abs().max().item() < 1e-12) is are_equal  # except for rounding


def test_equal_init_is_refused_with_a_reason_unless_equal_anyway_is_set() -> None:
    for model_class, arguments in ARGUMENTS.items():
        with torch.device("meta"), pytest.raises(ConfigError) as error:
            model_class(**arguments, init="equal")
        assert str(error.value) == (
            "error[config] init = equal: cannot break symmetry: all units of a layer always compute the same value and "
            "get the same gradient; to see this effect, set equal_anyway"
        )
    model = nn.Sequential(nn.Conv2d(4, 8, 5), nn.Linear(25, 3))
    initialise(model, "equal_anyway")
    assert (model[0].weight == 1 / 100).all() and (model[1].weight == 1 / 25).all()


# ---- The adapter


def small_model(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("old_channels", [1, 3])
def test_adapter_keeps_the_function_on_grey_images(old_channels: int, channels: int) -> None:
    model = small_model(old_channels)
    grey = torch.randn(2, 1, 8, 8)
    expected = model(grey.expand(-1, old_channels, -1, -1))
    names = list(model.state_dict())
    adapted = adapt(network=model, in_channels=channels, num_classes=10)
    torch.testing.assert_close(adapted(grey.expand(-1, channels, -1, -1)), expected)
    assert adapted is model
    assert list(adapted.state_dict()) == names
    assert adapted[0].in_channels == channels
    assert adapted[0].weight.is_contiguous()


def test_adapter_repeats_and_folds_channels_as_documented() -> None:
    red, green, blue = 1.0, 20.0, 300.0
    for channels, expected in (
        (1, [321]),
        (2, [301, 20]),
        (4, [0.5, 20, 300, 0.5]),
        (6, [0.5, 10, 150, 0.5, 10, 150]),
    ):
        model = small_model()
        model[0].weight.data = torch.tensor([red, green, blue]).reshape(1, 3, 1, 1).repeat(8, 1, 3, 3)
        adapt(network=model, in_channels=channels, num_classes=10)
        assert model[0].weight[5, :, 2, 1].tolist() == expected


def test_adapter_fits_a_first_linear_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 8), nn.Tanh(), nn.Linear(8, 10))
    grey = torch.randn(2, 1, 4, 4)
    expected = model(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(adapt(network=model, in_channels=1, num_classes=10)(grey), expected)
    readapted = adapt(network=model, in_channels=3, num_classes=10)
    torch.testing.assert_close(readapted(grey.expand(-1, 3, -1, -1)), expected)
    pooled = nn.Sequential(nn.Linear(7, 10))  # 7 inputs are not a square image: unchanged
    assert adapt(network=pooled, in_channels=3, num_classes=10)[0].in_features == 7


def test_adapter_replaces_the_last_layer_only_if_the_classes_differ() -> None:
    model = small_model()
    first, last = model[0].weight, model[4].weight
    adapt(network=model, in_channels=3, num_classes=10)
    assert model[0].weight is first
    assert model[4].weight is last
    adapt(network=model, in_channels=3, num_classes=5)
    assert model[0].weight is first
    assert model[4].weight.shape == (5, 8)
    assert model[4].weight.isfinite().all()
    assert model[4].weight.abs().max() <= 8**-0.5
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)

    fully_convolutional = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    adapt(network=fully_convolutional, in_channels=1, num_classes=4)
    assert fully_convolutional(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    assert fully_convolutional[1].out_channels == 4


def test_adapter_keeps_a_frozen_layer_frozen() -> None:
    model = small_model().requires_grad_(False)
    adapt(network=model, in_channels=1, num_classes=3)
    assert not model[0].weight.requires_grad
    assert model[4].weight.requires_grad


# ---- Invalid arguments


@pytest.mark.parametrize(
    ("model_class", "arguments", "message"),
    [
        (MLP, {"hidden": 64}, "hidden = 64: must be a list of integers >= 1"),
        (MLP, {"hidden": "64"}, "hidden = 64: must be a list of integers >= 1"),
        (MLP, {"hidden": [64, 0]}, "hidden = [64, 0]: must be a list of integers >= 1"),
        (MLP, {"hidden": [1.5]}, "hidden = [1.5]: must be a list of integers >= 1"),
        (MLP, {"hidden": [True]}, "hidden = [true]: must be a list of integers >= 1"),
        (MLP, {"dropout": 1}, "dropout = 1: must be a number >= 0 and < 1"),
        (MLP, {"dropout": -0.1}, "dropout = -0.1: must be a number >= 0 and < 1"),
        (MLP, {"dropout": "half"}, "dropout = half: must be a number >= 0 and < 1"),
        (MLP, {"dropout": float("nan")}, "dropout = nan: must be a number >= 0 and < 1"),
        (MLP, {"activation": "rleu"}, "activation = rleu: must be one of relu, leaky_relu"),
        (MLP, {"activation": "rleu"}, "did you mean relu?"),
        (MLP, {"activation": "rleu", "hidden": []}, "did you mean relu?"),
        (MLP, {"activation": None}, "activation = null: must be one of relu, leaky_relu"),
        (MLP, {"init": "he_norml"}, "did you mean he_normal?"),
        (MLP, {"init": "paper"}, "init = paper: is not defined for this model; must be one of default, he_normal"),
        (LeNet, {"init": "paper"}, "init = paper: is not defined for this model"),
        (MLP, {"num_classes": None}, "num_classes = null: must be an integer >= 1"),
        (MLP, {"in_channels": 0}, "in_channels = 0: must be an integer >= 1"),
        (MLP, {"image_size": 0}, "image_size = 0: must be an integer >= 1"),
        (LeNet5, {"image_size": 8}, "image_size = 8: LeNet5 needs at least 16 px"),
        (LeNet5, {"image_size": "32"}, "image_size = 32: must be an integer >= 1"),
        (LeNet5, {"activation": ["relu"]}, "activation = [relu]: must be one of relu"),
        (LeNet, {"dropout": 2}, "dropout = 2: must be a number >= 0 and < 1"),
        (ResNet, {"depths": []}, "depths = []: must have one integer for each of widths = [4, 8, 16]"),
        (ResNet, {"depths": [1, 1]}, "depths = [1, 1]: must have one integer for each of widths = [4, 8, 16]"),
        (ResNet, {"widths": [4, 8, -16]}, "widths = [4, 8, -16]: must be a list of integers >= 1"),
        (ResNet, {"block": "botleneck"}, "must be one of basic, bottleneck; did you mean bottleneck?"),
        (ResNet, {"stem": "large"}, "stem = large: must be one of imagenet, small"),
        (ResNet, {"shortcut": "C"}, "shortcut = C: must be one of A, B, none"),
        (MLP, {"pieces": 0}, "pieces = 0: must be an integer >= 1"),
        (MLP, {"activation": "maxot"}, "did you mean maxout?"),
        (LeNet5, {"activation": "maxout"}, "activation = maxout: must be one of relu"),
        (MaxoutNet, {"pieces": 1.5}, "pieces = 1.5: must be an integer >= 1"),
        (MaxoutNet, {"widths": []}, "widths = []: must contain at least one integer >= 1, such as [32, 32, 64]"),
        (VGG, {"stages": []}, "stages = []: must be a list of lists of integers >= 1, such as [[64], [128, 128]]"),
        (VGG, {"stages": [64, 128]}, "stages = [64, 128]: must be a list of lists of integers >= 1"),
        (VGG, {"stages": [[64], []]}, "stages = [[64], []]: must be a list of lists of integers >= 1"),
        (VGG, {"stages": "64"}, "stages = 64: must be a list of lists of integers >= 1"),
        (VGG, {"head": "smal"}, "must be one of imagenet, small; did you mean small?"),
        (VGG, {"dropout": 1}, "dropout = 1: must be a number >= 0 and < 1"),
        (NIN, {"widths": [[8, 0], [4]]}, "widths = [[8, 0], [4]]: must be a list of lists of integers >= 1"),
        (NIN, {"kernel_sizes": [5, 4]}, "kernel_sizes = [5, 4]: must be 2 odd integers, one for each list in widths"),
        (Airbench, {"widths": [8, 0]}, "widths = [8, 0]: must be a list of integers >= 1"),
        (NIN, {"kernel_sizes": [5]}, "kernel_sizes = [5]: must be 2 odd integers, one for each list in widths"),
        (AlexNet, {"groups": 3}, "groups = 3: must be 1 or 2"),
        (AlexNet, {"image_size": 64}, "image_size = 64: AlexNet needs at least 67 px"),
    ],
)
def test_config_error_names_wrong_model_arguments(model_class: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_class(**{**ARGUMENTS[model_class], **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "in_channels", "message"),
    [
        ("resnet18", 3, "network = str: must be a torch.nn.Module"),
        (nn.Sequential(nn.Flatten()), 3, "network = Sequential: must contain a convolution or a linear layer"),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 10)), 3, "its first convolution is grouped"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 9, 3)),
            3,
            "its last layer must be a linear layer or an ungrouped 1x1 convolution, not Conv2d(",
        ),
        (small_model(), 0, "in_channels = 0: must be an integer >= 1"),
    ],
)
def test_adapter_refuses_models_it_cannot_fit(model: Any, in_channels: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        adapt(network=model, in_channels=in_channels, num_classes=10)
    assert message in str(error.value)
