"""Schedules against torch's own schedulers over whole runs, and durations by table."""

import json
import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from conftest import composed
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from core.errors import ConfigError
from trainer.build.training import build
from trainer.durations import due, to_steps, total_steps, warmup_steps
from trainer.optim.schedules import (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    inverse_time,
    multistep,
    one_cycle,
    one_cycle_momentum,
    polynomial,
    step_decay,
)
from trainer.optim.scheduling import FactorSchedule, Plateau, TorchScheduler, momentum_of

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")  # nothing is trained

RATES = [0.3, 0.02]  # two groups
close = partial(pytest.approx, rel=1e-9, abs=1e-15)


def optimizer(rates: list[float] = RATES, kind: type[Optimizer] = SGD) -> Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    return kind(groups, **({"momentum": 0.9} if kind is SGD else {}))


def rates(made: Optimizer) -> list[float]:
    return [group["lr"] for group in made.param_groups]


def theirs(scheduler: Any, steps: int) -> list[tuple[list[float], list[float | None]]]:
    """Rates and momenta of each step of a plain torch loop."""
    seen = []
    for _ in range(steps):
        seen.append((rates(scheduler.optimizer), [momentum_of(group) for group in scheduler.optimizer.param_groups]))
        scheduler.step()
    return seen


def ours(factor: Any, *, steps: int, warmup: int = 0, momentum: Any = None, kind: type[Optimizer] = SGD) -> list[Any]:
    made = optimizer(kind=kind)
    schedule = FactorSchedule(factor, base_lrs=RATES, total_steps=steps, warmup_steps=warmup, momentum=momentum)
    seen = []
    for step in range(steps):
        schedule.apply(made, step)
        seen.append((rates(made), [momentum_of(group) for group in made.param_groups]))
    return seen


def assert_same(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for step, (one, other) in enumerate(zip(first, second)):
        assert one[0] == close(other[0]) and one[1] == close(other[1]), step


# Pure functions


def test_constant():
    assert ours(constant, steps=9) == [(RATES, [0.9, 0.9])] * 9


@pytest.mark.parametrize("every", [4, 10, 7])
def test_step_decay_is_step_lr(every):
    factor = partial(step_decay, every=every / 40, gamma=0.3)
    assert_same(ours(factor, steps=40), theirs(lr_scheduler.StepLR(optimizer(), every, gamma=0.3), 40))


def test_step_decay_at_a_share_that_is_no_whole_step_is_multi_step_lr():
    # Thirds of 31 steps end at 10.33 and 20.67, so the rate falls before steps 11 and 21; thirds of 30 at 10 and 20.
    third = partial(step_decay, every=0.3333333333, gamma=0.1)
    assert_same(ours(third, steps=31), theirs(lr_scheduler.MultiStepLR(optimizer(), [11, 21]), 31))
    assert_same(ours(third, steps=30), theirs(lr_scheduler.MultiStepLR(optimizer(), [10, 20]), 30))


@pytest.mark.parametrize("steps", [1, 2, 50, 333])
def test_cosine_is_cosine_annealing_lr(steps):
    assert_same(ours(cosine, steps=steps), theirs(lr_scheduler.CosineAnnealingLR(optimizer(), steps), steps))


@pytest.mark.parametrize(("steps", "at"), [(40, [10, 22, 30]), (31, [11, 21]), (30, [10, 20]), (40, [])])
def test_multistep_is_multi_step_lr(steps, at):
    shares = {31: [0.33333333, 0.66666667], 30: [0.33333333, 0.66666667]}.get(steps, [step / steps for step in at])
    factor = partial(multistep, milestones=shares, gamma=0.3)
    assert_same(ours(factor, steps=steps), theirs(lr_scheduler.MultiStepLR(optimizer(), at, gamma=0.3), steps))


def test_exponential_is_exponential_lr():
    reference = theirs(lr_scheduler.ExponentialLR(optimizer(), gamma=0.05 ** (1 / 50)), 50)
    assert_same(ours(partial(exponential, final=0.05), steps=50), reference)


def test_inverse_time_is_its_formula():
    """Bottou's rate / (1 + rate lambda t): with a rate of 0.3 and lambda 2, over 50 steps."""
    seen = [row[0][0] for row in ours(partial(inverse_time, decay=0.3 * 2 * 50), steps=50)]
    assert seen == close([0.3 / (1 + 0.3 * 2 * step) for step in range(50)])


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_polynomial_is_polynomial_lr(power):
    reference = theirs(lr_scheduler.PolynomialLR(optimizer(), total_iters=50, power=power), 50)
    assert_same(ours(partial(polynomial, power=power), steps=50), reference)
    raised = ours(partial(polynomial, power=power, final=0.2), steps=50)
    assert [row[0] for row in raised] == [
        close([0.2 * top + 0.8 * rate for top, rate in zip(RATES, row[0])]) for row in reference
    ]


@pytest.mark.parametrize(
    ("steps", "periods", "multiplier", "first"),
    [(70, 3, 2, 10), (700, 3, 2, 100), (30, 3, 1, 10), (40, 1, 2, 40), (93, 5, 2, 3), (80, 4, 3, 2)],
)
def test_cosine_restarts_is_cosine_annealing_warm_restarts(steps, periods, multiplier, first):
    made = optimizer([0.3, 0.3])  # torch's eta_min is one rate for all groups
    reference = lr_scheduler.CosineAnnealingWarmRestarts(made, first, T_mult=multiplier, eta_min=0.06)
    seen = [row[0][0] for row in theirs(reference, steps)]
    factor = partial(cosine_restarts, periods=periods, multiplier=multiplier, final=0.2)
    found = [row[0][0] for row in ours(factor, steps=steps)]
    assert found == close(seen)
    starts = [step for step in range(steps) if step == 0 or found[step] > found[step - 1]]
    assert len(starts) == periods and all(found[step] == close(0.3) for step in starts)


def test_periods_that_end_between_steps():
    """Thirds of 31 steps: each period starts at the first step behind its beginning, and the last ends with the run."""
    found = [cosine_restarts(step, 31, 0, periods=3, multiplier=1.0) for step in range(31)]
    assert [step for step in range(1, 31) if found[step] > found[step - 1]] == [11, 21]
    assert found[11] == close((1 + math.cos(math.pi * (33 / 31 - 1))) / 2) and found[30] < 0.03


def test_schedule_spans_the_whole_run():
    """As a run resumed with more epochs continues: at the step of the longer run."""
    factors = {
        "multistep": partial(multistep, milestones=[0.3, 0.6]),
        "exponential": exponential,
        "inverse_time": inverse_time,
        "polynomial": polynomial,
        "cosine_restarts": cosine_restarts,
    }
    for name, factor in factors.items():
        for step in range(0, 60, 7):
            assert factor(2 * step, 120, 0) == close(factor(step, 60, 0)), name
        assert factor(55, 120, 0) > factor(55, 60, 0), name


def test_cosine_with_an_end():
    made = optimizer([0.3, 0.3])  # torch's eta_min is one rate for all groups
    seen = [row[0][0] for row in theirs(lr_scheduler.CosineAnnealingLR(made, 50, eta_min=0.06), 50)]
    assert [row[0][0] for row in ours(partial(cosine, final=0.2), steps=50)] == close(seen)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize(("steps", "rise", "warmup"), [(10, 0.3, 0), (97, 0.3, 0), (97, 0.17, 0), (60, 0.3, 11)])
def test_one_cycle_is_one_cycle_lr(kind, steps, rise, warmup):
    momentum = partial(one_cycle_momentum, low=0.8, high=0.97, rise=rise)
    factor = partial(one_cycle, rise=rise, start_divisor=20, final_divisor=500)
    reference = lr_scheduler.OneCycleLR(
        optimizer(kind=kind),
        max_lr=RATES,
        total_steps=steps,
        pct_start=(warmup + 1) / steps if warmup else rise,  # torch turns at pct_start x total - 1
        div_factor=20,
        final_div_factor=500,
        base_momentum=0.8,
        max_momentum=0.97,
    )
    seen = []
    for step in range(steps):
        made = reference.optimizer
        seen.append((rates(made), [momentum_of(group) for group in made.param_groups]))
        if step < steps - 1:
            reference.step()
    assert_same(ours(factor, steps=steps, warmup=warmup, momentum=momentum, kind=kind), seen)


def test_warm_up_by_hand():
    ramp = [0.2, 0.4, 0.6, 0.8]
    assert [constant(step, 10, 4) for step in range(10)] == close([*ramp, 1, 1, 1, 1, 1, 1])
    assert [step_decay(step, 10, 4, every=0.5, gamma=0.1) for step in range(10)] == close([*ramp, 1, 1, 1, *[0.1] * 3])
    half_wave = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [cosine(step, 10, 4) for step in range(10)] == close([*ramp, *half_wave])
    falls = partial(multistep, milestones=[0.5], gamma=0.1)
    assert [falls(step, 10, 4) for step in range(10)] == close([*ramp, 1, 1, 1, *[0.1] * 3])
    shrinking = [0.01 ** (step / 6) for step in range(6)]
    assert [exponential(step, 10, 4) for step in range(10)] == close([*ramp, *shrinking])
    inverse = [1 / (1 + 99 * step / 6) for step in range(6)]
    assert [inverse_time(step, 10, 4) for step in range(10)] == close([*ramp, *inverse])
    line = [1 - step / 6 for step in range(6)]
    assert [polynomial(step, 10, 4) for step in range(10)] == close([*ramp, *line])
    waves = [*half_wave[::3], *[(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]]
    assert [cosine_restarts(step, 10, 4, periods=2) for step in range(10)] == close([*ramp, *waves])


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        (partial(step_decay, every=0, gamma=0.1), "every"),
        (partial(step_decay, every=0.5, gamma=1.1), "gamma"),
        (partial(cosine, final=1.5), "final"),
        (partial(multistep, milestones=[0.5, 0.5]), "milestones"),
        (partial(multistep, milestones=[0.5, 1.0]), "milestones"),
        (partial(multistep, milestones=[0.0]), "milestones"),
        (partial(multistep, milestones=[30, 60]), "milestones"),
        (partial(multistep, milestones=["0.5"]), "milestones"),
        (partial(multistep, milestones=0.5), "milestones"),
        (partial(multistep, milestones=[0.5], gamma=0), "gamma"),
        (partial(exponential, final=0), "final"),
        (partial(inverse_time, decay=-1), "decay"),
        (partial(polynomial, power=0), "power"),
        (partial(polynomial, final=-0.1), "final"),
        (partial(cosine_restarts, periods=0), "periods"),
        (partial(cosine_restarts, periods=2.5), "periods"),
        (partial(cosine_restarts, multiplier=0.9), "multiplier"),
        (partial(cosine_restarts, final=1.1), "final"),
        (partial(one_cycle, rise=1), "rise"),
        (partial(one_cycle, start_divisor=0.5), "start_divisor"),
        (partial(one_cycle, final_divisor=0.5), "final_divisor"),
    ],
)
def test_config_error_names_the_key_of_a_schedule(factor, name):
    with pytest.raises(ConfigError) as caught:
        factor(0, 10, 0)
    assert caught.value.subject == name


# Plateau


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 3])
def test_plateau_is_reduce_lr_on_plateau(mode, patience):
    made, other = optimizer(), optimizer()
    settings: dict[str, Any] = {"monitor": "val/loss", "mode": mode, "factor": 0.5, "patience": patience}
    settings |= {"min_delta": 0.01, "minimum": 0.001, "base_lrs": RATES, "warmup_steps": 0}
    plateau = Plateau(**settings)
    reference = lr_scheduler.ReduceLROnPlateau(
        other,
        mode=mode,
        factor=0.5,
        patience=patience,
        threshold=0.01,
        threshold_mode="abs",
        min_lr=[rate * 0.001 for rate in RATES],
        eps=0,
    )
    draw, seen = random.Random(1), set()
    for step in range(300):
        value = math.nan if draw.random() < 0.05 else 1 + draw.gauss(0, 0.02) + (0.98**step if mode == "min" else 0)
        plateau.apply(made, step)
        assert rates(made) == close(rates(other)), step
        seen.add(rates(made)[0])
        plateau.observe({"val/loss": value, "val/accuracy": 0.0})
        reference.step(value)
        again = Plateau(**settings)  # the state is all there is
        again.load_state_dict(json.loads(json.dumps(plateau.state_dict())))
        plateau = again
    assert len(seen) == 11 and min(seen) == close(0.3 * 0.001)  # ten falls, to the minimum


def test_plateau_warms_up():
    made = optimizer()
    plateau = Plateau(monitor="a", mode="min", factor=0.5, patience=0, min_delta=0, base_lrs=RATES, warmup_steps=3)
    for value in (1.0, 2.0):
        plateau.observe({"a": value})
    factors = []
    for step in range(5):
        plateau.apply(made, step)
        factors.append(rates(made)[0] / RATES[0])
    assert factors == close([0.125, 0.25, 0.375, 0.5, 0.5])


# Torch's schedulers

TORCH = {
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.93),
    "step": partial(lr_scheduler.StepLR, step_size=3, gamma=0.7),
    "multi_step": partial(lr_scheduler.MultiStepLR, milestones=[2, 5, 5], gamma=0.7),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=9),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "linear": partial(lr_scheduler.LinearLR, total_iters=4),
    "one_cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.7, total_steps=30),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.3, step_size_up=3),
}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", TORCH)
def test_torch_scheduler_equals_a_plain_loop_and_resumes_at_any_step(name, interval):
    every, steps = (1, 14) if interval == "step" else (3, 29)
    reference, expected = TORCH[name](optimizer()), []
    for step in range(steps):
        if step and step % every == 0:
            reference.step()
        groups = reference.optimizer.param_groups
        expected.append([(group["lr"], group["momentum"]) for group in groups])
    assert len({str(row) for row in expected}) > 2

    for stop in range(steps):
        adapter = TorchScheduler(TORCH[name](optimizer()), interval=interval, steps_per_epoch=3)
        for step in range(steps):
            if step == stop:
                state = json.loads(json.dumps(adapter.state_dict()))
                adapter = TorchScheduler(TORCH[name](optimizer()), interval=interval, steps_per_epoch=3)
                adapter.load_state_dict(state)
            made = adapter.scheduler.optimizer
            adapter.apply(made, step)
            assert [(group["lr"], group["momentum"]) for group in made.param_groups] == expected[step], (stop, step)


@pytest.mark.parametrize("name", ["exponential", "multi_step", "cosine", "restarts"])
def test_torch_scheduler_continues_with_another_base_lr(name):
    first = TorchScheduler(TORCH[name](optimizer()), interval="step", steps_per_epoch=3)
    for step in range(4):
        first.apply(first.scheduler.optimizer, step)
    halved = TorchScheduler(TORCH[name](optimizer([rate / 2 for rate in RATES])), interval="step", steps_per_epoch=3)
    halved.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(4, 9):
        first.apply(first.scheduler.optimizer, step)
        halved.apply(halved.scheduler.optimizer, step)
        wanted = [rate / 2 for rate in rates(first.scheduler.optimizer)]
        assert rates(halved.scheduler.optimizer) == close(wanted)


def test_one_cycle_leaves_groups_without_momentum_alone():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [parameter], "momentum": 0.9}, {"params": [], "momentum": 0.0}], lr=1.0)
    momentum = partial(one_cycle_momentum, low=0.8, high=0.95)
    FactorSchedule(constant, base_lrs=[1.0, 1.0], total_steps=9, warmup_steps=0, momentum=momentum).apply(optimizer, 0)
    assert [group["momentum"] for group in optimizer.param_groups] == [pytest.approx(0.95), 0.0]


# Durations


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("1 step", 1),
        ("7 steps", 7),
        ("1 epoch", 20),
        ("2 epochs", 40),
        ("0.5 epochs", 10),
        ("1000 samples", 20),
        ("50 samples", 1),
        ("1 sample", 1),
        ("1e3 samples", 20),
        ("10%", 60),
        (" 2.5 % ", 15),
        ("100%", 600),
        ("0.001 epochs", 1),
    ],
)
def test_durations(duration, steps):
    assert to_steps(duration, steps_per_epoch=20, samples_per_epoch=1000, total_steps=600) == steps


def test_ten_times_a_tenth_is_the_run():
    """No evaluation a step or two before the last one, whatever the number of steps."""
    for total in (471, 600, 1001, 7):
        every = to_steps("10%", steps_per_epoch=20, samples_per_epoch=1000, total_steps=total)
        assert len([step for step in range(1, total + 1) if due(step, every, total_steps=total)]) <= 10


def test_invalid_duration_is_refused():
    for text in ("", "steps", "3", "-1 steps", "3 weeks", "nan steps", "1 epoch 2"):
        with pytest.raises(ValueError, match="no duration"):
            to_steps(text, steps_per_epoch=20, samples_per_epoch=1000, total_steps=600)


def test_due():
    assert [step for step in range(1, 12) if due(step, 4)] == [4, 8]
    assert [step for step in range(1, 12) if due(step, 4, total_steps=11)] == [4, 8, 11]
    assert not any(due(step, None, total_steps=11) for step in range(1, 12))


def test_budgets_and_warm_up():
    assert total_steps(max_epochs=3, max_steps=None, steps_per_epoch=7) == 21
    assert total_steps(max_epochs=3, max_steps=20, steps_per_epoch=7) == 20
    assert total_steps(max_epochs=3, max_steps=22, steps_per_epoch=7) == 21
    assert total_steps(max_epochs=None, max_steps=5, steps_per_epoch=7) == 5
    assert total_steps(max_epochs=None, max_steps=None, steps_per_epoch=7) is None
    assert [warmup_steps(epochs, steps_per_epoch=7) for epochs in (0, 1, 0.5, 2)] == [0, 7, 4, 14]


@pytest.mark.parametrize(("horizon", "fits"), [(5, False), (10, False), (11, True), (12, True)])
def test_a_torch_scheduler_whose_horizon_is_too_short_is_refused_at_build(horizon, fits):
    """12 steps need it stepped 11 times; OneCycleLR would raise in the middle of the run."""
    given = ("schedule=torch", "schedule._target_=torch.optim.lr_scheduler.OneCycleLR", "~schedule.gamma")
    given += ("+schedule.max_lr=0.1", f"+schedule.total_steps={horizon}", "schedule.interval=step")
    if fits:
        training, _ = build(composed(*given))
        for step in range(training.settings.total_steps):
            training.state.schedule.apply(training.state.optimizer, step)
    else:
        with pytest.raises(ConfigError, match=rf"schedule.total_steps = {horizon}: is too short.* steps it 11 times"):
            build(composed(*given))
