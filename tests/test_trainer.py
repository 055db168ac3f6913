"""The loop against a plain one written here from torch alone; what stops it; what its files say."""

import errno
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from conftest import built, composed, reopened, run_to_end, trained
from torch import Tensor, nn
from torch.nn import functional

from core.errors import ConfigError, DataError, NumericalError, StopSignal, StorageError
from core.json_lines import read_lines
from trainer.build.training import build
from trainer.device import configure_tf32, configure_torch
from trainer.monitor import clock
from trainer.monitor.early_stopping import EarlyStopping
from trainer.run import Run
from trainer.storage.checkpoint import CheckpointFolder


def metrics(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.folder.path / "metrics.jsonl")


def summary(run: Run) -> dict[str, Any]:
    return json.loads((run.folder.path / "summary.json").read_text())


def steps_on_disk(run: Run, kind: str) -> list[int]:
    return [file.step for file in run.folder.checkpoints.files(kind)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# A plain loop, from torch's operations alone


def batches(run: Run, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training part in the epoch's order, cut and standardised by hand."""
    loader, order = run.training.train_loader, run.training.train_loader.order(epoch)
    mean, std = (run.state.normalisation.tensors[name][:, None, None] for name in ("mean", "std"))
    for start in range(0, len(order), loader.batch_size):
        chosen = order[start : start + loader.batch_size]
        scale, bias = (1 / (255 * std.double())).float(), (-mean.double() / std.double()).float()
        yield loader.source.pixels[chosen] * scale + bias, loader.source.labels[chosen]


def plain_loop(
    run: Run, *, epochs: int, lr: float, momentum: float, decay: float, clip: float | None, l1: float = 0
) -> Any:
    """SGD with momentum under a cosine, in a few lines: the last weights, the gradients' norms, the moving average."""
    model, names = run.state.model, [name for name, _ in run.state.model.named_parameters()]
    velocity: dict[str, Tensor] = {}
    average = weights(model)
    steps_per_epoch = math.ceil(len(run.training.train_loader.order(0)) / run.training.train_loader.batch_size)
    norms, step = [], 0
    model.train()
    for epoch in range(epochs):
        for images, labels in batches(run, epoch):
            rate = lr * (1 + math.cos(math.pi * step / (epochs * steps_per_epoch))) / 2
            model.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            for parameter in model.parameters():
                parameter.grad += l1 * torch.sign(parameter.detach())
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    gradient = parameter.grad.add(parameter, alpha=decay)
                    velocity[name] = velocity[name] * momentum + gradient if name in velocity else gradient.clone()
                    parameter.add_(velocity[name], alpha=-rate)
            step += 1
            share = min(0.9, (1 + step) / (10 + step))
            for name in names:
                average[name] = share * average[name] + (1 - share) * model.state_dict()[name]
    return weights(model), norms, average


# Not fused: that kernel rounds once where several operations round often.
NOT_FUSED = "+optimizer.fused=false"
SGD = ("optimizer=sgd", "optimizer.lr=0.2", "optimizer.momentum=0.8", "optimizer.weight_decay=0.01", NOT_FUSED)


@pytest.mark.parametrize(("clip", "l1"), [(None, 0), (0.5, 0), (None, 0.01), (0.5, 0.01)])
def test_fit_is_bit_identical_to_a_plain_loop(tmp_path, clip, l1):
    clipping = f"trainer.clip_norm={'null' if clip is None else clip}"
    given = (*SGD, clipping, f"trainer.l1={l1}", "trainer.checkpoint.monitor=null")
    run = built(tmp_path / "run", *given)
    seen: list[float] = []
    log_step = run.loop.log_step
    run.loop.log_step = lambda result: (  # type: ignore[method-assign]
        seen.append(result.metrics["gradient_norm"].item()),
        log_step(result),
    )
    run_to_end(run)
    other = built(tmp_path / "other", *given)
    expected, norms, _ = plain_loop(other, epochs=2, lr=0.2, momentum=0.8, decay=0.01, clip=clip, l1=l1)
    assert len(norms) == 12 == run.state.step and len(set(norms)) == 12
    assert seen == norms  # before clipping
    assert clip is None or max(norms) > clip > min(norms) or min(norms) > clip
    assert_equal(weights(run.state.model), expected)
    assert_equal(run.folder.checkpoints.load("last")[0].weights, expected)


def test_plain_loop_comparison_detects_another_order(tmp_path):
    """The reference is no tautology: another seed gives other weights."""
    one, two = (trained(tmp_path / str(seed), *SGD, f"seed={seed}") for seed in (0, 1))
    assert not torch.equal(one.state.model.head.weight, two.state.model.head.weight)


@pytest.mark.parametrize("samples", [60, 55, 54])  # 48: even; 44: a tail of 12, 8 + 4; 43: 11, 8 + 3
def test_accumulation_is_a_larger_batch(tmp_path, samples):
    data = f"data.train_samples={samples}"
    small = trained(tmp_path / "small", *SGD, data, "trainer.accumulate=2", "trainer.checkpoint.monitor=null")
    large = trained(tmp_path / "large", *SGD, data, "data.batch_size=16", "trainer.checkpoint.monitor=null")
    assert small.state.step == large.state.step == 6
    assert small.training.train_loader.samples_per_epoch == large.training.train_loader.samples_per_epoch
    assert_close(weights(small.state.model), weights(large.state.model), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(metrics(small), metrics(large)):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert ours["train/accuracy"] == theirs["train/accuracy"]


def test_the_moving_average_is_its_formula_and_is_what_is_evaluated(tmp_path):
    given = (*SGD, "trainer.ema_decay=0.9", "trainer.clip_norm=2", "trainer.checkpoint.monitor=null")
    run = trained(tmp_path / "run", *given)
    expected, _, average = plain_loop(
        built(tmp_path / "other", *given), epochs=2, lr=0.2, momentum=0.8, decay=0.01, clip=2
    )
    assert run.state.ema is not None
    assert_equal(weights(run.state.model), expected)
    assert_close(weights(run.state.models["ema"]), average, rtol=1e-5, atol=1e-7)
    assert_equal(run.folder.checkpoints.load("last")[0].weights, weights(run.state.models["ema"]))
    by_average, by_model = (
        measured(network, run.training.val_loader) for network in (run.state.models["ema"], run.state.model)
    )
    assert metrics(run)[-1]["val/loss"] == pytest.approx(by_average["loss"]) != pytest.approx(by_model["loss"])
    assert summary(run)["test"]["loss"] == pytest.approx(
        measured(run.state.models["ema"], run.training.test_loader)["loss"]
    )


def test_the_average_copies_batch_norms_statistics(tmp_path):
    run = trained(tmp_path / "run", "model.batch_norm=true", "trainer.ema_decay=0.9", "trainer.checkpoint.monitor=null")
    assert run.state.ema is not None
    buffers = dict(run.state.model.named_buffers())
    assert len(buffers) == 3 and buffers["features.2.num_batches_tracked"] == 12
    assert_equal(dict(run.state.models["ema"].named_buffers()), buffers)


def test_weight_decay_on_weights_excludes_biases_and_norms(tmp_path):
    """With a zero gradient, SGD without momentum shrinks a decayed tensor by 1 - lr x decay and leaves others alone."""
    given = ("optimizer.momentum=0", "optimizer.weight_decay=0.5", "optimizer.lr=0.1", "model.batch_norm=true")
    for where in ("weights", "all"):
        run = built(tmp_path / where, *given, f"trainer.weight_decay_on={where}")
        with torch.no_grad():
            for parameter in run.state.model.parameters():
                parameter.fill_(2.0)
                parameter.grad = torch.zeros_like(parameter)
        run.state.optimizer.step()
        for name, parameter in run.state.model.named_parameters():
            is_decayed = where == "all" or parameter.ndim > 1
            assert parameter.unique().tolist() == pytest.approx([2 * (1 - 0.1 * 0.5) if is_decayed else 2.0]), name
        assert {group["name"] for group in run.state.optimizer.param_groups} == (
            {"all"} if where == "all" else {"weights", "no_decay"}
        )


@pytest.mark.parametrize("where", ["all", "weights"])
def test_an_l1_step_by_hand(tmp_path, where):
    """w <- w - lr (g + l1 sign w), once a step of two batches; at 0 nothing is added, and the loss is the data's."""
    plain = ("optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=0.5", "schedule=constant")
    plain += ("trainer.accumulate=2", "trainer.max_steps=1", f"trainer.weight_decay_on={where}", "data.val_fraction=0")
    plain += ("trainer.checkpoint.monitor=null", "trainer.early_stopping.monitor=train/loss")
    without, with_l1 = (built(tmp_path / str(l1), *plain, f"trainer.l1={l1}") for l1 in (0, 0.25))
    with torch.no_grad():
        for run in (without, with_l1):
            run.state.model.head.weight[0] = 0
    first = weights(with_l1.state.model)
    run_to_end(without)
    run_to_end(with_l1)
    for name, tensor in weights(without.state.model).items():
        is_penalised = where == "all" or tensor.ndim > 1
        expected = tensor - 0.5 * 0.25 * torch.sign(first[name]) * is_penalised
        torch.testing.assert_close(with_l1.state.model.state_dict()[name], expected, rtol=1e-5, atol=1e-7, msg=name)
    assert metrics(with_l1)[0]["train/loss"] == metrics(without)[0]["train/loss"]


# What it writes


@torch.no_grad()
def measured(model: nn.Module, loader: Any) -> dict[str, float]:
    """Mean loss and accuracy, sample by sample in float64."""
    model.eval()
    losses, hits = [], []
    for images, labels, _ in loader:
        for image, label in zip(images, labels):
            scores = model(image[None])[0].double()
            losses.append(float(torch.logsumexp(scores, 0) - scores[label]))
            hits.append(int(scores.argmax()) == int(label))
    return {"loss": sum(losses) / len(losses), "accuracy": sum(hits) / len(hits)}


def test_metrics_against_recomputation(tmp_path):
    """Each epoch's checkpoint gives that line's val figures; the logits seen in training give its train figures."""
    run = built(tmp_path / "run", "trainer.max_epochs=4", "trainer.checkpoint.every_steps=6", "data.eval_batch_size=4")
    run.loop.settings = replace(run.loop.settings, checkpoint_keep=None)
    seen: list[tuple[float, bool]] = []

    def note(_: nn.Module, given: tuple[Tensor, Tensor], result: Tensor) -> None:
        logits, labels = given
        if run.state.model.training:
            scores = logits.detach().double()
            each = torch.logsumexp(scores, 1) - scores[torch.arange(len(labels)), labels]
            seen.extend(zip(each.tolist(), (scores.argmax(1) == labels).tolist()))

    run.training.loss_function.register_forward_hook(note)
    run_to_end(run)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [6, 12, 18, 24] and [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert len(seen) == 4 * 44
    model = built(tmp_path / "other").state.model
    for epoch, line in enumerate(lines):
        part = seen[44 * epoch : 44 * (epoch + 1)]
        assert line["train/loss"] == pytest.approx(sum(loss for loss, _ in part) / 44, rel=1e-5)
        assert line["train/accuracy"] == pytest.approx(sum(hit for _, hit in part) / 44, rel=1e-12)
        file = next(file for file in run.folder.checkpoints.files("step") if file.step == line["step"])
        content = safetensors.torch.load_file(file.path)
        model.load_state_dict(
            {key.removeprefix("model."): value for key, value in content.items() if key[:6] == "model."}
        )
        expected = measured(model, run.training.val_loader)
        assert line["val/loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["val/accuracy"] == pytest.approx(expected["accuracy"], rel=1e-12)
        assert line["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * (line["step"] - 1) / 24)) / 2)
    assert len({line["val/loss"] for line in lines}) == 4


def test_best_weights_are_tested(tmp_path):
    given = ("optimizer.lr=2", "trainer.max_epochs=6", "schedule=constant", "trainer.checkpoint.monitor=val/loss")
    run = trained(tmp_path / "run", *given)
    lines, told = metrics(run), summary(run)
    best = min(lines, key=lambda line: line["val/loss"])
    assert 0 < best["step"] < 36  # else this shows nothing
    assert told["best"]["step"] == best["step"] and told["best"]["epoch"] == best["epoch"]
    assert told["best"]["metrics"] == {key: best[key] for key in best if key[:4] in ("trai", "val/")}
    assert steps_on_disk(run, "best")[0] == best["step"]
    found = CheckpointFolder(run.folder.path / "checkpoints").load("best")[0]
    other = built(tmp_path / "other").state.model
    other.load_state_dict(found.weights)
    expected = measured(other, run.training.test_loader)
    assert told["test"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert told["test"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert told["test"]["loss"] != pytest.approx(measured(last_model(run, other), run.training.test_loader)["loss"])


def last_model(run: Run, model: nn.Module) -> nn.Module:
    model.load_state_dict(run.folder.checkpoints.load("last")[0].weights)
    return model


def test_summary_and_files(tmp_path):
    run = trained(tmp_path / "run")
    told = summary(run)
    assert (told["status"], told["stop_reason"], told["step"], told["epoch"]) == ("finished", "max_epochs", 12, 2)
    assert told["parameters"] == 64 * 16 + 16 + 16 * 4 + 4 and told["seed"] == 0
    assert torch.__version__.startswith(told["provenance"]["versions"]["torch"])
    assert told["provenance"]["device"] == "cpu" and told["provenance"]["threads"] == 1
    assert set(told["test"]) == {"loss", "accuracy"} and told["seconds"] > 0 and told["samples_per_second"] > 0
    names = {path.name for path in run.folder.path.iterdir() if not path.name.startswith("events.out")}
    assert names == {
        *(".lock", "checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl", "summary.json", "train.log"),
    }
    assert yaml.safe_load((run.folder.path / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert steps_on_disk(run, "last") == [12, 6]


# What ends it


@pytest.mark.parametrize(
    ("given", "step", "reason"),
    [
        (["trainer.max_steps=7"], 7, "max_steps"),
        (["trainer.max_steps=70"], 12, "max_epochs"),
        (["trainer.max_steps=5", "trainer.max_epochs=null"], 5, "max_steps"),
        (["trainer.max_epochs=1"], 6, "max_epochs"),
    ],
)
def test_run_ends_at_the_smallest_budget(tmp_path, given, step, reason):
    run = trained(tmp_path / "run", *given)
    assert (run.state.step, summary(run)["stop_reason"], summary(run)["status"]) == (step, reason, "finished")
    assert metrics(run)[-1]["step"] == step == steps_on_disk(run, "last")[0]


def test_max_minutes(tmp_path, monkeypatch):
    run = built(tmp_path / "run", "trainer.max_minutes=2")
    start = run.state.clock.born
    monkeypatch.setattr(clock.time, "perf_counter", lambda: start + 24.2 * run.state.step)  # 121 s after the fifth
    run_to_end(run)
    assert (run.state.step, summary(run)["stop_reason"], summary(run)["status"]) == (
        5,
        "max_minutes",
        "stopped_early",
    )
    assert steps_on_disk(run, "last")[0] == 5


def test_no_budget_is_an_error():
    with pytest.raises(ConfigError, match=r"trainer.max_epochs = null"):
        build(composed("trainer.max_epochs=null"))


@pytest.mark.parametrize(
    ("monitor", "given"),
    [
        ("val/loss", ["patience=2"]),
        ("train/accuracy", ["patience=1", "min_delta=0.05"]),
        ("val/accuracy", ["patience=3", "geometric=1.5"]),
    ],
)
@pytest.mark.parametrize("every", ["1 epoch", "4 steps"])
def test_early_stopping_is_the_machine_fed_with_metrics(tmp_path, monitor, given, every):
    stopping = [f"trainer.early_stopping.{item}" for item in (f"monitor={monitor}", *given)]
    common = ("optimizer.lr=1", "schedule=constant", "trainer.max_epochs=30", f"trainer.evaluate_every={every}")
    run = trained(tmp_path / "run", *common, *stopping)
    settings: dict[str, Any] = {"monitor": monitor, "mode": "min" if "loss" in monitor else "max"}
    settings |= {item.partition("=")[0]: float(item.partition("=")[2]) for item in given}
    machine, lines = EarlyStopping(**settings), metrics(run)
    stops = []
    for line in lines:
        machine.observe(line[monitor], line["step"] / 6)
        stops.append(machine.stopped)
    assert stops == [False] * (len(lines) - 1) + [True] and 1 < len(lines)
    told = summary(run)
    assert (told["status"], told["stop_reason"], told["step"]) == ("stopped_early", "early_stopping", lines[-1]["step"])
    assert run.state.step < 180 and steps_on_disk(run, "last")[0] == run.state.step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(tmp_path, number, code):
    before = signal.getsignal(number)
    run = built(tmp_path / "run")
    run.state.optimizer.register_step_post_hook(
        lambda *_: os.kill(os.getpid(), number) if run.state.step == 3 else None
    )
    with pytest.raises(StopSignal) as caught:
        run_to_end(run)
    assert caught.value.exit_code == code and signal.getsignal(number) is before
    assert run.state.step == 4 == steps_on_disk(run, "last")[0]
    told = summary(run)
    assert (told["status"], told["stop_reason"], told["test"]) == ("interrupted", number.name, {})


def test_a_second_interrupt_stops_at_once(tmp_path):
    run = built(tmp_path / "run")

    def twice(*_: object) -> None:
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    run.state.optimizer.register_step_post_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(run)
    assert steps_on_disk(run, "last") == [0]


# Memory and disk


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce] DefaultCPUAllocator: x")],
)
def test_out_of_memory(tmp_path, error, training):
    run = built(tmp_path / "run")

    def fail(*_: object) -> None:
        if run.state.step == 6 and run.state.model.training is training:
            raise error

    run.state.model.register_forward_pre_hook(fail)
    with pytest.raises(NumericalError, match=r"out of memory.*data.batch_size"):
        run_to_end(run)
    assert summary(run)["status"] == "failed" and steps_on_disk(run, "last")[0] == 6


def test_other_errors_are_not_disguised(tmp_path):
    run = built(tmp_path / "run")
    run.state.model.register_forward_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_to_end(run)


@pytest.mark.parametrize("fails", ["metrics.jsonl", "checkpoints", "summary.json"])
def test_a_full_disk(tmp_path, monkeypatch, fails):
    run = built(tmp_path / "run", "trainer.max_epochs=3")
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if fails in path and ("-00000012-" in path if fails == "checkpoints" else run.state.step == 12):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    if fails == "summary.json":
        run.loop.settings = replace(run.loop.settings, total_steps=12)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="No space left"):
        run_to_end(run)
    monkeypatch.undo()
    assert steps_on_disk(run, "last")[0] == (12 if fails == "summary.json" else 6)
    again = reopened(run.folder.path)
    assert again is not None
    run_to_end(again)
    whole = trained(tmp_path / "whole", "trainer.max_epochs=3")
    assert_equal(again.folder.checkpoints.load("last")[0].weights, whole.folder.checkpoints.load("last")[0].weights)
    assert [line["step"] for line in metrics(again)] == [6, 12, 18]


# Precision, presets


def test_bf16_runs_and_is_another_training(tmp_path):
    low, full = trained(tmp_path / "low", "trainer.precision=bf16"), trained(tmp_path / "full")
    assert low.state.model.head.weight.dtype == torch.float32
    assert not torch.equal(low.state.model.head.weight, full.state.model.head.weight)
    assert_close(weights(low.state.model), weights(full.state.model), rtol=0.1, atol=0.02)


def test_debug_overfit_overfits_one_batch(tmp_path):
    run = trained(tmp_path / "run", "debug=overfit", "data.val_fraction=0", "trainer.max_epochs=200")
    lines = metrics(run)
    assert lines[-1]["train/loss"] < 0.01 and lines[-1]["train/accuracy"] == 1 and run.state.step == 200
    assert "val/loss" not in lines[-1]


def test_steps_preset_goes_through_everything(tmp_path):
    run = trained(tmp_path / "run", "debug=steps")
    assert [line["step"] for line in metrics(run)] == [2, 4] and summary(run)["test"]


def test_dropout_is_a_function_of_seed_and_step(tmp_path):
    """Whatever else draws from the global generator."""
    one, two = (built(tmp_path / name, "model.dropout=0.5", "trainer.checkpoint.monitor=null") for name in "ab")
    two.state.optimizer.register_step_post_hook(lambda *_: torch.rand(7))
    run_to_end(one)
    run_to_end(two)
    assert_equal(weights(one.state.model), weights(two.state.model))
    none = trained(tmp_path / "none", "trainer.checkpoint.monitor=null")
    assert not torch.equal(one.state.model.head.weight, none.state.model.head.weight)


def test_too_few_samples(tmp_path):
    with pytest.raises(ConfigError, match=r"data.batch_size = 45.*at most 44"):
        built(tmp_path / "run", "data.batch_size=45")
    run = trained(tmp_path / "limited", "data.limit_train=9", "data.batch_size=9")
    assert run.state.step == 2 and run.training.train_loader.samples == 9
    assert not (tmp_path / "run").exists()


def test_a_monitor_that_is_not_produced():
    for section in ("trainer.early_stopping", "trainer.checkpoint"):
        others = {"trainer.early_stopping", "trainer.checkpoint"} - {section}
        given = [f"{section}.monitor=val/loss", *(f"{other}.monitor=train/loss" for other in others)]
        with pytest.raises(ConfigError, match=rf"{section}.monitor = val/loss.*available: train/loss"):
            build(composed("data.val_fraction=0", *given))


def test_run_folder_beside_its_data(tmp_path):
    """An unhappy path in the middle: what the loader raises keeps its class, and the last state stays."""
    run = built(tmp_path / "run")
    steps = run.training.train_loader.steps

    def broken(epoch: int, start: int = 0) -> Iterator[Any]:
        if epoch == 1:
            raise DataError(str(Path("image.png")), "is gone")
        yield from steps(epoch, start)

    run.training.train_loader.steps = broken  # type: ignore[method-assign]
    with pytest.raises(DataError, match="is gone"):
        run_to_end(run)
    assert summary(run)["status"] == "failed" and steps_on_disk(run, "last")[0] == 6


@pytest.mark.parametrize(
    ("tf32", "expected"), [("auto", (True, "highest")), (True, (True, "high")), (False, (False, "highest"))]
)
def test_tf32_is_set_in_torch_on_cuda(tf32, expected):
    def told() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = told()
    settings = {"threads": None, "deterministic": False, "tf32": tf32, "precision": "fp32"}
    try:
        configure_torch({**settings, "device": "cpu"})
        assert told() == before
        configure_tf32(tf32, torch.device("cuda"))
        assert told() == expected
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_a_runs_own_folder_is_no_change_that_its_provenance_reports(tmp_path, monkeypatch):
    """git shows a new folder within the repository as a change."""
    existed = []
    monkeypatch.setattr("trainer.run.provenance", lambda: {"existed": existed.append((tmp_path / "run").exists())})
    run_to_end(built(tmp_path / "run", "trainer.max_steps=1"))
    assert existed == [False]
