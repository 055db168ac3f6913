"""Muon compared with torch's Muon and AdamW, its choice of matrices, and all other update rules in the loop."""

import json
from typing import Any

import pytest
import torch
from conftest import built, composed, run_to_end, trained
from torch import Tensor, nn

from core.errors import ConfigError
from core.json_lines import read_lines
from models.googlenet import GoogLeNet
from models.resnet import ResNet
from trainer.build.training import build
from trainer.optim.muon import Muon, orthogonalise
from trainer.optim.parameter_groups import decayed_parameters, group_parameters, hidden_matrices
from trainer.state import load_optimizer_state, optimizer_state


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(
        num_classes=4,
        in_channels=1,
        depths=[1, 1],
        widths=[4, 8],
        block="basic",
        stem="small",
        shortcut="B",
        init="paper",
    )


def names_of(model: nn.Module, parameters: Any) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for parameter in parameters]


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Return synthetic gradients of very different magnitudes, as in a real step."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(parameter.shape, generator=generator) * 10 ** (number % 5 - 3)
        for number, (name, parameter) in enumerate(model.named_parameters())
    }


# Which parameter gets which rule


def test_muon_updates_only_hidden_matrices():
    model = resnet()
    assert names_of(model, hidden_matrices(model)) == [
        name for name, parameter in model.named_parameters() if parameter.ndim == 4 and name != "conv1.weight"
    ]
    lenet = nn.Sequential(nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(16, 120), nn.Linear(120, 4))
    assert names_of(lenet, hidden_matrices(lenet)) == ["1.weight", "2.weight"]
    perceptron = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 4))  # no convolution reads the pixels
    assert names_of(perceptron, hidden_matrices(perceptron)) == ["0.weight"]
    outputs = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Conv2d(10, 10, 3), nn.Conv2d(10, 10, 1))  # as in Network in Network
    assert names_of(outputs, hidden_matrices(outputs)) == ["1.weight"]
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4))
    assert names_of(grouped, hidden_matrices(grouped)) == ["2.weight"]
    grouped[2].requires_grad_(False)
    assert hidden_matrices(grouped) == [] == hidden_matrices(nn.Sequential(nn.ReLU()))


def test_muon_excludes_the_output_layers_of_auxiliary_heads():
    with torch.device("meta"):
        model = GoogLeNet(num_classes=10, in_channels=3, init="default")
    excluded = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    excluded -= set(names_of(model, hidden_matrices(model)))
    first, *outputs = sorted(excluded, key=lambda name: "head" in name)
    assert first.startswith("to_4a.0") and len(outputs) == 3 and sum("auxiliary" in name for name in outputs) == 2


@pytest.mark.parametrize("on", ["all", "weights"])
def test_parameter_groups_contain_each_trainable_parameter_once(on):
    model = resnet()
    model.conv1.weight.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for with_muon, expected in ((False, ["all"]), (True, ["muon", "adamw"])):
        groups = group_parameters(model, decayed=decayed_parameters(model, on), with_muon=with_muon)
        if on == "weights":
            expected = [expected[0] if with_muon else "weights", *expected[1:], "no_decay"]
            assert all(parameter.ndim == 1 for parameter in groups[-1]["params"]) and groups[-1]["weight_decay"] == 0
        assert [group["name"] for group in groups] == expected
        assert sorted(map(id, trainable)) == sorted(id(parameter) for group in groups for parameter in group["params"])


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        (("optimizer=sgd",), True),
        (("optimizer=nesterov",), True),
        (("optimizer=adamw",), True),
        (("optimizer=adagrad",), True),
        (("optimizer=sgd", "+optimizer.foreach=true"), None),
        (("optimizer=adam", "+optimizer.fused=false"), False),
        (("optimizer=rmsprop",), None),
    ],
)
def test_fused_update_is_used_if_available(tmp_path, overrides, fused):
    """The training is the same except for rounding."""
    runs = [
        built(tmp_path / name, *keys)
        for name, keys in {"a": overrides, "b": (overrides[0], "+optimizer.foreach=true")}.items()
    ]
    assert runs[0].state.optimizer.defaults.get("fused") is fused
    for run in runs:
        run_to_end(run)
    for parameter, expected in zip(*(run.state.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


# Updates


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_muon_and_adamw_updates_are_bit_identical_to_torch(monkeypatch, layout, adjust_lr_fn):
    """The weight of a convolution is updated like a matrix (out, in x k x k) by torch.optim.Muon, in 16 bits as there.

    All other parameters are updated as by torch.optim.AdamW.
    """
    monkeypatch.setattr("trainer.optim.muon.working_type", lambda device: torch.bfloat16)
    model, reference = resnet().to(memory_format=layout), resnet()
    groups = group_parameters(model, decayed=decayed_parameters(model, "weights"), with_muon=True)
    optimizer = Muon(
        groups, lr=0.02, adamw_lr=0.003, momentum=0.9, betas=[0.8, 0.99], weight_decay=0.3, adjust_lr_fn=adjust_lr_fn
    )
    is_hidden_matrix = {
        name: parameter.ndim == 4 and name != "conv1.weight" for name, parameter in reference.named_parameters()
    }
    assert 0 < sum(is_hidden_matrix.values()) < len(is_hidden_matrix)
    matrices = {
        name: nn.Parameter(parameter.detach().flatten(1).clone())
        for name, parameter in reference.named_parameters()
        if is_hidden_matrix[name]
    }
    other_parameters = {
        name: parameter for name, parameter in reference.named_parameters() if not is_hidden_matrix[name]
    }
    muon = torch.optim.Muon(
        matrices.values(), lr=0.02, momentum=0.9, weight_decay=0.3, nesterov=True, adjust_lr_fn=adjust_lr_fn
    )
    decay = [{"params": [p for p in other_parameters.values() if p.ndim > 1], "weight_decay": 0.3}]
    decay += [{"params": [p for p in other_parameters.values() if p.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(decay, lr=0.003, betas=(0.8, 0.99), fused=True)
    for step in range(4):
        for name, gradient in gradients(reference, step).items():
            model.get_parameter(name).grad = (
                gradient.to(memory_format=layout) if gradient.ndim == 4 else gradient.clone()
            )
            (matrices if is_hidden_matrix[name] else other_parameters)[name].grad = (
                gradient.flatten(1) if is_hidden_matrix[name] else gradient
            )
        for updater in (optimizer, muon, adamw):
            updater.step()
        for name, parameter in model.named_parameters():
            expected = matrices[name].view_as(parameter) if is_hidden_matrix[name] else other_parameters[name]
            assert torch.equal(parameter, expected), (step, name)
    assert model.conv1.weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6)])
def test_orthogonalise_applies_its_polynomial_to_the_singular_values(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = (
        torch.randn(shape, generator=generator, dtype=torch.float64) @ torch.logspace(-1, 1, shape[1]).double().diag()
    )
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    [actual] = orthogonalise(matrix.unsqueeze(0), steps=3, dtype=torch.float64)
    torch.testing.assert_close(actual, left @ values.diag() @ right, rtol=1e-10, atol=1e-12)


def test_muon_step_on_the_cpu_is_close_to_torchs_16_bit_step():
    """The singular values of the update are near 1 for any gradient, which is the purpose of Muon."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 12, 3), nn.Linear(12, 2))
    weight, initial = model[1].weight, model[1].weight.detach().flatten(1).clone()
    matrix = nn.Parameter(initial.clone())
    gradient = torch.randn(12, 36) * torch.logspace(-2, 2, 36)
    weight.grad, matrix.grad = gradient.view_as(weight), gradient
    groups = group_parameters(model, decayed=list(model.parameters()), with_muon=True)
    Muon(groups, lr=0.1, adjust_lr_fn="original", weight_decay=0.0).step()
    torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0).step()
    update, torch_update = (initial - weight.detach().flatten(1)) / 0.1, (initial - matrix.detach()) / 0.1
    assert (update - torch_update).norm() < 0.02 * torch_update.norm() and not torch.equal(update, torch_update)
    values = torch.linalg.svdvals(update)
    assert 0.6 < values.min() and values.max() < 1.3


def test_parameter_without_a_gradient_is_unchanged():
    model = resnet()
    optimizer = Muon(group_parameters(model, decayed=list(model.parameters()), with_muon=True), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.fc.bias.grad = torch.ones(4)
    optimizer.step()
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {"fc.bias"}


# State


@pytest.mark.parametrize("name", ["muon", "rmsprop", "adagrad"])
def test_optimizer_state_is_restored_from_a_checkpoint(tmp_path, name):
    extra = () if name == "adagrad" else ("optimizer.momentum=0.8",)
    extra += ("optimizer.centered=true",) if name == "rmsprop" else ()
    run = trained(tmp_path / "run", f"optimizer={name}", "model.hidden=[16,16]", "trainer.max_epochs=1", *extra)
    tensors, plain = optimizer_state(run.state.models, run.state.optimizer)
    kinds = {key.rpartition(".")[2] for key in tensors}
    assert (
        kinds
        == {
            "muon": {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"},
            "rmsprop": {"step", "square_avg", "momentum_buffer", "grad_avg"},
            "adagrad": {"step", "sum"},
        }[name]
        and plain == {}
    )
    other = built(tmp_path / "other", f"optimizer={name}", "model.hidden=[16,16]", *extra)
    load_optimizer_state(other.state.models, other.state.optimizer, tensors, json.loads(json.dumps(plain)))
    restored, _ = optimizer_state(other.state.models, other.state.optimizer)
    assert restored.keys() == tensors.keys() and all(torch.equal(restored[key], tensors[key]) for key in tensors)


# Through the loop


def test_schedule_sets_lr_and_momentum_of_each_group(tmp_path):
    run = built(
        tmp_path / "run",
        *("optimizer=muon", "optimizer.lr=0.02", "optimizer.adamw_lr=0.001", "trainer.weight_decay_on=weights"),
        *("schedule=one_cycle", "model.hidden=[16,16]", "trainer.bias_lr_factor=8"),
    )
    assert run.state.schedule.base_lrs == [0.02, 0.001, 0.008]
    run_to_end(run)
    groups = run.state.optimizer.param_groups
    share = groups[0]["lr"] / 0.02
    assert 0 < share < 0.01 and [group["lr"] for group in groups] == pytest.approx(
        [0.02 * share, 0.001 * share, 0.008 * share]
    )
    assert [group.get("momentum") for group in groups] == [pytest.approx(0.95), None, None]
    assert [group.get("betas") for group in groups] == [None, *[pytest.approx((0.95, 0.95))] * 2]


@pytest.mark.parametrize("name", ["muon", "rmsprop", "adagrad"])
def test_optimizer_overfits_a_batch(tmp_path, name):
    lr = {"muon": 0.003, "rmsprop": 0.001, "adagrad": 0.01}[name]
    overrides = ("model=lenet5", "data.image_size=32", "data=digits", "debug=overfit", "trainer.max_epochs=60")
    folder = trained(tmp_path / "run", f"optimizer={name}", f"optimizer.lr={lr}", *overrides).folder.path
    losses = [line["train/loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert losses[-1] < 0.1 * losses[0], losses


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.adjust_lr_fn=spectral", r"optimizer.adjust_lr_fn = spectral: must be match_rms_adamw or original"),
        ("optimizer.ns_steps=0", r"optimizer.ns_steps = 0: must be an integer in \[1, 99\]"),
        ("optimizer.adamw_lr=0", r"optimizer.adamw_lr = 0: must be a number > 0"),
        ("optimizer.momentum=1", r"optimizer.momentum = 1: must be a number in \[0, 1\)"),
        ("trainer.bias_lr_factor=2", r"trainer.bias_lr_factor = 2: .* needs trainer.weight_decay_on=weights"),
        ("+optimizer.fused=true", r"optimizer.fused = true: .* takes no such argument"),
        ("model.hidden=[]", r"optimizer._target_.*this model has none; try optimizer=adamw"),
    ],
)
def test_config_error_names_the_key_of_an_optimizer(override, message):
    with pytest.raises(ConfigError, match=message):
        build(composed("optimizer=muon", override))


def test_momentum_schedule_needs_an_optimizer_with_momentum():
    with pytest.raises(ConfigError, match=r"schedule.momentum.*this optimizer has no momentum"):
        build(composed("optimizer=adagrad", "schedule=one_cycle"))
