"""The lines that a run prints: one each log interval, one for each event, warnings marked.

Every line starts with the run's optimizer steps, as ``[   120/14,400]``. Values have units and few
digits; all of them, in full, are in metrics.jsonl and events.jsonl. No function here prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsasr.schedule import GIVEN
from dsasr.utils.troubleshooting import see

LOSSES = {"ctc": "CTC", "consistency": "consistency", "nll": "NLL", "entropy": "entropy"}  # nats
WARNINGS = {
    "audio_ignored",
    "bad_samples",
    "bad_validation_samples",
    "checkpoint_failed",
    "checkpoint_passed_over",
    "ctc_plateau",
    "evaluation_failed",
    "evaluation_repeated",
    "not_marked",
    "partly_initialized",
    "publisher_lost",
    "refused",
}
ERROR_RATES = {"wer": "WER", "cer": "CER", "mer": "MER", "phoneme_error_rate": "PER"}


# -- numbers -------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03`` of a duration in seconds."""
    seconds = max(int(seconds), 0)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def duration(seconds: float) -> str:
    """A duration with its unit: ``0.03 s``, ``4.2 s``, ``12 s``, ``1:02:03``."""
    if seconds >= 60:
        return clock(seconds)
    digits = 2 if seconds < 1 else 1 if seconds < 10 else 0
    return f"{seconds:.{digits}f} s"


def percent(share: float) -> str:
    """``12.3%`` of a share from 0 to 1."""
    return f"{100 * share:.1f}%"


def loss(value: float) -> str:
    """A loss, or a norm of gradients: three decimals, of a very large one three digits."""
    return f"{value:.3f}" if abs(value) < 1e3 else f"{value:.3g}"


def number(value: Any) -> str:
    """At most four significant digits of a float; thousands in groups."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


# -- lines ---------------------------------------------------------------------------------------


def head(steps: int, total_steps: int) -> str:
    """The start of every line, of equal width over a run."""
    total = f"{total_steps:,}"
    return f"[{steps:>{len(total)},}/{total}]"


def stage_step(stage: str, step: int) -> str:
    """A stage's name and its own steps done, in columns."""
    return f"{stage:<10} {step:>7,}"


def progress_line(
    steps: int,
    total_steps: int,
    stage: str,
    step: int,
    line: Mapping[str, float],
    seconds_left: float,
) -> str:
    """The line of a log interval: losses, learning rate, audio hours an hour, time left.

    ``line`` holds the interval's metrics, ``step`` the stage's own steps done.
    """
    cells = [f"{label} {loss(line[key])}" for key, label in LOSSES.items() if key in line]
    cells = cells or ["no usable sample"]
    if "accuracy" in line:
        cells.append(f"accuracy {percent(line['accuracy'])}")
    rates = [value for key, value in line.items() if key.startswith("lr_")]
    if rates:
        low, high = f"{min(rates):.1e}", f"{max(rates):.1e}"
        cells.append(f"lr {low}" if low == high else f"lr {low}…{high}")
    if line["audio_hours_per_hour"]:  # not of steps on text alone
        cells.append(f"{line['audio_hours_per_hour']:,.0f} audio h/h")
    cells.append(f"ETA {clock(seconds_left)}")
    return f"{head(steps, total_steps)} {stage_step(stage, step)}  {'  '.join(cells)}"


def event_line(steps: int, total_steps: int, kind: str, fields: Mapping[str, Any]) -> str:
    """The line of an event, as `Monitor.event` has it; a warning is marked as one."""
    text = _EVENTS[kind](fields) if kind in _EVENTS else _unknown(kind, fields)
    mark = "WARNING" if kind in WARNINGS else "—"
    return f"{head(steps, total_steps)} {mark} {text}"


def warning_line(text: str) -> str:
    """The line of a problem that is no event of the log."""
    return f"WARNING {text}"


def _unknown(kind: str, fields: Mapping[str, Any]) -> str:
    values = "  ".join(f"{k} {number(v)}" for k, v in fields.items() if k != "steps")
    return f"{kind}  {values}".rstrip()


def _stage(e: Mapping[str, Any]) -> str:
    return f"stage {e['name']} starts ({e['branch']} branch, ready in {_time(e, 'switch')})"


def _stage_end(e: Mapping[str, Any]) -> str:
    return f"stage {e['name']} ends after {duration(e['stage_seconds'])} of training"


def _initialized(e: Mapping[str, Any]) -> str:
    """Tensors and parameters by part: taken from the source, left there, and fresh in the model."""
    cells = []
    for kind in ("taken", "left", "fresh"):
        parts = [
            f"{part} {tensors:,} tensors ({number(parameters)} parameters)"
            for part, (tensors, parameters) in e[kind].items()
        ]
        cells.append(f"{kind}: {', '.join(parts) or 'nothing'}")
    if e.get("head_kept"):
        cells.append("the encoder's CTC head is kept for scores and times of transcripts")
    return f"initial weights from {e['source']} (model.{e['key']}): {'; '.join(cells)}"


def _partly_initialized(e: Mapping[str, Any]) -> str:
    fresh = f"{e['fresh']:,} of its {e['tensors']:,} tensors are fresh"
    return f"only a part of the {e['part']} is from {e['source']}: {fresh}"


def _was_finished(_e: Mapping[str, Any]) -> str:
    return (
        "this run was finished already: give another run=FOLDER, or go on with more steps of its "
        "last stage, stages.NAME.steps=N allow_changed=true"
    )


def _resumed(e: Mapping[str, Any]) -> str:
    return f"resumed from checkpoint {e['checkpoint']}"


def _checkpoint(e: Mapping[str, Any]) -> str:
    stall = _time(e, "stall")
    return f"checkpoint {e['name']} saved in {_time(e, 'save')} (training waited {stall})"


def _checkpoint_failed(e: Mapping[str, Any]) -> str:
    return f"checkpoint not saved: {e['reason']}{see('disk')}"


def _checkpoint_passed_over(e: Mapping[str, Any]) -> str:
    return f"checkpoint not resumed from: {e['reason']}"


def _reference(e: Mapping[str, Any]) -> str:
    return f"drift reference taken at pretrain step {e['pretrain']:,}"


def _drift(e: Mapping[str, Any]) -> str:
    cka, threshold = e["cka"], e["threshold"]
    sign = "<" if cka < threshold else "≥" if cka >= threshold else "against"
    return (
        f"drift at pretrain step {e['pretrain']:,}: CKA {cka:.4f} {sign} threshold {threshold:g} "
        f"(measuring takes {percent(e['share_of_time'])} of the time)"
    )


def _published(e: Mapping[str, Any]) -> str:
    cause = f"{e['cause']}, CKA {e['cka']:.4f}" if "cka" in e else e["cause"]
    return f"published {e['snapshot']} ({cause}) in {_time(e, 'publish')}"


def _swap(e: Mapping[str, Any]) -> str:
    if e["snapshot"] == GIVEN:
        return "the sft branch starts with the encoder that the run was given"
    return (
        f"swapped to {e['snapshot']} ({e['cause']}) at sft step {e['sft']:,} in {_time(e, 'swap')}"
    )


def _after_swap(e: Mapping[str, Any]) -> str:
    if e["nll_before"] is None:
        return f"NLL {loss(e['nll'])} with its first encoder (sft steps since: {e['sft_steps']:,})"
    change = f"{loss(e['nll_before'])} → {loss(e['nll'])}"
    return f"NLL {change} by the swap (sft steps since: {e['sft_steps']:,})"


def _refused(e: Mapping[str, Any]) -> str:
    name = e.get("snapshot") or f"encoder of pretrain step {e['pretrain']:,}"
    return f"{name} refused: {e['reason']}{see('encoder-refused')}"


def _waiting(e: Mapping[str, Any]) -> str:
    return f"waiting for the next encoder at sft step {e['sft']:,} (store.late={e['late']})"


def _publisher_lost(e: Mapping[str, Any]) -> str:
    silent = duration(e["silent_seconds"])
    return f"publisher silent for {silent}: {e['last']} is used as the final encoder"


def _not_marked(e: Mapping[str, Any]) -> str:
    return f"{e['snapshot'] or 'no snapshot'} not marked as in use: {e['reason']}"


def _bad_samples(e: Mapping[str, Any]) -> str:
    causes = {k: v for k, v in e.items() if k != "steps"}
    shown = ", ".join(f"{name} {count:,}" for name, count in causes.items())
    return f"bad samples so far: {sum(causes.values()):,} ({shown})"


def _bad_validation_samples(e: Mapping[str, Any]) -> str:
    causes = {k: v for k, v in e.items() if k not in ("steps", "first")}
    shown = ", ".join(f"{name} {count:,}" for name, count in causes.items())
    total = sum(causes.values())
    return f"bad validation samples left out: {total:,} ({shown}); the first: {e['first']}"


def _evaluation_failed(e: Mapping[str, Any]) -> str:
    return f"evaluation of {e['stage']} failed, and training goes on: {e['reason']}"


def _evaluation_repeated(e: Mapping[str, Any]) -> str:
    return (
        f"the process before ended in the evaluation of {e['stage']}: it is repeated "
        "(evaluation.every=0 and probe.every=0 leave it out)"
    )


def _evaluated(e: Mapping[str, Any]) -> str:
    """Error rates, by language where there is more than one, and the share of hallucinations."""
    cells = []
    for key, value in e.items():
        name, _, lang = key.partition("/")
        if name in ERROR_RATES:
            cells.append(f"{ERROR_RATES[name]} {f'{lang} ' if lang else ''}{percent(value)}")
    cells = [cell for cell in cells if cell.count(" ") > 1] or cells
    if "hallucination/flagged" in e:
        cells.append(f"hallucination {percent(e['hallucination/flagged'])}")
    left_out = f"  ({e['left_out']:,.0f} bad samples left out)" if e.get("left_out") else ""
    return f"evaluated {e['stage']}: {'  '.join(cells) or 'no reference text'}{left_out}"


def _audio_ignored(e: Mapping[str, Any]) -> str:
    return (
        f"the loss of {e['stage']} hardly depends on the audio: NLL {loss(e['loss'])} a token, "
        f"with other utterances' audio {loss(e['loss'] + e['gain'])}{see('audio-ignored')}"
    )


def _ctc_plateau(e: Mapping[str, Any]) -> str:
    return (
        f"CTC of {e['stage']} is on its plateau, where it writes next to nothing: "
        f"{percent(e['phoneme_error_rate'])} of the phonemes are wrong{see('ctc-plateau')}"
    )


def _stopped(e: Mapping[str, Any]) -> str:
    return f"stopped by {e['cause']}"


def _finished(_: Mapping[str, Any]) -> str:
    return "finished"


def _time(e: Mapping[str, Any], name: str) -> str:
    return duration(e[f"{name}_seconds"])


_EVENTS = {
    "stage": _stage,
    "stage_end": _stage_end,
    "initialized": _initialized,
    "partly_initialized": _partly_initialized,
    "resumed": _resumed,
    "was_finished": _was_finished,
    "checkpoint": _checkpoint,
    "checkpoint_failed": _checkpoint_failed,
    "checkpoint_passed_over": _checkpoint_passed_over,
    "reference": _reference,
    "ctc_plateau": _ctc_plateau,
    "drift": _drift,
    "published": _published,
    "swap": _swap,
    "after_swap": _after_swap,
    "refused": _refused,
    "waiting": _waiting,
    "publisher_lost": _publisher_lost,
    "not_marked": _not_marked,
    "audio_ignored": _audio_ignored,
    "bad_samples": _bad_samples,
    "bad_validation_samples": _bad_validation_samples,
    "evaluated": _evaluated,
    "evaluation_failed": _evaluation_failed,
    "evaluation_repeated": _evaluation_repeated,
    "stopped": _stopped,
    "finished": _finished,
}
