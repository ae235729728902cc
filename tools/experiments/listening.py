"""Measure listening: long audio, clicks, memory, word times and channels.

    python tools/experiments/listening.py long runs/demo corpus/demo --clips 200
    python tools/experiments/listening.py clicks runs/demo
    python tools/experiments/listening.py memory runs/demo corpus/demo --minutes 60
    python tools/experiments/listening.py times runs/demo --sentences 100 [--live]
    python tools/experiments/listening.py channels runs/demo corpus/demo

Each prints its rows, and appends them to ``--out`` as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rapidfuzz.distance import Levenshtein
from spoken_times import LANGUAGES, RATE, offsets, speak_with_times

from dsasr.data.audio.channel import band_limit
from dsasr.demo.corpus import CorpusConfig, held_out
from dsasr.entropy_allocation.forced_alignment import words_of
from dsasr.evaluation.error_rate import count_edits, ratio_interval
from dsasr.evaluation.normalize import units
from dsasr.inference.recognizer import Recognizer
from dsasr.inference.sources import Samples
from dsasr.inference.stream_events import Final
from dsasr.inference.streaming import StreamingRecognizer
from dsasr.inference.transcript import Transcription
from dsasr.inference.words import Word

VOICES = ("m3", "Alex", "f3", "f5")  # of the demo's test set
Row = dict[str, Any]


def clips_of(corpus: Path, split: str, count: int) -> list[tuple[np.ndarray, str, str]]:
    """(wave, text, language) of ``count`` clips, spread over the split; 0: all."""
    rows = [json.loads(line) for line in (corpus / f"{split}.jsonl").open(encoding="utf-8")]
    if count:
        rows = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
    return [
        (soundfile.read(corpus / r["audio"], dtype="float32")[0], r["text"], r["lang"])
        for r in rows
    ]


def mixed(text: str) -> list[str]:
    return units(text, "zh-en", "standard")


def rate_row(edits: np.ndarray, counts: np.ndarray) -> Row:
    """Σ edits / Σ units in percent with its 95% interval over clips."""
    interval = ratio_interval(edits.astype(float), counts.astype(float))
    return {
        "errors": round(100 * interval.value, 2),
        "low": round(100 * interval.low, 2),
        "high": round(100 * interval.high, 2),
    }


# -- long audio ----------------------------------------------------------------------------------


def degraded(wave: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    power = float(np.square(wave, dtype=np.float64).mean())
    if kind == "dc":
        wave = wave + 0.01
    elif kind == "hum":
        phase = 2 * np.pi * 50 * np.arange(len(wave)) / RATE
        wave = wave + 10 ** (-50 / 20) * np.sqrt(2) * np.sin(phase)
    elif kind.startswith("noise"):
        scale = np.sqrt(power / 10 ** (float(kind[5:]) / 10))
        wave = wave + scale * rng.standard_normal(len(wave))
    elif kind == "band":
        wave = band_limit(torch.from_numpy(wave), 8000).numpy()
    return wave.astype(np.float32)


def trimmed(wave: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(wave) > 0.003)
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave


def long_rows(args: argparse.Namespace) -> Iterator[Row]:
    recognizer = loaded(args)
    clips = clips_of(args.corpus, args.split, args.clips)
    reference = [mixed(text) for _, text, _ in clips]
    total = sum(map(len, reference))
    for kind in args.kinds:
        rng = np.random.default_rng(0)
        waves = [Samples(degraded(wave, kind, rng)) for wave, _, _ in clips]
        alone = recognizer.transcribe_all(waves)
        edits = sum(
            count_edits(r, mixed(t.text)).errors for r, t in zip(reference, alone, strict=True)
        )
        yield {
            "audio": "clip by clip", "kind": kind, "clips": len(clips),
            "errors": round(100 * edits / total, 2),
        }  # fmt: skip
    rng = np.random.default_rng(0)
    for gap in args.gaps:
        for kind in args.kinds:
            parts = []
            for wave, _, _ in clips:
                cut = trimmed(wave) if gap < 0 else wave
                parts += [cut, np.zeros(int(max(gap, 0) * RATE), np.float32)]
            wave = degraded(np.concatenate(parts), kind, rng)
            started = time.perf_counter()
            transcription = recognizer.transcribe(wave)
            seconds = time.perf_counter() - started
            flat = [unit for of_clip in reference for unit in of_clip]
            errors = count_edits(flat, mixed(transcription.text)).errors
            joins = [s.start for s in transcription.segments if s.overlap]
            yield {
                "audio": "trimmed" if gap < 0 else f"gap {gap:g} s", "kind": kind,
                "minutes": round(len(wave) / RATE / 60, 2),
                "errors": round(100 * errors / total, 2),
                "segments": len(transcription.spoken), "doubtful": len(transcription.doubtful),
                "overlaps": len(joins), **errors_at(joins, flat, transcription),
                "real_time_factor": round(seconds * RATE / len(wave), 3),
            }  # fmt: skip


NEAR = 1.0  # seconds from a join


def errors_at(joins: Sequence[float], reference: list[str], found: Transcription) -> Row:
    """Errors of how many recognized units, within `NEAR` seconds of a join of overlapping pieces
    and elsewhere, as "x of y"."""
    timed = []
    for segment in found.spoken:
        # Normalized, a text may have other units than words: their order gives the times.
        units_of, words = mixed(segment.text), segment.words
        for number, unit in enumerate(units_of):
            word = words[number * len(words) // len(units_of)] if words else segment
            timed.append((unit, (word.start + word.end) / 2))
    if not timed:
        return {"errors_at_joins": "0 of 0", "errors_elsewhere": f"{len(reference)} of 0"}
    near = [any(abs(at - join) < NEAR for join in joins) for _, at in timed]
    errors = {True: 0, False: 0}
    for op in Levenshtein.opcodes(reference, [unit for unit, _ in timed]):
        if op.tag != "equal":
            place = min(op.dest_start, len(timed) - 1)
            errors[near[place]] += max(op.src_end - op.src_start, op.dest_end - op.dest_start)
    counts = {where: near.count(where) for where in (True, False)}
    return {
        f"errors_{name}": f"{errors[where]} of {counts[where]}"
        for name, where in (("at_joins", True), ("elsewhere", False))
    }


def click_rows(args: argparse.Namespace) -> Iterator[Row]:
    """50 clicks of 1 to 30 ms in five minutes of silence (dither, and noise at -60 dB)."""
    recognizer = loaded(args)
    for floor in (1 / 32768, 10 ** (-60 / 20)):
        rng = np.random.default_rng(0)
        wave = (floor * rng.standard_normal(300 * RATE)).astype(np.float32)
        for _ in range(50):
            size, at = int(rng.uniform(0.001, 0.03) * RATE), int(rng.integers(299 * RATE))
            decay = np.exp(-np.arange(size) / (size / 4))
            wave[at : at + size] += (0.5 * decay * rng.standard_normal(size)).astype(np.float32)
        found = recognizer.transcribe(np.clip(wave, -1, 1))
        subtitles = found.to_srt().count("-->")
        yield {"audio": "50 clicks in 300 s", "floor": float(floor), "subtitles": subtitles}


def memory_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The peak memory of this process after 5 minutes of audio, and after ``--minutes``."""
    recognizer = loaded(args)
    clips = [wave for wave, _, _ in clips_of(args.corpus, args.split, 100)]
    block = np.concatenate(clips)
    for minutes in (5.0, args.minutes):
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            with soundfile.SoundFile(file.name, "w", RATE, 1, "PCM_16") as out:
                written = 0
                while written < minutes * 60 * RATE:
                    out.write(block)
                    written += len(block)
            started = time.perf_counter()
            found = recognizer.transcribe(file.name)
            seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield {
            "minutes": round(written / RATE / 60, 1), "segments": len(found.segments),
            "seconds": round(seconds, 1), "peak_mib": round(peak),
        }  # fmt: skip


# -- word times ----------------------------------------------------------------------------------


def file_words(recognizer: Recognizer, waves: Sequence[np.ndarray]) -> list[list[Word]]:
    found = recognizer.transcribe_all(map(Samples, waves))
    return [[word for segment in t.segments for word in segment.words] for t in found]


def live_words(recognizer: Recognizer, waves: Sequence[np.ndarray]) -> list[list[Word]]:
    """Each wave as a stream of its own, in pieces of 100 ms."""
    streaming, found = StreamingRecognizer(recognizer), []
    for wave in waves:
        stream = streaming.stream()
        pieces = np.split(wave, range(RATE // 10, len(wave), RATE // 10))
        events = [event for piece in pieces for event in stream.feed(piece)] + stream.finish()
        found.append([word for e in events if isinstance(e, Final) for word in e.words])
    return found


def time_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Word times against the synthesizer's, over the words that were recognized.

    espeak-ng reports when each word begins; a word ends where the next one begins.
    """
    recognizer = loaded(args)
    config = CorpusConfig()
    texts = held_out(config, "test", args.sentences)
    texts = [(lang, text) for lang, text in texts if lang in LANGUAGES]
    spoken = [speak_with_times(text, lang, VOICES[i % 4]) for i, (lang, text) in enumerate(texts)]
    waves = [wave for wave, _ in spoken]
    found = live_words(recognizer, waves) if args.live else file_words(recognizer, waves)
    errors: dict[str, list[float]] = {}
    for (lang, text), (_, starts), heard in zip(texts, spoken, found, strict=True):
        if [word.text for word in heard] != words_of(text):
            continue
        words = dict(zip(offsets(text), heard, strict=True))
        for offset, start in starts.items():
            if offset in words:
                errors.setdefault(lang, []).append(words[offset].start - start)
    for lang, values in errors.items():
        delta = np.array(values)
        yield {
            "lang": lang, "live": args.live, "words": len(values),
            "mean_ms": round(1000 * float(np.abs(delta).mean()), 1),
            "median_ms": round(1000 * float(np.median(np.abs(delta))), 1),
            "bias_ms": round(1000 * float(delta.mean()), 1),
            "p95_ms": round(1000 * float(np.quantile(np.abs(delta), 0.95)), 1),
        }  # fmt: skip


# -- channels -----------------------------------------------------------------------------------


def channel_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Errors on test clips as they are and through each channel of the suite: decoded whole, and
    as `dsasr transcribe` does."""
    from dsasr.evaluation.eval_sets import read_recordings
    from dsasr.evaluation.suite import CLEAN, RECORDINGS_ONLY, USUAL_CHANNELS, through_channel
    from dsasr.inference.evaluated_model import EvaluatedModel

    torch.set_num_threads(1)
    evaluated = EvaluatedModel.open(args.model)
    test, _ = read_recordings(
        str(args.corpus / "shards" / args.split), text=evaluated.text, limit=args.clips
    )
    suite = replace(RECORDINGS_ONLY, channels=USUAL_CHANNELS)
    results = evaluated.transcribe(test, suite, beam=args.beam)
    for condition in (CLEAN, *USUAL_CHANNELS):
        rows = [row for row in results.rows if row.condition == condition]
        pairs = [(mixed(row.reference), mixed(row.hypothesis)) for row in rows]
        edits = np.array([count_edits(*pair).errors for pair in pairs])
        counts = np.array([len(reference) for reference, _ in pairs])
        doubtful = sum(bool(row.doubt) for row in rows)
        row = {"condition": condition, "clips": len(rows), "doubtful": doubtful}
        yield row | rate_row(edits, counts)
    # As files are transcribed: cut at pauses, without the silence around speech.
    recognizer, rng = loaded(args), np.random.default_rng(0)
    references = [mixed(recording.text) for recording in test]
    for condition in (CLEAN, *USUAL_CHANNELS):
        waves = [recording.wave for recording in test]
        if condition != CLEAN:
            waves = [through_channel(wave, condition, RATE, rng) for wave in waves]
        texts = [mixed(found.text) for found in recognizer.transcribe(waves)]
        pairs = zip(references, texts, strict=True)
        edits = np.array([count_edits(*pair).errors for pair in pairs])
        counts = np.array([len(reference) for reference in references])
        row = {"condition": condition, "by": "transcribe", "clips": len(test)}
        yield row | rate_row(edits, counts)


def loaded(args: argparse.Namespace) -> Recognizer:
    torch.set_num_threads(1)
    recognizer = Recognizer.from_pretrained(args.model)
    if args.beam:
        recognizer = recognizer.with_beam(args.beam)
    pieces = {}
    if args.max_seconds:
        pieces = {"max_seconds": args.max_seconds, "whole_seconds": args.max_seconds}
    return replace(
        recognizer,
        segmentation=replace(recognizer.segmentation, vad=args.vad, **pieces),
        batch_seconds=args.batch_seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("long", "clicks", "memory", "times", "channels"))
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path, nargs="?", help="the demo's corpus")
    parser.add_argument("--clips", type=int, default=0, help="of the test set; 0: all")
    parser.add_argument("--split", default="test")
    parser.add_argument("--gaps", type=float, nargs="+", default=[0.8, 0.2, 0.0, -1.0],
                        help="seconds between clips; -1: their own silence is cut off")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", default=["clean", "dc", "hum", "noise30"])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--live", action="store_true", help="word times of live streams")
    parser.add_argument("--beam", type=int, default=0)
    parser.add_argument("--vad", default="auto")
    parser.add_argument("--max-seconds", type=float, default=0.0,
                        help="of a piece; 0: as the model says")  # fmt: skip
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {
        "long": long_rows, "clicks": click_rows, "memory": memory_rows, "times": time_rows,
        "channels": channel_rows,
    }[args.what]  # fmt: skip
    write_rows(({"measured": args.what, "vad": args.vad} | row for row in rows(args)), args.out)


def write_rows(rows: Iterable[Row], out: Path | None) -> None:
    """Print each row as it comes, and append it to ``out`` as a JSON line."""
    for row in rows:
        line = json.dumps(row, ensure_ascii=False)
        print(line, flush=True)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
