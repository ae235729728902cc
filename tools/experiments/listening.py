"""Measure listening: long audio, clicks, memory, word times, and scores by the CTC head.

    python tools/experiments/listening.py long runs/demo corpus/demo --clips 200
    python tools/experiments/listening.py clicks runs/demo
    python tools/experiments/listening.py memory runs/demo corpus/demo --minutes 60
    python tools/experiments/listening.py times runs/demo --sentences 100
    python tools/experiments/listening.py witness runs/demo corpus/demo
    python tools/experiments/listening.py channels runs/demo corpus/demo

Each prints its rows, and appends them to ``--out`` as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from spoken_times import LANGUAGES, RATE, offsets, speak_with_times

from dsasr.data.audio.channel import band_limit
from dsasr.data.speech_statistics import characters
from dsasr.demo.corpus import CorpusConfig, held_out
from dsasr.entropy_allocation.forced_alignment import words_of
from dsasr.evaluation.error_rate import count_edits, ratio_interval
from dsasr.evaluation.hallucination import wilson
from dsasr.evaluation.normalize import units
from dsasr.inference.recognizer import Recognizer
from dsasr.inference.sources import Samples

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
            yield {
                "audio": "trimmed" if gap < 0 else f"gap {gap:g} s", "kind": kind,
                "minutes": round(len(wave) / RATE / 60, 2),
                "errors": round(100 * errors / total, 2),
                "segments": len(transcription.spoken), "doubtful": len(transcription.doubtful),
                "overlaps": sum(s.overlap > 0 for s in transcription.segments),
                "real_time_factor": round(seconds * RATE / len(wave), 3),
            }  # fmt: skip


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


def time_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Word times against the synthesizer's, over the words that were recognized.

    espeak-ng reports when each word begins; a word ends where the next one begins.
    """
    recognizer = loaded(args)
    config = CorpusConfig()
    texts = held_out(config, "test", args.sentences)
    texts = [(lang, text) for lang, text in texts if lang in LANGUAGES]
    spoken = [speak_with_times(text, lang, VOICES[i % 4]) for i, (lang, text) in enumerate(texts)]
    found = recognizer.transcribe_all([Samples(wave) for wave, _ in spoken])
    errors: dict[str, list[float]] = {}
    for (lang, text), (_, starts), transcription in zip(texts, spoken, found, strict=True):
        heard = [word for segment in transcription.segments for word in segment.words]
        if [word.text for word in heard] != words_of(text):
            continue
        words = dict(zip(offsets(text), heard, strict=True))
        for offset, start in starts.items():
            if offset in words:
                errors.setdefault(lang, []).append(words[offset].start - start)
    for lang, values in errors.items():
        delta = np.array(values)
        yield {
            "lang": lang, "words": len(values),
            "mean_ms": round(1000 * float(np.abs(delta).mean()), 1),
            "median_ms": round(1000 * float(np.median(np.abs(delta))), 1),
            "bias_ms": round(1000 * float(delta.mean()), 1),
            "p95_ms": round(1000 * float(np.quantile(np.abs(delta), 0.95)), 1),
        }  # fmt: skip


# -- witness -------------------------------------------------------------------------------------


def witness_rows(args: argparse.Namespace) -> Iterator[Row]:
    """How well each signal finds wrong and hallucinated transcripts on the suite: area under the
    curve, and the share that a threshold set on ``valid`` at 1% false alarms catches; then errors
    with rescoring."""
    from dsasr.evaluation.eval_sets import read_recordings
    from dsasr.evaluation.suite import RECORDINGS_ONLY, USUAL_CHANNELS, SuiteConfig
    from dsasr.inference.evaluated_model import EvaluatedModel

    torch.set_num_threads(1)
    evaluated = EvaluatedModel.open(args.model)
    valid, _ = read_recordings(str(args.corpus / "shards" / "valid"), text=evaluated.text)
    test, _ = read_recordings(
        [str(args.corpus / "shards" / name) for name in ("test", "nonspeech")],
        text=evaluated.text, limit=args.clips,
    )  # fmt: skip
    beam = args.beam or 1
    before = evaluated.transcribe(valid, RECORDINGS_ONLY, beam=beam).rows
    rows = evaluated.transcribe(
        test, SuiteConfig(clips=args.nonspeech, channels=USUAL_CHANNELS), beam=beam
    ).rows
    rows = [row for row in rows if row.hypothesis]
    right = [row for row in before if row.hypothesis and row.hypothesis == row.reference]
    wrong = np.array([row.wrong for row in rows])
    invented = np.array([row.hallucinated for row in rows])
    # Without those that are neither right nor wrong, which have some errors.
    clear = wrong | np.array([row.hypothesis == row.reference for row in rows])
    for name, value in SIGNALS.items():
        scores = np.array([value(row) for row in rows])
        threshold = float(np.quantile([value(row) for row in right], 0.99))
        caught = scores > threshold
        yield {
            "signal": name, "beam": beam, "transcripts": len(rows),
            "wrong": int(wrong.sum()), "auc_wrong": round(area(scores, wrong), 3),
            "auc_wrong_or_right": round(area(scores[clear], wrong[clear]), 3),
            "hallucinated": int(invented.sum()),
            "auc_hallucinated": round(area(scores, invented), 3),
            "caught_hallucinated": share(caught, invented), "caught_wrong": share(caught, wrong),
            "false_alarms": share(caught, np.array([r.hypothesis == r.reference for r in rows])),
        }  # fmt: skip
    yield from rescoring_rows(args, evaluated, valid, [r for r in test if r.text])


# Higher is more suspicious.
SIGNALS = {
    "margin (nats a phoneme)": lambda row: _less(row.margin),
    "CTC (nats a second)": lambda row: _less(row.heard),
    "weakest three words": lambda row: 1 - (0.0 if row.weakest is None else row.weakest),
    "token entropy": lambda row: row.entropy if row.entropy is not None else 99.0,
    "characters a second": lambda row: characters(row.hypothesis) / max(row.seconds, 0.1),
}


def _less(value: float | None) -> float:
    return 1e3 if value is None else -value  # what has no score is suspicious


def share(caught: np.ndarray, of: np.ndarray) -> str:
    hits, count = int((caught & of).sum()), int(of.sum())
    if not count:
        return "none"
    low, high = wilson(hits, count)
    return f"{100 * hits / count:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


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


def rescoring_rows(args, evaluated, valid, test) -> Iterator[Row]:
    """Errors on the test set with the weight that was tuned on the validation set."""
    from dsasr.inference.tuning import choose, nbest_of, tune

    for beam in (4, 8):
        tuning = tune(evaluated, valid, beam=beam)
        weight = tuning.tuned.ctc_weight
        nbest = nbest_of(evaluated, test, replace(evaluated.decode, beam=beam, ctc_weight=0.0))
        for used in (0.0, weight):
            pairs = [(mixed(r.text), mixed(choose(nbest[r.key], used).text)) for r in test]
            edits = np.array([count_edits(*pair).errors for pair in pairs])
            counts = np.array([len(reference) for reference, _ in pairs])
            row = {"rescoring": "test", "beam": beam, "ctc_weight": used, "clips": len(test)}
            yield row | rate_row(edits, counts)
        yield {"tuned": tuning.tuned.doubt.margin, "beam": beam, "right": tuning.right}


def area(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the curve of ``scores``, higher where more suspicious; ties count half."""
    positive, negative = scores[wrong], np.sort(scores[~wrong])
    if not len(positive) or not len(negative):
        return float("nan")
    below = np.searchsorted(negative, positive, "left")
    upto = np.searchsorted(negative, positive, "right")
    return float((below + upto).sum() / 2 / len(positive) / len(negative))


def loaded(args: argparse.Namespace) -> Recognizer:
    torch.set_num_threads(1)
    recognizer = Recognizer.from_pretrained(args.model)
    if args.beam:
        recognizer = recognizer.with_beam(args.beam)
    return replace(
        recognizer,
        segmentation=replace(recognizer.segmentation, vad=args.vad),
        batch_seconds=args.batch_seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", choices=("long", "clicks", "memory", "times", "witness", "channels")
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path, nargs="?", help="the demo's corpus")
    parser.add_argument("--clips", type=int, default=0, help="of the test set; 0: all")
    parser.add_argument("--nonspeech", type=int, default=10, help="clips of each synthetic sound")
    parser.add_argument("--split", default="test")
    parser.add_argument("--gaps", type=float, nargs="+", default=[0.8, 0.2, 0.0, -1.0],
                        help="seconds between clips; -1: their own silence is cut off")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", default=["clean", "dc", "hum", "noise30"])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--beam", type=int, default=0)
    parser.add_argument("--vad", default="auto")
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {
        "long": long_rows, "clicks": click_rows, "memory": memory_rows, "times": time_rows,
        "witness": witness_rows, "channels": channel_rows,
    }[args.what]  # fmt: skip
    for row in rows(args):
        line = json.dumps({"measured": args.what, "vad": args.vad} | row, ensure_ascii=False)
        print(line, flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
