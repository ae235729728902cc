"""Cuts of lhotse: JSON lines of MonoCut, each with its recording and its supervisions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsasr.data.manifests.entry import Corpus, Form, ManifestEntry
from dsasr.data.manifests.rows import audio_of, first_row, json_rows, seconds, text_of
from dsasr.utils.errors import UserError


def _read(corpus: Corpus) -> Iterator[ManifestEntry]:
    def read(cut: dict) -> list[ManifestEntry]:
        recording, supervisions = cut.get("recording") or {}, cut.get("supervisions") or []
        why = _unusable(cut, recording)
        if why:
            corpus.leave_out("unusable_cut", str(cut.get("id")), why)
            return []
        if not any(supervision.get("text") for supervision in supervisions):
            corpus.leave_out("missing_text", str(cut["id"]), "no supervision has a text")
            return []
        audio = audio_of(recording["sources"][0]["source"], corpus.path.parent)
        if len(supervisions) == 1:  # the whole cut, as recipes for single utterances train on it
            return [_entry(corpus, cut, supervisions[0], audio, 0.0, seconds(cut["duration"]))]
        return [
            _entry(corpus, cut, s, audio, seconds(s["start"]), seconds(s["duration"]), n)
            for n, s in enumerate(supervisions)
            if s.get("text")
        ]

    for entries in json_rows(corpus.path, read):
        yield from entries


def _unusable(cut: dict, recording: dict) -> str:
    """Why a cut cannot be read; empty if it can."""
    if cut.get("type") in ("MixedCut", "PaddingCut"):
        return f"a {cut['type']}: save the mixture with CutSet.save_audios"
    sources = recording.get("sources") or []
    if not sources:
        return "it has no recording"
    if recording.get("transforms"):
        return "its recording is transformed (speed, volume …): save it with CutSet.save_audios"
    if len(sources) > 1 or sources[0].get("type") != "file":
        kinds = ", ".join(str(source.get("type")) for source in sources)
        return f"its recording has sources of type {kinds}, not one file: use CutSet.save_audios"
    return ""


def _entry(
    corpus: Corpus,
    cut: dict,
    supervision: dict,
    audio: Path,
    start: float,
    duration: float,
    number: int | None = None,
) -> ManifestEntry:
    """A supervision from ``start`` of its cut on."""
    start += seconds(cut.get("start"))
    whole = start == 0 and abs(duration - seconds(cut["recording"].get("duration"))) < 1e-3
    return ManifestEntry(
        id=str(cut["id"]) if number is None else f"{cut['id']}-{supervision.get('id') or number}",
        audio=audio,
        text=text_of(supervision["text"]),
        speaker=str(supervision.get("speaker") or ""),
        lang=str(supervision.get("language") or corpus.lang),
        duration=duration,
        start=None if whole else start,
        end=None if whole else start + duration,
    )


def _is_cuts(path: Path) -> bool:
    row = first_row(path)
    return "supervisions" in row and {"recording", "type"} & row.keys() != set()


def _is_parts(path: Path) -> bool:
    """Recordings or supervisions alone, from which lhotse makes cuts."""
    row = first_row(path)
    recordings = {"sources", "sampling_rate", "num_samples"} <= row.keys()
    return recordings or {"recording_id", "start", "duration", "channel"} <= row.keys()


def _is_shar(path: Path) -> bool:
    return path.is_dir() and any(path.glob("cuts.*.jsonl*")) and any(path.glob("recording.*.tar"))


def _refuse_parts(corpus: Corpus) -> Iterator[ManifestEntry]:
    raise UserError(
        f"{corpus.path} has recordings or supervisions alone: `lhotse cut simple -r "
        "recordings.jsonl.gz -s supervisions.jsonl.gz cuts.jsonl.gz` makes cuts, which are read"
    )
    yield


def _refuse_shar(corpus: Corpus) -> Iterator[ManifestEntry]:
    raise UserError(
        f'{corpus.path} is a lhotse Shar folder: convert it with python -c "from lhotse import '
        f"CutSet; CutSet.from_shar(in_dir='{corpus.path}').save_audios('audio')"
        ".to_file('cuts.jsonl.gz')\", and pack cuts.jsonl.gz"
    )
    yield


CUTS = Form("lhotse", "lhotse cuts", _is_cuts, _read)
PARTS = Form("lhotse-parts", "lhotse recordings or supervisions", _is_parts, _refuse_parts)
SHAR = Form("lhotse-shar", "lhotse Shar folder", _is_shar, _refuse_shar)
