"""Show the data, the model, the augmentation and the schedule of a training, without training.

    python scripts/look.py data=cifar10 'augment=[crop_flip,mixup]' schedule=one_cycle

The command takes the same arguments as train.py. It prints the class counts of each split and the layers of the
model. It writes these files, and the figures for TensorBoard too, to run_dir (null: outputs/<date>_<time>-look-<data>):

    images.png    one row per class: a training image without augmentation, and as augmented in the first epochs
    classes.png   the class counts
    layers.csv    shape, parameters, multiply-adds, memory and receptive field of each layer
    lr.png        the learning rate of each parameter group
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.declarations import TrainConfig

if __name__ == "__main__":
    launch("analysis.look.look_at", config_name="look", schema=TrainConfig)
