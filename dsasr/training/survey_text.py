"""A survey of the datasets as text: tables, one transcript in all its forms, and what to fix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from dsasr.build import Builder
from dsasr.data.audio.measure import CLIPPED
from dsasr.data.text.normalization import is_upper_case
from dsasr.data.text.prompt import find_language
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.training.sample_survey import SetSurvey, SurveyedSample
from dsasr.utils.columns import WIDTH, columns, shortened
from dsasr.utils.troubleshooting import see

# **Ours**: the share from which on something is reported.
MANY = 0.02  # of a set's samples left out for one cause
CAPITALS = 0.9  # of its transcripts in capitals
CHEAPER = 0.85  # the tokens of lower case to those of the case as it is
QUIET = -45.0  # dB of full scale, of the median sample
KEPT = 0.5  # of the samples that were read, at least, must be usable
# Causes that limits make, and the keys of those limits in `BatchConfig`.
_LIMITS = {
    "too_long": "max_seconds",
    "too_short": "min_seconds",
    "too_much_text": "max_chars_per_second",
    "over_budget": "frames and tokens",
}


def hours_of_mixtures(builder: Builder, surveys: Sequence[SetSurvey]) -> dict[str, float]:
    """Stage → hours of its mixture, counted in batches: hours of its training sets, divided by
    the share of its batches that have speech. Stages that read text alone are left out."""
    recipe = builder.recipe
    hours = {s.reading.dataset.name: s.hours for s in surveys if s.reading.kind == "train"}
    return {
        stage.name: sum(hours.get(d.name, 0.0) for d in recipe.dataloader(stage)[1])
        / (1 - stage.text_share)
        for stage in recipe.stages
        if not stage.text_only
    }


def lines(builder: Builder, surveys: Sequence[SetSurvey]) -> list[str]:
    """The survey for people, without its warnings."""
    return [*_sizes(surveys), "", *_samples(builder, surveys), "", *_examples(builder, surveys)]


def _set(row: SetSurvey) -> str:
    return f"  {row.reading.kind} {row.reading.dataset.name}"


def _sizes(surveys: Sequence[SetSurvey]) -> list[str]:
    """A row for each set: how much there is, and how much the limits leave out."""
    head = ["DATA", "utterances", "hours", "seconds 10%", "half", "90%", "longest", "chars/s",
            "left out"]  # fmt: skip
    rows: dict[tuple[str, str], list[str]] = {}
    for row in surveys:
        about = "" if row.exact else "≈"
        quantiles = ["-"] * 4
        if row.indexed:
            quantiles = [f"{q:.1f}" for q in np.quantile(row.seconds, (0.1, 0.5, 0.9, 1))]
        rate = np.median(row.chars / np.maximum(row.seconds, 0.01)) if row.indexed else 0.0
        key = row.reading.kind, row.reading.dataset.name
        cells = [_set(row), f"{about}{row.utterances:,}", f"{about}{row.hours:,.2f}", *quantiles,
                 f"{rate:.0f}", _causes(row.left_out, row.indexed)]  # fmt: skip
        if key not in rows or row.left_out:
            rows[key] = cells
    return columns([head, *rows.values()], left=(0, 8))


def _causes(counts: Counter[str], total: int) -> str:
    known = ((c, n) for c, n in counts.most_common())
    return ", ".join(f"{c} {_share(n, total)}" for c, n in known) or "none"


def _share(count: int, total: int) -> str:
    share = count / max(total, count, 1)
    return f"{count} ({share:.0%})" if share >= 0.005 else f"{count}"


def _samples(builder: Builder, surveys: Sequence[SetSurvey]) -> list[str]:
    """A row for each set and branch: the samples that were read."""
    head = ["SAMPLES", "usable", "level dB", "SNR dB", "clipped", "labels", "a second",
            "least frames each"]  # fmt: skip
    rows, named = [head], set()
    for row in surveys:
        found, name = row.samples, _set(row)
        ctc = row.reading.branch == "pretrain"
        labels = _label_name(builder) if ctc else "tokens"
        cells = ["" if name in named else name, f"{len(found)} of {row.read}"]
        if not found:
            rows.append([*cells, "-", "-", "-", labels, "-", "-"])
            continue
        sound = ["", "", ""]
        if name not in named:
            levels, ratios = ([getattr(s.audio, n) for s in found] for n in ("level", "snr"))
            clipped = sum(s.audio.clipped > CLIPPED for s in found)
            sound = [f"{np.median(levels):.0f}", f"{np.median(ratios):.0f}", str(clipped)]
        named.add(name)
        counts = [len(s.units if ctc else s.tokens) for s in found]
        rate = sum(counts) / max(sum(s.seconds for s in found), 0.01)
        room = [s.encoder_frames / n for s, n in zip(found, counts, strict=True) if n and ctc]
        rows.append([*cells, *sound, labels, f"{rate:.1f}", f"{min(room):.1f}" if room else ""])
    return columns(rows, left=(0, 5))


def _label_name(builder: Builder) -> str:
    """What the CTC head writes."""
    kind = builder.recipe.data.phonemizer.kind
    return kind if kind in ("characters", "tokens") else "phonemes"


def _examples(builder: Builder, surveys: Sequence[SetSurvey]) -> list[str]:
    """One transcript of each training set in all its forms."""
    forms: dict[str, list[tuple[str, str]]] = {}
    chosen: dict[str, str] = {}
    for row in surveys:
        if row.reading.kind != "train" or not row.samples:
            continue
        name = row.reading.dataset.name
        sample = _example(row.samples, chosen.get(name))
        if name not in forms:
            chosen[name] = sample.key
            forms[name] = [("transcript", sample.stored)]
            if sample.written != sample.stored:
                forms[name].append(("trained on", sample.written))
        if sample.units:
            symbols = " ".join(builder.phonemes.symbols[i] for i in sample.units)
            count = f"{len(sample.units)} for {sample.encoder_frames} encoder frames: "
            forms[name].append((_label_name(builder), count + symbols))
        if sample.tokens:
            shown = "".join(f"[{builder.tokenizer.token(i)}]" for i in sample.tokens)
            forms[name].append(("tokens", f"{len(sample.tokens)}: " + shown.replace("\n", "\\n")))
    rows = [
        (f"  {name}" if not i else "", label, text)
        for name, labeled in forms.items()
        for i, (label, text) in enumerate(labeled)
    ]
    return [shortened(line, WIDTH) for line in columns([("TEXT", "", ""), *rows], (0, 1, 2))]


def _example(samples: Sequence[SurveyedSample], key: str | None) -> SurveyedSample:
    """The sample of ``key`` if it is among them, else the one of median length."""
    by_length = sorted(samples, key=lambda s: len(s.stored))
    return next((s for s in samples if s.key == key), by_length[len(by_length) // 2])


# -- what to fix -------------------------------------------------------------------------------


def warnings(builder: Builder, surveys: Sequence[SetSurvey]) -> list[str]:
    """A line for each thing that a user should know before a run is started."""
    found: dict[str, None] = {}
    for row in surveys:
        lines_of = (_left_out(row), _unusable(row), _sound(row), _case(builder, row),
                    _lost_characters(builder, row), _unnamed(builder, row))  # fmt: skip
        found |= {line: None for some in lines_of for line in some}
    return [*found, *_shared(surveys)]


def faults(surveys: Sequence[SetSurvey]) -> list[str]:
    """Faults of the data with which a run must not start."""
    found = []
    for row in surveys:
        if row.reading.kind == "train" and len(row.samples) < KEPT * row.read:
            causes = Counter(cause for cause, *_ in row.dropped)
            dropped = ", ".join(f"{c} {n}" for c, n in causes.most_common())
            _, shard, key, detail = row.dropped[-1]
            found.append(
                f"{row.reading.where}: {len(row.dropped)} of {row.read} samples are dropped "
                f"({dropped}; the last: {key} in {shard}: {detail}){see('dropped-samples')}"
            )
    return found


def _left_out(row: SetSurvey) -> Iterator[str]:
    for cause, count in row.left_out.items():
        if count < MANY * row.indexed:
            continue
        dropped = (
            f"{row.reading.where}: {count} of {row.indexed} utterances are left out as {cause}"
        )
        if cause in _LIMITS:
            limit = row.reading.batch.limit_of(cause).removeprefix("; ")
            yield (
                f"{dropped} ({limit}): cut them, or change {_LIMITS[cause]} of "
                f"data.dataloader.batch, or of the stage's own batch{see('limits')}"
            )
        else:
            yield f"{dropped}{see('dropped-samples')}"


def _unusable(row: SetSurvey) -> Iterator[str]:
    for cause, count in Counter(cause for cause, *_ in row.dropped).items():
        _, _, key, detail = next(r for r in row.dropped if r[0] == cause)
        link = see("ctc-frames") if cause == "too_few_frames" else see("dropped-samples")
        yield (
            f"{row.reading.where}: {count} of {row.read} samples dropped as {cause} (such as "
            f"{key}: {detail}){link}"
        )


def _sound(row: SetSurvey) -> Iterator[str]:
    if not row.samples:
        return
    level = np.median([s.audio.level for s in row.samples])
    if level < QUIET:
        yield (
            f"{row.reading.where}: very quiet, {level:.0f} dB of full scale: listen to it with "
            f"dsasr data inspect{see('sound')}"
        )
    clipped = sum(s.audio.clipped > CLIPPED for s in row.samples)
    if clipped > 0.2 * len(row.samples):
        yield (
            f"{row.reading.where}: {clipped} of {len(row.samples)} samples are clipped: listen "
            f"to them with dsasr data inspect{see('sound')}"
        )


def _case(builder: Builder, row: SetSurvey) -> Iterator[str]:
    """Capitals that the language model reads in many more tokens than lower case."""
    if row.reading.branch != "sft" or row.reading.kind != "train" or not row.samples:
        return
    capitals = [is_upper_case(s.written) for s in row.samples]
    share = sum(capitals) / len(capitals)
    if share >= CAPITALS:
        as_it_is, lower = (
            sum(len(builder.tokenizer.encode(change(s.written))) for s in row.samples)
            for change in (str, str.lower)
        )
        if lower < CHEAPER * as_it_is:
            yield (
                f"{row.reading.where}: transcripts in capitals take the language model {as_it_is} "
                f"tokens, in lower case {lower}: give data.text.case=lower{see('case')}"
            )
    elif share > 1 - CAPITALS:
        yield (
            f"{row.reading.where}: {sum(capitals)} of {len(capitals)} transcripts are in capitals, "
            f"the others not: give data.text.case=lower{see('case')}"
        )


def _lost_characters(builder: Builder, row: SetSurvey) -> Iterator[str]:
    """Characters that the tokenizer does not give back."""
    if row.reading.branch != "sft":
        return
    lost: Counter[str] = Counter()
    space = builder.recipe.data.text.leading_space
    for sample in row.samples:
        lost.update(_lost(builder.tokenizer, sample.written, space))
    if lost:
        shown = " ".join(c for c, _ in lost.most_common(10))
        yield (
            f"{row.reading.where}: the tokenizer does not know {shown} ({lost.total()} in "
            f"{len(row.samples)} samples): give data.text.case or .punctuation, or another "
            f"tokenizer{see('unknown-characters')}"
        )


def _unnamed(builder: Builder, row: SetSurvey) -> Iterator[str]:
    """Utterances whose language no prompt names."""
    known = builder.recipe.model.languages
    if row.reading.branch != "sft" or row.reading.kind != "train" or not known:
        return
    others = {lang: n for lang, n in row.langs.items() if not find_language(lang, known)}
    if others:
        named = ", ".join(f"{lang or 'no language'} {n}" for lang, n in sorted(others.items()))
        yield (
            f"{row.reading.where}: no prompt names the language of {sum(others.values())} of "
            f"{row.langs.total()} utterances ({named}): model.languages has {', '.join(known)}"
        )


def _lost(tokenizer: Tokenizer, text: str, space: bool) -> set[str]:
    back = tokenizer.decode(tokenizer.encode(" " + text if space else text))
    return set("".join(text.split())) - set(back)


def _shared(surveys: Sequence[SetSurvey]) -> Iterator[str]:
    """Utterances of the training data that are validated on too."""
    by_name = {(s.reading.kind, s.reading.dataset.name): s for s in surveys}
    for (kind, name), row in by_name.items():
        for (other, other_name), second in by_name.items():
            both = row.identities & second.identities if (kind, other) == ("train", "valid") else ()
            if both:
                yield (
                    f"data.valid.{other_name} shares {len(both)} utterances with data.train.{name} "
                    f"(such as {min(both)[0]}): error rates will look better than they are"
                )
