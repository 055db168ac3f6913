"""All randomness is a pure function of the seed and of what it is for.

`fold(seed, "order", epoch)` gives the seed of an epoch's sample order, `fold(seed, "dropout", step)` that of a step's
dropout. Nothing is drawn from a stream that must be carried on, so a resumed run needs no saved generator state.
"""

import hashlib


def fold(seed: int, *names: int | str) -> int:
    """A 63-bit seed from a seed and the names of what it is for; equal arguments give equal seeds on every machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
