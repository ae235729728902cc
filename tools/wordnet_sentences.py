"""Print the usage examples of a WordNet database, one a line: plain English sentences and phrases.

    python tools/wordnet_sentences.py /usr/share/wordnet > sentences.txt

The database is that of Debian's package wordnet-base (WordNet 3.0, Princeton's free license). An
example is what stands in quotes in a gloss (wndb(5WN)).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsasr.utils.errors import UserError, run_tool

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
WORDS = 3  # of the shortest example that is printed
EXAMPLE = re.compile(r'"([^"]+)"')
ODD = re.compile(r"[^A-Za-z' ,.;:!?-]")  # digits, brackets: what is read aloud differs


def sentences(folder: Path) -> Iterator[str]:
    """The examples of at least `WORDS` words without digits and symbols; each once."""
    seen = set()
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: give WordNet's folder of database files")
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # the license
                continue
            for example in EXAMPLE.findall(line.partition("|")[2]):
                text = " ".join(example.split()).strip(" ;,")
                if len(text.split()) >= WORDS and not ODD.search(text) and text not in seen:
                    seen.add(text)
                    yield text


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        raise UserError("usage: python tools/wordnet_sentences.py FOLDER")
    for text in sentences(Path(arguments[0])):
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
