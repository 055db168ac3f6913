"""Inception models compared with the papers' parameter counts, torchvision and second implementations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.errors import ConfigError
from models import googlenet, inception_v3
from models.blocks import LocalResponseNorm
from models.googlenet import TABLE_1, GoogLeNet
from models.inception_small import InceptionSmall
from models.inception_v3 import InceptionV3
from trainer.build.dry_run import check_model

pytestmark = pytest.mark.thorough

TEN: dict[str, Any] = {"num_classes": 10, "in_channels": 3}
IMAGENET: dict[str, Any] = {"num_classes": 1000, "in_channels": 3}
MODELS: list[tuple[Any, dict[str, Any], int]] = [  # with the smallest image side of each model
    (GoogLeNet, {"auxiliary": True}, 63),
    (GoogLeNet, {"auxiliary": False, "batch_norm": True}, 31),
    (InceptionV3, {"auxiliary": True}, 107),
    (InceptionV3, {"auxiliary": False}, 75),
    (InceptionSmall, {"batch_norm": True}, 1),
    (InceptionSmall, {"batch_norm": False}, 1),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def without_dropout(model: nn.Module) -> nn.Module:
    """Set all dropout rates to 0, so that two forward passes in training mode are equal, and return the model."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def randomise(model: nn.Module) -> nn.Module:
    """Set biases, norm weights and running statistics to random values, as after some training; return the model."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            if isinstance(layer.weight, nn.Parameter):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
        if getattr(layer, "bias", None) is not None:
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model


# ---- All models


@pytest.mark.parametrize(
    ("model_class", "arguments", "parameters"),
    [
        (GoogLeNet, {**IMAGENET}, 13_378_280),
        (GoogLeNet, {**IMAGENET, "auxiliary": False}, 6_998_552),
        (InceptionV3, {**IMAGENET}, 27_161_264),
        (InceptionV3, {**IMAGENET, "auxiliary": False}, 23_834_568),
        (InceptionSmall, {**TEN}, 1_649_402),
        (InceptionSmall, {**TEN, "batch_norm": False}, 1_649_402),
    ],
)
def test_inception_parameter_counts_equal_the_papers(
    model_class: Any, arguments: dict[str, Any], parameters: int
) -> None:
    with torch.device("meta"):
        assert count(model_class(**arguments)) == parameters


@pytest.mark.parametrize(("model_class", "arguments", "smallest"), MODELS)
def test_minimum_size_is_the_smallest_valid_inception_input(
    model_class: Any, arguments: dict[str, Any], smallest: int
) -> None:
    """In training and evaluation mode, as in the builder's dry run; one pixel less is refused, and would fail."""

    def build(side: int) -> None:
        target = {"_target_": model_class.__name__}
        check_model(model, {"data": {"num_classes": 10, "channels": 3, "image_size": side}, "model": target})

    model = model_class(**TEN, **arguments, init="default")
    build(smallest)
    assert model.minimum_size == smallest
    if smallest == 1:
        return
    with pytest.raises(ConfigError) as error:
        build(smallest - 1)
    needs = f"{model_class.__name__} needs images of at least {smallest} pixels"
    assert str(error.value) == f"error[config] data.image_size = {smallest - 1}: {needs}"
    model.minimum_size = 1
    with pytest.raises(ConfigError, match="does not take images"):
        build(smallest - 1)


@pytest.mark.parametrize(
    ("build", "pixels"),
    [
        (lambda: googlenet.AuxiliaryHead(8, 10, batch_norm=False), 4),
        (lambda: inception_v3.AuxiliaryHead(8, 10), 5),
    ],
    ids=["googlenet", "inception_v3"],
)
def test_auxiliary_heads_accept_every_size_from_their_minimum(build: Callable[[], nn.Module], pixels: int) -> None:
    """The two sides differ, so that swapping them fails. The compiled head must compute the same pooling."""
    head = build().eval()
    for side in range(pixels, 30):
        assert head(torch.randn(1, 8, side, side + side // 3)).shape == (1, 10)
    maps = torch.randn(1, 8, pixels + 2, pixels + 9)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="eager")(maps), head(maps))


@pytest.mark.parametrize(("model_class", "arguments", "smallest"), MODELS)
def test_auxiliary_logits_exist_only_in_training_and_every_parameter_gets_a_gradient(
    model_class: Any, arguments: dict[str, Any], smallest: int
) -> None:
    """Also checks that forward equals head(features) and that channels_last is preserved."""
    model = model_class(**TEN, **arguments, init="he_normal").to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, max(smallest, 9), max(smallest, 9)).contiguous(memory_format=torch.channels_last)
    outputs = model.train()(images)
    heads = {GoogLeNet: 3, InceptionV3: 2}[model_class] if arguments.get("auxiliary") else 1
    if heads == 1:
        assert isinstance(outputs, Tensor)
        outputs = (outputs,)
    assert type(outputs) is tuple
    assert [logits.shape for logits in outputs] == [(3, 10)] * heads
    sum(functional.cross_entropy(logits, torch.tensor([1, 4, 8])) for logits in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name

    model.eval()
    maps = model.features(images)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(images), model.head(maps))


@pytest.mark.parametrize(
    ("model_class", "arguments", "message"),
    [
        (
            GoogLeNet,
            {"init": "paper"},
            "init = paper: is not defined for this model; must be one of default, he_normal",
        ),
        (GoogLeNet, {"dropout": 1}, "dropout = 1: must be a number >= 0 and < 1"),
        (GoogLeNet, {"num_classes": 0}, "num_classes = 0: must be an integer >= 1"),
        (InceptionV3, {"dropout": -1}, "dropout = -1: must be a number >= 0 and < 1"),
        (InceptionV3, {"in_channels": None}, "in_channels = null: must be an integer >= 1"),
        (InceptionSmall, {"init": "he"}, "init = he: must be one of default, he_normal"),
        (InceptionSmall, {"in_channels": "3"}, "in_channels = 3: must be an integer >= 1"),
    ],
)
def test_config_error_names_wrong_inception_arguments(
    model_class: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error, torch.device("meta"):
        model_class(**{**TEN, **arguments})
    assert message in str(error.value)


# ---- GoogLeNet


def googlenet_reference(state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three logits of table 1 and figure 3 in plain operations; layers in the paper's order."""
    parameters = iter(state.values())

    def convolve(maps: Tensor, stride: int = 1) -> Tensor:
        weight, bias = next(parameters), next(parameters)
        return functional.relu(functional.conv2d(maps, weight, bias, stride, weight.shape[-1] // 2))

    def halve(maps: Tensor) -> Tensor:  # even sides: pad one row and column, as in the paper's sizes
        right, below = maps.shape[3] % 2 == 0, maps.shape[2] % 2 == 0
        return functional.max_pool2d(functional.pad(maps, (0, right, 0, below), value=-torch.inf), 3, 2)

    def respond(maps: Tensor) -> Tensor:  # torch divides alpha by the size; the paper does not
        return functional.local_response_norm(maps, 5, alpha=5e-4, beta=0.75, k=2.0)

    def inception(maps: Tensor) -> Tensor:
        one, three, five = convolve(maps), convolve(convolve(maps)), convolve(convolve(maps))
        return torch.cat((one, three, five, convolve(functional.max_pool2d(maps, 3, 1, 1))), 1)

    def classify(maps: Tensor) -> Tensor:
        maps = convolve(functional.avg_pool2d(maps, 5, 3))
        assert maps.shape[1:] == (128, 4, 4)
        hidden = functional.relu(functional.linear(maps.reshape(-1, 2048), next(parameters), next(parameters)))
        return functional.linear(hidden, next(parameters), next(parameters))

    maps = respond(halve(convolve(images, 2)))
    assert maps.shape[1:] == (64, 56, 56)
    maps = halve(respond(convolve(convolve(maps))))
    assert maps.shape[1:] == (192, 28, 28)
    maps = halve(inception(inception(maps)))
    assert maps.shape[1:] == (480, 14, 14)
    after_4a = inception(maps)
    assert after_4a.shape[1:] == (512, 14, 14)
    after_4d = inception(inception(inception(after_4a)))
    assert after_4d.shape[1:] == (528, 14, 14)
    maps = inception(inception(halve(inception(after_4d))))
    assert maps.shape[1:] == (1024, 7, 7)
    logits = functional.linear(maps.mean((2, 3)), next(parameters), next(parameters))
    return logits, classify(after_4a), classify(after_4d)


def test_googlenet_equals_a_second_implementation_at_224_pixels() -> None:
    model = without_dropout(randomise(GoogLeNet(**TEN))).train()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        outputs, expected = model(images), googlenet_reference(model.state_dict(), images)
        assert torch.equal(model.eval()(images), outputs[0])
    for logits, reference in zip(outputs, expected, strict=True):
        assert reference.std() > 0.5
        torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)


def test_googlenet_block_channels_match_the_paper() -> None:
    """The input channels of a block are the output channels of the block before; the sums are the paper's sizes."""
    out = [one + three + five + pooled for _, one, _, three, _, five, pooled in TABLE_1.values()]
    assert out == [256, 480, 512, 512, 512, 528, 832, 832, 1024]
    assert [row[0] for row in TABLE_1.values()] == [192, *out[:-1]]


def test_googlenet_batch_norm_replaces_biases_and_local_response_norm() -> None:
    with torch.device("meta"):
        plain, normed = GoogLeNet(**TEN), GoogLeNet(**TEN, batch_norm=True)
    convolutions = [layer for layer in normed.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 3 + 9 * 6 + 2
    assert all(convolution.bias is None for convolution in convolutions)
    assert [sum(isinstance(layer, LocalResponseNorm) for layer in model.modules()) for model in (plain, normed)] == [
        2,
        0,
    ]
    assert count(normed) - count(plain) == sum(convolution.out_channels for convolution in convolutions)
    assert list(map(type, normed.to_4a[0])) == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_googlenet_dropout_and_auxiliary_weights_equal_the_papers() -> None:
    with torch.device("meta"):
        model = GoogLeNet(**TEN)
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.4, 0.7, 0.7]
    assert (GoogLeNet.auxiliary_weight, InceptionV3.auxiliary_weight) == (0.3, 0.4)


# ---- Inception v3


@pytest.fixture(scope="module")
def reference_model() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return randomise(torchvision.models.inception_v3(num_classes=10, init_weights=False, dropout=0.0))


def test_inception_v3_without_auxiliary_head_equals_torchvision(reference_model: Any) -> None:
    """In evaluation mode: the state dict loads strictly, logits and gradients of all parameters are equal."""
    model = InceptionV3(**TEN, auxiliary=False, init="default").eval()
    model.load_state_dict({k: v for k, v in reference_model.state_dict().items() if "AuxLogits" not in k}, strict=True)
    images = torch.randn(2, 3, 107, 96)
    logits, expected = model(images), reference_model.eval()(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    functional.cross_entropy(logits, torch.tensor([3, 7])).backward()
    reference_model.zero_grad()
    functional.cross_entropy(expected, torch.tensor([3, 7])).backward()
    references = dict(reference_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, references[name].grad, rtol=1e-5, atol=1e-5)


def test_inception_v3_with_auxiliary_head_equals_torchvision(reference_model: Any) -> None:
    """At the paper's size, in training mode: both logits and the running statistics of batch norm are equal."""
    model = InceptionV3(**TEN, dropout=0.0, init="default").train()
    model.load_state_dict(reference_model.state_dict(), strict=True)
    images = torch.randn(2, 3, 299, 299)
    with torch.no_grad():
        outputs, expected = model(images), reference_model.train()(images)
    for logits, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
    references = reference_model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, references[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [17, 18, 20, 23])
def test_auxiliary_head_of_inception_v3_equals_torchvision(reference_model: Any, side: int) -> None:
    """For images from 299 pixels, torchvision's minimum: logits and the gradient of the input are equal."""
    model = InceptionV3(**TEN, init="default").AuxLogits.eval()
    model.load_state_dict(reference_model.AuxLogits.state_dict())
    maps = torch.randn(2, 768, side, side, requires_grad=True)
    logits, expected = model(maps), reference_model.AuxLogits.eval()(maps)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value.square().sum(), maps)[0] for value in (logits, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_inception_v3_paper_init_is_a_truncated_normal() -> None:
    """A normal distribution truncated at two standard deviations has 0.8796 of the standard deviation."""
    model = InceptionV3(**TEN, init="paper")
    head = model.AuxLogits
    layers = [(model.Mixed_6e.branch7x7_2.conv, 0.1), (model.fc, 0.1), (head.conv0.conv, 0.1)]
    for layer, deviation in (*layers, (head.conv1.conv, 0.01), (head.fc, 0.001)):
        assert layer.weight.std().item() == pytest.approx(0.8796 * deviation, rel=0.03)
        assert 1.9 * deviation < layer.weight.abs().max().item() <= 2 * deviation
    assert not model.fc.bias.any()


# ---- Small Inception


@pytest.mark.parametrize("batch_norm", [True, False])
def test_inception_small_equals_a_second_implementation(batch_norm: bool) -> None:
    """The reference is figure 3 of the paper in plain operations; its batch norm has a shift and no scale."""
    model = randomise(InceptionSmall(**TEN, batch_norm=batch_norm)).eval()
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    values = iter(state.values())

    def convolve(maps: Tensor, stride: int = 1) -> Tensor:
        weight = next(values)
        if not batch_norm:
            return functional.relu(functional.conv2d(maps, weight, next(values), stride, weight.shape[-1] // 2))
        maps = functional.conv2d(maps, weight, None, stride, weight.shape[-1] // 2)
        shift, mean, variance = (next(values).reshape(1, -1, 1, 1) for _ in range(3))
        return functional.relu((maps - mean) / torch.sqrt(variance + 1e-5) + shift)

    def inception(maps: Tensor) -> Tensor:
        return torch.cat((convolve(maps), convolve(maps)), 1)

    def downsample(maps: Tensor) -> Tensor:
        return torch.cat((convolve(maps, 2), functional.max_pool2d(maps, 3, 2, 1)), 1)

    images = torch.randn(2, 3, 28, 28)
    maps = downsample(inception(inception(convolve(images))))
    assert maps.shape == (2, 160, 14, 14)
    maps = downsample(inception(inception(inception(inception(maps)))))
    assert maps.shape == (2, 240, 7, 7)
    maps = inception(inception(maps))
    assert maps.shape == (2, 336, 7, 7)
    expected = functional.linear(functional.avg_pool2d(maps, 7).reshape(2, 336), next(values), next(values))
    assert next(values, None) is None
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


# ---- Training


@pytest.mark.parametrize(
    ("build", "side", "lr"),
    [
        (lambda: InceptionSmall(**TEN), 12, 1e-3),
        (lambda: InceptionSmall(**TEN, batch_norm=False), 12, 1e-3),
        # The initial weights matter: with torch's or Xavier's, the loss stays at chance level, log 4 = 1.39.
        (lambda: without_dropout(GoogLeNet(**TEN)), 63, 1e-4),
    ],
    ids=["small", "small without norms", "googlenet"],
)
def test_inception_model_overfits_a_batch(build: Callable[[], nn.Module], side: int, lr: float) -> None:
    model = build().train()
    images, labels = torch.randn(4, 3, side, side), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(16):
        outputs = model(images)
        logits, *auxiliary = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = functional.cross_entropy(logits, labels)
        total_loss = loss + 0.3 * sum(functional.cross_entropy(output, labels) for output in auxiliary)
        optimizer.zero_grad()
        total_loss.backward()
        optimizer.step()
    assert loss < 0.7  # half of the chance level
    assert logits.argmax(1).equal(labels)
