"""Show the data, the augmentation and the schedule of a training, without training. Takes train.py's command line.

    scripts/look.py data=cifar10 augment=[crop_flip,mixup] schedule=one_cycle

Prints the class counts of each split, and writes into run_dir (null: outputs/<date>_<time>-look-<data>)

    images.png   one row per class: a training image without augmentation, then as the first epochs show it
    classes.png    the class counts
    lr.png       the learning rate over the run

and the same for TensorBoard.
"""

from core.command_line import launch
from core.options.declarations import TrainConfig

if __name__ == "__main__":
    launch("analysis.look.look_at", config_name="train", schema=TrainConfig)
