"""From recordings to a running job: look at a corpus, pack it, write its recipe and next commands.

Recognized are JSONL and NeMo manifests and those of FunASR, ms-swift, WeNet and lhotse, Kaldi
folders, LibriSpeech, AISHELL-1, Common Voice, audio folders and Parquet of Hugging Face, folders of
recordings with a .txt beside each, and shards. Splits by name are kept apart; validation and test
sets that are missing are made, without speakers of the training data where speakers are known.

The folder of --out gets shards, what the models need of them, NAME.yaml with all that differs from
a packaged recipe, and try.yaml, a few steps of everything. Run again, it does nothing again.

examples:
  dsasr init recordings/ --llm Qwen/Qwen3-0.6B
  dsasr init train.jsonl dev.jsonl --llm models/llm --encoder models/whisper-base --out mine
  dsasr init LibriSpeech/ --dry-run            what is there, and nothing is written
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser, positive


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("data", nargs="+", type=Path, help="folders, manifests or shards")
    parser.add_argument("--llm", default="", help="language model: a folder, or a hub name")
    parser.add_argument(
        "--encoder", default="",
        help="pretrained encoder: a folder or a hub name (default: openai/whisper-large-v3, on a "
        "CPU openai/whisper-base); scratch: pretrain one",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("mine"), help="folder to make (mine)")
    parser.add_argument("--run", type=Path, help="run folder of its recipe (runs/NAME)")
    parser.add_argument("--lang", default="", help="language of utterances that name none: en …")
    parser.add_argument("--kind", default="auto", help="form of the corpus (default: recognized)")
    parser.add_argument(
        "--text",
        type=Path,
        help="sentences of your domain, one a line: text to read without speech",
    )
    parser.add_argument("--dry-run", action="store_true", help="look and tell; write nothing")
    parser.add_argument(
        "--overwrite", action="store_true", help="make --out anew; shards of the same data stay"
    )
    parser.add_argument("--processes", type=positive, help="that pack (default: one per core)")
    args = parser.parse_args(arguments)

    from dsasr.setup.project import init
    from dsasr.setup.workspace import Options
    from dsasr.utils.library_warnings import silence_library_warnings

    silence_library_warnings()
    init(Options(**vars(args) | {"data": tuple(args.data)}))
