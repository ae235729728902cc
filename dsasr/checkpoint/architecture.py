"""Settings of a model that no shape of its weights shows, and whether two recipes agree on them.

With another number of heads, say, the same weights load and compute something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dsasr.checkpoint.manifest import FragmentError
from dsasr.checkpoint.tensor_fragments import FragmentReader

# Part of ``model`` in a recipe → its settings that change what it computes and no shape of it.
HIDDEN = {
    "encoder": ("heads",),
    "encoder_lora": ("alpha",),
    "adaptor": ("kind", "stack", "activation", "heads", "queries", "temperature", "merge"),
    "lora": ("alpha",),
}
# Settings in which a recipe may differ from that of its weights.
FREE = {"dropout", "attention_dropout", "activation_checkpointing", "recompute", "path", "weights"}


def differing(
    part: str,
    theirs: Mapping[str, Any] | None,
    ours: Mapping[str, Any] | None,
    keys: Iterable[str] = (),
) -> list[str]:
    """``model.part.key=value`` of the plain settings ``theirs`` that are not those of ``ours``; of
    all keys that both have, or of ``keys``."""
    theirs, ours = (x if isinstance(x, Mapping) else {} for x in (theirs, ours))
    if ("path" in theirs) != ("path" in ours):  # a Conformer, and an encoder of another kind
        return []
    return [
        f"model.{part}.{key}={theirs[key]}"
        for key in keys or theirs
        if key in theirs and key in ours and key not in FREE and theirs[key] != ours[key]
    ]


def hidden_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """`differing` over all `HIDDEN` settings of two recipes' plain ``model`` mappings."""
    return [
        setting
        for part, keys in HIDDEN.items()
        for setting in differing(part, theirs.get(part), ours.get(part), keys)
    ]


def check(reader: FragmentReader, ours: Mapping[str, Any]) -> None:
    """Raise `FragmentError` where the recipe that a checkpoint or snapshot was trained with has
    other `HIDDEN` settings than the plain ``model`` mapping ``ours``."""
    # A snapshot has the settings of its encoder alone.
    theirs = (reader.manifest.get("recipe") or {}).get("model", reader.manifest)
    differ = hidden_differences(theirs if isinstance(theirs, Mapping) else {}, ours)
    if differ:
        raise FragmentError(
            f"{reader.folder} is of another architecture, which no shape shows: it was trained "
            f"with {' '.join(differ)}"
        )
