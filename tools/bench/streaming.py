"""Live recognition measured: errors streamed against whole, latency, revisions, streams a core.

    python tools/bench/streaming.py MODEL --data SHARDS [--limit 100] [--minutes 10]

Utterances of the set are fed in pieces of 100 ms, each followed by a second of silence, and found
by voice activity. Recorded are, one line each:

errors     error rates of whole utterances, of the encoder's chunks simulated (what ``dsasr evaluate
           --chunk`` gives) and of streams; the ratio of streamed to whole
latency    seconds of audio, and of computing beside it, from an utterance's beginning to its first
           partial text, and from its end to its final text; words that were revised for each word
           of the final texts, within partial texts and by the final one
streams    audio seconds that one core recognizes in a second, with 1, 4, 16 and 32 streams together
constant   a stream of ``--minutes``: computing time of a chunk in its first and in its last minute

Computing time is the CPU's, of one thread (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import record

from dsasr.data.text.scripts import HAN
from dsasr.evaluation.eval_sets import Recording, read_recordings
from dsasr.evaluation.results import Results
from dsasr.inference.evaluated_model import EvaluatedModel
from dsasr.inference.recognizer import Recognizer
from dsasr.inference.stream_events import Final, Partial
from dsasr.inference.streaming import StreamingConfig, StreamingRecognizer
from dsasr.utils.errors import run_tool
from dsasr.utils.memory import process_bytes

RATE, PIECE = 16_000, 1_600
SILENCE = np.zeros(RATE, np.float32)


def words(text: str) -> list[str]:
    return re.findall(f"[{HAN}]|[^\\s{HAN}]+", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=100, help="utterances (0: all)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--chunk-ms", type=int, default=640)
    parser.add_argument("--left", type=int, default=4)
    parser.add_argument("--skip", nargs="*", default=[], help="of errors streams constant")
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    evaluated = EvaluatedModel.open(args.model)
    recordings, _ = read_recordings(args.data, text=evaluated.text, limit=args.limit)
    recordings = [recording for recording in recordings if recording.text]
    config = StreamingConfig(chunk_seconds=args.chunk_ms / 1000, left=args.left)
    recognizer = StreamingRecognizer(Recognizer.from_pretrained(args.model), config)
    about = {
        "model": args.model.name, "utterances": len(recordings), "chunk_ms": args.chunk_ms,
        "left": args.left,
    }  # fmt: skip
    if "errors" not in args.skip:
        errors(evaluated, recordings, recognizer, args, about)
    if "streams" not in args.skip:
        throughput(recognizer, recordings, about)
    if "constant" not in args.skip:
        constant(recognizer, recordings, args.minutes, about)
    return 0


def errors(evaluated, recordings: list[Recording], recognizer, args, about: dict) -> None:
    """Error rates three ways, and the latency and revisions of the streams."""
    whole = evaluated.transcribe(recordings)
    decode = replace(evaluated.decode, chunk_ms=args.chunk_ms, chunk_left=args.left)
    chunked = replace(evaluated, decode=decode).transcribe(recordings)
    texts, rows = [], []
    for recording in recordings:
        timed = stream_alone(recognizer, recording.wave)
        texts.append(" ".join(e.text for _, _, e in timed if isinstance(e, Final) and e.text))
        rows.append((len(recording.wave) / RATE, timed))
    order = {recording.key: text for recording, text in zip(recordings, texts, strict=True)}
    streamed = Results([replace(row, hypothesis=order[row.key]) for row in whole.rows])
    rates = {}
    for name, results in (("whole", whole), ("chunked", chunked), ("streamed", streamed)):
        summary = results.summary(evaluated.rules)
        rates[name] = {
            key: round(100 * summary[key], 2) for key in ("wer", "cer", "mer") if key in summary
        }
        clean = summary["conditions"]["clean"]
        rates[name]["all"] = [round(100 * clean[k], 2) for k in ("rate", "low", "high")]
    ratio = rates["streamed"]["all"][0] / max(rates["whole"]["all"][0], 1e-9)
    record("streaming/errors", **about, rates=rates, ratio=round(ratio, 3))
    record("streaming/latency", **about, **latency(rows))


def stream_alone(recognizer: StreamingRecognizer, wave: np.ndarray):
    """(seconds of audio fed, computing seconds of the piece, event) of an utterance's stream."""
    stream, timed, fed = recognizer.stream(), [], 0
    audio = np.concatenate((wave, SILENCE))
    for start in range(0, len(audio), PIECE):
        piece = audio[start : start + PIECE]
        begun = time.process_time()
        events = stream.feed(piece)
        spent, fed = time.process_time() - begun, fed + len(piece)
        timed += [(fed / RATE, spent, event) for event in events]
    begun = time.process_time()
    events = stream.finish()
    spent = time.process_time() - begun
    return timed + [(fed / RATE, spent, event) for event in events]


def latency(rows) -> dict:
    """Medians and 95% quantiles in seconds; revised words for each word of the final texts."""
    first, last, computing, revised, corrected, final_words = [], [], [], 0, 0, 0
    for seconds, timed in rows:
        shown: list[str] = []
        begun = False
        for fed, spent, event in timed:
            computing.append(spent)
            if isinstance(event, Partial) and event.text and not begun:
                begun = True
                first.append(fed - event.start + spent)
            now = words(event.text)
            same = sum(1 for _ in agreeing(shown, now))
            if isinstance(event, Partial):
                revised += len(shown) - same
                shown = now
            else:
                corrected += len(shown) - same
                final_words += len(now)
                shown, begun = [], False
        ends = [(fed, spent) for fed, spent, event in timed if isinstance(event, Final)]
        if ends:
            last.append(ends[-1][0] - seconds + ends[-1][1])
    count = max(final_words, 1)
    return {
        "first_partial_s": spread(first),
        "final_s": spread(last),
        "computing_s": spread(computing),
        "revised_by_partials_per_word": round(revised / count, 3),
        "revised_by_finals_per_word": round(corrected / count, 3),
        "words": final_words,
    }


def agreeing(old: list[str], new: list[str]):
    for a, b in zip(old, new, strict=False):
        if a != b:
            return
        yield a


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 3),
        "p95": round(float(np.quantile(values, 0.95)), 3),
    }


def throughput(recognizer: StreamingRecognizer, recordings: list[Recording], about: dict) -> None:
    """Streams that start one after the other and speak without end, taken a step at a time."""
    for count in (1, 4, 16, 32):
        audio = [endless(recordings, shift) for shift in range(count)]
        streams = [recognizer.stream() for _ in range(count)]
        seconds, spent = 30 if count < 16 else 12, 0.0
        for step in range(seconds * RATE // PIECE):
            begun = time.process_time()
            for stream, wave in zip(streams, audio, strict=True):
                stream.push(wave[step * PIECE : (step + 1) * PIECE])
            recognizer.advance(streams)
            spent += time.process_time() - begun
        heard = count * seconds
        record(
            "streaming/streams", **about, together=count, audio_s=heard,
            real_time_factor=round(spent / heard, 4), streams_per_core=round(heard / spent, 1),
        )  # fmt: skip


def endless(recordings: list[Recording], shift: int, seconds: float = 31) -> np.ndarray:
    parts, total = [], 0
    for recording in islice(cycle(recordings), 7 * shift % len(recordings), None):
        parts += [recording.wave, SILENCE[: int(0.8 * RATE)]]
        total += len(recording.wave) + int(0.8 * RATE)
        if total > seconds * RATE:
            return np.concatenate(parts)
    raise AssertionError


def constant(recognizer, recordings: list[Recording], minutes: float, about: dict) -> None:
    """The computing time of pieces that complete a chunk, early and late in a long stream."""
    wave = endless(recordings, 0, 60 * minutes + 1)[: int(60 * minutes * RATE)]
    stream, spent, sizes = recognizer.stream(), [], []
    finals = 0
    for start in range(0, len(wave), PIECE):
        begun = time.process_time()
        events = stream.feed(wave[start : start + PIECE])
        finals += sum(isinstance(event, Final) for event in events)
        spent.append((start / RATE, time.process_time() - begun, bool(events)))
        if start % (30 * RATE) == 0:
            sizes.append(round(process_bytes() / 2**20))
    chunks = [(at, seconds) for at, seconds, told in spent if told]
    early = [s for at, s in chunks if at < 60]
    late = [s for at, s in chunks if at >= 60 * (minutes - 1)]
    record(
        "streaming/constant", **about, minutes=minutes, finals=finals,
        first_minute_s=spread(early), last_minute_s=spread(late),
        real_time_factor=round(sum(s for _, s, _ in spent) / (60 * minutes), 4),
        memory_mib=[sizes[0], sizes[len(sizes) // 2], sizes[-1]],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_tool(main))
