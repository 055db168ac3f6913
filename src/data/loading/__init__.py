"""Batches for the loop, from images in memory or in files.

    loaders.py         TrainLoader and EvalLoader: order of an epoch, groups of batches, where images are augmented
    normalisation.py   pixels of 0 to 255 -> float32 images of zero mean; fitted to the training split
    prefetch.py        on CUDA: the next batch is made while a step computes
    workers.py         WorkerPool: loader workers, seen from the main process
    worker_process.py  what a loader worker does
    parcels.py         objects with tensors, handed to workers through files in memory
    server.py          the fork server of all workers of this process

A batch: rows -> Resident or Streamed (perhaps a worker) -> augmentation -> normalisation -> prefetch -> loop.
"""
