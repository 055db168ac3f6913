"""TrainState: all that survives a restart is in it, also with several models and optimizers."""

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


def adversarial(seed: int) -> TrainState:
    """A generator with a moving average, a critic, and an optimizer of another kind for each."""
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
        restored=[],
        take_back=sums.take_back,
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


def one_step(state: TrainState) -> None:
    values = torch.arange(12.0).view(4, 3) / 12 + state.step
    state.unsettle()
    state.models["critic"](state.model(values)).square().mean().backward()
    for optimizer in state.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    state.advance(4)
    assert state.ema is not None
    state.ema.update(state.model, state.step)
    state.settle()


def stopped_and_resumed(folder: Path, *, steps: int) -> TrainState:
    """The state of another seed, loaded from a checkpoint after some steps of the first."""
    stopped, resumed = adversarial(0), adversarial(1)
    for _ in range(steps):
        one_step(stopped)
    resumed.load_state_dict(unpack(packed(stopped.state_dict()), source=folder))
    return resumed


def test_several_models_and_optimizers_continue_bit_identically_from_a_checkpoint(tmp_path):
    whole, resumed = adversarial(0), stopped_and_resumed(tmp_path, steps=3)
    for _ in range(6):
        one_step(whole)
    for _ in range(3):
        one_step(resumed)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
    assert found.values | {"clock": None} == expected.values | {"clock": None}
    assert found.weights.keys() == {"weight", "bias"} and found.step == 6
    kinds = {"model.weight", "critic.1.running_mean", "ema.bias", "optimizer.model.weight.momentum_buffer"}
    assert kinds | {"critic_optimizer.critic.0.weight.exp_avg", "data.mean"} <= found.tensors.keys()


def test_an_optimizer_that_is_not_restored_is_noticed(tmp_path):
    """The mutant of the test above: with one optimizer from step 0, the weights differ."""
    whole, resumed = adversarial(0), stopped_and_resumed(tmp_path, steps=3)
    for _ in range(4):
        one_step(whole)
    resumed.optimizers["critic_optimizer"].state.clear()
    one_step(resumed)
    assert not torch.equal(resumed.models["critic"][0].weight, whole.models["critic"][0].weight)


def test_a_checkpoint_holds_the_state_and_nothing_else(tmp_path):
    """The file of step 0 is what the state of the run returns, byte for byte but for the clock."""
    run = built(tmp_path / "run", "trainer.ema_decay=0.9", "model.batch_norm=true")
    found = run.folder.checkpoints.load("last")[0]
    now = run.state.state_dict()
    assert found.values | {"clock": None} == now.values | {"clock": None, "format": 4}
    assert found.tensors.keys() == now.tensors.keys()
    assert all(torch.equal(tensor, now.tensors[name]) for name, tensor in found.tensors.items())
    with run:
        pass
