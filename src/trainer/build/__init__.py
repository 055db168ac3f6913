"""From a config to objects. Nothing here opens a file of the run or prints.

training.py        config -> Training, in the order in which the parts depend on each other
instantiate.py     one node of the config (`_target_` and arguments) -> an object, errors by key
trust.py           the classes that a config of a run folder may name
checks.py          values that contradict each other
dry_run.py         checks of model and augmentation on dummy images
generators.py      seeded random values; the caller's generators stay unchanged
data.py            data set, splits, augmentation, loaders
normalisation.py   the normalisation of a run, from its checkpoint
model.py           the model, on its device
step.py            the step, and how it calls the model: as it is, compiled, or as a CUDA graph
weights.py         the initial weights of a new run
loss.py            the loss
optimizer.py       the optimizer
schedule.py        the schedule
"""
