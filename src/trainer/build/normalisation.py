"""The normalisation of a run, from its checkpoint."""

from core.errors import CheckpointError
from data.loading.normalisation import WHITENING, Normalisation
from trainer.snapshot import Snapshot


def saved_normalisation(snapshot: Snapshot, source: str, *, kind: str | None = None) -> Normalisation:
    """Return the normalisation in a checkpoint.

    Raises CheckpointError, which names `source`, if there is none, or if it is not of `kind` (data.normalise).
    """
    try:
        normalisation = Normalisation(snapshot.part("data"))
    except (KeyError, TypeError) as exception:
        raise CheckpointError(source, f"its checkpoint does not say what its data was: {exception!r}") from None
    if kind is not None and normalisation.whitens != (kind in WHITENING):
        explanation = f"data.normalise = {kind} is not the normalisation of its checkpoint; give back what was edited"
        raise CheckpointError(source, explanation)
    return normalisation
