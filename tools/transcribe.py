"""Transcribe audio with an exported model or a run: files, folders, or standard input.

python tools/transcribe.py models/demo talk.mp3 interviews/ --format srt --out subtitles
ffmpeg -i film.mp4 -f wav - | python tools/transcribe.py models/demo - --format jsonl
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import soundfile
import torch

from dsasr.inference.recognizer import Recognizer, Transcription, audio_files, with_beam
from dsasr.recipe import quiet
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write, to_json
from dsasr.utils.progress import Bar


def find(names: list[str]) -> list[Path | str]:
    """Files in the order given, folders replaced by what they hold."""
    found: list[Path | str] = []
    for name in names:
        if name == "-":
            found.append(name)
        elif Path(name).is_dir():
            found += audio_files(Path(name))
        elif Path(name).is_file():
            found.append(Path(name))
        else:
            raise UserError(f"there is no {name}")
    if found.count("-") > 1:
        raise UserError("standard input can be read only once")
    return found


def seconds_of(path: Path | str) -> float:
    """By the header; 0 where there is none to believe."""
    try:
        return 0.0 if path == "-" else soundfile.info(str(path)).duration
    except (soundfile.LibsndfileError, RuntimeError):
        return 0.0


def shown(done: Transcription, form: str) -> str:
    if form == "jsonl":
        return to_json(done.plain()) + "\n"
    return done.srt() if form == "srt" else done.text + "\n"


def target(out: Path, path: str, form: str, taken: set[Path]) -> Path:
    """A name of its own in ``out`` for the transcript of ``path``."""
    stem = "stdin" if path == "-" else Path(path).stem
    ending = {"text": "txt"}.get(form, form)
    name, number = out / f"{stem}.{ending}", 1
    while name in taken:
        number += 1
        name = out / f"{stem}-{number}.{ending}"
    taken.add(name)
    return name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an exported folder, or a run folder")
    parser.add_argument("audio", nargs="+", help="files, folders, or - for standard input")
    parser.add_argument("--format", choices=("text", "jsonl", "srt"), default="text")
    parser.add_argument("--out", type=Path, help="a folder: one file for each audio file")
    parser.add_argument("--beam", type=int, default=1, help="1 is greedy")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    sources = find(args.audio)
    if args.format == "srt" and len(sources) > 1 and not args.out:
        raise UserError("subtitles of several files need --out FOLDER")
    quiet()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    recognizer = with_beam(Recognizer.from_pretrained(args.model), args.beam)
    several = len(sources) > 1 and not args.out and args.format == "text"
    taken: set[Path] = set()
    bad: list[str] = []

    def failed(path: str, error: UserError) -> None:
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
            for done in recognizer.transcribe_all(opened, bar.update, failed):
                text = shown(done, args.format)
                if args.out:
                    atomic_write(target(args.out, done.path, args.format, taken), text)
                else:
                    with bar.external_write_mode():
                        sys.stdout.write(f"{done.path}\t{text}" if several else text)
                        sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
