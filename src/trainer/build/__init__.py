"""From a config to objects; nothing here opens a file of the run or prints.

training.py        the whole: config -> Training, in the order in which the parts depend on each other
instantiate.py     one node of the config (`_target_` and arguments) -> an object, errors by key
trust.py           what a config that comes with a run may name
checks.py          values that are right by themselves and wrong together
dry_run.py         model and augmentation on dummy images
generators.py      seeded random values that leave the caller's generators as they were
data.py            data set, splits, augmentation, loaders
normalisation.py   the normalisation of a run, from its checkpoint
model.py           the model, on its device
weights.py         the weights that a new run starts from
loss.py            the loss
optimizer.py       the optimizer
schedule.py        the schedule
"""
