"""The weight of the CTC head, chosen on hypotheses whose answer is known."""

import math

import pytest

from dsasr.evaluation.ctc_scoring import CtcScore
from dsasr.evaluation.decode import DecodeConfig, Hypothesis
from dsasr.evaluation.doubt import DoubtConfig
from dsasr.evaluation.tuned import Tuned
from dsasr.inference.tuning import choose
from dsasr.utils.errors import UserError


def hypothesis(text: str, logprob: float, heard: float | None, finished: bool = True):
    said = None if heard is None else CtcScore(heard, heard, 4)
    return Hypothesis("a", (), text, logprob, (), finished, logprob, said)


def test_the_weight_decides_between_the_model_and_the_encoder():
    found = [hypothesis("likely", -1.0, -9.0), hypothesis("heard", -2.0, -1.0)]
    assert [choose(found, w).text for w in (0.0, 0.1, 0.2, 1.0)] == [
        "likely", "likely", "heard", "heard",
    ]  # fmt: skip
    assert choose([*found, hypothesis("cut", 0.0, 0.0, False)], 1.0).text == "heard"
    unknown = hypothesis("unknown word", 0.0, None)
    assert choose([unknown, found[1]], 0.5).text == "heard"
    assert choose([unknown], 0.5) is unknown
    assert choose([hypothesis("a", -1.0, -math.inf)], 0.5).text == "a"


def test_tuned_values_are_kept_and_used_where_a_beam_can(tmp_path):
    assert Tuned.load(tmp_path) == Tuned()
    tuned = Tuned(0.3, DoubtConfig(margin=2.0))
    tuned.save(tmp_path)
    assert Tuned.load(tmp_path) == tuned
    assert tuned.decode(DecodeConfig()).ctc_weight == 0.0
    assert tuned.decode(DecodeConfig(beam=4)).ctc_weight == 0.3
    assert Tuned().decode(DecodeConfig(beam=4, ctc_weight=0.7)).ctc_weight == 0.7
    (tmp_path / "tuned.json").write_text("{")
    with pytest.raises(UserError, match="tune again"):
        Tuned.load(tmp_path)
