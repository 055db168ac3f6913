"""Augmentation: steps that change a batch of images, with separate random values for each sample.

pipeline.py       draws an epoch's random values, applies the steps, pairs samples for the mixing steps
geometry.py       steps that move pixels: crop, flip, affine, resized crop, elastic
color.py          steps that change colours
corruptions.py    steps that damage images: erasing, blur, noise
mixing.py         steps that mix two samples and their labels: mixup, CutMix
per_sample.py     torchvision's transforms and other callables, one seeded sample at a time
distributions.py  normal, beta and per-pixel random values, computed from uniform ones
checks.py         checks of a step's arguments

Only the pipeline draws random values.

seed, epoch -> Augmentations.draw -> Drawn; (images, labels, rows) of a batch -> Drawn(...) -> each step in order
"""
