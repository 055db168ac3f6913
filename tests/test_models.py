"""The networks against numbers from papers, formulas, torchvision, and second implementations written here."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from core.errors import ConfigError
from models.adapter import adapt
from models.blocks import ACTIVATIONS, SCHEMES, activation, initialise
from models.lenet import LeNet, LeNet5
from models.mlp import MLP
from models.resnet import PaddedShortcut, ResNet

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
GOLDENS = json.loads((ROOT / "tests" / "goldens.json").read_text())

DIGITS: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": 28}
CIFAR: dict[str, Any] = {"num_classes": 10, "in_channels": 3}
SMALL: dict[str, Any] = {**CIFAR, "depths": [1, 1, 1], "widths": [4, 8, 16], "stem": "small"}  # quick to run


def _load_zoo() -> Any:
    specification = importlib.util.spec_from_file_location("zoo", ROOT / "scripts" / "zoo.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


zoo = _load_zoo()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On a busy machine a second thread mostly waits for its turn: four times as slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shake(network: nn.Module) -> nn.Module:
    """Norms as after some training, so that no scale, shift or running statistic is 1 or 0 by luck."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            for values in (layer.weight, layer.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (layer.bias, layer.running_mean):
                nn.init.uniform_(values, -0.5, 0.5)
    return network.eval()


# ---- Every config


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_counts_of_its_golden(name: str) -> None:
    assert zoo.measure(name, GOLDENS[name]) == GOLDENS[name]


def test_goldens_have_no_other_entries() -> None:
    assert sorted(GOLDENS) == NAMES


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("mlp", 269_322, 784 * 256 + 256 * 256 + 256 * 10),
        ("lenet5", 61_706, 28**2 * 6 * 25 + 10**2 * 16 * 6 * 25 + 400 * 120 + 120 * 84 + 84 * 10),
        ("lenet", 233_196, 24**2 * 20 * 25 + 8**2 * 50 * 20 * 25 + 800 * 256 + 256 * 10),
        # Each stage does the same work but for its first convolution, which reads half the channels.
        ("resnet20", 269_722, 32**2 * 16 * 27 + (6 + 5.5 + 5.5) * 32**2 * 16 * 144 + 64 * 10),
        ("resnet18", 11_689_512, 1_814_073_344),
        ("resnet34", 21_797_672, 3_663_761_408),
        ("resnet50", 25_557_032, 4_089_184_256),
    ],
)
def test_goldens_are_the_numbers_of_the_papers(name: str, parameters: int, multiply_adds: int) -> None:
    """Written out, so that `zoo.py --write` cannot hide a mistake."""
    assert (GOLDENS[name]["parameters"], GOLDENS[name]["multiply_adds"]) == (parameters, multiply_adds)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_learns_on_grey_and_colour(name: str, channels: int) -> None:
    """On real numbers, from the composed node alone: every parameter gets a finite gradient from a batch."""
    network = zoo.build(name, {"input": [channels, 32, 32], "num_classes": 7, "overrides": []}).train()
    logits = network(torch.randn(4, channels, 32, 32))
    assert logits.shape == (4, 7)
    functional.cross_entropy(logits, torch.arange(4)).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torchvision"])
def test_forward_is_head_of_features(name: str) -> None:
    network = zoo.build(name, {"input": [3, 32, 32], "num_classes": 7, "overrides": []}).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), network.head(network.features(images)))


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_config_has_a_comment(name: str) -> None:
    for line in (ROOT / "configs" / "model" / f"{name}.yaml").read_text().splitlines():
        assert line.startswith("#") or "  # " in line, line


@pytest.mark.parametrize("network_class", [MLP, LeNet5, LeNet, ResNet])
def test_minimum_size_is_the_smallest_that_works(network_class: Any) -> None:
    def build(side: int) -> nn.Module:
        sized = {} if network_class is ResNet else {"image_size": side}
        return network_class(num_classes=10, in_channels=1, **sized).eval()

    smallest = network_class.minimum_size
    for side in (smallest, smallest + 1, smallest + 5):
        assert build(side)(torch.randn(1, 1, side, side)).shape == (1, 10)
    if network_class in (LeNet, LeNet5):
        with pytest.raises(ConfigError) as error:
            build(15)
        assert str(error.value) == f"error[config] image_size = 15: {network_class.__name__} needs at least 16 px"


# ---- MLP


@pytest.mark.parametrize(("hidden", "parameters"), [([64], 50_890), ([256, 256], 269_322), ([], 7_850)])
def test_mlp_has_the_textbook_counts(hidden: list[int], parameters: int) -> None:
    assert count(MLP(**DIGITS, hidden=hidden)) == parameters


def test_mlp_is_matrix_products_and_the_activation_between_them() -> None:
    network = MLP(**DIGITS, hidden=[9, 5], activation="gelu")
    images = torch.randn(3, 1, 28, 28)
    first, second = (layer for layer in network.features if isinstance(layer, nn.Linear))
    hidden = functional.gelu(images.reshape(3, 784) @ first.weight.T + first.bias)
    hidden = functional.gelu(hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(network(images), hidden @ network.head.weight.T + network.head.bias)


def test_mlp_without_hidden_layers_is_linear() -> None:
    network = MLP(**DIGITS, hidden=[])
    images = torch.randn(3, 1, 28, 28)
    expected = images.reshape(3, 784) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(images), expected)


def test_mlp_orders_norm_activation_dropout() -> None:
    layers = MLP(**DIGITS, hidden=[8], batch_norm=True, dropout=0.25).features
    assert [type(layer) for layer in layers] == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert layers[1].bias is None
    assert layers[4].p == 0.25


# ---- LeNet


def test_lenet5_is_the_textbook_composition() -> None:
    """A second implementation; its shapes alone fix the order of the layers."""
    network = LeNet5(num_classes=10, in_channels=1, image_size=32)
    first, second = network.features[0], network.features[3]
    images = torch.randn(2, 1, 32, 32)
    maps = functional.avg_pool2d(torch.tanh(functional.conv2d(images, first.weight, first.bias)), 2)
    maps = functional.avg_pool2d(torch.tanh(functional.conv2d(maps, second.weight, second.bias)), 2)
    assert maps.shape == (2, 16, 5, 5)
    values = maps.reshape(2, 400)
    for index in (1, 3):
        values = torch.tanh(functional.linear(values, network.head[index].weight, network.head[index].bias))
    assert values.shape == (2, 84)
    expected = functional.linear(values, network.head[5].weight, network.head[5].bias)
    torch.testing.assert_close(network(images), expected)


def test_lenet_equals_relu_before_the_pool_exactly() -> None:
    """Logits and gradients, bit for bit, against the order of the textbooks."""
    network = LeNet(**DIGITS)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    images = torch.randn(4, 1, 28, 28)

    maps = functional.max_pool2d(functional.relu(functional.conv2d(images, *parameters[0:2])), 2)
    maps = functional.max_pool2d(functional.relu(functional.conv2d(maps, *parameters[2:4])), 2)
    assert maps.shape == (4, 50, 4, 4)
    hidden = functional.relu(functional.linear(maps.flatten(1), *parameters[4:6]))
    expected = functional.linear(hidden, *parameters[6:8])
    assert torch.equal(network(images), expected)

    labels = torch.tensor([3, 1, 4, 1])
    functional.cross_entropy(network(images), labels).backward()
    functional.cross_entropy(expected, labels).backward()
    for parameter, reference in zip(network.parameters(), parameters, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, reference.grad)


def test_lenet_drops_hidden_units_in_training_only() -> None:
    network = LeNet(**DIGITS, dropout=0.5)
    images = torch.randn(1, 1, 28, 28)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


# ---- ResNet


@pytest.mark.parametrize("depth", ["resnet18", "resnet50"])
def test_resnet_is_torchvisions(depth: str) -> None:
    """Both blocks, the stem and every parameter name: the state loads strictly, the logits agree."""
    import torchvision

    theirs = shake(getattr(torchvision.models, depth)(num_classes=1000))
    ours = zoo.build(depth, {"input": [3, 64, 64], "num_classes": 1000, "overrides": []}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "parameters"), [(3, 269_722), (5, 464_154), (7, 658_586), (9, 853_018), (18, 1_727_962)]
)
def test_small_resnets_have_the_counts_of_the_paper(blocks: int, parameters: int) -> None:
    """He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million for 20, 32, 44, 56 and 110 layers."""
    with torch.device("meta"):
        network = ResNet(**CIFAR, depths=[blocks] * 3, widths=[16, 32, 64], stem="small", shortcut="A")
    assert count(network) == parameters
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in network.modules()) == 6 * blocks + 2


def test_shortcut_options_differ_by_their_projections_alone() -> None:
    plain, padded, projected = (count(ResNet(**SMALL, shortcut=option)) for option in ("none", "A", "B"))
    assert plain == padded
    assert projected - padded == (4 * 8 + 2 * 8) + (8 * 16 + 2 * 16)  # a 1x1 convolution and a norm, twice


@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("shortcut", ["A", "none"])
def test_small_resnet_equals_one_written_by_hand(shortcut: str, side: int) -> None:
    """Plain functional operations on the state by torchvision's names; odd sizes round as the convolutions do."""
    network = shake(ResNet(**SMALL, shortcut=shortcut))
    state = network.state_dict()

    def convolve(maps: torch.Tensor, name: str, number: int, stride: int = 1) -> torch.Tensor:
        maps = functional.conv2d(maps, state[f"{name}conv{number}.weight"], stride=stride, padding=1)
        mean, variance, weight, bias = (
            state[f"{name}bn{number}.{part}"].reshape(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (maps - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    images = torch.randn(2, 3, side, side)
    maps = functional.relu(convolve(images, "", 1))
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        name = f"layer{stage}.0."
        out = convolve(functional.relu(convolve(maps, name, 1, stride)), name, 2)
        if shortcut == "A":
            carried = torch.zeros_like(out)
            for row in range(out.shape[2]):
                for column in range(out.shape[3]):
                    carried[:, : maps.shape[1], row, column] = maps[:, :, row * stride, column * stride]
            out = out + carried
        maps = functional.relu(out)
    expected = functional.linear(maps.flatten(2).mean(2), state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)


def test_padded_shortcut_has_no_state_and_passes_the_gradient_of_the_kept_pixels() -> None:
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
    """Without shortcuts a block that gives zeros silences the network; with them it is skipped."""
    for shortcut, silent in (("none", True), ("A", False), ("B", False)):
        network = ResNet(**SMALL, shortcut=shortcut).eval()
        nn.init.zeros_(network.get_submodule("layer1.0.bn2").weight)
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(network.features(images), torch.zeros(2, 16, 2, 2)) is silent


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_keeps_channels_last(shortcut: str) -> None:
    network = shake(ResNet(**SMALL, shortcut=shortcut))
    images = torch.randn(2, 3, 16, 16)
    expected = network(images)
    network.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    assert network.features(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", [LeNet(**DIGITS), LeNet5(**DIGITS), ResNet(**SMALL, shortcut="A")], ids=type)
def test_network_is_one_graph_for_the_compiler(network: nn.Module) -> None:
    images = torch.randn(2, 3 if isinstance(network, ResNet) else 1, 28, 28)
    network.eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), network(images))


# ---- Activations


def test_every_activation_is_its_formula_and_has_its_gradient_in_place() -> None:
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
    values = torch.linspace(-3, 3, 50)  # an even number: no 0, where ReLU has no one gradient
    for name, formula in formulas.items():
        ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
        out, expected = activation(name)(ours * 1), formula(theirs)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---- Starting weights


def deviation(init: str, fan_in: int, fan_out: int) -> float:
    return {"he": 2 / fan_in, "xavier": 2 / (fan_in + fan_out)}[init.split("_")[0]] ** 0.5


@pytest.mark.parametrize("init", ["he_normal", "he_uniform", "xavier_normal", "xavier_uniform"])
def test_named_starting_weights_have_the_deviation_of_their_formula(init: str) -> None:
    """On a wide convolution and a wide linear layer: about 3e5 draws put the estimate within a percent."""
    network = nn.Sequential(nn.Conv2d(64, 200, 5), nn.BatchNorm2d(200), nn.Linear(800, 400))
    initialise(network, init)
    for layer, fan_in, fan_out in ((network[0], 64 * 25, 200 * 25), (network[2], 800, 400)):
        expected = deviation(init, fan_in, fan_out)
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.01)
        assert abs(layer.weight.mean().item()) < expected / 50
        largest = layer.weight.abs().max().item() / expected
        assert largest == pytest.approx(3**0.5, rel=0.01) if init.endswith("uniform") else largest > 3.5
        assert not layer.bias.any()
    assert (network[1].weight == 1).all()
    assert not network[1].bias.any()


@pytest.mark.parametrize("init", SCHEMES)
@pytest.mark.parametrize("network_class", [MLP, LeNet5, LeNet, ResNet])
def test_every_network_takes_every_scheme(network_class: Any, init: str) -> None:
    sized = SMALL if network_class is ResNet else DIGITS
    network = network_class(**sized, init=init)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    biases = [layer.bias.abs().sum().item() for layer in layers if layer.bias is not None]
    assert all(bias > 0 for bias in biases) if init == "default" else not any(biases)
    if init.startswith(("he", "xavier")):
        for weight in (layer.weight for layer in layers if layer.weight.numel() > 5_000):
            pixels = weight[0, 0].numel()
            expected = deviation(init, weight.shape[1] * pixels, weight.shape[0] * pixels)
            assert weight.std().item() == pytest.approx(expected, rel=0.05)


def test_default_starting_weights_are_torchs_own() -> None:
    network = LeNet5(**DIGITS, init="default")
    torch.manual_seed(0)
    assert torch.equal(network.features[0].weight, nn.Conv2d(1, 6, 5).weight)


def test_papers_starting_weights() -> None:
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


# ---- The adapter


def small_network(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("old", [1, 3])
def test_adapter_keeps_the_function_on_grey_pictures(old: int, channels: int) -> None:
    network = small_network(old)
    grey = torch.randn(2, 1, 8, 8)
    expected = network(grey.expand(-1, old, -1, -1))
    names = list(network.state_dict())
    adapted = adapt(network=network, in_channels=channels, num_classes=10)
    torch.testing.assert_close(adapted(grey.expand(-1, channels, -1, -1)), expected)
    assert adapted is network
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
        network = small_network()
        network[0].weight.data = torch.tensor([red, green, blue]).reshape(1, 3, 1, 1).repeat(8, 1, 3, 3)
        adapt(network=network, in_channels=channels, num_classes=10)
        assert network[0].weight[5, :, 2, 1].tolist() == expected


def test_adapter_fits_a_first_linear_layer() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 8), nn.Tanh(), nn.Linear(8, 10))
    grey = torch.randn(2, 1, 4, 4)
    expected = network(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(adapt(network=network, in_channels=1, num_classes=10)(grey), expected)
    back = adapt(network=network, in_channels=3, num_classes=10)
    torch.testing.assert_close(back(grey.expand(-1, 3, -1, -1)), expected)
    pooled = nn.Sequential(nn.Linear(7, 10))  # no square picture: left alone
    assert adapt(network=pooled, in_channels=3, num_classes=10)[0].in_features == 7


def test_adapter_replaces_the_last_layer_only_when_it_must() -> None:
    network = small_network()
    first, last = network[0].weight, network[4].weight
    adapt(network=network, in_channels=3, num_classes=10)
    assert network[0].weight is first
    assert network[4].weight is last
    adapt(network=network, in_channels=3, num_classes=5)
    assert network[0].weight is first
    assert network[4].weight.shape == (5, 8)
    assert network[4].weight.isfinite().all()
    assert network[4].weight.abs().max() <= 8**-0.5
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 5)

    fully_convolutional = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    adapt(network=fully_convolutional, in_channels=1, num_classes=4)
    assert fully_convolutional(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    assert fully_convolutional[1].out_channels == 4


def test_adapter_keeps_a_frozen_layer_frozen() -> None:
    network = small_network().requires_grad_(False)
    adapt(network=network, in_channels=1, num_classes=3)
    assert not network[0].weight.requires_grad
    assert network[4].weight.requires_grad


# ---- What a user can type wrong


@pytest.mark.parametrize(
    ("network_class", "arguments", "message"),
    [
        (MLP, {"hidden": 64}, "hidden = 64: must be a list of whole numbers >= 1"),
        (MLP, {"hidden": "64"}, "hidden = 64: must be a list of whole numbers >= 1"),
        (MLP, {"hidden": [64, 0]}, "hidden = [64, 0]: must be a list of whole numbers >= 1"),
        (MLP, {"hidden": [1.5]}, "hidden = [1.5]: must be a list of whole numbers >= 1"),
        (MLP, {"hidden": [True]}, "hidden = [True]: must be a list of whole numbers >= 1"),
        (MLP, {"dropout": 1}, "dropout = 1: must be a number >= 0 and < 1"),
        (MLP, {"dropout": -0.1}, "dropout = -0.1: must be a number >= 0 and < 1"),
        (MLP, {"dropout": "half"}, "dropout = half: must be a number >= 0 and < 1"),
        (MLP, {"dropout": float("nan")}, "dropout = nan: must be a number >= 0 and < 1"),
        (MLP, {"activation": "rleu"}, "activation = rleu: must be one of relu, leaky_relu"),
        (MLP, {"activation": "rleu"}, "did you mean relu?"),
        (MLP, {"activation": "rleu", "hidden": []}, "did you mean relu?"),
        (MLP, {"activation": None}, "activation = null: must be one of relu, leaky_relu"),
        (MLP, {"init": "he_norml"}, "did you mean he_normal?"),
        (MLP, {"init": "paper"}, "init = paper: this network has none; must be one of default, he_normal"),
        (LeNet, {"init": "paper"}, "init = paper: this network has none"),
        (MLP, {"num_classes": None}, "num_classes = null: must be a whole number >= 1"),
        (MLP, {"in_channels": 0}, "in_channels = 0: must be a whole number >= 1"),
        (MLP, {"image_size": 0}, "image_size = 0: must be a whole number >= 1"),
        (LeNet5, {"image_size": 8}, "image_size = 8: LeNet5 needs at least 16 px"),
        (LeNet5, {"image_size": "32"}, "image_size = 32: must be a whole number >= 1"),
        (LeNet5, {"activation": ["relu"]}, "activation = ['relu']: must be one of relu"),
        (LeNet, {"dropout": 2}, "dropout = 2: must be a number >= 0 and < 1"),
        (ResNet, {"depths": []}, "depths = []: must have one number for each of widths = [4, 8, 16]"),
        (ResNet, {"depths": [1, 1]}, "depths = [1, 1]: must have one number for each of widths = [4, 8, 16]"),
        (ResNet, {"widths": [4, 8, -16]}, "widths = [4, 8, -16]: must be a list of whole numbers >= 1"),
        (ResNet, {"block": "botleneck"}, "must be one of basic, bottleneck; did you mean bottleneck?"),
        (ResNet, {"stem": "large"}, "stem = large: must be one of imagenet, small"),
        (ResNet, {"shortcut": "C"}, "shortcut = C: must be one of A, B, none"),
    ],
)
def test_wrong_arguments_are_named(network_class: Any, arguments: dict[str, Any], message: str) -> None:
    sized = SMALL if network_class is ResNet else DIGITS
    with pytest.raises(ConfigError) as error:
        network_class(**{**sized, **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("network", "in_channels", "message"),
    [
        ("resnet18", 3, "network = str: must be a torch.nn.Module"),
        (nn.Sequential(nn.Flatten()), 3, "network = Sequential: has no convolution and no linear layer"),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 10)), 3, "its first convolution is grouped"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 9, 3)), 3, "is no linear layer or 1x1 convolution"),
        (small_network(), 0, "in_channels = 0: must be a whole number >= 1"),
    ],
)
def test_wrong_networks_are_refused_by_the_adapter(network: Any, in_channels: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        adapt(network=network, in_channels=in_channels, num_classes=10)
    assert message in str(error.value)
