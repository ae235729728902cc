"""The CTC head's scores of a batch's hypotheses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsasr.data.text.speller import Speller
from dsasr.evaluation.ctc_prefix import JointScores, Posteriors
from dsasr.evaluation.ctc_scoring import CtcScore, log_prob_of, score_text
from dsasr.evaluation.detokenizer import Detokenizer
from dsasr.model.speech_llm import SpeechLLM


@dataclass(frozen=True)
class HypothesisScorer:
    """Scores by the head's log-probabilities [B, S, P], of which row b has ``lengths_B[b]`` frames.

    ``langs``: one for each utterance; "" where it is not known.
    """

    log_probs_BSP: Tensor
    lengths_B: Tensor
    langs: Sequence[str]
    speller: Speller

    @classmethod
    def of(
        cls,
        model: SpeechLLM,
        log_probs_BSP: Tensor | None,
        lengths_B: Tensor | None,
        langs: Sequence[str],
    ) -> HypothesisScorer | None:
        """The scorer of ``model``'s head; None for a model without a head or a speller."""
        if model.ctc is None or model.speller is None:
            return None
        return cls(log_probs_BSP, lengths_B, langs, model.speller)

    def _posteriors(self, row: int) -> Tensor:
        """The log-probabilities [S, P] of one utterance, without padding."""
        return self.log_probs_BSP[row, : int(self.lengths_B[row])]

    def log_prob(self, row: int, text: str) -> float:
        """The head's log-probability of a whole transcript in nats.

        -inf for one that the head cannot have written: a unit that it lacks, more units than
        frames.
        """
        pronunciations = self.speller.pronunciations(text, self.langs[row])
        return log_prob_of(self._posteriors(row), pronunciations)

    def score(self, row: int, text: str) -> CtcScore | None:
        """The scores and times of a transcript; None where it has none (`score_text`)."""
        return score_text(self._posteriors(row), text, self.langs[row], self.speller)

    def joint(self, tokenizer: Detokenizer) -> JointScores:
        """Scores of unfinished transcripts, for a head whose units are characters or tokens
        (`Speller.writes_text`)."""

        def units_of(ids: Sequence[int], row: int, ended: bool) -> list[int] | None:
            text = tokenizer.decode(list(ids))
            if not ended:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character
            return self.speller(text, self.langs[row])

        lengths_B = self.lengths_B.to(self.log_probs_BSP.device)
        return JointScores(Posteriors(self.log_probs_BSP, lengths_B), units_of, tokenizer.end_id)
