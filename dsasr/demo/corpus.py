"""Writes the demo's corpus: FLAC files, JSONL manifests, and text for the language model."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dsasr.data.text import espeak
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.demo import grammar, speech
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write
from dsasr.utils.progress import Bar

VERSION = 1  # goes up when the same arguments make another corpus
SUMMARY = "corpus.json"
_PARTIAL = "corpus.partial"  # marks an unfinished corpus, which may be cleared


@dataclass(frozen=True)
class CorpusConfig:
    """The settings of a corpus; equal settings give equal bytes.

    ``hours``: the train split's audio. ``english`` is the share of English sentences, ``mixed``
    that of code-switched ones; the rest is Mandarin. ``valid``, ``test`` and ``nonspeech`` count
    utterances, ``text`` the LM's sentences.
    """

    hours: float = 1.5
    seed: int = 0
    english: float = 0.5
    mixed: float = 0.04
    valid: int = 100
    test: int = 400
    nonspeech: int = 60
    text: int = 30_000

    def __post_init__(self) -> None:
        if not 0 < self.hours <= 10_000:
            raise UserError(f"--hours {self.hours}: give a number above 0")
        if not 0 <= self.english <= 1:
            raise UserError(f"--english-share {self.english}: give a number from 0 to 1")
        if not 0 <= self.mixed <= 0.5:
            raise UserError(f"--mixed-share {self.mixed}: give a number from 0 to 0.5")
        if min(self.valid, self.test, self.nonspeech, self.text) < 1 or self.seed < 0:
            raise UserError("sizes of a corpus must be 1 or more, its seed 0 or more")

    def shares(self) -> dict[str, float]:
        """Language → share of sentences. A corpus of one language has no code-switching."""
        mixed = self.mixed if 0 < self.english < 1 else 0.0
        return {
            "en": self.english * (1 - mixed),
            "zh": (1 - self.english) * (1 - mixed),
            "zh-en": mixed,
        }


def sentences(config: CorpusConfig, split: str, stream: int = 0) -> Iterator[tuple[str, str]]:
    """Endless (language, sentence) pairs of one split, the languages in their shares.

    ``stream`` seeds independent draws for one split: 0 for speech, 1 for text.
    """
    seed = config.seed * 16 + grammar.SPLITS.index(split) * 4 + stream
    shares = {lang: share for lang, share in config.shares().items() if share > 0}
    sources = {lang: grammar.SentenceSampler(lang, seed).sentences(split) for lang in shares}
    due = dict.fromkeys(shares, 0.0)  # sentences that a language is behind its share
    while True:
        for lang, share in shares.items():
            due[lang] += share
        lang = max(due, key=due.__getitem__)
        due[lang] -= 1
        yield lang, next(sources[lang])


def held_out(config: CorpusConfig, split: str, count: int) -> list[tuple[str, str]]:
    """``count`` (language, sentence) pairs of a held-out split, spread over all words."""
    drawn = list(itertools.islice(sentences(config, split), 4 * count))
    langs = [lang for lang, _ in drawn[:count]]
    selected = {
        lang: grammar.select_diverse([text for of, text in drawn if of == lang], langs.count(lang))
        for lang in dict.fromkeys(langs)
    }
    return [(lang, selected[lang].pop(0)) for lang in langs]


@functools.lru_cache
def _phonemizer() -> EspeakPhonemizer:
    return EspeakPhonemizer()


def _utterance(job: tuple[int, str, int, str, str]) -> tuple[dict, bytes]:
    """One utterance's manifest row (without its path) and FLAC bytes; runs in a worker process."""
    seed, split, number, lang, text = job
    rng = np.random.default_rng([seed, grammar.SPLITS.index(split), number])
    style = speech.SpeakingStyle.draw(rng, speech.VOICES[split])
    wave = speech.speak(text, style)
    row = {
        "id": f"{split}-{number:06d}",
        "text": text,
        "speaker": style.voice,
        "lang": lang,
        "duration": round(len(wave) / speech.RATE, 4),
        "phonemes": _phonemizer().phonemes(text, lang),
    }
    return row, speech.flac(wave)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _cores() -> int:
    """The number of cores that this process may use; in a job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(processes: int) -> ProcessPoolExecutor:
    # Forked workers share the imported modules; with another start method each imports them.
    method = "fork" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context(method), initializer=_one_thread
    )


def make_corpus(
    config: CorpusConfig,
    out: str | Path,
    *,
    processes: int | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> dict:
    """Write the corpus to the folder ``out`` and return its summary (also `SUMMARY` there).

    Writes ``{train,valid,test,nonspeech}.jsonl`` (id, audio, text, speaker, lang, duration,
    phonemes; ``audio`` relative to the manifest), ``audio/SPLIT/*.flac``, ``text/lm.txt`` (train
    sentences only) and ``text/lm_heldout.txt`` (valid sentences). Bytes depend on ``config`` alone,
    not on ``processes``. A finished corpus of the same config is kept, unless ``fresh``.
    Raises `UserError` if espeak-ng is missing or ``out`` holds something else.
    """
    out = Path(out)
    summary_path = out / SUMMARY
    identity = {"version": VERSION, **asdict(config)}
    if summary_path.is_file() and not fresh:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        if summary.get("config") == identity:
            return summary
    is_corpus = summary_path.is_file() or (out / _PARTIAL).is_file()
    if out.is_dir() and any(out.iterdir()) and not is_corpus:
        raise UserError(f"{out} holds something else than a corpus: choose another --out")
    espeak.phoneme_names("ready", "en-us", ipa=True)  # fails here, not in a worker
    atomic_write(out / _PARTIAL, "This corpus is being written, or writing it was interrupted.\n")
    summary_path.unlink(missing_ok=True)
    shutil.rmtree(out / "audio", ignore_errors=True)
    _write_text(config, out)
    summary = {"config": identity, "splits": {}}
    import torch  # noqa: F401 - before the fork, so that the workers share it

    with _pool(processes or _cores()) as pool:
        for split in grammar.SPLITS:
            rows = _write_split(config, split, out, pool, progress)
            summary["splits"][split] = _summarize(rows)
    summary["splits"]["nonspeech"] = _summarize(_write_nonspeech(config, out))
    atomic_write(summary_path, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    (out / _PARTIAL).unlink()
    return summary


def _write_split(
    config: CorpusConfig, split: str, out: Path, pool: ProcessPoolExecutor, progress: bool
) -> list[dict]:
    target = {"valid": config.valid, "test": config.test}.get(split)
    folder = out / "audio" / split
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    seconds = 0.0
    source = enumerate(held_out(config, split, target) if target else sentences(config, split))
    jobs = ((config.seed, split, number, lang, text) for number, (lang, text) in source)
    total = target or round(config.hours * 3600)
    bar = Bar(total=total, desc=split, unit="utt" if target else "s", disable=not progress)
    done = False
    with bar:
        while not done:
            # In blocks: where the train split ends is known only from the durations.
            block = list(itertools.islice(jobs, min(512, target or 512)))
            for row, data in pool.map(_utterance, block, chunksize=8):
                if done:
                    break
                path = folder / f"{row['id']}.flac"
                path.write_bytes(data)
                row = {"id": row["id"], "audio": str(path.relative_to(out)), **row}
                rows.append(row)
                seconds += row["duration"]
                bar.update(1 if target else min(row["duration"], max(0.0, total - bar.n)))
                done = len(rows) >= target if target else seconds >= config.hours * 3600
    _write_manifest(out / f"{split}.jsonl", rows)
    return rows


def _write_nonspeech(config: CorpusConfig, out: Path) -> list[dict]:
    """Silence, white noise and babble in turn, 2 to 6 s each; babble from training utterances."""
    import soundfile

    train = sorted((out / "audio" / "train").glob("*.flac"))
    rng = np.random.default_rng([config.seed, len(grammar.SPLITS)])
    talker_ids = rng.choice(len(train), min(64, len(train)), replace=False)
    talkers = [soundfile.read(train[i], dtype="float32")[0] for i in sorted(talker_ids.tolist())]
    folder = out / "audio" / "nonspeech"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(config.nonspeech):
        kind = speech.NONSPEECH[number % len(speech.NONSPEECH)]
        wave = speech.nonspeech(kind, rng.uniform(2, 6), talkers, int(rng.integers(2**62)))
        name = f"nonspeech-{number:04d}"
        path = folder / f"{name}.flac"
        path.write_bytes(speech.flac(wave))
        rows.append(
            {
                "id": name,
                "audio": str(path.relative_to(out)),
                "text": "",
                "speaker": kind,
                "lang": "und",
                "duration": round(len(wave) / speech.RATE, 4),
                "phonemes": [],
            }
        )
    _write_manifest(out / "nonspeech.jsonl", rows)
    return rows


def _write_manifest(path: Path, rows: list[dict]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_text(config: CorpusConfig, out: Path) -> None:
    for name, split, count in (
        ("lm.txt", "train", config.text),
        ("lm_heldout.txt", "valid", max(100, config.text // 50)),
    ):
        lines = itertools.islice(sentences(config, split, stream=1), count)
        atomic_write(out / "text" / name, "".join(text + "\n" for _, text in lines))


def _summarize(rows: list[dict]) -> dict:
    """Counts of a split: utterances, hours, speakers, distinct words and Han characters."""
    words: Counter = Counter()
    han: Counter = Counter()
    for row in rows:
        for token in row["text"].split():
            if token.isascii():
                words[token] += 1
            else:
                han.update(token)
    return {
        "utterances": len(rows),
        "hours": round(sum(row["duration"] for row in rows) / 3600, 4),
        "speakers": len({row["speaker"] for row in rows}),
        "languages": dict(sorted(Counter(row["lang"] for row in rows).items())),
        "english_words": len(words),
        "han_characters": len(han),
    }
