"""What the report says in words."""

from __future__ import annotations

from dsasr.evaluation.results import Result, Results
from dsasr.reporting import findings


def said(run) -> str:
    return "\n".join(findings.sentences(run, "standard"))


def test_the_first_sentence_is_the_error_rate(made):
    report = made.suite()
    report["conditions"]["clean"]["languages"]["zh"] = made.rated(0.25) | {"unit": "char"}
    first = findings.sentences(made.run(suite=report), "standard")[0]
    assert first == (
        "WER 10.0% (8.0 to 13.0) on en and CER 25.0% (23.0 to 28.0) on zh, over 30 utterances."
    )


def test_noise_hallucinations_and_training_are_told(made):
    report = made.suite()
    report["hallucination"]["nonspeech"] = {"all": {"clips": 40.0, "clips_with_text": 3}}
    told = said(made.run(suite=report))
    for sentence in (
        "At 5\u00a0dB of noise the error rate is 50.0%, without 10.0%, over 30 utterances.",
        "Text that was not spoken: in 1 of 100 utterances and 9 of 100 noisy ones, and in 3 of 40 "
        "clips without speech.",
        "100% of the 1 errors are substitutions.",
        "Trained for 210 steps on 20.0 hours of audio in 7:00, with 1 encoder swap.",
    ):
        assert sentence in told


def test_a_run_under_way_says_how_far_it_is(made):
    run = made.run()
    run.metrics = [m for m in run.metrics if m["steps"] <= 100]
    assert "Trained for 100 of 210 steps so far" in said(run)


def test_the_validation_loss_is_told_with_its_lowest(made):
    run = made.run()
    for line, loss in zip(run.validation, (0.5, 0.75), strict=True):
        line["loss"] = loss
    assert (
        "On the validation set: transcript loss 0.75 at step 210, the last measured (lowest 0.5 at "
        "step 100)." in said(run)
    )
    run.validation[-1]["loss"] = 0.25
    assert "transcript loss 0.25 at step 210, the last measured and the lowest." in said(run)
    run.metrics.append({**run.validation[0], "branch": "pretrain", "loss": 0.4, "steps": 90})
    assert "validation set: CTC loss 0.4 at step 90, the last measured; transcript" in said(run)
    # A single measurement, long before the end, is no lowest one.
    del run.validation[1]["loss"]
    assert "transcript loss 0.5 at step 100, the last measured." in said(run)


def test_what_was_cut_left_out_or_dropped_is_counted(made):
    rows = [
        Result(str(i), "clean", "en", "red green", "red grin", 2.0, 0.1, finished=i > 0)
        for i in range(3)
    ]
    evaluated = {"left_out": {"too_long": 2, "decode": 1}}
    run = made.run(suite=made.suite() | {"evaluated": evaluated}, transcripts=Results(rows))
    run.events.append({"event": "refused", "reason": "not finite", "steps": 60, "seconds": 1})
    run.events.append(
        {"event": "bad_samples", "steps": 60, "seconds": 1, "too_long": 4, "empty": 0}
    )
    told = said(run)
    assert (
        "1 of 3 transcripts cut by the token limit and 3 recordings left out (too_long 2, " in told
    )
    assert "the most frequent: “grin” for “green”, 3 times" in told
    assert "Problems: 1 encoder refused and 4 training samples dropped (too_long 4)." in told
    clean = made.run(suite=made.suite() | {"evaluated": {"left_out": {}}})
    assert "No transcript was cut, no recording left out." in said(clean)


def test_facts_name_test_set_checkpoint_commit_and_hardware(made):
    trained = {"machine": "H200", "gpus": 8, "cores": 96, "commit": "abc", "ranks": 16}
    evaluated = {
        "machine": "Some CPU", "gpus": 0, "cores": 2, "commit": "def+", "checkpoint": "step-210",
        "recordings": 400, "time": "2026-11-29T01:02:03+00:00",
    }  # fmt: skip
    report = made.suite() | {"data": ["a", "b"], "evaluated": evaluated}
    run = made.run(suite=report, environments={"first": trained}, recipes={"first": "seed: 7"})
    facts = dict(findings.facts([run, made.run("second")]))
    assert facts["hardware"] == ["8 × H200, 16 ranks; evaluated on Some CPU, 2 cores", "–"]
    assert facts["commit"][0] == "abc (training), def+ (evaluation)"
    assert facts["test set"][0] == "a, b" and facts["utterances"][0] == "400"
    assert facts["evaluated"][0] == "2026-11-29 01:02:03 UTC" and facts["seed"][0] == "7"
    assert facts["checkpoint"][0] == "step-210"
    assert facts["recipe"] == ["pretrain 100 → align 10 → ia_sft 80 → joint 20"] * 2
