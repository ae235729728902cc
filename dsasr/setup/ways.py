"""The ways to train, of which data, machine and models choose one: base recipe, stages, lengths.

- ``read``: a CTC head on a pretrained encoder writes labels, and the language model learns, from
  text without speech too, to read them. The only way with a result on less than an hour of speech.
- ``adapt``: adaptor and LoRA on a frozen pretrained encoder, as most published systems.
- ``scratch``: an encoder is pretrained from scratch, and its snapshots go to the language model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from dsasr.data.text.prompt import LANG
from dsasr.data.text.scripts import MIXED_LANGS
from dsasr.setup.facts import Facts
from dsasr.setup.parts import Device, LanguageModel, SpeechEncoder, is_installed
from dsasr.setup.recipe_text import Setting
from dsasr.utils.errors import UserError

# Hours of speech (**ours**; between 0.75 h and 150 h nothing has been compared).
FEW_HOURS = 5.0  # below: the language model reads what a CTC head writes
SMALL_LLM = 60e6  # parameters up to which the language model is trained whole, above with LoRA
SPEECH_TOKEN = 0.16  # seconds of an adaptor's token, as whisper-qwen3 has them
LONGEST = 30.0  # seconds of an utterance, unless the data has longer ones
MOST_SECONDS = 60.0
RARE = 0.01  # share of the utterances from which on a language is named in prompts
DECODED = 256  # tokens of a hypothesis: more than half a minute of speech has
_BATCH = "data.dataloader.batch"
FILLED = 0.9  # of a batch's budget that is speech
# Hours up to which → epochs of the adaptor alone, and with LoRA. At 150 h and 960 h as the recipes
# aishell and librispeech have them.
EPOCHS = ((20, 5, 15), (200, 3, 10), (2_000, 1, 10), (20_000, 1, 3), (math.inf, 0.25, 1))


@dataclass(frozen=True)
class Way:
    """One way for given data, as settings on top of a base, and what to expect of it."""

    name: str
    base: str
    settings: list[Setting]
    expect: list[str]
    stages: list[dict] = field(default_factory=list)  # where they differ from the base's


def choose_way(facts: Facts, encoder: SpeechEncoder) -> str:
    """The name of the way for this data and encoder: read, adapt or scratch."""
    if not encoder.is_pretrained:
        return "scratch"
    return "read" if facts.hours < FEW_HOURS else "adapt"


def way_of(
    name: str, facts: Facts, encoder: SpeechEncoder, llm: LanguageModel, device: Device, frames: int
) -> Way:
    """The way of that name for the data and models; ``frames``: of a batch of one rank.

    Raises `UserError` where a library is missing.
    """
    make = {"read": _read, "adapt": _adapt, "scratch": _scratch}[name]
    return make(facts, encoder, llm, device, frames)


def longest_seconds(facts: Facts, encoder: SpeechEncoder) -> float:
    """Seconds of the longest utterance that is trained on."""
    wanted = min(max(LONGEST, math.ceil(facts.training.longest)), MOST_SECONDS)
    return min(wanted, encoder.most_seconds)


def uses_lora(llm: LanguageModel) -> bool:
    """Whether the language model gets LoRA. Raises `UserError` where peft is missing."""
    if llm.parameters <= SMALL_LLM:
        return False
    if not is_installed("peft"):
        raise UserError(
            f"a language model of {llm.parameters / 1e6:.0f} M parameters is trained with LoRA: "
            "pip install 'dsasr[lora]', or give a smaller --llm"
        )
    return True


def _steps(hours: float, epochs: float, frames: int, device: Device, least: int) -> int:
    """Optimizer steps of so many epochs, in two digits."""
    each = FILLED * frames / 100 / 3600 * device.world
    steps = max(least, epochs * hours / each)
    return int(float(f"{steps:.2g}"))


# -- read ----------------------------------------------------------------------------------------

_READ_HOURS = 0.75  # that recipe whisper-read's steps are for


def _read(
    facts: Facts, encoder: SpeechEncoder, llm: LanguageModel, device: Device, frames: int
) -> Way:
    lora, settings = uses_lora(llm), []
    settings += [
        Setting("data.phonemes", facts.phonemes, "labels of the CTC head, of the transcripts"),
        Setting("data.phonemizer.kind", facts.units, _why_units(facts)),
        Setting(
            "data.text_only.path", facts.sentences,
            "sentences that the language model reads without speech; the more of your domain, the "
            "better (41,264 made whisper-read's result)",
        ),
        Setting("data.text_only.lang", facts.text.main_lang, "of that text"),
    ]  # fmt: skip
    most = longest_seconds(facts, encoder)
    settings += _batch(most, frames)
    settings += _prompt(llm, facts)
    factor = min(max(facts.hours / _READ_HOURS, 0.5), 4.0)
    whole = {"frames": max(4500, 100 * int(most)), "samples": 8, "bucket": 0.3, "max_seconds": most}
    part = "lora" if lora else "llm"
    rate = 5.0 if lora else 1.0  # LoRA's matrices start at zero
    stages = [
        ({"name": "head", "branch": "pretrain", "objective": "ctc", "trains": {"ctc": 1e-3},
          "steps": 160, "warmup_steps": 20, "decay": "constant"},
         "the CTC head alone, on the frozen encoder"),
        ({"name": "tune", "branch": "pretrain", "objective": "ctc",
          "trains": {"encoder": 5e-5, "ctc": 3e-4}, "steps": round(500 * factor),
          "warmup_steps": 20, "batch": whole}, "head and encoder"),
        ({"name": "read", "branch": "sft", "trains": {"adaptor": 1e-3, part: rate * 1e-4},
          "steps": 900, "warmup_steps": 50, "min_lr_ratio": 0.1, "text_share": 1.0},
         "the language model learns to read units, from text alone"),
        ({"name": "ia_sft", "branch": "sft", "trains": {"adaptor": 2e-4, part: rate * 5e-5},
          "steps": round(300 * factor), "warmup_steps": 10, "text_share": 0.5},
         "half speech, half text"),
        ({"name": "joint", "branch": "sft",
          "trains": {"encoder": 1e-5, "ctc": 1e-5, "adaptor": 1e-4, part: rate * 5e-5},
          "steps": 100, "warmup_steps": 10, "text_share": 0.25, "batch": whole},
         "all parts, at low rates"),
    ]  # fmt: skip
    if lora:
        settings.append(Setting("model.lora", {"rank": 16, "alpha": 16}, _why_lora(llm)))
    settings.append(Setting("evaluation.decode.max_tokens", DECODED, "of a hypothesis, at most"))
    settings.append(_stage_table(stages, "whisper-read's stages, with lengths for these hours"))
    expect = [
        f"{_hours(facts)} of training speech: too few for an adaptor alone, so a CTC head on the "
        f"pretrained encoder writes {facts.units} and the language model learns to read them, "
        "from text too.",
        "45 minutes of read English and 41,264 sentences of text gave 34.1 to 35.8% WER (three "
        "seeds), in an hour on two cores, with Whisper base and its decoder of 45 M parameters as "
        "the language model, which tools/whisper_decoder_lm.py makes (34.5% by Whisper itself); a "
        "larger one takes longer. From scratch nothing would be learned.",
    ]
    return Way("read", "whisper-read", settings, expect, [stage for stage, _ in stages])


# -- adapt ---------------------------------------------------------------------------------------


def _adapt(
    facts: Facts, encoder: SpeechEncoder, llm: LanguageModel, device: Device, frames: int
) -> Way:
    lora, most = uses_lora(llm), longest_seconds(facts, encoder)
    stack = max(1, round(SPEECH_TOKEN / encoder.frame_seconds))
    per_token = round(100 * encoder.frame_seconds * stack)
    settings = [
        *_batch(most, frames),
        Setting(f"{_BATCH}.tokens", math.ceil(0.4 * frames), "of the language model, likewise"),
        Setting("model.adaptor.stack", stack, "encoder frames of an adaptor frame, about 0.16 s"),
    ]
    if per_token != 16:
        settings.append(
            Setting(f"{_BATCH}.frames_per_token", per_token, "10 ms frames of an adaptor frame")
        )
    settings += _prompt(llm, facts)
    if device.is_cpu:
        settings.append(Setting("model.llm.pack", 0, "rows are short in batches for a CPU"))
    if device.is_cpu or llm.parameters < 5e8:
        settings.append(
            Setting("model.llm.activation_checkpointing", False, "the memory holds all layers")
        )
    if not lora:
        settings.append(Setting("model.lora", None, "a language model this small is trained whole"))
    _, first, then = next(row for row in EPOCHS if facts.hours < row[0])
    align = _steps(facts.hours, first, frames, device, 300)
    sft = _steps(facts.hours, then, frames, device, 1000)
    rates = {"adaptor": 5e-4, "lora": 5e-4} if lora else {"adaptor": 5e-4, "llm": 1e-4}
    stages = [
        ({"name": "align", "branch": "sft", "trains": {"adaptor": 5e-4}, "steps": align,
          "warmup_steps": min(100, align // 5)}, f"the adaptor alone: {first:g} epochs"),
        ({"name": "sft", "branch": "sft", "trains": rates, "steps": sft,
          "warmup_steps": 100, "keep_moments": True},
         f"with {'LoRA' if lora else 'the language model'}: {then:g} epochs"),
    ]  # fmt: skip
    settings.append(_stage_table(stages, f"lengths for {_hours(facts)} in batches of "
                                 f"{frames / 100:g} s on {device.world} rank"
                                 f"{'s' if device.world > 1 else ''}"))  # fmt: skip
    settings.append(
        Setting("evaluation.every", max(100, sft // 10), "steps; ten evaluations of the last stage")
    )
    expect = [
        f"{_hours(facts)} of training speech: adaptor{' + LoRA' if lora else ''} on a pretrained "
        "encoder; from scratch nothing would be learned below some hundred hours.",
        "For comparison, not measured here: 150 h of AISHELL-1 gave others 3.6 to 4.2% CER, 960 h "
        "of LibriSpeech 1.9 to 2.3% WER on test-clean, with large encoders and 1.5 to 7 B models. "
        "The loss stays on a plateau until the adaptor is aligned: some hundred steps or more.",
    ]
    return Way("adapt", "whisper-qwen3", settings, expect, [stage for stage, _ in stages])


# -- scratch -------------------------------------------------------------------------------------


def _scratch(
    facts: Facts, encoder: SpeechEncoder, llm: LanguageModel, device: Device, frames: int
) -> Way:
    most = longest_seconds(facts, encoder)
    units, part = _why_units(facts), "llm"
    settings = [
        Setting("data.cmvn", facts.cmvn, "mean and variance of the features, of training data"),
        Setting("data.phonemes", facts.phonemes, "labels of the CTC head, of the transcripts"),
        Setting("data.phonemizer", {"kind": facts.units, "lexicons": []}, units),
        *_batch(most, frames),
    ]  # fmt: skip
    settings += _prompt(llm, facts)
    settings.append(Setting("model.llm.attn", "sdpa", "fused attention"))
    if uses_lora(llm):
        part = "lora"
        settings.append(Setting("model.lora", {"rank": 32}, _why_lora(llm)))
    if not device.is_cpu:
        size = _encoder_size(facts.hours)
        settings.append(
            Setting("model.encoder", size, f"for {_hours(facts)}; the base's is for 10,000 h")
        )
    passes = 20 if facts.hours < 1000 else 10
    pretrain = _steps(facts.hours, passes, frames, device, 1800)
    sft = _steps(facts.hours, passes / 2, frames, device, 1400)
    objective = "ctc" if device.is_cpu else "cr_ctc"
    rates = {"adaptor": 1e-3, part: 1e-4}
    stages = [
        ({"name": "pretrain", "branch": "pretrain", "objective": objective,
          "trains": {"encoder": 1e-3 if device.is_cpu else 5e-4, "ctc": 1e-3}, "steps": pretrain,
          "warmup_steps": max(40, pretrain // 50)}, f"the encoder: {passes} epochs or more"),
        ({"name": "align", "branch": "sft", "trains": {"adaptor": 1e-3},
          "steps": max(40, sft // 20), "warmup_steps": 10}, "the adaptor alone"),
        ({"name": "ia_sft", "branch": "sft", "trains": rates, "steps": sft, "warmup_steps": 20,
          "swaps": True, "steps_after_final_swap": sft // 2},
         "on snapshots of the encoder, the last half on its final state"),
        ({"name": "joint", "branch": "sft", "trains": {"encoder": 5e-5, **rates, "adaptor": 1e-4},
          "steps": max(40, sft // 20), "warmup_steps": 10}, "all parts, at low rates"),
    ]  # fmt: skip
    settings.append(_stage_table(stages, f"lengths for {_hours(facts)}"))
    settings += [
        Setting("interleave", [1, 1], "pretrain and sft steps in turn"),
        Setting("evaluation.every", max(100, sft // 10), "steps"),
        Setting("evaluation.decode.max_tokens", DECODED, "of a hypothesis, at most"),
        Setting("probe.every", 0, "no measurements of entropy allocation"),
        Setting("evaluation.rules", "standard", "normalization of any text"),
    ]
    expect = [
        f"{_hours(facts)} of training speech, an encoder from scratch: below some hundred hours "
        "it learns little of real speech (45 minutes: nothing at all); give --encoder of a "
        "pretrained one unless that is what you study.",
    ]
    base = "digits" if device.is_cpu else "nim-2.3b"
    return Way("scratch", base, settings, expect, [stage for stage, _ in stages])


def _encoder_size(hours: float) -> dict:
    """Of a Conformer (**ours**): about 30 M, 120 M and 600 M parameters."""
    sizes = ((300, 256, 12, 4), (3_000, 512, 16, 8), (math.inf, 1280, 16, 20))
    _, width, layers, heads = next(row for row in sizes if hours < row[0])
    return {"width": width, "layers": layers, "heads": heads, "ffn": 4 * width}


# -- of all --------------------------------------------------------------------------------------


def _stage_table(stages: Sequence[tuple[dict, str]], why: str) -> Setting:
    return Setting("stages", [s for s, _ in stages], why, tuple(w for _, w in stages))


def _prompt(llm: LanguageModel, facts: Facts) -> list[Setting]:
    """The prompt, and the space before a transcript's first word."""
    text, languages = "", _languages(llm, facts)
    why = "the form that the language model's tokenizer calls for"
    if llm.is_whisper:
        lang = LANG if languages else f"<|{facts.text.main_lang.partition('-')[0] or 'en'}|>"
        text = f"<|startofprev|><speech><|startoftranscript|>{lang}<|transcribe|><|notimestamps|>"
        why = "what Whisper's decoder saw before a transcript"
    spaced = "as this model's tokens have it" if llm.spaced else "chat models answer without one"
    return [
        Setting("model.prompt", text, why),
        *languages,
        Setting("data.text.leading_space", llm.spaced, f"a space before the first word: {spaced}"),
    ]


def _languages(llm: LanguageModel, facts: Facts) -> list[Setting]:
    """What the prompt calls the languages of data in several; nothing where it is one.

    Names are those of transformers' Whisper, and of other languages their tags.
    """
    counts: Counter[str] = Counter()
    for lang, count in facts.text.langs.items():
        if lang and lang.lower() not in MIXED_LANGS:
            counts[lang.partition("-")[0].lower()] += count
    langs = sorted(lang for lang, n in counts.items() if n >= RARE * facts.text.count)
    if len(langs) < 2 or (llm.is_whisper and not all(lang in LANGUAGES for lang in langs)):
        return []
    texts = {
        lang: f"<|{lang}|>" if llm.is_whisper else LANGUAGES.get(lang, lang).title()
        for lang in langs
    }
    why = "named in half of the prompts, so that --lang can tell the model what is spoken"
    return [Setting("model.languages", texts, why)]


def _why_units(facts: Facts) -> str:
    return {
        "characters": "letters are the CTC head's labels",
        "espeak": "phonemes by espeak-ng are the CTC head's labels",
        "tokens": "the language model's tokens are the CTC head's labels",
    }[facts.units]


def _why_lora(llm: LanguageModel) -> str:
    return f"{llm.parameters / 1e6:,.0f} M parameters stay frozen; LoRA's matrices train"


def _batch(most: float, frames: int) -> list[Setting]:
    return [
        Setting(f"{_BATCH}.frames", frames, "of 10 ms, of a rank's batch: what fits the memory"),
        Setting(f"{_BATCH}.max_seconds", most, "of the longest utterance"),
    ]


def _hours(facts: Facts) -> str:
    hours = facts.hours
    return f"{max(1, round(60 * hours))} minutes" if hours < 1.5 else f"{hours:,.0f} hours"
