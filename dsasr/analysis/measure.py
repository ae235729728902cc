"""Entropy allocation of checkpoints: runs', snapshots' and foreign encoders on one probe set.

`dsasr.entropy_allocation` defines the measures, `probed_encoders` opens the
encoders; here the recordings are labeled and encoded. Rows are plain JSON: one per checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsasr.analysis.probed_encoders import ProbedEncoder
from dsasr.build import Builder
from dsasr.data.audio.features import resample
from dsasr.data.text.phonemes import (
    EspeakPhonemizer,
    MissingPhonemes,
    StoredPhonemes,
    UnknownPhoneme,
    UnknownWord,
    build_phonemizer,
)
from dsasr.entropy_allocation import forced_alignment, frame_labels
from dsasr.entropy_allocation.cka import cka
from dsasr.entropy_allocation.frame_labels import Labeled, Numbering
from dsasr.entropy_allocation.nse import nse
from dsasr.entropy_allocation.predictive_entropy import Allocation, CtcEntropySums
from dsasr.entropy_allocation.v_information import VInformation, VInformationConfig, csai, pai
from dsasr.evaluation.eval_sets import Recording, batches
from dsasr.model.encoders.pretrained import RATE
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError
from dsasr.utils.io import nonfinite_to_none

# -- labels ------------------------------------------------------------------------------------


@dataclass
class ProbeSet:
    """Recordings at ``rate`` with their labels; ``causes`` counts what had to be left out."""

    recordings: list[Recording]
    labels: list[Labeled]
    causes: Counter[str] = field(default_factory=Counter)
    rate: int = RATE


def probe_set(
    aligner: ProbedEncoder, recordings: Sequence[Recording], semantic: str = "word"
) -> ProbeSet:
    """Label recordings: alignments that the shards hold, else the aligner's forced alignment.

    ``semantic`` is ``word`` or ``token`` (of the run's LLM): the labels S of CSAI. What has no
    text, or the key of an earlier one, is left out. Raises `UserError` if fewer than 3 utterances
    could be labeled.
    """
    build = aligner.build
    if build is None:
        raise UserError("labels need a CTC head: give --aligner a run, checkpoint or snapshot")
    causes: Counter[str] = Counter()
    speech: dict[str, Recording] = {}
    for r in recordings:
        if r.text and r.key not in speech:
            speech[r.key] = r
        else:
            causes["same_key" if r.text else "no_text"] += 1
    features = aligner.encode(list(speech.values())) if aligner.ctc is not None else {}
    phonemizer = build_phonemizer(build.recipe.data.phonemizer)
    speaker = EspeakPhonemizer() if isinstance(phonemizer, StoredPhonemes) else phonemizer
    number, labels, kept = Numbering(), [], []
    for r in speech.values():
        try:
            labels.append(_label(r, aligner, features.get(r.key), phonemizer, speaker, number))
            kept.append(r)
        except (UnknownPhoneme, UnknownWord, MissingPhonemes) as error:
            causes[type(error).__name__] += 1
        except ValueError:
            causes["not_alignable"] += 1
    if len(kept) < 3:
        raise UserError(
            f"only {len(kept)} utterances could be labeled (left out: {dict(causes)}): "
            "at least 3 are needed"
        )
    if semantic == "token":
        labels = [_tokens(r, held, build, speaker) for r, held in zip(kept, labels, strict=True)]
    return ProbeSet(kept, labels, causes, build.recipe.data.fbank.rate)


def _label(r: Recording, aligner: ProbedEncoder, x_SE, phonemizer, speaker, number) -> Labeled:
    vocab, seconds = aligner.build.phonemes, aligner.frame_seconds
    rate = aligner.build.recipe.data.fbank.rate
    words, owners = forced_alignment.words_of(r.text), None
    if r.alignment is not None and r.alignment.get("phonemes"):
        frames = len(x_SE) if x_SE is not None else round(len(r.wave) / rate / seconds)
        stored = forced_alignment.read(r.alignment, vocab.encode, frames, seconds)
        placed, symbols = stored.placed, stored.phonemes
        if stored.words is not None:  # what counts as a word is then the alignment's matter
            words, owners = stored.words, stored.owners
    else:
        if x_SE is None:
            raise UserError("the aligner has no CTC head, and the shards hold no alignments")
        symbols = phonemizer.for_sample(r)
        with torch.no_grad():
            log_probs = aligner.ctc(x_SE[None].to(device()))[0]
        placed = forced_alignment.align(log_probs, vocab.encode(symbols))
    if owners is None:
        owners = frame_labels.word_owners(symbols, r.text, r.lang, speaker)
    ids = vocab.encode(list(symbols))
    return frame_labels.label(r.key, r.speaker, words, ids, owners, placed, number, seconds)


def _tokens(r: Recording, held: Labeled, build: Builder, speaker) -> Labeled:
    symbols = build.phonemes.decode(held.phonemes)
    owners = frame_labels.word_owners(symbols, r.text, r.lang, speaker)
    tokenizer = build.tokenizer
    ids = tokenizer.encode(r.text)
    return frame_labels.label_tokens(held, r.text, owners, ids, tokenizer.decode)


# -- measuring ---------------------------------------------------------------------------------


def measure(
    subject: ProbedEncoder,
    probes: ProbeSet,
    config: VInformationConfig,
    reference: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The subject's row, and its features (key → [S, E]) for CKA of later ones.

    Raises `UserError` where its frames are not finite, or too few to hold any out.
    """
    started = time.monotonic()
    recordings = _at_rate(probes, subject.rate)
    features = subject.encode(recordings)
    every_NE = torch.cat(list(features.values()))
    if not bool(every_NE.isfinite().all()):
        raise UserError(f"{subject.name} gives frames that are not finite: leave it out")
    spectrum = nse(every_NE)
    frames = frame_labels.frame_set(probes.labels, features, subject.frame_seconds, config.window)
    frames = frames.to(device())
    row: dict[str, Any] = {"name": subject.name, **subject.about}
    row |= {"nse": spectrum.nse, "effective_rank": spectrum.effective_rank}
    row |= {"width": every_NE.shape[1], "frames": spectrum.frames}
    try:
        row |= {"pai": _plain(pai(frames, config)), "csai": _plain(csai(frames, config))}
    except ValueError as error:
        raise UserError(f"{subject.name}: {error}; give more utterances") from None
    if reference is not None and all(
        len(features[k]) == len(reference[k]) for k in features if k in reference
    ):
        both = torch.cat([reference[k] for k in features])
        row["cka_to_first"] = cka(both, every_NE)
    if subject.ctc is not None:
        row["ctc"] = asdict(_ctc_entropy(subject.ctc, features))
    if subject.llm is not None:
        row["llm"] = llm_allocation(subject.llm, subject.build, recordings)
    row["utterances"] = len(recordings)
    row["seconds"] = time.monotonic() - started
    return nonfinite_to_none(row), features


def _at_rate(probes: ProbeSet, rate: int) -> list[Recording]:
    if rate == probes.rate:
        return probes.recordings
    return [
        replace(r, wave=resample(torch.from_numpy(r.wave), probes.rate, rate).numpy())
        for r in probes.recordings
    ]


def _plain(found: VInformation) -> dict[str, Any]:
    more = {"share": found.share, "sound": found.sound, "found": found.found}
    return nonfinite_to_none(asdict(found) | more)


@torch.no_grad()
def _ctc_entropy(head: nn.Module, features: dict[str, Tensor]):
    sums = CtcEntropySums()
    for x_SE in features.values():
        sums.update(head(x_SE[None].to(device())).cpu(), torch.tensor([len(x_SE)]))
    return sums.value()


@torch.no_grad()
def llm_allocation(
    model: SpeechLLM, build: Builder, recordings: Sequence[Recording]
) -> dict[str, float]:
    """H₀, H₁ and H₀ − H₁ in nats per transcript token (end included), and predictive entropies
    with and without the audio. H₀ is the same, trained language model with the speech left out."""
    sums: dict[str, float] = {}
    fbank = build.recipe.data.fbank
    given = {"fbank_config": fbank, "cmvn": build.cmvn, "tokenizer": build.tokenizer}
    for batch in batches(recordings, **given):
        moved = batch.to(device())
        for audio in (True, False):
            for name, (total, count) in model(moved, audio=audio).sums.items():
                key = f"{name}_{'with' if audio else 'without'}"
                sums[key] = sums.get(key, 0.0) + float(total)
                sums[f"{key}_n"] = sums.get(f"{key}_n", 0.0) + float(count)
    mean = {k: v / max(sums[f"{k}_n"], 1.0) for k, v in sums.items() if not k.endswith("_n")}
    tokens = int(sums["nll_with_n"])
    found = Allocation(mean["nll_without"], mean["nll_with"], tokens)
    return {
        "without_audio": found.without_audio,
        "with_audio": found.with_audio,
        "resolved": found.resolved,
        "share": found.share,
        "entropy": mean["entropy_with"],
        "entropy_without_audio": mean["entropy_without"],
        "gap": mean["nll_with"] - mean["entropy_with"],
        "tokens": tokens,
    }


# -- a table -----------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text. PAI and CSAI are nats a frame with their 95% interval, shuffled in brackets;
    ``none (<x)`` where nothing was found and a gain of x would have been."""
    head = ("checkpoint", "NSE", "rank", "PAI", "of H(P)", "CSAI", "of H(S|P)", "CKA", "CTC H",
            "H0", "H1", "H0-H1", "LLM H")  # fmt: skip
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    llm, ctc = row.get("llm", {}), row.get("ctc", {})

    def number(value: float | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    def gain(held: dict[str, Any]) -> str:
        shuffled = f"[{number(held['shuffled'], 2)}]"
        if held["sound"] and not held.get("found", True):
            limit = "" if held["limit"] is None else f" (<{number(held['limit'])})"
            return f"none{limit} {shuffled}"
        mark = "" if held["sound"] else " underfit"
        return f"{held['value']:.3f} {held['low']:.2f}…{held['high']:.2f} {shuffled}{mark}"

    def share(held: dict[str, Any]) -> str:
        return "–" if held["share"] is None else f"{100 * held['share']:.1f}%"

    return (
        row["name"], number(row["nse"]), number(row["effective_rank"], 1),
        gain(row["pai"]), share(row["pai"]),
        gain(row["csai"]), share(row["csai"]),
        number(row.get("cka_to_first")), number(ctc.get("frames")),
        number(llm.get("without_audio")), number(llm.get("with_audio")),
        number(llm.get("resolved")), number(llm.get("entropy")),
    )  # fmt: skip
