"""Hallucinations: transcribed text that was not spoken, found by rules that need no model.

A transcript of speech is flagged as
- ``invented``: NIM4-ASR's rule (arXiv 2604.18105), more than 50% longer than the reference with
  negligible lexical overlap. The numbers that the paper leaves open are **ours**: both sides as
  bags of units, overlap = 2·|common| / (|reference| + |hypothesis|) ≤ 0.2, and at least 2 units
  longer;
- ``loop`` (**ours**): up to 12 units repeated at least 4 times in a row, 2 times more than in the
  reference;
- ``chat`` (**ours**): a refusal, an assistant's phrase, a piece of the prompt, or a video
  subtitle's sign-off, English or Mandarin, that the reference does not contain;
- ``burst`` (**ours**): between two matching units, a stretch with at least 5 words (8 characters)
  more than in the reference.

On non-speech (**ours**) any text is wrong, in brackets as well: characters per minute of audio, and
the share of clips with text. Units are words or characters by language, as in `error_rate`, but
after `normalize`'s plain rules, so that a repeated digit stays repeated.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields

from rapidfuzz.distance import Levenshtein

from dsasr.evaluation.normalize import unit_of, units
from dsasr.utils.errors import UserError

KINDS = ("invented", "loop", "chat", "burst")

_CHAT = {
    "refusal": r"\b(i am|i'm|im) (sorry|unable)\b.{0,30}\b(can't|cannot|can not|unable|not able)\b"
    r"|\bi (can't|cannot|can not|am unable to|am not able to)"
    r" (transcribe|assist|help|process|provide|hear|access|listen)\b"
    r"|抱歉.{0,8}(无法|不能|没有)|(无法|不能)(转录|转写|识别|处理|提供)",
    "assistant": r"\b(as|i am|i'm|im) an? (ai|artificial intelligence|(large )?language model)\b"
    r"|\bhow (can|may) i (help|assist) you\b|\blet me know if\b.{0,30}\b(need|help|questions?)\b"
    r"|(作为|我是)一?[个名位]?.{0,8}(人工智能|语言模型|ai助手|助手)|有什么(可以|能)帮",
    "meta": r"\bplease (provide|upload|share)\b.{0,20}\b(audio|recording|speech|file)\b"
    r"|\b(here is|here's|sure)\b.{0,20}\btranscri(pt|ption)\b|\btranscription of the\b"
    r"|\bthe (audio|recording|speech|clip) (is|contains|appears|seems)\b"
    r"|\bno (speech|audio|audible)\b.{0,20}\b(detected|provided|found|content)\b"
    r"|请(提供|上传).{0,6}(音频|语音|录音)|以下是.{0,10}(转录|转写|文字|内容)"
    r"|(音频|语音|录音)[中里]?.{0,4}(没有|为空|听不清)",
    "prompt": r"<\|?\w+\|?>|</?think>|\bmultilingual speech recognition model\b"
    r"|\btranscribe the speech\b|\bcontextual hints\b",
    "subtitle": r"\bthanks? (you )?(for|so much for) watching\b|\b(like and )?subscribe to\b"
    r"|\bsubtitles by\b|字幕(由|by|志愿者|组)"
    r"|(感谢|谢谢)(您的?)?(观看|收看)|请不吝点赞|订阅.{0,4}频道",
}
_CHAT_RULES = {name: re.compile(rule, re.IGNORECASE) for name, rule in _CHAT.items()}
_BRACKETS = str.maketrans(dict.fromkeys("<>[]()", " "))


@dataclass(frozen=True)
class HallucinationConfig:
    """Thresholds of the rules in the module's docstring.

    ``examples`` limits the stored examples of each kind, language and condition.
    """

    length_ratio: float = 1.5
    overlap: float = 0.2
    extra_units: int = 2
    loop_period: int = 12
    loop_repeats: int = 4
    loop_margin: int = 2
    burst_words: int = 5
    burst_chars: int = 8
    examples: int = 5

    def __post_init__(self) -> None:
        if self.length_ratio < 1 or not 0 <= self.overlap < 1:
            raise UserError("hallucination: length_ratio must be ≥ 1 and overlap in [0, 1)")
        if min(self.loop_period, self.burst_words, self.burst_chars) < 1 or self.loop_repeats < 2:
            raise UserError("hallucination: periods and bursts must be ≥ 1, loop_repeats ≥ 2")


def count_characters(hypothesis: str) -> int:
    """Characters of words of any script: spaces and punctuation do not count (plain rules).

    Text in brackets counts. Plain rules leave such remarks out, since transcribers differ in them;
    but on non-speech "[music]" and "(thank you for watching)" are text as well.
    """
    opened = unicodedata.normalize("NFKC", hypothesis).translate(_BRACKETS)
    # Split as Chinese whatever the language, so that the count does not depend on the tag.
    return sum(len(unit) for unit in units(opened, "zh", "plain"))


def find_hallucinations(
    reference: str, hypothesis: str, lang: str, config: HallucinationConfig | None = None
) -> dict[str, str]:
    """The `KINDS` of hallucination in a transcript of speech, each with the reason in words."""
    config = config or HallucinationConfig()
    ref, hyp = units(reference, lang, "plain"), units(hypothesis, lang, "plain")
    reasons = {
        "invented": _invented(ref, hyp, config),
        "loop": _loop(ref, hyp, config),
        "chat": chat_phrase(hypothesis, reference),
        "burst": _burst(ref, hyp, lang, config),
    }
    return {kind: reason for kind, reason in reasons.items() if reason}


def bag_overlap(reference: list[str], hypothesis: list[str]) -> float:
    """2·|common| / (|reference| + |hypothesis|) of two bags of units; 1 if both are empty."""
    total = len(reference) + len(hypothesis)
    common = sum((Counter(reference) & Counter(hypothesis)).values())
    return 2 * common / total if total else 1.0


def max_repeats(sequence: list[str], period: int) -> int:
    """How often in a row the most repeated stretch of 1…``period`` units occurs.

    1 if none repeats, 0 if ``sequence`` is empty.
    """
    most = min(len(sequence), 1)
    for length in range(1, min(period, len(sequence) // 2) + 1):
        run = 0
        for at in range(length, len(sequence)):
            run = run + 1 if sequence[at] == sequence[at - length] else 0
            most = max(most, run // length + 1)
    return most


def chat_phrase(hypothesis: str, reference: str = "") -> str:
    """The first phrase of a refusal, an assistant, the prompt or a subtitle, or ``""``.

    A kind of phrase that the reference contains as well is speech, not chat.
    """
    hypothesis, reference = (s.replace("’", "'") for s in (hypothesis, reference))
    for name, rule in _CHAT_RULES.items():
        if (match := rule.search(hypothesis)) and not rule.search(reference):
            return f"{name}: {match[0]}"
    return ""


def _invented(ref: list[str], hyp: list[str], config: HallucinationConfig) -> str:
    if len(hyp) <= config.length_ratio * len(ref) or len(hyp) - len(ref) < config.extra_units:
        return ""
    common = bag_overlap(ref, hyp)
    if common > config.overlap:
        return ""
    return f"{len(hyp)} units for {len(ref)}, overlap {common:.2f}"


def _loop(ref: list[str], hyp: list[str], config: HallucinationConfig) -> str:
    times = max_repeats(hyp, config.loop_period)
    if times < config.loop_repeats:
        return ""
    spoken = max_repeats(ref, config.loop_period)
    return f"repeated {times} times" if times >= spoken + config.loop_margin else ""


def _burst(ref: list[str], hyp: list[str], lang: str, config: HallucinationConfig) -> str:
    limit = config.burst_words if unit_of(lang) == "word" else config.burst_chars
    extra = longest = 0
    for op in Levenshtein.opcodes(ref, hyp):
        if op.tag == "equal":
            extra = 0
        else:
            extra += (op.dest_end - op.dest_start) - (op.src_end - op.src_start)
            longest = max(longest, extra)
    return f"{longest} units inserted in a row" if longest >= limit else ""


@dataclass
class HallucinationCounts:
    """Counts of one language and condition. ``clips``, ``seconds`` and ``characters`` are of
    non-speech, the others of speech."""

    utterances: int = 0
    invented: int = 0
    loop: int = 0
    chat: int = 0
    burst: int = 0
    flagged: int = 0
    clips: int = 0
    clips_with_text: int = 0
    seconds: float = 0.0
    characters: int = 0

    def add(self, other: HallucinationCounts) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    @property
    def characters_per_minute(self) -> float:
        return 60 * self.characters / self.seconds if self.seconds else math.nan

    def rate(self, kind: str = "flagged") -> float:
        """Share of speech utterances with a hallucination of ``kind``; ``flagged``: of any kind."""
        return getattr(self, kind) / self.utterances if self.utterances else math.nan


@dataclass(frozen=True)
class Example:
    """One hallucination, as an example; ``reference`` is empty for non-speech."""

    kind: str
    lang: str
    condition: str
    key: str
    reference: str
    hypothesis: str
    detail: str


@dataclass
class HallucinationReport:
    """Counts per (language, condition) and examples; a condition is ``clean``, ``snr5``, ``music``…

    `add` and `add_nonspeech` judge one transcript each; `total`, `summary` and `rows` sum up.
    """

    config: HallucinationConfig = field(default_factory=HallucinationConfig)
    cells: dict[tuple[str, str], HallucinationCounts] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def add(
        self, reference: str, hypothesis: str, lang: str, *, condition: str = "clean", key: str = ""
    ) -> None:
        """Judge one transcript of speech."""
        reasons = find_hallucinations(reference, hypothesis, lang, self.config)
        cell = self.cells.setdefault((lang, condition), HallucinationCounts())
        cell.utterances += 1
        cell.flagged += bool(reasons)
        for kind, reason in reasons.items():
            setattr(cell, kind, getattr(cell, kind) + 1)
            self._add_example(Example(kind, lang, condition, key, reference, hypothesis, reason))

    def add_nonspeech(
        self, hypothesis: str, seconds: float, lang: str = "", *, condition: str, key: str = ""
    ) -> None:
        """Count the characters (`count_characters`) transcribed from ``seconds`` s without speech.

        ``lang`` is the corpus's tag, or ``und`` for sounds in no language.
        """
        characters = count_characters(hypothesis)
        cell = self.cells.setdefault((lang, condition), HallucinationCounts())
        cell.clips += 1
        cell.clips_with_text += characters > 0
        cell.seconds += seconds
        cell.characters += characters
        if characters:
            detail = f"{characters} characters in {seconds:.1f} s"
            self._add_example(Example("nonspeech", lang, condition, key, "", hypothesis, detail))

    def total(self, condition: str | None = None) -> HallucinationCounts:
        """Counts summed over the languages, of one condition or of all."""
        total = HallucinationCounts()
        for (_, cell_condition), cell in self.cells.items():
            if condition in (None, cell_condition):
                total.add(cell)
        return total

    def summary(self) -> dict[str, float]:
        """Flat scalars for a log: rates over all conditions and per condition, if finite."""
        total = self.total()
        scalars = {kind: total.rate(kind) for kind in (*KINDS, "flagged")}
        scalars["characters_per_minute"] = total.characters_per_minute
        for condition in self.conditions():
            cell = self.total(condition)
            scalars[f"{condition}/flagged"] = cell.rate()
            scalars[f"{condition}/invented"] = cell.rate("invented")
            scalars[f"{condition}/characters_per_minute"] = cell.characters_per_minute
        return {name: value for name, value in scalars.items() if math.isfinite(value)}

    def conditions(self) -> list[str]:
        return sorted({condition for _, condition in self.cells})

    def rows(self) -> Iterator[dict]:
        """One flat dict per language and condition, for a table."""
        for (lang, condition), cell in sorted(self.cells.items()):
            low, high = wilson(cell.flagged, cell.utterances)
            rates = {"characters_per_minute": cell.characters_per_minute}
            rates |= {"rate": cell.rate(), "low": low, "high": high}
            yield {"lang": lang, "condition": condition, **asdict(cell), **rates}

    def _add_example(self, example: Example) -> None:
        group = example.kind, example.lang, example.condition
        same = sum((e.kind, e.lang, e.condition) == group for e in self.examples)
        if same < self.config.examples:
            self.examples.append(example)


def wilson(hits: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval (1927) of the proportion ``hits`` / ``count``, also valid near zero.

    95% by default; NaN where ``count`` is 0.
    """
    if not count:
        return math.nan, math.nan
    p, zz = hits / count, z * z / count
    middle = (p + zz / 2) / (1 + zz)
    half = math.sqrt(p * (1 - p) * zz + zz * zz / 4) / (1 + zz)
    return max(0.0, middle - half), min(1.0, middle + half)
