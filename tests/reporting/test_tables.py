"""The report's tables."""

from __future__ import annotations

from dsasr.evaluation.hallucination import wilson
from dsasr.evaluation.results import Result, Results
from dsasr.reporting import tables


def shown(cell: tables.Cell) -> tuple[str, str]:
    return cell.text, cell.small


def test_text_on_nonspeech_has_its_interval_or_says_why_not(made):
    hallucination = made.suite()["hallucination"]
    assert shown(tables.nonspeech_rate(hallucination)) == ("25.0", "")  # without an interval
    clips = {"rate": 25.0, "low": 3.2, "high": 61.72, "clips": 8, "clips_with_text": 2}
    hallucination["nonspeech"] = {"all": clips}
    assert shown(tables.nonspeech_rate(hallucination)) == ("25.0", "3.2…61.7")
    clips["clips"] = 7  # too few
    assert shown(tables.nonspeech_rate(hallucination)) == ("25.0", "")
    clips |= {"clips": 8, "low": None, "high": None}
    assert shown(tables.nonspeech_rate(hallucination)) == ("25.0", "")
    clips |= {"rate": 0.0, "clips_with_text": 0}
    assert shown(tables.nonspeech_rate(hallucination)) == ("0", "no text in 8 clips")
    assert shown(tables.nonspeech_rate({"rows": [], "nonspeech": {}})) == ("–", "")


def test_an_utterance_in_several_conditions_is_one_draw():
    def cells(conditions):
        return [
            {"lang": lang, "condition": c, "utterances": 50, "flagged": 5}
            for lang in ("en", "zh")
            for c in conditions
        ]

    once = tables.share(cells(["snr0"]))
    assert once == tables.share(cells(["snr0", "snr5", "snr10"]))
    low, high = (100 * x for x in wilson(10, 100))
    assert once.small == f"{low:.1f}…{high:.1f}"


def test_a_rate_over_few_utterances_says_how_many(made):
    assert shown(tables.rate(made.rated(0.1))) == ("10.0", "8.0…13.0")
    assert shown(tables.rate(made.rated(0.1) | {"utterances": 7})) == ("10.0", "7 utterances")
    assert shown(tables.rate(None)) == ("–", "")


def result(key, reference, hypothesis, lang="en", speaker="s", seconds=3.0, condition="clean"):
    return Result(key, condition, lang, reference, hypothesis, seconds, 0.1, True, speaker)


def test_errors_are_counted_by_language_noise_duration_and_speaker(made):
    rows = [
        result("a", "red green blue white", "red green blue white", speaker="ann"),
        result("b", "red green blue white", "red green glue", speaker="bob", seconds=12.0),
        result("c", "你好", "你好吗", lang="zh", speaker="cai", seconds=12.5),
        result("a", "red green blue white", "white", speaker="ann", condition="snr5"),
    ]
    run = made.run(transcripts=Results(rows))
    by_title = {table.title: table for table in tables.errors_by_group(run, "standard")}
    assert list(by_title) == ["By language", "By noise", "By duration", "By speaker"]
    texts = {title: [[c.text for c in row] for row in table.cells]
             for title, table in by_title.items()}  # fmt: skip
    # Of 8 English words one replaced and one left out; of 2 characters none wrong and one added.
    assert texts["By language"] == [
        ["en", "25.0", "12.5", "12.5", "0.0", "2", "8"],
        ["zh", "50.0", "0.0", "0.0", "50.0", "1", "2"],
    ]
    assert [row[:2] for row in texts["By duration"]] == [
        ["2 to 5 s", "0.0"],
        ["10 to 20 s", "50.0"],
    ]
    assert [row[0] for row in texts["By speaker"]] == ["bob", "cai", "ann"]
    assert [row[:2] for row in texts["By noise"]] == [["clean", "0.0"], ["5\u00a0dB", "75.0"]]
    assert tables.errors_by_group(made.run(), "standard") == []


def test_confusions_are_ordered_by_how_often(made):
    rows = [result(str(i), "red green", "red grin") for i in range(3)]
    rows.append(result("x", "red green", "red green white"))
    table = tables.confusion_table(made.run(transcripts=Results(rows)), "standard")
    assert table.rows == [["green", "grin", 3], ["–", "white", 1]]
    assert tables.confusion_table(made.run(), "standard") is None


def test_without_any_error_the_interval_is_the_rule_of_three(made):
    """Of 12 utterances 1 − 0.05^(1/12) = 22.1%: a bootstrap would say 0.0 to 0.0."""
    clean = [result(str(i), "red green", "red green") for i in range(12)]
    noisy = [result(str(i), "red green", "red", condition="snr5") for i in range(12)]
    run = made.run(transcripts=Results(clean + noisy))
    [by_noise] = tables.errors_by_group(run, "standard")
    assert shown(by_noise.cells[0][1]) == ("0.0", "0.0…22.1")


def test_equal_examples_stand_once(made):
    report = made.suite()
    example = {**report["hallucination"]["examples"][0], "kind": "nonspeech", "reference": ""}
    report["hallucination"]["examples"] = [
        {**example, "condition": condition, "key": str(key), "hypothesis": text}
        for condition in ("silence", "white")
        for key, text in enumerate(("same", "same", "other"))
    ]
    table = tables.examples([made.run(suite=report)])
    assert [(row[1], row[-1]) for row in table.rows] == [
        ("silence", "same"), ("white", "same"), ("silence", "other"), ("white", "other"),
    ]  # fmt: skip
    assert len(tables.examples([made.run(suite=report)], limit=3).rows) == 3
