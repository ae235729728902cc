"""Transcribe a set of recordings: batches or clips in, `Results` out, the same on every rank.

Nothing here imports torch.distributed: the collectives that several ranks need are parameters, and
their defaults are those of a single rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dsasr.data.audio.activity import spoken_part
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.batch import Batch
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.evaluation.ctc_scoring import worst_stretch
from dsasr.evaluation.decode import DecodeConfig, Hypothesis, decode_nbest
from dsasr.evaluation.detokenizer import Detokenizer
from dsasr.evaluation.doubt import DoubtConfig, find_doubt
from dsasr.evaluation.eval_sets import Recording, batch_recordings
from dsasr.evaluation.results import Result, Results
from dsasr.evaluation.suite import CLEAN, SuiteClip
from dsasr.model.speech_llm import SpeechLLM


@dataclass(frozen=True)
class DoubtRules:
    """What transcripts are doubted by: the training's speech, and thresholds."""

    speech: SpeechStatistics = field(default_factory=SpeechStatistics)
    doubt: DoubtConfig = field(default_factory=DoubtConfig)


def transcribe(
    model: SpeechLLM,
    batches: Iterable[Batch],
    tokenizer: Detokenizer,
    config: DecodeConfig,
    *,
    device: torch.device,
    any_rank: Callable[[bool], bool] = bool,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    rules: DoubtRules | None = None,
    spoken: Mapping[str, float] | None = None,
) -> Results:
    """Decode this rank's ``batches``; the results of all ranks, sorted by key, on every rank.

    Every rank must bring equally many batches; some may hold no utterance. ``any_rank`` is as in
    `decode_nbest`; ``gather`` returns the values of all ranks in rank order; ``rules``: of doubt;
    ``spoken``: seconds of speech by key, where they are less than the recording.
    """
    results: list[Result] = []
    for batch in batches:
        found = decode_nbest(
            model, batch.to(device), tokenizer, config, any_rank, with_ctc_score=True
        )
        for row, (best, *_) in enumerate(found):
            seconds = (spoken or {}).get(best.key, batch.durations[row])
            results.append(_result(batch, row, best, seconds, rules or DoubtRules()))
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
    rules: DoubtRules | None = None,
    hint: Callable[[str], str] = lambda lang: "",
) -> Results:
    """`transcribe` clips that are the same on every rank; results in the order of ``clips``.

    The ranks share the clips, in batches of up to about ``frames`` padded feature frames.
    ``progress`` wraps this rank's batches; ``hint``: what the prompt names of a clip in a language
    (`Batch.hints`).
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
    batches = [replace(batch, hints=tuple(map(hint, batch.langs))) for batch in batches]
    spoken = {}
    for recording in recordings:
        start, end, _ = spoken_part(recording.wave, front_end.rate)
        spoken[recording.key] = end - start
    most = max(gather(len(batches)))
    batches += [Batch.blank(torch.zeros(0, 0, front_end.bins))] * (most - len(batches))
    indexed = transcribe(
        model, progress(batches), tokenizer, config,
        device=device, any_rank=any_rank, gather=gather, rules=rules, spoken=spoken,
    )  # fmt: skip
    ordered = sorted(indexed.rows, key=lambda result: int(result.key))
    return Results(
        [
            replace(result, key=clip.key, condition=clip.condition, speaker=clip.speaker)
            for clip, result in zip(clips, ordered, strict=True)
        ]
    )


def _result(
    batch: Batch, row: int, hypothesis: Hypothesis, spoken: float, rules: DoubtRules
) -> Result:
    entropies, ctc = hypothesis.token_entropies, hypothesis.ctc_score
    seconds = batch.durations[row]
    margin = None if ctc is None else ctc.margin_per_unit
    return Result(
        key=batch.keys[row],
        condition=CLEAN,
        lang=batch.langs[row],
        reference=batch.texts[row] or None,
        hypothesis=hypothesis.text,
        seconds=seconds,
        entropy=sum(entropies) / max(len(entropies), 1),
        finished=hypothesis.finished,
        speaker=batch.speakers[row],
        margin=margin,
        heard=None if ctc is None else ctc.log_prob / max(seconds, 1e-3),
        weakest=None if ctc is None else worst_stretch(ctc.words),
        doubt=find_doubt(
            hypothesis.text,
            seconds=spoken,
            finished=hypothesis.finished,
            ctc_margin=margin,
            speech=rules.speech,
            config=rules.doubt,
            lang=batch.langs[row],
        ),
    )
