"""Non-finite values never reach weights or checkpoints (docs/reliability.md: 9): the run stops or skips the step."""

import math
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import built, last_state, reopened, run_to_end
from test_trainer import SGD, assert_equal, metrics, steps_on_disk, summary, weights
from torch import Tensor, nn

from core.config import CONFIGS
from core.errors import NumericalError, StopSignal
from core.json_lines import read_lines
from trainer.monitor.nonfinite import MOST_IN_A_ROW
from trainer.run import Run

pytestmark = pytest.mark.thorough

OPTIMIZERS = (CONFIGS / "optimizer").glob("*.yaml")


def poison(run: Run, step: int, source: str) -> dict[str, Any]:
    """Make the loss of a step NaN or one of its gradients infinite; return a dict that records the state before it."""
    recorded: dict[str, Any] = {}

    def in_loss(_: nn.Module, inputs: Any, loss: Tensor) -> Tensor | None:
        if not (run.state.model.training and run.state.step == step - 1):
            return None
        recorded.update(
            before=weights(run.state.model), optimizer=str(run.state.optimizer.state_dict()), labels=inputs[1]
        )
        return loss * math.nan if source == "loss" else None

    def in_gradient(gradient: Tensor) -> Tensor:
        if run.state.step != step - 1:
            return gradient
        poisoned = gradient.clone()
        poisoned.view(-1)[3] = math.inf
        return poisoned

    run.training.loss_function.register_forward_hook(in_loss)
    if source == "gradient":
        run.state.model.head.weight.register_hook(in_gradient)
    return recorded


@pytest.mark.parametrize("source", ["loss", "gradient"])
@pytest.mark.parametrize("overrides", [["optimizer=adam"], [*SGD, "trainer.clip_norm=1"]])
def test_nonfinite_values_never_reach_the_weights(tmp_path, source, overrides):
    run = built(tmp_path / "run", *overrides, "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    recorded = poison(run, 8, source)
    with pytest.raises(NumericalError) as caught:
        run_to_end(run)
    assert_equal(weights(run.state.model), recorded["before"])
    assert str(run.state.optimizer.state_dict()) == recorded["optimizer"]
    message, rows = str(caught.value), run.training.train_loader.order(1)[8:16].tolist()
    assert caught.value.exit_code == 4 and "step 8 (epoch 1.1667)" in message and "lr 0.0" in message
    assert ", ".join(map(str, rows)) in message and torch.equal(
        run.training.train_loader.source.labels[rows], recorded["labels"]
    )
    assert ("loss nan" in message) == (source == "loss") and "gradient norm" in message
    assert steps_on_disk(run, "step") == [7, 6, 5, 4, 3, 2, 1] and steps_on_disk(run, "last")[0] == 6
    report = summary(run)
    assert report["status"] == "failed" and "not finite" in report["stop_reason"] and report["step"] == 7
    for file in run.folder.checkpoints.files("last", "best", "step"):
        content = safetensors.torch.load_file(file.path)
        assert all(tensor.isfinite().all() for tensor in content.values()), file.path.name


@pytest.mark.parametrize("detected_at", ["log line", "evaluation", "checkpoint"])
@pytest.mark.parametrize("source", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nesterov"])
def test_fused_update_skips_nonfinite_steps_and_reports_them_later(tmp_path, name, source, detected_at):
    """As on CUDA, a flag makes the fused update skip. Here on the CPU: its fused kernels support the same flag."""
    detection_step = {"log line": 5, "evaluation": 6, "checkpoint": 4}[detected_at]
    run = built(
        tmp_path / "run",
        f"optimizer={name}",
        "++optimizer.fused=true",
        f"trainer.log_every={5 if detected_at == 'log line' else 100} steps",
        f"trainer.evaluate_every={1 if detected_at == 'evaluation' else 4} epochs",
        "trainer.max_epochs=4",
        f"trainer.checkpoint.every_steps={4 if detected_at == 'checkpoint' else 100}",
        "trainer.early_stopping.patience=1",
    )
    run.state.guard.on_device = True
    recorded, after = poison(run, 3, source), []
    run.state.optimizer.register_step_post_hook(lambda *_: after.append(weights(run.state.model)))
    with pytest.raises(NumericalError) as caught:
        run_to_end(run)
    rows = ", ".join(map(str, run.training.train_loader.order(0)[16:24].tolist()))
    assert "step 3 (epoch 0.3333)" in str(caught.value) and rows in str(caught.value)
    assert len(after) == detection_step == run.state.step
    assert_equal(after[2], recorded["before"])  # the third step was skipped
    assert not torch.equal(after[3]["head.weight"], after[2]["head.weight"])  # the fourth was not
    assert all(tensor.isfinite().all() for state in after for tensor in state.values())
    assert steps_on_disk(run, "step") == [] and steps_on_disk(run, "last") == [0]
    assert metrics(run) == []


def test_skipped_first_step_leaves_momentum_at_zero(tmp_path):
    """Fused SGD allocates uninitialised momentum at the first step, even if it skips that step."""
    run = built(tmp_path / "run", *SGD, "++optimizer.fused=true", "trainer.log_every=100 steps")
    run.state.guard.on_device = True
    recorded = poison(run, 1, "gradient")
    after: list[dict[str, Tensor]] = []
    run.state.optimizer.register_step_post_hook(lambda *_: after.append(momentum_of(run)))
    with pytest.raises(NumericalError):
        run_to_end(run)
    assert recorded["before"] and all(torch.equal(value, torch.zeros_like(value)) for value in after[0].values())
    assert all(value.isfinite().all() and value.abs().max() < 100 for value in after[1].values())


def momentum_of(run: Run) -> dict[str, Tensor]:
    state = run.state.optimizer.state
    return {name: state[value]["momentum_buffer"].clone() for name, value in run.state.model.named_parameters()}


def test_device_flag_does_not_change_training_without_skipped_steps(tmp_path):
    """If no step is skipped, passing the flag to the fused update gives bit-identical weights."""
    overrides = ("optimizer=adamw", "++optimizer.fused=true", "trainer.clip_norm=1")
    host, device = built(tmp_path / "host", *overrides), built(tmp_path / "device", *overrides)
    device.state.guard.on_device = True
    run_to_end(host)
    run_to_end(device)
    assert_equal(weights(host.state.model), weights(device.state.model))


def test_nonfinite_validation_is_never_the_best(tmp_path):
    run = built(tmp_path / "run", "trainer.max_epochs=3", "trainer.checkpoint.monitor=val/loss")
    run.training.loss_function.register_forward_hook(
        lambda _, inputs, loss: loss * (1 if run.state.model.training or run.state.step != 12 else math.nan)
    )
    run.state.evaluated_model.register_forward_hook(lambda *_: None)
    run_to_end(run)
    assert metrics(run)[1]["val/loss"] is None and summary(run)["status"] == "finished"
    assert summary(run)["best"]["step"] != 12 and 12 not in steps_on_disk(run, "best")
    _, event = read_lines(run.folder.path / "events.jsonl")
    assert event["event"] == "warning" and event["step"] == 12 and "val/loss is nan" in event["text"]


def test_huge_learning_rate_saves_only_finite_checkpoints(tmp_path, promise):
    """N05: with every optimizer, the run stops at the first non-finite step and all its checkpoints are finite."""
    stopped = 0
    cases = [(name, lr) for name in sorted(path.stem for path in OPTIMIZERS) for lr in ("1e6", "1e30")]
    for name, lr in cases:
        run = built(
            *(tmp_path / f"{name} {lr}", f"optimizer={name}", f"optimizer.lr={lr}", "schedule=constant"),
            *("model.hidden=[16,16]", "trainer.max_epochs=6", "trainer.checkpoint.every_steps=1"),
            *("trainer.checkpoint.keep=null", "trainer.early_stopping.patience=null"),
        )
        with suppress(NumericalError):
            run_to_end(run)
        report = summary(run)
        if report["status"] == "failed":
            stopped += 1
            assert "error[numerical]" in report["stop_reason"] and "lower optimizer.lr" in report["stop_reason"]
            assert steps_on_disk(run, "step")[0] == run.state.step - ("is not saved" in report["stop_reason"])
        for path in (run.folder.path / "checkpoints").iterdir():
            content = safetensors.torch.load_file(path)
            assert all(tensor.isfinite().all() for tensor in content.values()), path.name
    assert stopped >= len(cases) // 2
    promise(
        9,
        "no NaN or Inf is learned or saved",
        f"{len(cases)} runs with a learning rate of 1e6 or 1e30, {stopped} stopped",
    )


# Skipped steps


def skipping(folder: Path, *overrides: str) -> Run:
    return built(folder, "trainer.on_nonfinite=skip", *BATCH_NORM, *overrides)


BATCH_NORM = ("model.batch_norm=true", "trainer.ema_decay=0.9", "trainer.log_every=100 steps", *SGD)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("source", ["loss", "gradient"])
def test_skipped_step_leaves_the_state_unchanged(tmp_path, source, on_device):
    """N06: weights, optimizer, batch norm statistics and metric sums do not change; the next step is performed."""
    run = skipping(tmp_path / "run", *(["++optimizer.fused=true"] if on_device else []))
    run.state.guard.on_device = on_device
    snapshots = [run.state.state_dict()]
    conclude = run.loop.conclude

    def record_state() -> str | None:
        snapshots.append(run.state.state_dict())
        return conclude()

    run.loop.conclude = record_state  # type: ignore[method-assign]
    recorded = poison(run, 3, source)
    run_to_end(run)
    assert run.state.step == 12 and summary(run)["status"] == "finished"
    before, after, following = (snapshot.tensors for snapshot in snapshots[2:5])
    assert recorded["before"]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert not torch.equal(following["model.head.weight"], after["model.head.weight"])
    rows = ", ".join(map(str, run.training.train_loader.order(0)[16:24].tolist()))
    warnings = [line["text"] for line in read_lines(run.folder.path / "events.jsonl") if line["event"] == "warning"]
    assert len(warnings) == 1 and "step 3 (epoch 0.3333) was skipped" in warnings[0] and rows in warnings[0]
    first = metrics(run)[0]
    assert math.isfinite(first["train/loss"])
    window_sums = snapshots[6].values["sums"]["window"]
    assert window_sums[2] == 36 and first["train/loss"] == pytest.approx(
        window_sums[0] / window_sums[2], abs=0
    )  # not the skipped 8


@pytest.mark.parametrize("on_device", [False, True])
def test_run_with_skipped_steps_resumes_bit_identically(tmp_path, on_device):
    def make(name: str) -> Run:
        run = skipping(tmp_path / name, *(["++optimizer.fused=true"] if on_device else []))
        return poisoned(run)

    def poisoned(run: Run) -> Run:
        run.state.guard.on_device = on_device
        run.training.loss_function.register_forward_hook(
            lambda _, inputs, loss: (
                loss * math.nan if run.state.model.training and run.state.step in (2, 7, 8) else None
            )
        )
        return run

    uninterrupted = make("uninterrupted")
    run_to_end(uninterrupted)
    for step in range(1, 12):
        run = make(str(step))
        run.state.model.register_forward_hook(  # within the step, skipped or not
            lambda *_, run=run, step=step: (
                os.kill(os.getpid(), signal.SIGTERM)
                if run.state.model.training and run.state.step == step - 1
                else None
            )
        )
        with pytest.raises(StopSignal):
            run_to_end(run)
        resumed = reopened(tmp_path / str(step))
        assert resumed is not None
        assert int(resumed.state.guard.in_a_row) == {3: 1, 8: 1, 9: 2}.get(step, 0)
        run_to_end(poisoned(resumed))
        assert last_state(tmp_path / str(step)) == last_state(tmp_path / "uninterrupted"), step


@pytest.mark.parametrize("on_device", [False, True])
def test_32_skipped_steps_in_a_row_end_the_run(tmp_path, on_device):
    overrides = ["trainer.max_epochs=20", *(["++optimizer.fused=true"] if on_device else [])]
    run = skipping(tmp_path / "run", *overrides)
    run.state.guard.on_device = on_device
    run.training.loss_function.register_forward_hook(
        lambda _, inputs, loss: loss * math.nan if run.state.model.training and run.state.step >= 10 else None
    )
    with pytest.raises(NumericalError, match=f"{MOST_IN_A_ROW} steps in a row" if not on_device else "steps in a row"):
        run_to_end(run)
    assert 10 + MOST_IN_A_ROW <= run.state.step + 1 <= 10 + MOST_IN_A_ROW + 12
    assert steps_on_disk(run, "last")[0] in (30, 36, 42)  # saved before the limit was reached


def test_too_many_overflows_of_a_scaled_gradient_end_the_run(tmp_path):
    """N04, with a scaler on the CPU: overflows reduce the scale; too many in a row end the run, a few do not."""
    for first, is_fatal in ((8, False), (0, True)):
        run = built(tmp_path / str(first), "trainer.max_epochs=20", "optimizer=adam")
        run.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        run.state.guard.scaler = run.state.scaler
        last = 1000 if is_fatal else first + 2
        run.state.model.head.weight.register_hook(
            lambda gradient, run=run, steps=range(first, last): (
                gradient * math.inf if run.state.step in steps else gradient
            )
        )
        if is_fatal:
            with pytest.raises(NumericalError, match="in a row"):
                run_to_end(run)
            assert run.state.step == MOST_IN_A_ROW - 1
        else:
            run_to_end(run)
            assert summary(run)["status"] != "failed" and run.state.scaler.get_scale() == 1.0  # halved twice


def test_weights_that_overflow_are_not_saved(tmp_path):
    """Loss and gradient are finite but the update is not; this is detected before saving."""
    run = built(tmp_path / "run", "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")

    def overflow(*_: object) -> None:
        if run.state.step == 4:
            with torch.no_grad():
                run.state.model.head.weight[0, 0] = math.inf

    run.state.optimizer.register_step_post_hook(overflow)
    with pytest.raises(NumericalError, match=r"step 5 .*model\.head\.weight is not finite and is not saved"):
        run_to_end(run)
    assert steps_on_disk(run, "step") == [4, 3, 2, 1]
