"""Decode shards with a run or an export: error rates, hallucinations, a paired test with another.

examples:
  dsasr evaluate runs/demo --data corpus/demo/shards/test
  dsasr evaluate runs/demo --data corpus/demo/shards/{test,nonspeech} --suite --report
  dsasr evaluate runs/demo --checkpoint step-0000000450 --data … --out early.jsonl
  dsasr evaluate models/demo --data corpus/demo/shards/test --against runs/demo
  dsasr evaluate runs/demo --data corpus/demo/shards/valid --tune
  dsasr evaluate runs/bilingual --data corpus/test --hint-lang
  dsasr evaluate runs/demo-streaming --data corpus/demo/shards/test --chunk 640ms
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsasr.cli.arguments import add_chunk, add_overwrite, check_new, command_parser, count
from dsasr.evaluation.tuned import FILE
from dsasr.tracking.run_log import CLIPS, TRANSCRIPTS
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, to_json
from dsasr.utils.masking import mask
from dsasr.utils.progress import Bar

if TYPE_CHECKING:
    from dsasr.evaluation.eval_sets import Recording
    from dsasr.evaluation.results import Results
    from dsasr.inference.evaluated_model import EvaluatedModel


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("run", type=Path, help="a run folder, or an exported folder")
    parser.add_argument(
        "--data", nargs="+", help="shards: folders, tars or patterns; samples without text count "
        "as non-speech",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", default="", help="a name below RUN/checkpoints, or a path (default: the "
        "newest)",
    )  # fmt: skip
    parser.add_argument("--beam", type=count, default=0, help="1 is greedy (default: the model's)")
    add_chunk(parser)
    parser.add_argument(
        "--lang", default="", help="what is spoken in all of the data: the prompt names it, of a "
        "model trained with languages in its prompt, and rows that name none are of it",
    )  # fmt: skip
    parser.add_argument(
        "--hint-lang", action="store_true", help="the prompt names each row's own language"
    )
    parser.add_argument("--limit", type=count, default=0, help="utterances, spread over the set")
    parser.add_argument(
        "--suite", action="store_true",
        help="also synthetic non-speech, noise at 20, 10, 5 and 0 dB, truncated speech, low level, "
        "silence around it, a telephone's band and codecs",
    )  # fmt: skip
    parser.add_argument(
        "--suite-utterances", type=count, default=0, metavar="N",
        help="of the suite in noise and truncated, spread over the set (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--rules", help="normalization: standard, plain (digit strings), or the path of a Whisper "
        "checkpoint's normalizer.json (default: the model's)",
    )  # fmt: skip
    parser.add_argument(
        "--clips", type=count, default=10, help="of each synthetic non-speech sound"
    )
    parser.add_argument(
        "--pairs", type=count, default=5, help="reference/hypothesis pairs to print"
    )
    parser.add_argument(
        "--against", type=Path, help="paired test: a run evaluated with --report, or its --out"
    )
    parser.add_argument("--out", type=Path, help="write all transcripts as JSON lines")
    add_overwrite(parser)
    parser.add_argument(
        "--report",
        action="store_true",
        help=f"write RUN/report.json, RUN/{TRANSCRIPTS} and "
        "sounds of the worst ones, for dsasr report",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead: choose the CTC head's weight and the threshold of doubt on --data, into "
        f"RUN/{FILE}",
    )
    parser.add_argument(
        "--is-finished", action="store_true", help="exit with 0 if the run is trained, else with 1"
    )
    args = parser.parse_args(arguments)
    if not args.is_finished and not args.data:
        parser.error("--data is needed")
    if args.checkpoint and args.report:
        parser.error("--report is for the end of the run: with --checkpoint use --out")
    if args.lang and args.hint_lang:
        parser.error("--lang and --hint-lang both say what the prompt names: leave out one")
    if args.tune and (args.lang or args.hint_lang):
        parser.error("--tune goes without a language in the prompt: leave out --lang, --hint-lang")
    if args.suite_utterances and not args.suite:
        parser.error("--suite-utterances needs --suite")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)

    import torch

    from dsasr.checkpoint.locate import recognizer_folder
    from dsasr.evaluation import results_text
    from dsasr.evaluation.eval_sets import longest_seconds, read_recordings
    from dsasr.evaluation.results import compare, shared_clips
    from dsasr.evaluation.suite import RECORDINGS_ONLY, USUAL_CHANNELS, SuiteConfig
    from dsasr.inference.evaluated_model import EvaluatedModel
    from dsasr.tracking.run_log import is_finished
    from dsasr.utils.library_warnings import silence_library_warnings

    args.run = recognizer_folder(args.run)
    if args.is_finished:
        return 0 if is_finished(args.run) else 1
    baseline = check(args)
    silence_library_warnings()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    evaluated = EvaluatedModel.open(args.run, args.checkpoint)
    rules, longest = args.rules or evaluated.rules, longest_seconds(evaluated.front_end)
    recordings, left_out = read_recordings(
        args.data,
        rate=evaluated.front_end.rate,
        text=evaluated.text,
        source=evaluated.source,
        limit=args.limit,
        max_seconds=longest,
    )
    if left_out:
        print(f"left out: {dict(left_out)} (too_long: more than {longest:g} s)")
    for line in hint_lines(args, evaluated, recordings):
        print(line)
    if args.tune:
        return tune_run(args, evaluated, recordings, rules)
    config = RECORDINGS_ONLY
    if args.suite:
        config = replace(SuiteConfig(), clips=args.clips, channels=USUAL_CHANNELS)
    bar = partial(Bar, desc="decoding", unit="batch", delay=2)
    results = evaluated.transcribe(
        recordings,
        config,
        beam=args.beam,
        chunk_ms=args.chunk,
        suite_utterances=args.suite_utterances,
        lang=args.lang,
        hint_langs=args.hint_lang,
        progress=bar,
    )
    summary = results.summary(rules)
    for line in results_text.format_results(results, summary, args.pairs):
        print(line)
    if baseline is not None:
        tests = compare(baseline, results, rules)
        clips = len(shared_clips(baseline, results)[0].rows)
        which = "" if clips == len(results.rows) else f", on the {clips:,} clips that both have"
        print(f"against {args.against}{which}: (this minus that)")
        for line in results_text.format_comparison(tests):
            print(line)
        summary["against"] = {"run": str(args.against), "tests": tests}
    if args.out:
        atomic_write(args.out, results.to_json_lines())
    if args.report:
        keep_for_report(args, evaluated, recordings, results, summary, left_out, rules)
    rates = "  ".join(
        f"{k.upper()} {100 * summary[k]:.2f}%" for k in ("wer", "cer", "mer") if k in summary
    )
    print(
        f"{len(results.rows)} clips: {rates or 'no reference, no error rate'}   ({evaluated.path})"
    )
    return 0


def keep_for_report(
    args: argparse.Namespace,
    evaluated: EvaluatedModel,
    recordings: Sequence[Recording],
    results: Results,
    summary: dict[str, Any],
    left_out: Mapping[str, int],
    rules: str,
) -> None:
    """Write what ``dsasr report`` shows into the run: transcripts, sounds of the worst, summary."""
    from dsasr.evaluation import error_analysis
    from dsasr.utils.environment import environment

    atomic_write(args.run / TRANSCRIPTS, results.to_json_lines())
    rows = error_analysis.worst(results, rules)
    waves = {recording.key: recording.wave for recording in recordings}
    rate = evaluated.front_end.rate
    summary["clips"] = error_analysis.write_clips(args.run / CLIPS, rows, waves, rate)
    summary["evaluated"] = environment() | {
        "checkpoint": evaluated.path.name,
        "recordings": len(recordings),
        "left_out": dict(left_out),
        "rules": rules,
        "chunk_ms": args.chunk or evaluated.decode.chunk_ms,
        "lang": args.lang or ("each row's own" if args.hint_lang else ""),
    }
    write_report(args, summary | {"beam": args.beam or evaluated.decode.beam})


def hint_lines(
    args: argparse.Namespace, evaluated: EvaluatedModel, recordings: Sequence[Recording]
) -> Iterator[str]:
    """What prompts name. Raises `UserError` for a language that the model was not trained with."""
    evaluated.model.hint(args.lang)
    if not args.hint_lang:
        return
    if not evaluated.model.hinted:
        raise UserError(
            f"--hint-lang: {evaluated.path} was trained without languages in its prompt"
        )
    named = sum(bool(evaluated.own_hint(r.lang)) for r in recordings)
    known = ", ".join(sorted(evaluated.model.hinted))
    yield f"the prompt names the language of {named} of {len(recordings)} recordings (of {known})"


def tune_run(
    args: argparse.Namespace,
    evaluated: EvaluatedModel,
    recordings: Sequence[Recording],
    rules: str,
) -> int:
    """Tune on ``recordings``, print the error rates and write RUN/tuned.json."""
    from dsasr.inference.tuning import tune

    bar = partial(Bar, desc="decoding", unit="batch", delay=2)
    tuning = tune(evaluated, recordings, beam=args.beam, rules=rules, progress=bar)
    for weight, errors in tuning.errors.items():
        print(f"ctc_weight {weight:<5g} {100 * errors:.2f}% errors")
    tuning.tuned.save(args.run)
    print(
        f"ctc_weight {tuning.tuned.ctc_weight:g}; doubt from {tuning.tuned.doubt.margin:g} nats a "
        f"phoneme on (1% of {tuning.right} right transcripts); written to {args.run / FILE}"
    )
    return 0


def check(args: argparse.Namespace) -> Results | None:
    """Raise `UserError` for what would fail after decoding; the results of ``--against``."""
    from dsasr.checkpoint.export_folder import is_export
    from dsasr.checkpoint.locate import recognizer_folder
    from dsasr.evaluation.normalize import check_rules, normalize
    from dsasr.evaluation.results import read_results

    if args.rules:
        try:
            check_rules(args.rules)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        normalize("a", "en", args.rules)  # reads the file of rules
    check_new([args.out] if args.out else [], args.overwrite)
    if args.tune and is_export(args.run):
        raise UserError(f"--tune is for runs: {args.run} is an exported model; tune, then export")
    if args.report and is_export(args.run):
        raise UserError(f"--report is for runs: {args.run} is an exported model; give --out")
    if not args.against:
        return None
    against = recognizer_folder(args.against)
    return read_results(against / TRANSCRIPTS if against.is_dir() else against)


def write_report(args: argparse.Namespace, summary: dict) -> None:
    """RUN/report.json: the results, the beam width, and the steps and seconds of each stage."""
    from dsasr.tracking.console import clock
    from dsasr.tracking.run_log import read_events

    stages = [
        {"stage": e["name"], "steps": e["steps"], "seconds": e["stage_seconds"]}
        for e in read_events(args.run)
        if e["event"] == "stage_end"
    ]
    data = [mask(name) for name in args.data]
    data = data[0] if len(data) == 1 else data
    values = {**summary, "data": data, "stages": stages}
    atomic_write(args.run / "report.json", to_json(values, indent=1) + "\n")
    for stage in stages:
        print(f"stage {stage['stage']:<10} {clock(stage['seconds'])}")
