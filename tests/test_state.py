"""TrainState contains the complete state for a resume, also with several models and optimizers."""

from pathlib import Path

import torch
from conftest import built, packed
from torch import nn

from data.loading.normalisation import Normalisation
from trainer.monitor.early_stopping import EarlyStopping
from trainer.monitor.metrics import RunningSums
from trainer.monitor.nonfinite import NonFiniteGuard
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.scheduling import FactorSchedule
from trainer.state import TrainState
from trainer.storage.checkpoint import unpack

CPU = torch.device("cpu")


def generator_and_critic(seed: int) -> TrainState:
    """Return the state of a generator with a moving average and a critic, each with a different optimizer."""
    torch.manual_seed(seed)
    generator, critic = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizers = {
        "optimizer": torch.optim.SGD([{"params": list(generator.parameters()), "name": "all"}], lr=0.1, momentum=0.9),
        "critic_optimizer": torch.optim.Adam(critic.parameters(), lr=0.01),
    }
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sums = RunningSums()
    guard = NonFiniteGuard(
        optimizers["optimizer"],
        scaler=scaler,
        device=CPU,
        skips=False,
        steps_per_epoch=5,
        buffers=[],
        discard=sums.discard,
    )
    factor = FactorSchedule(lambda *_: 1.0, base_lrs=[0.1], total_steps=10, warmup_steps=0)
    return TrainState(
        models={"model": generator, "critic": critic},
        optimizers=optimizers,
        schedule=factor,
        scaler=scaler,
        guard=guard,
        sums=sums,
        early_stopping=EarlyStopping(monitor="val/loss", mode="min", patience=3),
        ema=ExponentialMovingAverage(generator, decay=0.9),
        normalisation=Normalisation({"mean": torch.zeros(1), "std": torch.ones(1)}),
        data={"class_names": ["a", "b"], "fingerprint": "f", "counts": {"train": 5}},
        config={"seed": 0},
        steps_per_epoch=5,
    )


def train_step(state: TrainState) -> None:
    values = torch.arange(12.0).view(4, 3) / 12 + state.step
    state.unsettle()
    state.models["critic"](state.model(values)).square().mean().backward()
    for optimizer in state.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    state.advance(4)
    assert state.ema is not None
    state.ema.update(state.step)
    state.settle()


def stopped_and_resumed(folder: Path, *, steps: int) -> TrainState:
    """Train some steps with seed 0 and return a state of seed 1 that loaded the checkpoint."""
    stopped, resumed = generator_and_critic(0), generator_and_critic(1)
    for _ in range(steps):
        train_step(stopped)
    resumed.load_state_dict(unpack(packed(stopped.state_dict()), source=folder))
    return resumed


def test_several_models_and_optimizers_continue_bit_identically_from_a_checkpoint(tmp_path):
    uninterrupted, resumed = generator_and_critic(0), stopped_and_resumed(tmp_path, steps=3)
    for _ in range(6):
        train_step(uninterrupted)
    for _ in range(3):
        train_step(resumed)
    expected, actual = uninterrupted.state_dict(), resumed.state_dict()
    assert actual.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in actual.tensors.items())
    assert actual.values | {"clock": None} == expected.values | {"clock": None}
    assert actual.weights.keys() == {"weight", "bias"} and actual.step == 6
    kinds = {"model.weight", "critic.1.running_mean", "ema.bias", "optimizer.model.weight.momentum_buffer"}
    assert kinds | {"critic_optimizer.critic.0.weight.exp_avg", "data.mean"} <= actual.tensors.keys()


def test_optimizer_that_is_not_restored_is_detected(tmp_path):
    """Mutant of the test above: if one optimizer starts from step 0, the weights differ."""
    uninterrupted, resumed = generator_and_critic(0), stopped_and_resumed(tmp_path, steps=3)
    for _ in range(4):
        train_step(uninterrupted)
    resumed.optimizers["critic_optimizer"].state.clear()
    train_step(resumed)
    assert not torch.equal(resumed.models["critic"][0].weight, uninterrupted.models["critic"][0].weight)


def test_checkpoint_equals_the_state_dict_of_the_run(tmp_path):
    """The checkpoint of step 0 equals the state dict of the run, except for the clock."""
    run = built(tmp_path / "run", "trainer.ema_decay=0.9", "model.batch_norm=true")
    saved = run.folder.checkpoints.load("last")[0]
    state = run.state.state_dict()
    assert saved.values | {"clock": None} == state.values | {"clock": None, "format": 4}
    assert saved.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in saved.tensors.items())
    with run:
        pass
