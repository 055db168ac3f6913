"""Augmentation: each step changes a whole batch, each sample by its own random values. Only the frame draws.

pipeline.py       the frame: draws an epoch's random values, applies the steps, mixes samples with partners
geometry.py       steps that move pixels: crop, flip, affine, resized crop, elastic
color.py          steps that change colours
corruptions.py    steps that damage images: erasing, blur, noise
mixing.py         steps that mix two samples and their labels: mixup, CutMix
per_sample.py     torchvision's transforms and other callables, one seeded sample at a time
distributions.py  normal, beta and per-pixel random values, made of uniform ones
checks.py         checks of a step's arguments

seed, epoch -> Augmentations.draw -> Drawn; (images, labels, rows) of a batch -> Drawn(...) -> each step in order
"""
