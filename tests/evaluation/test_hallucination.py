import math

import pytest

from dsasr.evaluation.hallucination import (
    HallucinationConfig,
    HallucinationReport,
    bag_overlap,
    chat_phrase,
    count_characters,
    find_hallucinations,
    max_repeats,
    wilson,
)
from dsasr.utils.errors import UserError

FIVE = "turn on the kitchen light"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "lang", "kinds"),
    [
        (FIVE, FIVE, "en", set()),
        (FIVE, "", "en", set()),
        (FIVE, "burn in a chicken fight", "en", set()),  # wrong, and no longer
        # 8 units are more than 1.5 × 5; 7 are not.
        (FIVE, "we met again yesterday near some old harbour", "en", {"invented"}),
        (FIVE, "we met again yesterday near some harbour", "en", set()),
        # The same length with overlap: 2·3 / 13 > 0.2.
        (FIVE, "we met the kitchen light some old harbour", "en", set()),
        (FIVE, FIVE + " and then we all went home again", "en", {"burst"}),
        (FIVE, FIVE + " and then we left", "en", set()),
        (FIVE, "turn on " + "the " * 9 + "kitchen light", "en", {"loop", "burst"}),
        ("eight eight eight eight two", "eight eight eight eight eight two", "en", set()),
        ("eight two", "eight two " * 4, "en", {"loop", "burst"}),
        ("打开厨房的灯", "我们昨天在老港口又见面了吗", "zh", {"invented"}),
        ("打开厨房的灯", "打开厨房的灯谢谢谢谢谢谢谢谢", "zh", {"loop", "burst"}),
        ("打开厨房的灯", "抱歉，我无法处理", "zh", {"chat"}),
        ("打开 the light", "打开 the light", "zh-en", set()),
        ("go", "no way", "en", set()),  # one unit longer is a slip
        ("", "hello there", "en", {"invented"}),
    ],
)
def test_kinds(reference, hypothesis, lang, kinds):
    assert set(find_hallucinations(reference, hypothesis, lang)) == kinds


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I do not hear.",
        "I’m an AI assistant",
        "I cannot transcribe this audio.",
        "Sure, here is the transcription:",
        "Please provide the audio file.",
        "How can I help you today?",
        "<|im_start|>assistant",
        "Transcribe the speech into text",
        "Thank you for watching!",
        "作为一个人工智能语言模型",
        "我是一个AI助手",
        "请提供音频文件",
        "以下是语音的转录内容",
        "有什么可以帮您",
        "字幕由志愿者提供",
    ],
)
def test_chat_is_found(text):
    assert chat_phrase(text)
    assert not chat_phrase(text, text)


@pytest.mark.parametrize(
    "text",
    [
        "he said that he was sorry and went home",
        "the audience was silent",
        "i can't come on monday",
        "she is an airline pilot",
        "我没有时间",
        "他不能来",
        "我是一个学生",
    ],
)
def test_speech_is_not_chat(text):
    assert not chat_phrase(text)


def test_overlap_and_repeats():
    assert bag_overlap(list("aab"), list("aac")) == pytest.approx(2 * 2 / 6)
    assert bag_overlap([], []) == 1 and bag_overlap(["a"], []) == 0
    assert max_repeats([], 3) == 0 and max_repeats(["a"], 3) == 1
    assert max_repeats(list("xabababy"), 3) == 3
    assert max_repeats(list("xabababy"), 1) == 1
    assert max_repeats(list("abcabcabcabc"), 3) == 4
    assert max_repeats(list("aaaa"), 12) == 4


def _report():
    report = HallucinationReport()
    report.add(FIVE, FIVE, "en", key="a")
    report.add(FIVE, "we met again yesterday near some old harbour", "en", condition="snr5")
    report.add("打开厨房的灯", "打开厨房的灯", "zh", condition="snr5")
    report.add_nonspeech("hello, 你好", 30, "en", condition="silence")
    report.add_nonspeech("…", 30, "en", condition="silence")
    return report


def test_report_counts():
    report = _report()
    assert report.total("snr5").rate() == 0.5
    assert report.cells["zh", "snr5"].rate() == 0
    assert report.cells["en", "snr5"].invented == 1
    silence = report.total("silence")
    assert silence.characters_per_minute == 7
    assert (silence.clips, silence.clips_with_text, silence.utterances) == (2, 1, 0)
    assert math.isnan(silence.rate())
    summary = report.summary()
    assert summary["flagged"] == pytest.approx(1 / 3)
    assert summary["silence/characters_per_minute"] == 7
    assert "silence/flagged" not in summary and "clean/characters_per_minute" not in summary
    assert [e.kind for e in report.examples] == ["invented", "nonspeech"]
    rows = list(report.rows())
    assert [(r["lang"], r["condition"]) for r in rows] == sorted(report.cells)


def test_examples_of_a_language_are_not_crowded_out_by_another():
    report = HallucinationReport(HallucinationConfig(examples=2))
    for _ in range(3):
        report.add("eight two", "eight two " * 4, "en")
    report.add("打开厨房的灯", "打开厨房的灯谢谢谢谢谢谢谢谢", "zh")
    examples = [(e.kind, e.lang) for e in report.examples]
    assert examples == [(k, la) for la in ("en", "en", "zh") for k in ("loop", "burst")]


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("[music] [music]", 10),
        ("(thank you for watching)", 19),
        ("（笑）好", 2),
        ("<|endoftext|>", 9),
        ("你好, ok!", 4),
        ("[ ] (…) ♪", 0),
    ],
)
def test_characters_in_brackets_count(text, characters):
    assert count_characters(text) == characters


def test_thresholds_come_from_the_config():
    strict = HallucinationConfig(length_ratio=1.0, overlap=0.5, extra_units=1)
    assert "invented" in find_hallucinations("go", "no way", "en", strict)
    for wrong in ({"length_ratio": 0.5}, {"overlap": 1.0}, {"loop_repeats": 1}):
        with pytest.raises(UserError):
            HallucinationConfig(**wrong)


def test_wilson():
    low, high = wilson(0, 100)
    assert low == 0 and high == pytest.approx(0.037, abs=5e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert math.isnan(wilson(0, 0)[0])
