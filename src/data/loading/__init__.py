"""Batches for the training loop, from images in memory or in files.

    loaders.py         TrainLoader and EvalLoader: order of an epoch, groups of batches, device of the augmentation
    normalisation.py   pixels of 0 to 255 -> float32 images of zero mean; fitted on the train split
    prefetch.py        on CUDA: the next batch is prepared while a step computes
    workers.py         WorkerPool: the main process's side of the loader workers
    worker_process.py  the function that each loader worker runs
    parcels.py         objects with tensors, sent to workers through files in memory
    server.py          the fork server of all workers of this process

A batch: rows -> Resident or Streamed (perhaps in a worker) -> augmentation -> normalisation -> prefetch -> loop.
"""
