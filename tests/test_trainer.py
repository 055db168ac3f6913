"""The loop compared with a plain torch loop; stop conditions; contents of the files that a run writes."""

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


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# A plain loop in torch operations


def batches(run: Run, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the training split in the order of the epoch, normalised here."""
    loader, order = run.training.train_loader, run.training.train_loader.order(epoch)
    mean, std = (run.state.normalisation.tensors[name][:, None, None] for name in ("mean", "std"))
    for start in range(0, len(order), loader.batch_size):
        rows = order[start : start + loader.batch_size]
        scale, bias = (1 / (255 * std.double())).float(), (-mean.double() / std.double()).float()
        yield loader.source.pixels[rows] * scale + bias, loader.source.labels[rows]


def plain_loop(
    run: Run, *, epochs: int, lr: float, momentum: float, decay: float, clip: float | None, l1: float = 0
) -> Any:
    """Train with SGD, momentum and a cosine; return the last weights, the gradient norms and the moving average."""
    model, names = run.state.model, [name for name, _ in run.state.model.named_parameters()]
    velocity: dict[str, Tensor] = {}
    average = weights(model)
    steps_per_epoch = math.ceil(len(run.training.train_loader.order(0)) / run.training.train_loader.batch_size)
    norms, step = [], 0
    model.train()
    for epoch in range(epochs):
        for images, labels in batches(run, epoch):
            step_lr = lr * (1 + math.cos(math.pi * step / (epochs * steps_per_epoch))) / 2
            model.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            for parameter in model.parameters():
                parameter.grad += l1 * torch.sign(parameter.detach())
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    gradient = parameter.grad.add(parameter, alpha=decay)
                    velocity[name] = velocity[name] * momentum + gradient if name in velocity else gradient.clone()
                    parameter.add_(velocity[name], alpha=-step_lr)
            step += 1
            ema_decay = min(0.9, (1 + step) / (10 + step))
            for name in names:
                average[name] = ema_decay * average[name] + (1 - ema_decay) * model.state_dict()[name]
    return weights(model), norms, average


# Not fused: a fused kernel rounds once, separate operations round several times.
NOT_FUSED = "+optimizer.fused=false"
SGD = ("optimizer=sgd", "optimizer.lr=0.2", "optimizer.momentum=0.8", "optimizer.weight_decay=0.01", NOT_FUSED)


@pytest.mark.parametrize(("clip", "l1"), [(None, 0), (0.5, 0), (None, 0.01), (0.5, 0.01)])
def test_fit_is_bit_identical_to_a_plain_loop(tmp_path, clip, l1):
    clipping = f"trainer.clip_norm={'null' if clip is None else clip}"
    overrides = (*SGD, clipping, f"trainer.l1={l1}", "trainer.checkpoint.monitor=null")
    run = built(tmp_path / "run", *overrides)
    logged_norms: list[float] = []
    log_step = run.loop.log_step
    run.loop.log_step = lambda result: (  # type: ignore[method-assign]
        logged_norms.append(result.metrics["gradient_norm"].item()),
        log_step(result),
    )
    run_to_end(run)
    reference = built(tmp_path / "other", *overrides)
    expected, norms, _ = plain_loop(reference, epochs=2, lr=0.2, momentum=0.8, decay=0.01, clip=clip, l1=l1)
    assert len(norms) == 12 == run.state.step and len(set(norms)) == 12
    assert logged_norms == norms  # before clipping
    assert clip is None or max(norms) > clip > min(norms) or min(norms) > clip
    assert_equal(weights(run.state.model), expected)
    assert_equal(run.folder.checkpoints.load("last")[0].weights, expected)


def test_plain_loop_comparison_detects_another_order(tmp_path):
    """Another seed gives other weights, so that equality is not trivial."""
    first, second = (trained(tmp_path / str(seed), *SGD, f"seed={seed}") for seed in (0, 1))
    assert not torch.equal(first.state.model.head.weight, second.state.model.head.weight)


@pytest.mark.parametrize("samples", [60, 55, 54])  # trained on 48: no remainder; 44: a last step of 8 + 4; 43: of 8 + 3
def test_accumulation_equals_a_larger_batch(tmp_path, samples):
    data = f"data.train_samples={samples}"
    small = trained(tmp_path / "small", *SGD, data, "trainer.accumulate=2", "trainer.checkpoint.monitor=null")
    large = trained(tmp_path / "large", *SGD, data, "data.batch_size=16", "trainer.checkpoint.monitor=null")
    assert small.state.step == large.state.step == 6
    assert small.training.train_loader.samples_per_epoch == large.training.train_loader.samples_per_epoch
    assert_close(weights(small.state.model), weights(large.state.model), rtol=1e-4, atol=1e-6)
    for line, expected in zip(metrics(small), metrics(large)):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
        assert line["train/accuracy"] == expected["train/accuracy"]


def test_moving_average_equals_its_formula_and_is_evaluated(tmp_path):
    overrides = (*SGD, "trainer.ema_decay=0.9", "trainer.clip_norm=2", "trainer.checkpoint.monitor=null")
    run = trained(tmp_path / "run", *overrides)
    expected, _, average = plain_loop(
        built(tmp_path / "other", *overrides), epochs=2, lr=0.2, momentum=0.8, decay=0.01, clip=2
    )
    assert run.state.ema is not None
    assert_equal(weights(run.state.model), expected)
    assert_close(weights(run.state.models["ema"]), average, rtol=1e-5, atol=1e-7)
    assert_equal(run.folder.checkpoints.load("last")[0].weights, weights(run.state.models["ema"]))
    by_average, by_model = (
        measured(model, run.training.val_loader) for model in (run.state.models["ema"], run.state.model)
    )
    assert metrics(run)[-1]["val/loss"] == pytest.approx(by_average["loss"]) != pytest.approx(by_model["loss"])
    assert summary(run)["test"]["loss"] == pytest.approx(
        measured(run.state.models["ema"], run.training.test_loader)["loss"]
    )


def test_moving_average_copies_batch_norm_statistics(tmp_path):
    run = trained(tmp_path / "run", "model.batch_norm=true", "trainer.ema_decay=0.9", "trainer.checkpoint.monitor=null")
    assert run.state.ema is not None
    buffers = dict(run.state.model.named_buffers())
    assert len(buffers) == 3 and buffers["features.2.num_batches_tracked"] == 12
    assert_equal(dict(run.state.models["ema"].named_buffers()), buffers)


def test_weight_decay_on_weights_excludes_biases_and_norms(tmp_path):
    """With zero gradients, SGD without momentum scales decayed tensors by 1 - lr x decay and does not change others."""
    overrides = ("optimizer.momentum=0", "optimizer.weight_decay=0.5", "optimizer.lr=0.1", "model.batch_norm=true")
    for decay_on in ("weights", "all"):
        run = built(tmp_path / decay_on, *overrides, f"trainer.weight_decay_on={decay_on}")
        with torch.no_grad():
            for parameter in run.state.model.parameters():
                parameter.fill_(2.0)
                parameter.grad = torch.zeros_like(parameter)
        run.state.optimizer.step()
        for name, parameter in run.state.model.named_parameters():
            is_decayed = decay_on == "all" or parameter.ndim > 1
            assert parameter.unique().tolist() == pytest.approx([2 * (1 - 0.1 * 0.5) if is_decayed else 2.0]), name
        assert {group["name"] for group in run.state.optimizer.param_groups} == (
            {"all"} if decay_on == "all" else {"weights", "no_decay"}
        )


@pytest.mark.parametrize("decay_on", ["all", "weights"])
def test_l1_step_equals_its_formula(tmp_path, decay_on):
    """w <- w - lr (g + l1 sign w), once per step of two batches. The term is 0 at w = 0, and the loss excludes it."""
    plain = ("optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=0.5", "schedule=constant")
    plain += (
        "trainer.accumulate=2",
        "trainer.max_steps=1",
        f"trainer.weight_decay_on={decay_on}",
        "data.val_fraction=0",
    )
    plain += ("trainer.checkpoint.monitor=null", "trainer.early_stopping.monitor=train/loss")
    without_l1, with_l1 = (built(tmp_path / str(l1), *plain, f"trainer.l1={l1}") for l1 in (0, 0.25))
    with torch.no_grad():
        for run in (without_l1, with_l1):
            run.state.model.head.weight[0] = 0
    initial = weights(with_l1.state.model)
    run_to_end(without_l1)
    run_to_end(with_l1)
    for name, tensor in weights(without_l1.state.model).items():
        is_penalised = decay_on == "all" or tensor.ndim > 1
        expected = tensor - 0.5 * 0.25 * torch.sign(initial[name]) * is_penalised
        torch.testing.assert_close(with_l1.state.model.state_dict()[name], expected, rtol=1e-5, atol=1e-7, msg=name)
    assert metrics(with_l1)[0]["train/loss"] == metrics(without_l1)[0]["train/loss"]


# Files of a run


@torch.no_grad()
def measured(model: nn.Module, loader: Any) -> dict[str, float]:
    """Return mean loss and accuracy, computed sample by sample in float64."""
    model.eval()
    losses, hits = [], []
    for images, labels, _ in loader:
        for image, label in zip(images, labels):
            scores = model(image[None])[0].double()
            losses.append(float(torch.logsumexp(scores, 0) - scores[label]))
            hits.append(int(scores.argmax()) == int(label))
    return {"loss": sum(losses) / len(losses), "accuracy": sum(hits) / len(hits)}


def test_logged_metrics_equal_recomputed_ones(tmp_path):
    """Validation metrics are recomputed from each epoch's checkpoint, training metrics from the recorded logits."""
    run = built(tmp_path / "run", "trainer.max_epochs=4", "trainer.checkpoint.every_steps=6", "data.eval_batch_size=4")
    run.loop.settings = replace(run.loop.settings, checkpoint_keep=None)
    samples: list[tuple[float, bool]] = []

    def record_logits(_: nn.Module, inputs: tuple[Tensor, Tensor], result: Tensor) -> None:
        logits, labels = inputs
        if run.state.model.training:
            scores = logits.detach().double()
            losses = torch.logsumexp(scores, 1) - scores[torch.arange(len(labels)), labels]
            samples.extend(zip(losses.tolist(), (scores.argmax(1) == labels).tolist()))

    run.training.loss_function.register_forward_hook(record_logits)
    run_to_end(run)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [6, 12, 18, 24] and [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert len(samples) == 4 * 44
    model = built(tmp_path / "other").state.model
    for epoch, line in enumerate(lines):
        epoch_samples = samples[44 * epoch : 44 * (epoch + 1)]
        assert line["train/loss"] == pytest.approx(sum(loss for loss, _ in epoch_samples) / 44, rel=1e-5)
        assert line["train/accuracy"] == pytest.approx(sum(hit for _, hit in epoch_samples) / 44, rel=1e-12)
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
    overrides = ("optimizer.lr=2", "trainer.max_epochs=6", "schedule=constant", "trainer.checkpoint.monitor=val/loss")
    run = trained(tmp_path / "run", *overrides)
    lines, report = metrics(run), summary(run)
    best = min(lines, key=lambda line: line["val/loss"])
    assert 0 < best["step"] < 36  # otherwise the test proves nothing
    assert report["best"]["step"] == best["step"] and report["best"]["epoch"] == best["epoch"]
    assert report["best"]["metrics"] == {key: best[key] for key in best if key[:4] in ("trai", "val/")}
    assert steps_on_disk(run, "best")[0] == best["step"]
    best_snapshot = CheckpointFolder(run.folder.path / "checkpoints").load("best")[0]
    model = built(tmp_path / "other").state.model
    model.load_state_dict(best_snapshot.weights)
    expected = measured(model, run.training.test_loader)
    assert report["test"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert report["test"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert report["test"]["loss"] != pytest.approx(measured(last_model(run, model), run.training.test_loader)["loss"])


def last_model(run: Run, model: nn.Module) -> nn.Module:
    model.load_state_dict(run.folder.checkpoints.load("last")[0].weights)
    return model


def test_summary_and_files_of_a_finished_run(tmp_path):
    run = trained(tmp_path / "run")
    report = summary(run)
    assert (report["status"], report["stop_reason"], report["step"], report["epoch"]) == (
        "finished",
        "max_epochs",
        12,
        2,
    )
    assert report["parameters"] == 64 * 16 + 16 + 16 * 4 + 4 and report["seed"] == 0
    assert torch.__version__.startswith(report["provenance"]["versions"]["torch"])
    assert report["provenance"]["device"] == "cpu" and report["provenance"]["threads"] == 1
    assert set(report["test"]) == {"loss", "accuracy"} and report["seconds"] > 0 and report["samples_per_second"] > 0
    names = {path.name for path in run.folder.path.iterdir() if not path.name.startswith("events.out")}
    assert names == {
        *(".lock", "checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl", "summary.json", "train.log"),
    }
    assert yaml.safe_load((run.folder.path / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert steps_on_disk(run, "last") == [12, 6]


# Stop conditions


@pytest.mark.parametrize(
    ("overrides", "step", "reason"),
    [
        (["trainer.max_steps=7"], 7, "max_steps"),
        (["trainer.max_steps=70"], 12, "max_epochs"),
        (["trainer.max_steps=5", "trainer.max_epochs=null"], 5, "max_steps"),
        (["trainer.max_epochs=1"], 6, "max_epochs"),
    ],
)
def test_run_ends_at_the_smallest_budget(tmp_path, overrides, step, reason):
    run = trained(tmp_path / "run", *overrides)
    assert (run.state.step, summary(run)["stop_reason"], summary(run)["status"]) == (step, reason, "finished")
    assert metrics(run)[-1]["step"] == step == steps_on_disk(run, "last")[0]


def test_max_minutes_stops_the_run(tmp_path, monkeypatch):
    run = built(tmp_path / "run", "trainer.max_minutes=2")
    start = run.state.clock.born
    monkeypatch.setattr(clock.time, "perf_counter", lambda: start + 24.2 * run.state.step)  # 121 s after step 5
    run_to_end(run)
    assert (run.state.step, summary(run)["stop_reason"], summary(run)["status"]) == (
        5,
        "max_minutes",
        "stopped_early",
    )
    assert steps_on_disk(run, "last")[0] == 5


def test_missing_budget_is_a_config_error():
    with pytest.raises(ConfigError, match=r"trainer.max_epochs = null"):
        build(composed("trainer.max_epochs=null"))


@pytest.mark.parametrize(
    ("monitor", "options"),
    [
        ("val/loss", ["patience=2"]),
        ("train/accuracy", ["patience=1", "min_delta=0.05"]),
        ("val/accuracy", ["patience=3", "geometric=1.5"]),
    ],
)
@pytest.mark.parametrize("every", ["1 epoch", "4 steps"])
def test_run_stops_when_early_stopping_on_the_logged_metrics_stops(tmp_path, monitor, options, every):
    stopping = [f"trainer.early_stopping.{item}" for item in (f"monitor={monitor}", *options)]
    common = ("optimizer.lr=1", "schedule=constant", "trainer.max_epochs=30", f"trainer.evaluate_every={every}")
    run = trained(tmp_path / "run", *common, *stopping)
    settings: dict[str, Any] = {"monitor": monitor, "mode": "min" if "loss" in monitor else "max"}
    settings |= {item.partition("=")[0]: float(item.partition("=")[2]) for item in options}
    stopper, lines = EarlyStopping(**settings), metrics(run)
    stops = []
    for line in lines:
        stopper.observe(line[monitor], line["step"] / 6)
        stops.append(stopper.stopped)
    assert stops == [False] * (len(lines) - 1) + [True] and 1 < len(lines)
    report = summary(run)
    assert (report["status"], report["stop_reason"], report["step"]) == (
        "stopped_early",
        "early_stopping",
        lines[-1]["step"],
    )
    assert run.state.step < 180 and steps_on_disk(run, "last")[0] == run.state.step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signal_saves_and_stops_the_run(tmp_path, number, code):
    handler_before = signal.getsignal(number)
    run = built(tmp_path / "run")
    run.state.optimizer.register_step_post_hook(
        lambda *_: os.kill(os.getpid(), number) if run.state.step == 3 else None
    )
    with pytest.raises(StopSignal) as caught:
        run_to_end(run)
    assert caught.value.exit_code == code and signal.getsignal(number) is handler_before
    assert run.state.step == 4 == steps_on_disk(run, "last")[0]
    report = summary(run)
    assert (report["status"], report["stop_reason"], report["test"]) == ("interrupted", number.name, {})


def test_second_interrupt_stops_the_run_immediately(tmp_path):
    run = built(tmp_path / "run")

    def interrupt_twice(*_: object) -> None:
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    run.state.optimizer.register_step_post_hook(interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(run)
    assert steps_on_disk(run, "last") == [0]


# Memory and disk


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce] DefaultCPUAllocator: x")],
)
def test_out_of_memory_saves_the_state_and_advises_smaller_batches(tmp_path, error, training):
    run = built(tmp_path / "run")

    def fail(*_: object) -> None:
        if run.state.step == 6 and run.state.model.training is training:
            raise error

    run.state.model.register_forward_pre_hook(fail)
    with pytest.raises(NumericalError, match=r"out of memory.*data.batch_size"):
        run_to_end(run)
    assert summary(run)["status"] == "failed" and steps_on_disk(run, "last")[0] == 6


def test_unknown_errors_are_raised_unchanged(tmp_path):
    run = built(tmp_path / "run")
    run.state.model.register_forward_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_to_end(run)


@pytest.mark.parametrize("failing_file", ["metrics.jsonl", "checkpoints", "summary.json"])
def test_run_continues_after_a_full_disk(tmp_path, monkeypatch, failing_file):
    run = built(tmp_path / "run", "trainer.max_epochs=3")
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if failing_file in path and ("-00000012-" in path if failing_file == "checkpoints" else run.state.step == 12):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    if failing_file == "summary.json":
        run.loop.settings = replace(run.loop.settings, total_steps=12)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="No space left"):
        run_to_end(run)
    monkeypatch.undo()
    assert steps_on_disk(run, "last")[0] == (12 if failing_file == "summary.json" else 6)
    resumed = reopened(run.folder.path)
    assert resumed is not None
    run_to_end(resumed)
    uninterrupted = trained(tmp_path / "uninterrupted", "trainer.max_epochs=3")
    assert_equal(
        resumed.folder.checkpoints.load("last")[0].weights, uninterrupted.folder.checkpoints.load("last")[0].weights
    )
    assert [line["step"] for line in metrics(resumed)] == [6, 12, 18]


# Precision and presets


def test_bf16_training_is_close_to_fp32_but_not_equal(tmp_path):
    low, full = trained(tmp_path / "low", "trainer.precision=bf16"), trained(tmp_path / "full")
    assert low.state.model.head.weight.dtype == torch.float32
    assert not torch.equal(low.state.model.head.weight, full.state.model.head.weight)
    assert_close(weights(low.state.model), weights(full.state.model), rtol=0.1, atol=0.02)


def test_debug_overfit_preset_overfits_one_batch(tmp_path):
    run = trained(tmp_path / "run", "debug=overfit", "data.val_fraction=0", "trainer.max_epochs=200")
    lines = metrics(run)
    assert lines[-1]["train/loss"] < 0.01 and lines[-1]["train/accuracy"] == 1 and run.state.step == 200
    assert "val/loss" not in lines[-1]


def test_debug_steps_preset_trains_evaluates_and_tests(tmp_path):
    run = trained(tmp_path / "run", "debug=steps")
    assert [line["step"] for line in metrics(run)] == [2, 4] and summary(run)["test"]


def test_dropout_depends_only_on_seed_and_step(tmp_path):
    """Other draws from the global generator do not change the dropout."""
    first, second = (built(tmp_path / name, "model.dropout=0.5", "trainer.checkpoint.monitor=null") for name in "ab")
    second.state.optimizer.register_step_post_hook(lambda *_: torch.rand(7))
    run_to_end(first)
    run_to_end(second)
    assert_equal(weights(first.state.model), weights(second.state.model))
    without_dropout = trained(tmp_path / "none", "trainer.checkpoint.monitor=null")
    assert not torch.equal(first.state.model.head.weight, without_dropout.state.model.head.weight)


def test_batch_larger_than_the_data_is_refused_before_the_run_folder_is_created(tmp_path):
    with pytest.raises(ConfigError, match=r"data.batch_size = 45.*at most 44"):
        built(tmp_path / "run", "data.batch_size=45")
    run = trained(tmp_path / "limited", "data.limit_train=9", "data.batch_size=9")
    assert run.state.step == 2 and run.training.train_loader.samples == 9
    assert not (tmp_path / "run").exists()


def test_monitor_that_is_not_logged_is_a_config_error():
    for section in ("trainer.early_stopping", "trainer.checkpoint"):
        others = {"trainer.early_stopping", "trainer.checkpoint"} - {section}
        overrides = [f"{section}.monitor=val/loss", *(f"{other}.monitor=train/loss" for other in others)]
        with pytest.raises(ConfigError, match=rf"{section}.monitor = val/loss.*available: train/loss"):
            build(composed("data.val_fraction=0", *overrides))


def test_error_of_the_loader_keeps_its_class_and_the_last_state_is_saved(tmp_path):
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
    def settings_of_torch() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    initial = settings_of_torch()
    settings = {"threads": None, "deterministic": False, "tf32": tf32, "precision": "fp32", "compile": False}
    try:
        configure_torch({**settings, "device": "cpu"})
        assert settings_of_torch() == initial
        configure_tf32(tf32, torch.device("cuda"))
        assert settings_of_torch() == expected
    finally:
        torch.backends.cudnn.allow_tf32 = initial[0]
        torch.set_float32_matmul_precision(initial[1])


def test_provenance_is_read_before_the_run_folder_is_created(tmp_path, monkeypatch):
    """git would report a new folder within the repository as a change."""
    existed = []
    monkeypatch.setattr("trainer.run.provenance", lambda: {"existed": existed.append((tmp_path / "run").exists())})
    run_to_end(built(tmp_path / "run", "trainer.max_steps=1"))
    assert existed == [False]
