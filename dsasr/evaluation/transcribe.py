"""Transcribe a set of recordings: batches or clips in, `Results` out, the same on every rank.

Nothing here imports torch.distributed: the collectives that several ranks need are parameters, and
their defaults are those of a single rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.batch import Batch
from dsasr.evaluation.decode import DecodeConfig, Detokenizer, Hypothesis, decode
from dsasr.evaluation.eval_sets import Recording, batch_recordings
from dsasr.evaluation.results import Result, Results
from dsasr.evaluation.suite import CLEAN, SuiteClip
from dsasr.model.speech_llm import SpeechLLM


def transcribe(
    model: SpeechLLM,
    batches: Iterable[Batch],
    tokenizer: Detokenizer,
    config: DecodeConfig,
    *,
    device: torch.device,
    any_rank: Callable[[bool], bool] = bool,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> Results:
    """Decode this rank's ``batches``; the results of all ranks, sorted by key, on every rank.

    Every rank must bring equally many batches; some may hold no utterance. ``any_rank`` is as in
    `decode`; ``gather`` returns the values of all ranks in rank order.
    """
    results: list[Result] = []
    for batch in batches:
        hypotheses = decode(model, batch.to(device), tokenizer, config, any_rank)
        results += [_result(batch, row, hypothesis) for row, hypothesis in enumerate(hypotheses)]
    merged = [result for of_rank in gather(results) for result in of_rank]
    return Results(sorted(merged, key=lambda result: result.key))


def transcribe_clips(
    model: SpeechLLM,
    clips: Sequence[SuiteClip],
    tokenizer,
    config: DecodeConfig,
    *,
    front_end: FrontEnd,
    device: torch.device,
    frames: int = 8000,
    rank: int = 0,
    world_size: int = 1,
    any_rank: Callable[[bool], bool] = bool,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Results:
    """`transcribe` clips that are the same on every rank; results in the order of ``clips``.

    The ranks share the clips, in batches of up to about ``frames`` padded feature frames.
    ``progress`` wraps this rank's batches.
    """
    # The keys of clips repeat (one utterance at several SNRs): in the batches a clip is its index.
    recordings = [
        Recording(str(index), clip.wave, clip.text or "", clip.lang, "")
        for index, clip in enumerate(clips)
        if index % world_size == rank
    ]
    batches = list(
        batch_recordings(recordings, front_end=front_end, tokenizer=tokenizer, frames=frames)
    )
    most = max(gather(len(batches)))
    batches += [Batch.blank(torch.zeros(0, 0, front_end.bins))] * (most - len(batches))
    indexed = transcribe(
        model, progress(batches), tokenizer, config,
        device=device, any_rank=any_rank, gather=gather,
    )  # fmt: skip
    ordered = sorted(indexed.rows, key=lambda result: int(result.key))
    return Results(
        [
            replace(result, key=clip.key, condition=clip.condition, speaker=clip.speaker)
            for clip, result in zip(clips, ordered, strict=True)
        ]
    )


def _result(batch: Batch, row: int, hypothesis: Hypothesis) -> Result:
    entropies = hypothesis.token_entropies
    return Result(
        key=batch.keys[row],
        condition=CLEAN,
        lang=batch.langs[row],
        reference=batch.texts[row] or None,
        hypothesis=hypothesis.text,
        seconds=batch.durations[row],
        entropy=sum(entropies) / max(len(entropies), 1),
        finished=hypothesis.finished,
        speaker=batch.speakers[row],
    )
