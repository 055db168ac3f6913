"""Losses, optimizers, schedules and averages of the weights.

    losses.py             losses, and the objective that adds auxiliary heads
    parameter_groups.py   which parameters decay, and which of them Muon trains
    muon.py               Muon with AdamW
    schedules.py          learning-rate schedules: pure functions of (step, total steps, warm-up steps)
    scheduling.py         applies them to an optimizer; plateau and torch's own schedulers
    ema.py                exponential moving average of the weights
    lookahead.py          slow weights, which the trained weights return to

The path of optimizer.lr: config -> group["lr"] of each parameter group -> base learning rates of the schedule ->
schedule.apply(optimizer, step) before each step -> the update.
"""
