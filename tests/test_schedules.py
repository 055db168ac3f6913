"""Schedules compared with torch's schedulers over whole runs; durations compared with a table."""

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

pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected call of .lr_scheduler.step:UserWarning"
)  # no optimizer steps here

BASE_LRS = [0.3, 0.02]  # two parameter groups
close = partial(pytest.approx, rel=1e-9, abs=1e-15)


def make_optimizer(lrs: list[float] = BASE_LRS, kind: type[Optimizer] = SGD) -> Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs]
    return kind(groups, **({"momentum": 0.9} if kind is SGD else {}))


def learning_rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def torch_steps(scheduler: Any, steps: int) -> list[tuple[list[float], list[float | None]]]:
    """Return the learning rates and momenta of each step of a plain torch loop."""
    values = []
    for _ in range(steps):
        momenta = [momentum_of(group) for group in scheduler.optimizer.param_groups]
        values.append((learning_rates(scheduler.optimizer), momenta))
        scheduler.step()
    return values


def preceptor_steps(
    factor: Any, *, steps: int, warmup: int = 0, momentum: Any = None, kind: type[Optimizer] = SGD
) -> list[Any]:
    optimizer = make_optimizer(kind=kind)
    schedule = FactorSchedule(factor, base_lrs=BASE_LRS, total_steps=steps, warmup_steps=warmup, momentum=momentum)
    values = []
    for step in range(steps):
        schedule.apply(optimizer, step)
        values.append((learning_rates(optimizer), [momentum_of(group) for group in optimizer.param_groups]))
    return values


def assert_same(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for step, (actual, expected) in enumerate(zip(first, second)):
        assert actual[0] == close(expected[0]) and actual[1] == close(expected[1]), step


# Pure functions


def test_constant_keeps_base_lrs_and_momenta():
    assert preceptor_steps(constant, steps=9) == [(BASE_LRS, [0.9, 0.9])] * 9


@pytest.mark.parametrize("every", [4, 10, 7])
def test_step_decay_equals_step_lr(every):
    factor = partial(step_decay, every=every / 40, gamma=0.3)
    assert_same(
        preceptor_steps(factor, steps=40), torch_steps(lr_scheduler.StepLR(make_optimizer(), every, gamma=0.3), 40)
    )


def test_step_decay_at_fractional_steps_equals_multi_step_lr():
    # Thirds of 31 steps end at 10.33 and 20.67, so the factor falls at steps 11 and 21; thirds of 30 end at 10 and 20.
    third = partial(step_decay, every=0.3333333333, gamma=0.1)
    assert_same(preceptor_steps(third, steps=31), torch_steps(lr_scheduler.MultiStepLR(make_optimizer(), [11, 21]), 31))
    assert_same(preceptor_steps(third, steps=30), torch_steps(lr_scheduler.MultiStepLR(make_optimizer(), [10, 20]), 30))


@pytest.mark.parametrize("steps", [1, 2, 50, 333])
def test_cosine_equals_cosine_annealing_lr(steps):
    assert_same(
        preceptor_steps(cosine, steps=steps),
        torch_steps(lr_scheduler.CosineAnnealingLR(make_optimizer(), steps), steps),
    )


@pytest.mark.parametrize(("steps", "milestones"), [(40, [10, 22, 30]), (31, [11, 21]), (30, [10, 20]), (40, [])])
def test_multistep_equals_multi_step_lr(steps, milestones):
    shares = {31: [0.33333333, 0.66666667], 30: [0.33333333, 0.66666667]}.get(
        steps, [step / steps for step in milestones]
    )
    factor = partial(multistep, milestones=shares, gamma=0.3)
    assert_same(
        preceptor_steps(factor, steps=steps),
        torch_steps(lr_scheduler.MultiStepLR(make_optimizer(), milestones, gamma=0.3), steps),
    )


def test_exponential_equals_exponential_lr():
    reference = torch_steps(lr_scheduler.ExponentialLR(make_optimizer(), gamma=0.05 ** (1 / 50)), 50)
    assert_same(preceptor_steps(partial(exponential, final=0.05), steps=50), reference)


def test_inverse_time_equals_its_formula():
    """Bottou's lr / (1 + lr lambda t) with lr 0.3 and lambda 2, over 50 steps."""
    actual = [row[0][0] for row in preceptor_steps(partial(inverse_time, decay=0.3 * 2 * 50), steps=50)]
    assert actual == close([0.3 / (1 + 0.3 * 2 * step) for step in range(50)])


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_polynomial_equals_polynomial_lr(power):
    reference = torch_steps(lr_scheduler.PolynomialLR(make_optimizer(), total_iters=50, power=power), 50)
    assert_same(preceptor_steps(partial(polynomial, power=power), steps=50), reference)
    with_final = preceptor_steps(partial(polynomial, power=power, final=0.2), steps=50)
    assert [row[0] for row in with_final] == [
        close([0.2 * base_lr + 0.8 * lr for base_lr, lr in zip(BASE_LRS, row[0])]) for row in reference
    ]


@pytest.mark.parametrize(
    ("steps", "periods", "multiplier", "first"),
    [(70, 3, 2, 10), (700, 3, 2, 100), (30, 3, 1, 10), (40, 1, 2, 40), (93, 5, 2, 3), (80, 4, 3, 2)],
)
def test_cosine_restarts_equals_cosine_annealing_warm_restarts(steps, periods, multiplier, first):
    optimizer = make_optimizer([0.3, 0.3])  # torch's eta_min is the same for all groups
    reference = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first, T_mult=multiplier, eta_min=0.06)
    expected = [row[0][0] for row in torch_steps(reference, steps)]
    factor = partial(cosine_restarts, periods=periods, multiplier=multiplier, final=0.2)
    actual = [row[0][0] for row in preceptor_steps(factor, steps=steps)]
    assert actual == close(expected)
    starts = [step for step in range(steps) if step == 0 or actual[step] > actual[step - 1]]
    assert len(starts) == periods and all(actual[step] == close(0.3) for step in starts)


def test_period_of_cosine_restarts_starts_at_the_first_step_after_its_boundary():
    """Thirds of 31 steps: each period starts at the first step after its boundary; the last ends with the run."""
    factors = [cosine_restarts(step, 31, 0, periods=3, multiplier=1.0) for step in range(31)]
    assert [step for step in range(1, 31) if factors[step] > factors[step - 1]] == [11, 21]
    assert factors[11] == close((1 + math.cos(math.pi * (33 / 31 - 1))) / 2) and factors[30] < 0.03


def test_schedule_depends_on_the_share_of_the_run():
    """So a run resumed with more epochs continues at the step of the longer run."""
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


def test_cosine_with_final_equals_eta_min():
    optimizer = make_optimizer([0.3, 0.3])  # torch's eta_min is the same for all groups
    expected = [row[0][0] for row in torch_steps(lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.06), 50)]
    assert [row[0][0] for row in preceptor_steps(partial(cosine, final=0.2), steps=50)] == close(expected)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize(("steps", "rise", "warmup"), [(10, 0.3, 0), (97, 0.3, 0), (97, 0.17, 0), (60, 0.3, 11)])
def test_one_cycle_equals_one_cycle_lr(kind, steps, rise, warmup):
    momentum = partial(one_cycle_momentum, low=0.8, high=0.97, rise=rise)
    factor = partial(one_cycle, rise=rise, start_divisor=20, final_divisor=500)
    reference = lr_scheduler.OneCycleLR(
        make_optimizer(kind=kind),
        max_lr=BASE_LRS,
        total_steps=steps,
        pct_start=(warmup + 1) / steps if warmup else rise,  # torch's peak is at pct_start x total - 1
        div_factor=20,
        final_div_factor=500,
        base_momentum=0.8,
        max_momentum=0.97,
    )
    expected = []
    for step in range(steps):
        optimizer = reference.optimizer
        expected.append((learning_rates(optimizer), [momentum_of(group) for group in optimizer.param_groups]))
        if step < steps - 1:
            reference.step()
    assert_same(preceptor_steps(factor, steps=steps, warmup=warmup, momentum=momentum, kind=kind), expected)


def test_warm_up_of_each_schedule_equals_values_computed_by_hand():
    ramp = [0.2, 0.4, 0.6, 0.8]
    assert [constant(step, 10, 4) for step in range(10)] == close([*ramp, 1, 1, 1, 1, 1, 1])
    assert [step_decay(step, 10, 4, every=0.5, gamma=0.1) for step in range(10)] == close([*ramp, 1, 1, 1, *[0.1] * 3])
    half_wave = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [cosine(step, 10, 4) for step in range(10)] == close([*ramp, *half_wave])
    steps_down = partial(multistep, milestones=[0.5], gamma=0.1)
    assert [steps_down(step, 10, 4) for step in range(10)] == close([*ramp, 1, 1, 1, *[0.1] * 3])
    exponential_decay = [0.01 ** (step / 6) for step in range(6)]
    assert [exponential(step, 10, 4) for step in range(10)] == close([*ramp, *exponential_decay])
    inverse = [1 / (1 + 99 * step / 6) for step in range(6)]
    assert [inverse_time(step, 10, 4) for step in range(10)] == close([*ramp, *inverse])
    line = [1 - step / 6 for step in range(6)]
    assert [polynomial(step, 10, 4) for step in range(10)] == close([*ramp, *line])
    ramp_from_half = [0.6, 0.7, 0.8, 0.9]
    assert [polynomial(step, 10, 4, warmup_start=0.5) for step in range(10)] == close([*ramp_from_half, *line])
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
        (partial(polynomial, warmup_start=1), "warmup_start"),
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
def test_plateau_equals_reduce_lr_on_plateau(mode, patience):
    optimizer, reference_optimizer = make_optimizer(), make_optimizer()
    settings: dict[str, Any] = {"monitor": "val/loss", "mode": mode, "factor": 0.5, "patience": patience}
    settings |= {"min_delta": 0.01, "minimum": 0.001, "base_lrs": BASE_LRS, "warmup_steps": 0}
    plateau = Plateau(**settings)
    reference = lr_scheduler.ReduceLROnPlateau(
        reference_optimizer,
        mode=mode,
        factor=0.5,
        patience=patience,
        threshold=0.01,
        threshold_mode="abs",
        min_lr=[lr * 0.001 for lr in BASE_LRS],
        eps=0,
    )
    generator, seen_lrs = random.Random(1), set()
    for step in range(300):
        value = (
            math.nan
            if generator.random() < 0.05
            else 1 + generator.gauss(0, 0.02) + (0.98**step if mode == "min" else 0)
        )
        plateau.apply(optimizer, step)
        assert learning_rates(optimizer) == close(learning_rates(reference_optimizer)), step
        seen_lrs.add(learning_rates(optimizer)[0])
        plateau.observe({"val/loss": value, "val/accuracy": 0.0})
        reference.step(value)
        restored = Plateau(**settings)  # the state dict is complete
        restored.load_state_dict(json.loads(json.dumps(plateau.state_dict())))
        plateau = restored
    assert len(seen_lrs) == 11 and min(seen_lrs) == close(0.3 * 0.001)  # ten reductions, down to the minimum


def test_plateau_applies_warm_up():
    optimizer = make_optimizer()
    plateau = Plateau(monitor="a", mode="min", factor=0.5, patience=0, min_delta=0, base_lrs=BASE_LRS, warmup_steps=3)
    for value in (1.0, 2.0):
        plateau.observe({"a": value})
    factors = []
    for step in range(5):
        plateau.apply(optimizer, step)
        factors.append(learning_rates(optimizer)[0] / BASE_LRS[0])
    assert factors == close([0.125, 0.25, 0.375, 0.5, 0.5])


# torch schedulers

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
    reference, expected = TORCH[name](make_optimizer()), []
    for step in range(steps):
        if step and step % every == 0:
            reference.step()
        groups = reference.optimizer.param_groups
        expected.append([(group["lr"], group["momentum"]) for group in groups])
    assert len({str(row) for row in expected}) > 2

    for stop in range(steps):
        adapter = TorchScheduler(TORCH[name](make_optimizer()), interval=interval, steps_per_epoch=3)
        for step in range(steps):
            if step == stop:
                state = json.loads(json.dumps(adapter.state_dict()))
                adapter = TorchScheduler(TORCH[name](make_optimizer()), interval=interval, steps_per_epoch=3)
                adapter.load_state_dict(state)
            optimizer = adapter.scheduler.optimizer
            adapter.apply(optimizer, step)
            assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == expected[step], (
                stop,
                step,
            )


@pytest.mark.parametrize("name", ["exponential", "multi_step", "cosine", "restarts"])
def test_torch_scheduler_continues_with_another_base_lr(name):
    first = TorchScheduler(TORCH[name](make_optimizer()), interval="step", steps_per_epoch=3)
    for step in range(4):
        first.apply(first.scheduler.optimizer, step)
    halved = TorchScheduler(
        TORCH[name](make_optimizer([lr / 2 for lr in BASE_LRS])), interval="step", steps_per_epoch=3
    )
    halved.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(4, 9):
        first.apply(first.scheduler.optimizer, step)
        halved.apply(halved.scheduler.optimizer, step)
        expected = [lr / 2 for lr in learning_rates(first.scheduler.optimizer)]
        assert learning_rates(halved.scheduler.optimizer) == close(expected)


def test_one_cycle_does_not_set_momentum_of_groups_without_it():
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
def test_duration_is_converted_to_steps(duration, steps):
    assert to_steps(duration, steps_per_epoch=20, samples_per_epoch=1000, total_steps=600) == steps


def test_interval_of_ten_percent_is_due_at_most_ten_times():
    """For any number of steps, there is no extra evaluation one or two steps before the last one."""
    for total in (471, 600, 1001, 7):
        every = to_steps("10%", steps_per_epoch=20, samples_per_epoch=1000, total_steps=total)
        assert len([step for step in range(1, total + 1) if due(step, every, total_steps=total)]) <= 10


def test_invalid_duration_is_refused():
    for text in ("", "steps", "3", "-1 steps", "3 weeks", "nan steps", "1 epoch 2"):
        with pytest.raises(ValueError, match="no duration"):
            to_steps(text, steps_per_epoch=20, samples_per_epoch=1000, total_steps=600)


def test_due_at_every_interval_and_at_the_last_step():
    assert [step for step in range(1, 12) if due(step, 4)] == [4, 8]
    assert [step for step in range(1, 12) if due(step, 4, total_steps=11)] == [4, 8, 11]
    assert not any(due(step, None, total_steps=11) for step in range(1, 12))


def test_total_steps_and_warmup_steps_follow_from_the_budgets():
    assert total_steps(max_epochs=3, max_steps=None, steps_per_epoch=7) == 21
    assert total_steps(max_epochs=3, max_steps=20, steps_per_epoch=7) == 20
    assert total_steps(max_epochs=3, max_steps=22, steps_per_epoch=7) == 21
    assert total_steps(max_epochs=None, max_steps=5, steps_per_epoch=7) == 5
    assert total_steps(max_epochs=None, max_steps=None, steps_per_epoch=7) is None
    assert [warmup_steps(epochs, steps_per_epoch=7) for epochs in (0, 1, 0.5, 2)] == [0, 7, 4, 14]


@pytest.mark.parametrize(("horizon", "fits"), [(5, False), (10, False), (11, True), (12, True)])
def test_torch_scheduler_with_too_few_total_steps_is_refused_at_build(horizon, fits):
    """12 steps call the scheduler 11 times; OneCycleLR would raise in the middle of the run."""
    overrides = ("schedule=torch", "schedule._target_=torch.optim.lr_scheduler.OneCycleLR", "~schedule.gamma")
    overrides += ("+schedule.max_lr=0.1", f"+schedule.total_steps={horizon}", "schedule.interval=step")
    if fits:
        training, _ = build(composed(*overrides))
        for step in range(training.settings.total_steps):
            training.state.schedule.apply(training.state.optimizer, step)
    else:
        with pytest.raises(ConfigError, match=rf"schedule.total_steps = {horizon}: is too short.* steps it 11 times"):
            build(composed(*overrides))
