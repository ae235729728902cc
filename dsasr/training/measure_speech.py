"""Measure the utterances that a run trains on, once at its start: ``speech.json`` in its folder."""

from __future__ import annotations

from dsasr import config
from dsasr.build import Builder
from dsasr.data.dataloader.dataloader import build_dataset_parts
from dsasr.data.shards.storage import ShardReadError, ShardStorage
from dsasr.data.speech_statistics import SAMPLES, SpeechStatistics, measure
from dsasr.evaluation.eval_sets import read_recordings
from dsasr.tracking.run_log import SPEECH
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, to_json

SHARDS = 16  # of a dataset that are looked at, evenly spread


def save(builder: Builder) -> None:
    """Write ``speech.json``, unless it is there; rank 0 does, without the others.

    A shard that cannot be read is left out: training itself says so.
    """
    path = builder.recipe.folder / SPEECH
    if not distributed.is_main_rank() or path.exists() or "sft" not in builder.recipe.branches:
        return
    atomic_write(path, to_json(config.to_plain(statistics(builder)), indent=1) + "\n")


def statistics(builder: Builder, samples: int = SAMPLES) -> SpeechStatistics:
    """Of about ``samples`` utterances of the training sets as they are, not augmented."""
    data, rate = builder.recipe.data, builder.front_end.rate
    storage = ShardStorage(data.dataloader.source)
    parts = build_dataset_parts(data.train, storage, data.dataloader.temperature)
    storage.close()
    rows = []
    for part in parts:
        shards = [str(shard) for shard in part.shards[:: max(1, -(-len(part.shards) // SHARDS))]]
        limit = max(1, samples // (len(parts) * max(1, len(shards))))
        try:
            recordings, _ = read_recordings(
                shards, rate=rate, text=data.text, source=data.dataloader.source, limit=limit,
                max_seconds=data.dataloader.batch.max_seconds,
            )  # fmt: skip
        except (ShardReadError, UserError):
            continue
        for r in recordings:
            tokens = len(builder.tokenizer.encode(r.text)) + 1
            rows.append(measure(r.wave, rate, r.text, tokens, r.lang))
    return SpeechStatistics.of(rows)
