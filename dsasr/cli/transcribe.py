"""Transcribe audio with an exported model or a run: files, folders, or standard input.

The exit code is 1 if a file could not be read.

examples:
  dsasr transcribe models/demo talk.mp3 interviews/ --format srt --out subtitles
  ffmpeg -i film.mp4 -f wav - | dsasr transcribe models/demo - --format jsonl
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsasr.cli.arguments import add_chunk, add_overwrite, check_new, command_parser
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, to_json
from dsasr.utils.progress import Bar

if TYPE_CHECKING:
    from dsasr.inference.recognizer import Transcription


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("model", type=Path, help="an exported folder, or a run folder")
    parser.add_argument("audio", nargs="+", help="files, folders, or - for standard input")
    parser.add_argument("--format", choices=("text", "jsonl", "srt"), default="text")
    parser.add_argument(
        "--out", type=Path, help="a folder: one file for each audio file, placed as the audio is"
    )
    add_overwrite(parser)
    parser.add_argument("--beam", type=int, default=0, help="1 is greedy (default: the model's)")
    add_chunk(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)

    import torch

    from dsasr.inference.recognizer import Recognizer
    from dsasr.recipe import silence_library_warnings

    sources = find(args.audio)
    if args.format == "srt" and len(sources) > 1 and not args.out:
        raise UserError("subtitles of several files need --out FOLDER")
    written = targets(args.out, sources, args.audio, args.format) if args.out else {}
    check_new(written.values(), args.overwrite)
    silence_library_warnings()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    recognizer = Recognizer.from_pretrained(args.model)
    if args.beam:
        recognizer = recognizer.with_beam(args.beam)
    if args.chunk:
        decode = replace(recognizer.decode, chunk_ms=args.chunk)
        decode.chunk(recognizer.model.encoder)
        recognizer = replace(recognizer, decode=decode)
    several = len(sources) > 1 and not args.out and args.format == "text"
    bad: list[str] = []
    cut: list[str] = []  # the segments whose transcripts were cut

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
            for transcription in recognizer.transcribe_all(opened, bar.update, on_error):
                text = formatted(transcription, args.format)
                cut += cut_segments(transcription)
                if args.out:
                    atomic_write(written[transcription.path], text)
                else:
                    with bar.external_write_mode():
                        head = f"{transcription.path}\t" if several else ""
                        sys.stdout.write(head + text)
                        sys.stdout.flush()
    if cut:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        print(
            f"cut at the token limit, and perhaps not complete: {cut[0]}{more} (the limit is the "
            "recipe's evaluation.decode: max_tokens, tokens_per_second)",
            file=sys.stderr,
        )
    return 1 if bad else 0


def cut_segments(transcription: Transcription) -> list[str]:
    """The segments whose transcripts were cut at the token limit, as ``file, 0.0 to 12.3 s``."""
    return [
        f"{transcription.path}, {s.start:.1f} to {s.end:.1f} s"
        for s in transcription.segments
        if not s.finished
    ]


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


def formatted(transcription: Transcription, form: str) -> str:
    if form == "jsonl":
        return to_json(transcription.to_dict()) + "\n"
    return transcription.to_srt() if form == "srt" else transcription.text + "\n"


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
