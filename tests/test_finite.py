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
from conftest import built, last_state, reopened
from test_trainer import SGD, assert_equal, metrics, steps_on_disk, summary, weights
from torch import Tensor, nn

from core.command_line import CONFIGS
from core.errors import NumericalError, StopSignal
from core.json_lines import read_lines
from trainer.loop import Trainer
from trainer.monitor.nonfinite import MOST_IN_A_ROW
from trainer.state import snapshot

OPTIMIZERS = (CONFIGS / "optimizer").glob("*.yaml")


def poison(trainer: Trainer, step: int, what: str) -> dict[str, Any]:
    """Make the loss, or one gradient, of this step infinite or not a number; notes what the weights were before."""
    noted: dict[str, Any] = {}

    def in_loss(_: nn.Module, given: Any, loss: Tensor) -> Tensor | None:
        if not (trainer.model.training and trainer.step == step - 1):
            return None
        noted.update(before=weights(trainer.model), optimizer=str(trainer.optimizer.state_dict()), labels=given[1])
        return loss * math.nan if what == "loss" else None

    def in_gradient(gradient: Tensor) -> Tensor:
        if trainer.step != step - 1:
            return gradient
        poisoned = gradient.clone()
        poisoned.view(-1)[3] = math.inf
        return poisoned

    trainer.loss_function.register_forward_hook(in_loss)
    if what == "gradient":
        trainer.model.head.weight.register_hook(in_gradient)
    return noted


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("given", [["optimizer=adam"], [*SGD, "trainer.clip_norm=1"]])
def test_what_is_not_finite_never_reaches_the_weights(tmp_path, what, given):
    trainer = built(tmp_path / "run", *given, "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    noted = poison(trainer, 8, what)
    with pytest.raises(NumericalError) as caught:
        trainer.run()
    assert_equal(weights(trainer.model), noted["before"])
    assert str(trainer.optimizer.state_dict()) == noted["optimizer"]
    message, chosen = str(caught.value), trainer.train_loader.order(1)[8:16].tolist()
    assert caught.value.exit_code == 4 and "step 8 (epoch 1.1667)" in message and "lr 0.0" in message
    assert ", ".join(map(str, chosen)) in message and torch.equal(
        trainer.train_loader.source.labels[chosen], noted["labels"]
    )
    assert ("loss nan" in message) == (what == "loss") and "gradient norm" in message
    assert steps_on_disk(trainer, "step") == [7, 6, 5, 4, 3, 2, 1] and steps_on_disk(trainer, "last")[0] == 6
    told = summary(trainer)
    assert told["status"] == "failed" and "not finite" in told["stop_reason"] and told["step"] == 7
    for file in trainer.folder.checkpoints.files("last", "best", "step"):
        content = safetensors.torch.load_file(file.path)
        assert all(tensor.isfinite().all() for tensor in content.values()), file.path.name


@pytest.mark.parametrize("where", ["log line", "evaluation", "checkpoint"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nesterov"])
def test_the_device_skips_what_is_not_finite_and_tells_later(tmp_path, name, what, where):
    """As on CUDA: a fused update that is told by a flag; here on the CPU, whose fused kernels obey the same flag."""
    seen_at = {"log line": 5, "evaluation": 6, "checkpoint": 4}[where]
    trainer = built(
        tmp_path / "run",
        f"optimizer={name}",
        "++optimizer.fused=true",
        f"trainer.log_every={5 if where == 'log line' else 100} steps",
        f"trainer.evaluate_every={1 if where == 'evaluation' else 4} epochs",
        "trainer.max_epochs=4",
        f"trainer.checkpoint.every_steps={4 if where == 'checkpoint' else 100}",
        "trainer.early_stopping.patience=1",
    )
    trainer.guard.on_device = True
    noted, after = poison(trainer, 3, what), []
    trainer.optimizer.register_step_post_hook(lambda *_: after.append(weights(trainer.model)))
    with pytest.raises(NumericalError) as caught:
        trainer.run()
    chosen = ", ".join(map(str, trainer.train_loader.order(0)[16:24].tolist()))
    assert "step 3 (epoch 0.3333)" in str(caught.value) and chosen in str(caught.value)
    assert len(after) == seen_at == trainer.step
    assert_equal(after[2], noted["before"])  # the third step was skipped
    assert not torch.equal(after[3]["head.weight"], after[2]["head.weight"])  # the fourth was not
    assert all(tensor.isfinite().all() for state in after for tensor in state.values())
    assert steps_on_disk(trainer, "step") == [] and steps_on_disk(trainer, "last") == [0]
    assert metrics(trainer) == []


def test_a_skipped_first_step_leaves_momentum_at_zero(tmp_path):
    """Fused SGD allocates its momentum unfilled at the first step, also when it is told to skip that step."""
    trainer = built(tmp_path / "run", *SGD, "++optimizer.fused=true", "trainer.log_every=100 steps")
    trainer.guard.on_device = True
    noted = poison(trainer, 1, "gradient")
    after: list[dict[str, Tensor]] = []
    trainer.optimizer.register_step_post_hook(lambda *_: after.append(momentum_of(trainer)))
    with pytest.raises(NumericalError):
        trainer.run()
    assert noted["before"] and all(torch.equal(value, torch.zeros_like(value)) for value in after[0].values())
    assert all(value.isfinite().all() and value.abs().max() < 100 for value in after[1].values())


def momentum_of(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.optimizer.state
    return {name: state[value]["momentum_buffer"].clone() for name, value in trainer.model.named_parameters()}


def test_the_device_path_is_the_same_training(tmp_path):
    """Without anything to skip, telling the fused update so changes no bit."""
    given = ("optimizer=adamw", "++optimizer.fused=true", "trainer.clip_norm=1")
    host, device = built(tmp_path / "host", *given), built(tmp_path / "device", *given)
    device.guard.on_device = True
    host.run()
    device.run()
    assert_equal(weights(host.model), weights(device.model))


def test_a_validation_that_is_not_finite_is_no_best(tmp_path):
    trainer = built(tmp_path / "run", "trainer.max_epochs=3", "trainer.checkpoint.monitor=val/loss")
    trainer.loss_function.register_forward_hook(
        lambda _, given, loss: loss * (1 if trainer.model.training or trainer.step != 12 else math.nan)
    )
    trainer.evaluated_model.register_forward_hook(lambda *_: None)
    trainer.run()
    assert metrics(trainer)[1]["val/loss"] is None and summary(trainer)["status"] == "finished"
    assert summary(trainer)["best"]["step"] != 12 and 12 not in steps_on_disk(trainer, "best")
    _, event = read_lines(trainer.folder.path / "events.jsonl")
    assert event["event"] == "warning" and event["step"] == 12 and "val/loss is nan" in event["text"]


def test_a_learning_rate_far_too_large_never_learns_or_saves_nan(tmp_path, promise):
    """N05: with every optimizer; the run ends with the first step that is not finite, and with finite checkpoints."""
    ended = 0
    cases = [(name, lr) for name in sorted(path.stem for path in OPTIMIZERS) for lr in ("1e6", "1e30")]
    for name, lr in cases:
        trainer = built(
            *(tmp_path / f"{name} {lr}", f"optimizer={name}", f"optimizer.lr={lr}", "schedule=constant"),
            *("model.hidden=[16,16]", "trainer.max_epochs=6", "trainer.checkpoint.every_steps=1"),
            *("trainer.checkpoint.keep=null", "trainer.early_stopping.patience=null"),
        )
        with suppress(NumericalError):
            trainer.run()
        told = summary(trainer)
        if told["status"] == "failed":
            ended += 1
            assert "error[numerical]" in told["stop_reason"] and "lower optimizer.lr" in told["stop_reason"]
            assert steps_on_disk(trainer, "step")[0] == trainer.step - ("is not saved" in told["stop_reason"])
        for path in (trainer.folder.path / "checkpoints").iterdir():
            content = safetensors.torch.load_file(path)
            assert all(tensor.isfinite().all() for tensor in content.values()), path.name
    assert ended >= len(cases) // 2
    promise(9, "no NaN or Inf is learned or saved", f"{len(cases)} runs with a rate of 1e6 or 1e30, {ended} stopped")


# Steps that are skipped


def skipping(folder: Path, *given: str) -> Trainer:
    return built(folder, "trainer.on_nonfinite=skip", *BATCH_NORM, *given)


BATCH_NORM = ("model.batch_norm=true", "trainer.ema_decay=0.9", "trainer.log_every=100 steps", *SGD)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_skipped_changes_nothing(tmp_path, what, on_device):
    """N06: weights, optimizer, batch norm's statistics and the sums are those before it; the next step is made."""
    trainer = skipping(tmp_path / "run", *(["++optimizer.fused=true"] if on_device else []))
    trainer.guard.on_device = on_device
    states: list[dict[str, Tensor]] = [snapshot(trainer).tensors]
    conclude = trainer.conclude

    def note() -> None:
        states.append(snapshot(trainer).tensors)
        conclude()

    trainer.conclude = note  # type: ignore[method-assign]
    noted = poison(trainer, 3, what)
    trainer.run()
    assert trainer.step == 12 and summary(trainer)["status"] == "finished"
    before, after = states[2], states[3]
    assert noted["before"]
    for name, tensor in before.items():
        assert name.startswith("ema.") or torch.equal(tensor, after[name]), name
    assert not torch.equal(states[4]["model.head.weight"], after["model.head.weight"])
    chosen = ", ".join(map(str, trainer.train_loader.order(0)[16:24].tolist()))
    told = [line["text"] for line in read_lines(trainer.folder.path / "events.jsonl") if line["event"] == "warning"]
    assert len(told) == 1 and "step 3 (epoch 0.3333) was skipped" in told[0] and chosen in told[0]
    first = metrics(trainer)[0]
    assert math.isfinite(first["train/loss"])
    seen = states[6]["sums.window"]
    assert seen[2] == 36 and first["train/loss"] == pytest.approx(float(seen[0] / seen[2]), abs=0)  # not the skipped 8


@pytest.mark.parametrize("on_device", [False, True])
def test_a_run_that_skips_is_resumed_to_the_bit(tmp_path, on_device):
    def make(name: str) -> Trainer:
        trainer = skipping(tmp_path / name, *(["++optimizer.fused=true"] if on_device else []))
        return poisoned(trainer)

    def poisoned(trainer: Trainer) -> Trainer:
        trainer.guard.on_device = on_device
        trainer.loss_function.register_forward_hook(
            lambda _, given, loss: loss * math.nan if trainer.model.training and trainer.step in (2, 7, 8) else None
        )
        return trainer

    whole = make("whole")
    whole.run()
    for step in range(1, 12):
        trainer = make(str(step))
        trainer.model.register_forward_hook(  # within the step, whether it is skipped or not
            lambda *_, trainer=trainer, step=step: (
                os.kill(os.getpid(), signal.SIGTERM) if trainer.model.training and trainer.step == step - 1 else None
            )
        )
        with pytest.raises(StopSignal):
            trainer.run()
        again = reopened(tmp_path / str(step))
        assert again is not None
        assert int(again.guard.in_a_row) == {3: 1, 8: 1, 9: 2}.get(step, 0)
        poisoned(again).run()
        assert last_state(tmp_path / str(step)) == last_state(tmp_path / "whole"), step


@pytest.mark.parametrize("on_device", [False, True])
def test_too_many_skipped_in_a_row_end_the_run(tmp_path, on_device):
    given = ["trainer.max_epochs=20", *(["++optimizer.fused=true"] if on_device else [])]
    trainer = skipping(tmp_path / "run", *given)
    trainer.guard.on_device = on_device
    trainer.loss_function.register_forward_hook(
        lambda _, given, loss: loss * math.nan if trainer.model.training and trainer.step >= 10 else None
    )
    with pytest.raises(NumericalError, match=f"{MOST_IN_A_ROW} steps in a row" if not on_device else "steps in a row"):
        trainer.run()
    assert 10 + MOST_IN_A_ROW <= trainer.step + 1 <= 10 + MOST_IN_A_ROW + 12
    assert steps_on_disk(trainer, "last")[0] in (30, 36, 42)  # saved while it was still borne


def test_overflows_of_a_scaled_gradient_are_counted(tmp_path):
    """N04, with a scaler on the CPU: it skips and scales down; too many in a row end the run, a few do not."""
    for first, ends in ((8, False), (0, True)):
        trainer = built(tmp_path / str(first), "trainer.max_epochs=20", "optimizer=adam")
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        trainer.guard.scaler = trainer.scaler
        last = 1000 if ends else first + 2
        trainer.model.head.weight.register_hook(
            lambda gradient, trainer=trainer, steps=range(first, last): (
                gradient * math.inf if trainer.step in steps else gradient
            )
        )
        if ends:
            with pytest.raises(NumericalError, match="in a row"):
                trainer.run()
            assert trainer.step == MOST_IN_A_ROW - 1
        else:
            trainer.run()
            assert summary(trainer)["status"] != "failed" and trainer.scaler.get_scale() == 1.0  # halved twice


def test_weights_that_overflow_are_not_saved(tmp_path):
    """Loss and gradient are finite, the update is not: found where it would be saved."""
    trainer = built(tmp_path / "run", "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")

    def overflow(*_: object) -> None:
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.head.weight[0, 0] = math.inf

    trainer.optimizer.register_step_post_hook(overflow)
    with pytest.raises(NumericalError, match=r"step 5 .*model\.head\.weight is not finite and is not saved"):
        trainer.run()
    assert steps_on_disk(trainer, "step") == [4, 3, 2, 1]
