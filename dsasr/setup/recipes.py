"""The two recipes of a project: the whole training, and a short one that shows that all runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from dsasr import config
from dsasr.planning.cluster_sizing import estimate_step
from dsasr.planning.memory import Traffic, step_memory
from dsasr.planning.model_parts import ModelPart, count_parts
from dsasr.recipe import Recipe
from dsasr.setup import recipe_text
from dsasr.setup.facts import Facts
from dsasr.setup.parts import Device, LanguageModel, SpeechEncoder
from dsasr.setup.recipe_text import Setting
from dsasr.setup.ways import Way, choose_way, longest_seconds, way_of
from dsasr.utils.errors import UserError

# Frames of a rank's batch that are tried, the largest first (**ours**: 400 to 60 s on a GPU).
BUDGETS = {
    "gpu": (40_000, 30_000, 20_000, 12_000, 8_000, 6_000),
    "cpu": (9_000, 6_000, 4_500, 3_000),
}
MEMORY_SHARE = 0.85  # of the memory that the plan may take
TRY_SECONDS = 60.0  # of all steps of the short training together, as planned (**ours**)
TRY_STEPS = (2, 20)  # of one of its stages
STEP_OVERHEAD = 0.3  # seconds of a step on a CPU beside its products (**ours**, small models)


@dataclass(frozen=True)
class Written:
    """A recipe's text, the recipe that it gives, and the seconds of each stage as planned."""

    text: str
    recipe: Recipe
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def load_text(text: str) -> Recipe:
    """The recipe of a YAML text. Raises `UserError`."""
    values = config.parse_yaml(text)
    base = values.pop("base")
    return config.build(Recipe, config.merge(config.read_recipe(base), values))


def main_recipe(
    facts: Facts, encoder: SpeechEncoder, llm: LanguageModel, device: Device, run: str, title: str
) -> tuple[Written, Way]:
    """The recipe of the whole training, with the largest batches that fit by plan.

    Raises `UserError` where not even the smallest fit, and for a missing library.
    """
    name, longest = choose_way(facts, encoder), longest_seconds(facts, encoder)
    budgets = sorted(
        {max(b, 100 * int(longest)) for b in BUDGETS["cpu" if device.is_cpu else "gpu"]}
    )
    parts: dict[str, ModelPart] = {}
    needed = 0.0
    for frames in reversed(budgets):
        way = way_of(name, facts, encoder, llm, device, frames)
        if lost := facts.share_longer(longest):
            note = f"{lost:.2%} of the utterances are longer than {longest:g} s and are dropped."
            way = replace(way, expect=[*way.expect, note])
        settings = [*_common(facts, encoder, llm, device, run), *way.settings]
        base = config.read_recipe(way.base)
        bases = [base, config.to_plain(config.build(Recipe, base))]
        settings = recipe_text.differing(bases, settings)
        text = recipe_text.write([title, *way.expect], way.base, settings)
        recipe = load_text(text)
        parts = parts or count_parts(recipe)
        traffic = traffic_of(facts, longest)
        needed = max(
            sum(step_memory(recipe, stage, device.machine, parts, traffic).values())
            for stage in recipe.stages
        )
        if needed <= MEMORY_SHARE * device.memory:
            seconds = planned_seconds(recipe, device, traffic, parts)
            return Written(text, recipe, seconds), way
    # Rounded away from each other, so that the first is the larger one in print too.
    most = MEMORY_SHARE * device.memory
    raise UserError(
        f"the models need {math.ceil(10 * needed) / 10:.1f} GB of a rank for batches of "
        f"{budgets[0] / 100:g} s, and {math.floor(10 * most) / 10:.1f} GB may be taken "
        f"({MEMORY_SHARE:.0%} of {device.memory:.1f} GB free): give a smaller --llm or --encoder, "
        "or a machine with more"
    )


def try_recipe(main: Written, path: Path, facts: Facts, device: Device, run: str) -> Written:
    """The short training of ``main``, whose file is ``path``: a few steps of each stage, and an
    evaluation of a dozen utterances."""
    most = main.recipe.data.dataloader.batch.max_seconds
    batch = {**config.to_plain(main.recipe.data.dataloader.batch)}
    batch |= {"frames": 100 * int(most), "samples": 4}
    if batch["tokens"]:
        batch["tokens"] = max(2_000, batch["frames"])
    settings = [
        Setting("run", run, "its own run folder"),
        Setting("data.dataloader.batch", {k: batch[k] for k in ("frames", "tokens", "samples")},
                "small batches"),
        Setting("evaluation.every", 0, "once, at the end"),
        Setting("evaluation.final_utterances", 12, "of the validation set"),
        Setting("evaluation.decode", {"beam": 1, "ctc_weight": 0.0, "max_tokens": 32}, "greedy"),
        Setting("monitor.every", 1, "every step is shown"),
    ]  # fmt: skip
    if main.recipe.data.text_only is not None:
        settings.append(Setting("data.text_only.samples", 4, "sentences of a batch"))
    parts = count_parts(main.recipe)
    traffic = traffic_of(facts, main.recipe.data.dataloader.batch.max_seconds)
    header = ["A few steps of everything, to see that it runs; the score means nothing."]
    # The stages' time depends on their batches, and their steps on that time.
    steps = dict.fromkeys((stage.name for stage in main.recipe.stages), 1)
    for _ in range(2):
        table = _try_stages(main, batch, steps)
        text = recipe_text.write(header, str(path), [*settings, table])
        values = config.merge(
            config.to_plain(main.recipe), recipe_text.values_of([*settings, table])
        )
        recipe = config.build(Recipe, values)
        seconds = planned_seconds(recipe, device, traffic, parts)
        share = TRY_SECONDS / len(seconds)
        low, high = TRY_STEPS
        steps = {
            name: min(high, max(low, int(share / (spent / steps[name]))))
            for name, spent in seconds.items()
        }
    return Written(text, recipe, seconds)


def _try_stages(main: Written, batch: dict, steps: dict[str, int]) -> Setting:
    stages = []
    for stage in main.recipe.stages:
        count = steps[stage.name]
        values = {"name": stage.name, "branch": stage.branch, "objective": stage.objective,
                  "trains": dict(stage.trains), "steps": count,
                  "warmup_steps": min(1, count - 1)}  # fmt: skip
        if stage.text_share:
            values["text_share"] = stage.text_share
        if stage.batch is not None:
            values["batch"] = {k: batch[k] for k in ("frames", "tokens", "samples", "max_seconds")}
        if stage.swaps:
            values |= {"swaps": True, "steps_after_final_swap": count // 2}
        stages.append(values)
    return Setting("stages", stages, "as in the whole training, cut short", ("",) * len(stages))


def _common(
    facts: Facts, encoder: SpeechEncoder, llm: LanguageModel, device: Device, run: str
) -> list[Setting]:
    """What every way sets."""
    text = facts.text
    case = "lower" if text.is_upper else "keep"
    why = "capitals cost a language model a token a letter or two" if text.is_upper else (
        "as the transcripts have it"
    )  # fmt: skip
    workers = 1 if device.is_cpu else max(1, min(8, device.cores // device.world - 1))
    settings = [
        Setting("run", run, "the run folder"),
        _data(facts, "train"),
        _data(facts, "valid"),
        Setting("data.text.case", case, why),
        Setting("data.text.punctuation", "keep", "as the transcripts have it"),
        Setting("data.dataloader.num_workers", workers, f"{device}"),
        Setting("model.llm.path", llm.path, f"{llm.kind}, {llm.parameters / 1e6:,.0f} M"),
    ]  # fmt: skip
    if encoder.is_pretrained:
        settings.append(Setting("model.encoder.path", encoder.path, "the pretrained encoder"))
    if encoder.bins == 1:
        settings.append(
            Setting("model.pretrain.spec", None, "the encoder reads waves: no SpecAugment")
        )
    if device.is_cpu:
        settings.append(
            Setting("engine.matmul", "medium", "on some CPUs twice as fast and as exact")
        )
        if device.world == 1:
            settings.append(
                Setting("engine.deepspeed", "zero1", "one rank: there is nothing to share out")
            )
    return settings


def _data(facts: Facts, role: str) -> Setting:
    sets = facts.of_role(role)
    count, hours = sum(len(s.lengths) for s in sets), sum(s.lengths.hours for s in sets)
    why = f"{count:,} utterances, {hours:.2f} h"
    return Setting(f"data.{role}", [one.entry for one in sets], why)


def traffic_of(facts: Facts, longest: float) -> Traffic:
    """The average utterance of at most ``longest`` seconds (that long, where all are longer);
    tokens by a rule of thumb: a Latin word's letters are a token."""
    lengths = facts.training
    seconds, characters = lengths.seconds, lengths.characters
    if (seconds <= longest).any():
        seconds, characters = seconds[seconds <= longest], characters[seconds <= longest]
    mean = float(seconds.mean()) if len(lengths) else 5.0
    rate = float(characters.mean()) / max(0.5, mean) if len(lengths) else 14.0
    seconds = min(max(0.5, mean), longest)
    return Traffic(seconds, rate * (0.7 if facts.text.is_han else 0.25))


def planned_seconds(
    recipe: Recipe, device: Device, traffic: Traffic, parts: dict[str, ModelPart]
) -> dict[str, float]:
    """Seconds of each stage on ``device``, by arithmetic (`dsasr.planning`)."""
    found = {}
    for stage in recipe.stages:
        with_speech = estimate_step(recipe, stage, device.machine, traffic, parts).seconds
        step = (1 - stage.text_share) * with_speech
        if stage.text_share:
            step += stage.text_share * _text_step(recipe, device, parts)
        overhead = STEP_OVERHEAD if device.is_cpu else 0.0
        found[stage.name] = stage.steps * (step + overhead)
    return found


def _text_step(recipe: Recipe, device: Device, parts: dict[str, ModelPart]) -> float:
    """Seconds of a batch of text alone: its positions through the language model and back."""
    positions = recipe.data.text_only.samples * (2.0 * recipe.data.text_only.max_characters)
    products = 4 if recipe.model.lora is not None else 6
    return products * parts["llm"].parameters * positions * 0.5 / (device.rate * 1e12)


def clock(seconds: float) -> str:
    """A planned time in words, in two digits: it is no measurement."""
    if seconds < 90:
        return "a minute"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:,.0f} hours" if hours < 72 else (
        f"{hours / 24:,.0f} days"
    )  # fmt: skip
