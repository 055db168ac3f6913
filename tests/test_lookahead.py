"""Lookahead compared with a second implementation, and layers that are frozen during the run."""

from itertools import pairwise

import pytest
import torch
from conftest import built, last_state, reopened, run_to_end, stop_after, trained
from torch import Tensor

from core.errors import ConfigError, StopSignal
from trainer.run import Run

LOOKAHEAD = ("trainer.lookahead.every=5", "model.batch_norm=true")


def weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}


@pytest.mark.parametrize(("decay", "power"), [(0.774, 3.0), (0.5, 0.0)])
def test_lookahead_equals_a_second_implementation(tmp_path, decay, power):
    """Slow weights after steps 5, 10 and 12 of 12; each step continues from them (Zhang et al. 2019, algorithm 1)."""
    overrides = (*LOOKAHEAD, f"trainer.lookahead.decay={decay}", f"trainer.lookahead.power={power}")
    run = built(tmp_path / "run", *overrides)
    before_update: list[dict[str, Tensor]] = []
    update = run.state.lookahead.update

    def recorded(step: int, *, total_steps: int) -> None:
        before_update.append(weights(run))
        update(step, total_steps=total_steps)
        after_update.append(weights(run))

    after_update: list[dict[str, Tensor]] = []
    slow = weights(run)
    run.state.lookahead.update = recorded  # type: ignore[method-assign]
    run_to_end(run)
    assert len(before_update) == 12
    for step, (fast, after) in enumerate(zip(before_update, after_update), start=1):
        for name, value in fast.items():
            if not value.is_floating_point():
                expected = value
            elif step in (5, 10):
                kept = decay * (step / 12) ** power
                slow[name] = expected = kept * slow[name] + (1 - kept) * value
            else:
                expected = slow[name] if step == 12 else value
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6, msg=f"step {step}: {name}")
    assert not torch.equal(before_update[11]["head.weight"], after_update[11]["head.weight"])


def test_lookahead_resumes_bit_identically(tmp_path):
    expected = last_state(trained(tmp_path / "uninterrupted", *LOOKAHEAD).folder.path)
    for step in (3, 5, 7, 11):
        run = built(tmp_path / str(step), *LOOKAHEAD)
        stop_after(run, step)
        with pytest.raises(StopSignal):
            run_to_end(run)
        resumed = reopened(tmp_path / str(step))
        assert resumed is not None
        run_to_end(resumed)
        assert last_state(tmp_path / str(step)) == expected, step


def test_frozen_layer_changes_only_before_its_step(tmp_path):
    overrides = (
        "trainer.freeze_after={features: 8 steps}",
        "trainer.weight_decay_on=weights",
        "trainer.bias_lr_factor=4",
    )
    run = built(tmp_path / "run", *overrides)
    lrs = {group["name"]: group["lr"] for group in run.state.optimizer.param_groups}
    assert lrs == {"weights": 0.05, "no_decay": 0.2, "features": 0.05}
    states = [weights(run)]
    conclude = run.loop.conclude
    run.loop.conclude = lambda: (states.append(weights(run)), conclude())[1]  # type: ignore[method-assign]
    run_to_end(run)
    layers = {name: [not torch.equal(a[name], b[name]) for a, b in pairwise(states)] for name in states[0]}
    for name, changed in layers.items():
        assert changed == [True] * 12 if name.startswith("head") else [True] * 8 + [False] * 4, name


def test_freezing_continues_after_a_resume(tmp_path):
    overrides = ("trainer.freeze_after={features: 1 epoch}", "optimizer=adamw")
    expected = last_state(trained(tmp_path / "uninterrupted", *overrides).folder.path)
    for step in (4, 6, 9):
        run = built(tmp_path / str(step), *overrides)
        stop_after(run, step)
        with pytest.raises(StopSignal):
            run_to_end(run)
        resumed = reopened(tmp_path / str(step))
        assert resumed is not None
        run_to_end(resumed)
        assert last_state(tmp_path / str(step)) == expected, step


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.freeze_after={feature: 1 epoch}", "did you mean features"),
        ("trainer.freeze_after={xyz: 1 epoch}", "its layers: features, head"),
        ("trainer.freeze_after={features: soon}", "each value must be a duration"),
        ("trainer.freeze_after=3", "must be a section of keys"),
        ("trainer.lookahead.decay=1", "must be a number in \\[0, 1\\)"),
    ],
)
def test_error_names_the_layer_or_value(tmp_path, override, message):
    with pytest.raises(ConfigError, match=f"trainer.*{message}"):
        built(tmp_path / "run", override)
