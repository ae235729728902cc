"""A recipe's section ``evaluation``."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsasr.evaluation.decode import DecodeConfig
from dsasr.evaluation.normalize import check_rules
from dsasr.evaluation.suite import SuiteConfig
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import NonNegativeInt


@dataclass(frozen=True)
class EvaluationConfig:
    """Error rates and hallucinations during training, and at the end of the run."""

    # steps of a stage between two evaluations; 0: only at the end of the run
    every: NonNegativeInt = 0
    # of the validation set, in an evaluation during training; 0: all
    utterances: NonNegativeInt = 64
    # of the validation set, in the evaluation at the end of the run; 0: all
    final_utterances: NonNegativeInt = 0
    samples: NonNegativeInt = 3  # pairs of reference and hypothesis that each evaluation logs
    # normalization before scoring: standard, plain (digit strings stay words), or the path of a
    # Whisper normalizer.json (standard, and British spellings count as American ones)
    rules: str = "standard"
    decode: DecodeConfig = field(default_factory=DecodeConfig)  # decoding of the validation set
    # utterances for the hallucination suite in each evaluation; 0: no suite
    suite_utterances: NonNegativeInt = 0
    # the hallucination suite, smaller than the one of `dsasr evaluate`
    suite: SuiteConfig = field(
        default_factory=lambda: SuiteConfig(clips=2, seconds=4.0, snrs=(5.0,), truncations=())
    )

    def __post_init__(self) -> None:
        ranges.check(self)
        try:
            check_rules(self.rules)
        except ValueError as error:
            raise UserError(f"evaluation.{error}") from None
