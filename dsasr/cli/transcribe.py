"""Transcribe audio with an exported model or a run: files, folders, or standard input.

The exit code is 1 if a file could not be read.

examples:
  dsasr transcribe models/demo talk.mp3 interviews/ --format srt --out subtitles
  ffmpeg -i film.mp4 -f wav - | dsasr transcribe models/demo - --format jsonl
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsasr.cli.arguments import add_chunk, add_overwrite, check_new, command_parser, count
from dsasr.evaluation.doubt import MEANING
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, to_json
from dsasr.utils.progress import Bar
from dsasr.utils.troubleshooting import see

ALIASES = {"txt": "text", "json": "jsonl"}
FORMATS = ("text", "jsonl", "srt", "vtt", *ALIASES)

if TYPE_CHECKING:
    from dsasr.inference.recognizer import Recognizer, Transcription


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("model", type=Path, help="an exported folder, or a run folder")
    parser.add_argument("audio", nargs="+", help="files, folders, or - for standard input")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument(
        "--out", type=Path, help="a folder: one file for each audio file, placed as the audio is"
    )
    add_overwrite(parser)
    parser.add_argument("--beam", type=count, default=0, help="1 is greedy (default: the model's)")
    parser.add_argument(
        "--nbest", type=count, default=1,
        help="hypotheses of each segment, with scores (text, jsonl)",
    )  # fmt: skip
    parser.add_argument("--lang", default="", help="what is spoken, such as en or zh, if known")
    parser.add_argument(
        "--channel", type=int, help="the channel to transcribe, from 0 (default: the mean of all)"
    )
    parser.add_argument(
        "--vad", choices=("auto", "silero", "energy"), default="auto", help="what finds the speech "
        "(default: silero-vad where it is installed)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    parser.add_argument(
        "--batch-seconds", type=float, default=240.0, help="of audio that is decoded together"
    )
    add_chunk(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    args.format = ALIASES.get(args.format, args.format)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)

    import torch

    from dsasr.utils.library_warnings import silence_library_warnings

    sources = find(args.audio)
    if args.format in ("srt", "vtt") and len(sources) > 1 and not args.out:
        raise UserError("subtitles of several files need --out FOLDER")
    written = targets(args.out, sources, args.audio, args.format) if args.out else {}
    check_new(written.values(), args.overwrite)
    silence_library_warnings()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    recognizer = open_recognizer(args)
    several = len(sources) > 1 and not args.out and args.format == "text"
    bad: list[str] = []
    doubts = Doubts()

    def on_error(path: str, error: UserError) -> None:
        bad.append(path)
        Bar.write(f"left out: {error}", file=sys.stderr)

    with tempfile.TemporaryFile() as spool:
        if "-" in sources:
            shutil.copyfileobj(sys.stdin.buffer, spool)  # libsndfile wants to seek
            spool.seek(0)
        opened = [spool if s == "-" else s for s in sources]
        total = sum(map(seconds_of, sources))
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}, {rate_fmt}]"
        if not total:
            form = "{n:.0f} s [{elapsed}]"
        with Bar(total=total or None, unit="s", bar_format=form, disable=args.quiet) as bar:
            for transcription in recognizer.transcribe_all(
                opened, bar.update, on_error, lang=args.lang, channel=args.channel
            ):
                text = formatted(transcription, args.format, args.nbest)
                doubts.add(transcription)
                if args.out:
                    atomic_write(written[transcription.path], text)
                else:
                    with bar.external_write_mode():
                        head = f"{transcription.path}\t" if several else ""
                        sys.stdout.write(head + text)
                        sys.stdout.flush()
    for line in doubts.lines():
        print(line, file=sys.stderr)
    if args.out and not args.quiet:
        print(f"{len(written) - len(bad):,} transcripts in {args.out}", file=sys.stderr)
    return 1 if bad else 0


def open_recognizer(args: argparse.Namespace) -> Recognizer:
    """The model with what the command line changes of its settings."""
    from dsasr.inference.recognizer import Recognizer

    recognizer = Recognizer.from_pretrained(args.model, args.device)
    check_vad(args.vad)
    recognizer = replace(
        recognizer,
        batch_seconds=args.batch_seconds,
        segmentation=replace(recognizer.segmentation, vad=args.vad),
    )
    if args.beam:
        recognizer = recognizer.with_beam(args.beam)
    if args.nbest > 1:
        recognizer = recognizer.with_nbest(args.nbest)
    if args.chunk:
        decode = replace(recognizer.decode, chunk_ms=args.chunk)
        decode.chunk(recognizer.model.encoder)
        recognizer = replace(recognizer, decode=decode)
    return recognizer


class Doubts:
    """What is in doubt over all files, for the console: counts, and the first place of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.segments = self.doubtful = 0
        self.warnings: list[str] = []

    def add(self, transcription: Transcription) -> None:
        self.segments += len(transcription.spoken)
        self.doubtful += len(transcription.doubtful)
        for segment in transcription.doubtful:
            place = f"{transcription.path}, {segment.start:.1f} to {segment.end:.1f} s"
            for kind in segment.doubt:
                self.counts[kind] += 1
                self.first.setdefault(kind, place)
        self.warnings += [f"{transcription.path}: {text}" for text in transcription.warnings]

    def lines(self) -> list[str]:
        lines = list(self.warnings)
        if self.doubtful:
            lines.append(f"in doubt: {self.doubtful} of {self.segments} segments")
        for kind, number in self.counts.most_common():
            hint = see("cut") if kind == "cut" else ""
            lines.append(f"  {number} {kind} ({MEANING[kind]}): {self.first[kind]}{hint}")
        return lines


def check_vad(kind: str) -> None:
    from dsasr.inference.vad import has_silero

    if kind == "silero" and not has_silero():
        raise UserError('silero-vad is not installed: run pip install "dsasr[vad]"')


def find(names: Sequence[str]) -> list[Path | str]:
    """Files in the order given, folders replaced by the audio files below them."""
    from dsasr.inference.recognizer import audio_files

    sources: list[Path | str] = []
    for name in names:
        if name == "-":
            sources.append(name)
        elif Path(name).is_dir():
            sources += audio_files(Path(name))
        elif Path(name).is_file():
            sources.append(Path(name))
        else:
            raise UserError(f"there is no {name}")
    if sources.count("-") > 1:
        raise UserError("standard input can be read only once")
    return sources


def seconds_of(path: Path | str) -> float:
    """By the header; 0 where there is none, or none that can be believed."""
    import soundfile

    try:
        return 0.0 if path == "-" else soundfile.info(str(path)).duration
    except (soundfile.LibsndfileError, RuntimeError):
        return 0.0


def formatted(transcription: Transcription, form: str, nbest: int = 1) -> str:
    if form == "jsonl":
        return to_json(transcription.to_dict()) + "\n"
    if form == "text":
        return transcription.to_nbest() if nbest > 1 else transcription.text + "\n"
    return transcription.to_srt() if form == "srt" else transcription.to_vtt()


def targets(
    out: Path, sources: Sequence[Path | str], names: Sequence[str], form: str
) -> dict[str, Path]:
    """Each source → the file in ``out`` for its transcript.

    What lies below one of the folders among ``names`` keeps its place there; other files have
    their names. Of several of one name all but the first get a number.
    """
    folders = [Path(name) for name in names if Path(name).is_dir()]
    ending = {"text": "txt"}.get(form, form)
    found: dict[str, Path] = {}
    for source in sources:
        place = Path("stdin" if source == "-" else Path(source).name)
        for folder in folders:
            if source != "-" and Path(source).is_relative_to(folder):
                place = Path(source).relative_to(folder)
                break
        stem = out / place.with_suffix("")
        name, number = stem.with_name(f"{stem.name}.{ending}"), 1
        while name in found.values():
            number += 1
            name = stem.with_name(f"{stem.name}-{number}.{ending}")
        found.setdefault(str(source), name)
    return found
