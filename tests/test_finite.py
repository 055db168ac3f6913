"""What is not finite is never learned nor saved (docs/reliability.md: 9): stopped at, skipped, counted."""

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

OPTIMIZERS = (CONFIGS / "optimizer").glob("*.yaml")


def poison(run: Run, step: int, what: str) -> dict[str, Any]:
    """Make the loss, or one gradient, of this step infinite or not a number; notes what the weights were before."""
    noted: dict[str, Any] = {}

    def in_loss(_: nn.Module, given: Any, loss: Tensor) -> Tensor | None:
        if not (run.state.model.training and run.state.step == step - 1):
            return None
        noted.update(before=weights(run.state.model), optimizer=str(run.state.optimizer.state_dict()), labels=given[1])
        return loss * math.nan if what == "loss" else None

    def in_gradient(gradient: Tensor) -> Tensor:
        if run.state.step != step - 1:
            return gradient
        poisoned = gradient.clone()
        poisoned.view(-1)[3] = math.inf
        return poisoned

    run.training.loss_function.register_forward_hook(in_loss)
    if what == "gradient":
        run.state.model.head.weight.register_hook(in_gradient)
    return noted


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("given", [["optimizer=adam"], [*SGD, "trainer.clip_norm=1"]])
def test_nonfinite_values_never_reach_the_weights(tmp_path, what, given):
    run = built(tmp_path / "run", *given, "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    noted = poison(run, 8, what)
    with pytest.raises(NumericalError) as caught:
        run_to_end(run)
    assert_equal(weights(run.state.model), noted["before"])
    assert str(run.state.optimizer.state_dict()) == noted["optimizer"]
    message, chosen = str(caught.value), run.training.train_loader.order(1)[8:16].tolist()
    assert caught.value.exit_code == 4 and "step 8 (epoch 1.1667)" in message and "lr 0.0" in message
    assert ", ".join(map(str, chosen)) in message and torch.equal(
        run.training.train_loader.source.labels[chosen], noted["labels"]
    )
    assert ("loss nan" in message) == (what == "loss") and "gradient norm" in message
    assert steps_on_disk(run, "step") == [7, 6, 5, 4, 3, 2, 1] and steps_on_disk(run, "last")[0] == 6
    told = summary(run)
    assert told["status"] == "failed" and "not finite" in told["stop_reason"] and told["step"] == 7
    for file in run.folder.checkpoints.files("last", "best", "step"):
        content = safetensors.torch.load_file(file.path)
        assert all(tensor.isfinite().all() for tensor in content.values()), file.path.name


@pytest.mark.parametrize("where", ["log line", "evaluation", "checkpoint"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nesterov"])
def test_fused_update_skips_nonfinite_steps_and_reports_them_later(tmp_path, name, what, where):
    """As on CUDA: a fused update that obeys a flag; here on the CPU, whose fused kernels obey the same flag."""
    seen_at = {"log line": 5, "evaluation": 6, "checkpoint": 4}[where]
    run = built(
        tmp_path / "run",
        f"optimizer={name}",
        "++optimizer.fused=true",
        f"trainer.log_every={5 if where == 'log line' else 100} steps",
        f"trainer.evaluate_every={1 if where == 'evaluation' else 4} epochs",
        "trainer.max_epochs=4",
        f"trainer.checkpoint.every_steps={4 if where == 'checkpoint' else 100}",
        "trainer.early_stopping.patience=1",
    )
    run.state.guard.on_device = True
    noted, after = poison(run, 3, what), []
    run.state.optimizer.register_step_post_hook(lambda *_: after.append(weights(run.state.model)))
    with pytest.raises(NumericalError) as caught:
        run_to_end(run)
    chosen = ", ".join(map(str, run.training.train_loader.order(0)[16:24].tolist()))
    assert "step 3 (epoch 0.3333)" in str(caught.value) and chosen in str(caught.value)
    assert len(after) == seen_at == run.state.step
    assert_equal(after[2], noted["before"])  # the third step was skipped
    assert not torch.equal(after[3]["head.weight"], after[2]["head.weight"])  # the fourth was not
    assert all(tensor.isfinite().all() for state in after for tensor in state.values())
    assert steps_on_disk(run, "step") == [] and steps_on_disk(run, "last") == [0]
    assert metrics(run) == []


def test_a_skipped_first_step_leaves_momentum_at_zero(tmp_path):
    """Fused SGD allocates its momentum unfilled at the first step, also if it skips that step."""
    run = built(tmp_path / "run", *SGD, "++optimizer.fused=true", "trainer.log_every=100 steps")
    run.state.guard.on_device = True
    noted = poison(run, 1, "gradient")
    after: list[dict[str, Tensor]] = []
    run.state.optimizer.register_step_post_hook(lambda *_: after.append(momentum_of(run)))
    with pytest.raises(NumericalError):
        run_to_end(run)
    assert noted["before"] and all(torch.equal(value, torch.zeros_like(value)) for value in after[0].values())
    assert all(value.isfinite().all() and value.abs().max() < 100 for value in after[1].values())


def momentum_of(run: Run) -> dict[str, Tensor]:
    state = run.state.optimizer.state
    return {name: state[value]["momentum_buffer"].clone() for name, value in run.state.model.named_parameters()}


def test_device_flag_gives_the_same_training(tmp_path):
    """Without anything to skip, telling the fused update so changes no bit."""
    given = ("optimizer=adamw", "++optimizer.fused=true", "trainer.clip_norm=1")
    host, device = built(tmp_path / "host", *given), built(tmp_path / "device", *given)
    device.state.guard.on_device = True
    run_to_end(host)
    run_to_end(device)
    assert_equal(weights(host.state.model), weights(device.state.model))


def test_nonfinite_validation_is_never_the_best(tmp_path):
    run = built(tmp_path / "run", "trainer.max_epochs=3", "trainer.checkpoint.monitor=val/loss")
    run.training.loss_function.register_forward_hook(
        lambda _, given, loss: loss * (1 if run.state.model.training or run.state.step != 12 else math.nan)
    )
    run.state.evaluated_model.register_forward_hook(lambda *_: None)
    run_to_end(run)
    assert metrics(run)[1]["val/loss"] is None and summary(run)["status"] == "finished"
    assert summary(run)["best"]["step"] != 12 and 12 not in steps_on_disk(run, "best")
    _, event = read_lines(run.folder.path / "events.jsonl")
    assert event["event"] == "warning" and event["step"] == 12 and "val/loss is nan" in event["text"]


def test_huge_learning_rate_saves_no_nan(tmp_path, promise):
    """N05: with every optimizer; the run ends with the first step that is not finite, and with finite checkpoints."""
    ended = 0
    cases = [(name, lr) for name in sorted(path.stem for path in OPTIMIZERS) for lr in ("1e6", "1e30")]
    for name, lr in cases:
        run = built(
            *(tmp_path / f"{name} {lr}", f"optimizer={name}", f"optimizer.lr={lr}", "schedule=constant"),
            *("model.hidden=[16,16]", "trainer.max_epochs=6", "trainer.checkpoint.every_steps=1"),
            *("trainer.checkpoint.keep=null", "trainer.early_stopping.patience=null"),
        )
        with suppress(NumericalError):
            run_to_end(run)
        told = summary(run)
        if told["status"] == "failed":
            ended += 1
            assert "error[numerical]" in told["stop_reason"] and "lower optimizer.lr" in told["stop_reason"]
            assert steps_on_disk(run, "step")[0] == run.state.step - ("is not saved" in told["stop_reason"])
        for path in (run.folder.path / "checkpoints").iterdir():
            content = safetensors.torch.load_file(path)
            assert all(tensor.isfinite().all() for tensor in content.values()), path.name
    assert ended >= len(cases) // 2
    promise(9, "no NaN or Inf is learned or saved", f"{len(cases)} runs with a rate of 1e6 or 1e30, {ended} stopped")


# Steps that are skipped


def skipping(folder: Path, *given: str) -> Run:
    return built(folder, "trainer.on_nonfinite=skip", *BATCH_NORM, *given)


BATCH_NORM = ("model.batch_norm=true", "trainer.ema_decay=0.9", "trainer.log_every=100 steps", *SGD)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skipped_step_changes_nothing(tmp_path, what, on_device):
    """N06: weights, optimizer, batch norm's statistics and the sums are those before it; the next step is made."""
    run = skipping(tmp_path / "run", *(["++optimizer.fused=true"] if on_device else []))
    run.state.guard.on_device = on_device
    snapshots = [run.state.state_dict()]
    conclude = run.loop.conclude

    def note() -> str | None:
        snapshots.append(run.state.state_dict())
        return conclude()

    run.loop.conclude = note  # type: ignore[method-assign]
    noted = poison(run, 3, what)
    run_to_end(run)
    assert run.state.step == 12 and summary(run)["status"] == "finished"
    before, after, following = (snapshot.tensors for snapshot in snapshots[2:5])
    assert noted["before"]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert not torch.equal(following["model.head.weight"], after["model.head.weight"])
    chosen = ", ".join(map(str, run.training.train_loader.order(0)[16:24].tolist()))
    told = [line["text"] for line in read_lines(run.folder.path / "events.jsonl") if line["event"] == "warning"]
    assert len(told) == 1 and "step 3 (epoch 0.3333) was skipped" in told[0] and chosen in told[0]
    first = metrics(run)[0]
    assert math.isfinite(first["train/loss"])
    seen = snapshots[6].values["sums"]["window"]
    assert seen[2] == 36 and first["train/loss"] == pytest.approx(seen[0] / seen[2], abs=0)  # not the skipped 8


@pytest.mark.parametrize("on_device", [False, True])
def test_run_with_skipped_steps_resumes_bit_identically(tmp_path, on_device):
    def make(name: str) -> Run:
        run = skipping(tmp_path / name, *(["++optimizer.fused=true"] if on_device else []))
        return poisoned(run)

    def poisoned(run: Run) -> Run:
        run.state.guard.on_device = on_device
        run.training.loss_function.register_forward_hook(
            lambda _, given, loss: loss * math.nan if run.state.model.training and run.state.step in (2, 7, 8) else None
        )
        return run

    whole = make("whole")
    run_to_end(whole)
    for step in range(1, 12):
        run = make(str(step))
        run.state.model.register_forward_hook(  # within the step, whether it is skipped or not
            lambda *_, run=run, step=step: (
                os.kill(os.getpid(), signal.SIGTERM)
                if run.state.model.training and run.state.step == step - 1
                else None
            )
        )
        with pytest.raises(StopSignal):
            run_to_end(run)
        again = reopened(tmp_path / str(step))
        assert again is not None
        assert int(again.state.guard.in_a_row) == {3: 1, 8: 1, 9: 2}.get(step, 0)
        run_to_end(poisoned(again))
        assert last_state(tmp_path / str(step)) == last_state(tmp_path / "whole"), step


@pytest.mark.parametrize("on_device", [False, True])
def test_32_skipped_steps_in_a_row_end_the_run(tmp_path, on_device):
    given = ["trainer.max_epochs=20", *(["++optimizer.fused=true"] if on_device else [])]
    run = skipping(tmp_path / "run", *given)
    run.state.guard.on_device = on_device
    run.training.loss_function.register_forward_hook(
        lambda _, given, loss: loss * math.nan if run.state.model.training and run.state.step >= 10 else None
    )
    with pytest.raises(NumericalError, match=f"{MOST_IN_A_ROW} steps in a row" if not on_device else "steps in a row"):
        run_to_end(run)
    assert 10 + MOST_IN_A_ROW <= run.state.step + 1 <= 10 + MOST_IN_A_ROW + 12
    assert steps_on_disk(run, "last")[0] in (30, 36, 42)  # saved while it was still borne


def test_overflows_of_a_scaled_gradient_are_counted(tmp_path):
    """N04, with a scaler on the CPU: it skips and scales down; too many in a row end the run, a few do not."""
    for first, ends in ((8, False), (0, True)):
        run = built(tmp_path / str(first), "trainer.max_epochs=20", "optimizer=adam")
        run.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        run.state.guard.scaler = run.state.scaler
        last = 1000 if ends else first + 2
        run.state.model.head.weight.register_hook(
            lambda gradient, run=run, steps=range(first, last): (
                gradient * math.inf if run.state.step in steps else gradient
            )
        )
        if ends:
            with pytest.raises(NumericalError, match="in a row"):
                run_to_end(run)
            assert run.state.step == MOST_IN_A_ROW - 1
        else:
            run_to_end(run)
            assert summary(run)["status"] != "failed" and run.state.scaler.get_scale() == 1.0  # halved twice


def test_weights_that_overflow_are_not_saved(tmp_path):
    """Loss and gradient are finite, the update is not: found where it would be saved."""
    run = built(tmp_path / "run", "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")

    def overflow(*_: object) -> None:
        if run.state.step == 4:
            with torch.no_grad():
                run.state.model.head.weight[0, 0] = math.inf

    run.state.optimizer.register_step_post_hook(overflow)
    with pytest.raises(NumericalError, match=r"step 5 .*model\.head\.weight is not finite and is not saved"):
        run_to_end(run)
    assert steps_on_disk(run, "step") == [4, 3, 2, 1]
