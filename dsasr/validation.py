"""Error rates of a branch while it trains, on the recipe's validation set."""

from __future__ import annotations

import math

from dsasr import ranks
from dsasr.build import Builder
from dsasr.engine import Branch
from dsasr.evaluation import validate
from dsasr.recipe import Recipe


def error_rates(
    recipe: Recipe, build: Builder, branch: Branch, utterances: int
) -> tuple[dict[str, float], str]:
    """Rates by name over all ranks, and some transcripts beside their references; collective.

    Of a pretrain branch the phoneme error rate; of an sft branch what its transcripts give.
    ``utterances`` limits the set; 0: all of it.
    """
    batches = build.held_out(branch.name, utterances)
    with branch.evaluating() as module:
        if branch.name == "pretrain":
            rate = validate.phoneme_error_rate(
                module, batches, device=ranks.device(), sum_ranks=ranks.sum_ranks
            )
            return {"phoneme_error_rate": rate}, ""
        found = validate.transcribe(
            module,
            batches,
            build.tokenizer,
            recipe.evaluation.decode,
            device=ranks.device(),
            any_rank=ranks.any_rank,
            gather=ranks.gather,
        )
    summary = found.scores(recipe.evaluation.rules).summary()
    samples = recipe.evaluation.samples
    rows = found.rows[:: max(len(found.rows) // max(samples, 1), 1)][:samples]
    shown = "\n\n".join(f"ref {r.reference}  \nhyp {r.hypothesis}" for r in rows)
    return {k: v for k, v in summary.items() if not math.isnan(v)}, shown
