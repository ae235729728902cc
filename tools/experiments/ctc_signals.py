"""Measure what finds wrong transcripts: scores by the CTC head, entropy, length; and rescoring.

    python tools/experiments/ctc_signals.py runs/demo corpus/demo

Prints its rows, and appends them to ``--out`` as JSON lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from listening import Row, mixed, rate_row, write_rows

from dsasr.data.speech_statistics import characters
from dsasr.evaluation.error_rate import count_edits
from dsasr.evaluation.eval_sets import Recording, read_recordings
from dsasr.evaluation.hallucination import wilson
from dsasr.evaluation.suite import RECORDINGS_ONLY, USUAL_CHANNELS, SuiteConfig
from dsasr.inference.evaluated_model import EvaluatedModel
from dsasr.inference.tuning import choose, nbest_of, tune


def signal_rows(args: argparse.Namespace) -> Iterator[Row]:
    """How well each signal finds wrong and hallucinated transcripts on the suite: area under the
    curve, and the share that a threshold set on ``valid`` at 1% false alarms catches; then errors
    with rescoring."""
    torch.set_num_threads(1)
    evaluated = EvaluatedModel.open(args.model)
    valid, _ = read_recordings(str(args.corpus / "shards" / "valid"), text=evaluated.text)
    test, _ = read_recordings(
        [str(args.corpus / "shards" / name) for name in ("test", "nonspeech")],
        text=evaluated.text, limit=args.clips,
    )  # fmt: skip
    beam = args.beam or 1
    before = evaluated.transcribe(valid, RECORDINGS_ONLY, beam=beam).rows
    rows = evaluated.transcribe(
        test, SuiteConfig(clips=args.nonspeech, channels=USUAL_CHANNELS), beam=beam
    ).rows
    rows = [row for row in rows if row.hypothesis]
    right = [row for row in before if row.hypothesis and row.hypothesis == row.reference]
    wrong = np.array([row.wrong for row in rows])
    invented = np.array([row.hallucinated for row in rows])
    # Without those that are neither right nor wrong, which have some errors.
    clear = wrong | np.array([row.hypothesis == row.reference for row in rows])
    for name, value in SIGNALS.items():
        scores = np.array([value(row) for row in rows])
        threshold = float(np.quantile([value(row) for row in right], 0.99))
        caught = scores > threshold
        yield {
            "signal": name, "beam": beam, "transcripts": len(rows),
            "wrong": int(wrong.sum()), "auc_wrong": round(area(scores, wrong), 3),
            "auc_wrong_or_right": round(area(scores[clear], wrong[clear]), 3),
            "hallucinated": int(invented.sum()),
            "auc_hallucinated": round(area(scores, invented), 3),
            "caught_hallucinated": share(caught, invented), "caught_wrong": share(caught, wrong),
            "false_alarms": share(caught, np.array([r.hypothesis == r.reference for r in rows])),
        }  # fmt: skip
    yield from rescoring_rows(evaluated, valid, [r for r in test if r.text])


# Higher is more suspicious.
SIGNALS = {
    "margin (nats a phoneme)": lambda row: _less(row.margin),
    "CTC (nats a second)": lambda row: _less(row.heard),
    "weakest three words": lambda row: 1 - (0.0 if row.weakest is None else row.weakest),
    "token entropy": lambda row: row.entropy if row.entropy is not None else 99.0,
    "characters a second": lambda row: characters(row.hypothesis) / max(row.seconds, 0.1),
}


def _less(value: float | None) -> float:
    return 1e3 if value is None else -value  # what has no score is suspicious


def share(caught: np.ndarray, of: np.ndarray) -> str:
    hits, count = int((caught & of).sum()), int(of.sum())
    if not count:
        return "none"
    low, high = wilson(hits, count)
    return f"{100 * hits / count:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def rescoring_rows(
    evaluated: EvaluatedModel, valid: list[Recording], test: list[Recording]
) -> Iterator[Row]:
    """Errors on the test set with the weight that was tuned on the validation set."""
    for beam in (4, 8):
        tuning = tune(evaluated, valid, beam=beam)
        weight = tuning.tuned.ctc_weight
        nbest = nbest_of(evaluated, test, replace(evaluated.decode, beam=beam, ctc_weight=0.0))
        for used in (0.0, weight):
            pairs = [(mixed(r.text), mixed(choose(nbest[r.key], used).text)) for r in test]
            edits = np.array([count_edits(*pair).errors for pair in pairs])
            counts = np.array([len(reference) for reference, _ in pairs])
            row = {"rescoring": "test", "beam": beam, "ctc_weight": used, "clips": len(test)}
            yield row | rate_row(edits, counts)
        yield {"tuned": tuning.tuned.doubt.margin, "beam": beam, "right": tuning.right}


def area(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the curve of ``scores``, higher where more suspicious; ties count half."""
    positive, negative = scores[wrong], np.sort(scores[~wrong])
    if not len(positive) or not len(negative):
        return float("nan")
    below = np.searchsorted(negative, positive, "left")
    upto = np.searchsorted(negative, positive, "right")
    return float((below + upto).sum() / 2 / len(positive) / len(negative))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path, help="the demo's corpus")
    parser.add_argument("--clips", type=int, default=0, help="of the test set; 0: all")
    parser.add_argument("--nonspeech", type=int, default=10, help="clips of each synthetic sound")
    parser.add_argument("--beam", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write_rows(({"measured": "signals"} | row for row in signal_rows(args)), args.out)


if __name__ == "__main__":
    main()
