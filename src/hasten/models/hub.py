"""What the local cache of the hub holds of a model. No torch."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cached_snapshot", "kept_snapshot"]

SECONDS = 3.0  # that the hub has for its answer


def cached_snapshot(model: str) -> Path | None:
    """The directory in the cache that `DiffusionPipeline.from_pretrained` would load a hub id from.

    None where it would have to fetch the model: there is no snapshot of its main branch, or the hub
    says that the branch has moved on. A hub that cannot be reached, gives no answer within three
    seconds or refuses one has no say.
    """
    folder = kept_snapshot(model)
    return folder if folder is not None and _commit(model) in (folder.name, None) else None


def kept_snapshot(model: str) -> Path | None:
    """The directory of a hub id's main branch as it was last fetched, if it was. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(model, "model_index.json")
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(index).parent if isinstance(index, str) else None


def _commit(model: str) -> str | None:
    """Of the main branch on the hub; None where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(model, timeout=SECONDS).sha
    except Exception:  # of whichever network library it is: loading takes the snapshot then, too
        return None
