"""Data: from files or archives to batches on the device. Imports neither models nor trainer.

sources/   read a data set, split it, convert it to one image size: Splits
augment/   change a batch by random values that are a pure function of seed, epoch and sample
loading/   normalisation, and loaders that yield batches
device.py  what depends on the device: copies to it, its memory, its precision

image file -> sources.decode -> uint8 (C, H, W) -> sources.splits -> loading.loaders (gather or decode a batch)
  -> augment.pipeline -> loading.normalisation -> float32 (B, C, H, W)
"""
