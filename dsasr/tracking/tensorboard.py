"""A run's TensorBoard files: one curve per quantity over the whole run.

The files of each branch are a TensorBoard run of their own, ``tensorboard/pretrain`` and
``tensorboard/sft``, so that a chart such as ``train/loss`` shows a curve for each. A stage is a
mark, not a name in the tags: the scalar ``train/stage`` counts the stages of the table from 1, and
the text ``events`` names each start, end, published encoder and swap. The x axis is the optimizer
steps of both branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsasr.engine.gradient_histograms import EDGES

# Charts that show several curves together.
CHARTS = {
    "encoder": {
        "drift and swaps": ["Multiline", ["drift/cka$", "drift/cka_threshold", "drift/swap_mark"]],
        "loss around a swap": ["Multiline", ["swap/nll_before", "swap/nll_after"]],
    }
}
# The group of a value of a training line, where it is not "train".
_GROUPS = {
    "speed": ("audio_hours_per_hour", "step_seconds", "padding_share"),
    "data": ("wait_share", "queue_depth", "bytes_per_second", "bad_samples"),
    "memory": ("memory_bytes", "offloaded_bytes"),
    "swap": ("encoder_in_use",),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
# Other lines: the start of their "stage" in metrics.jsonl, and the tag's.
_HELD_OUT = {"valid_": "valid", "allocation_": "probe"}
_OTHER = {"drift": "drift", "encoder": "swap", "bad_samples": "data/bad_samples"}
_LOSSES = ("ctc", "nll")  # what the branches minimize, in nats a phoneme and nats a token
# Sections of the recipe whose values are shown beside the results of runs.
_HPARAMS = (
    "seed", "interleave", "model", "stages", "drift", "engine", "data.augment",
    "data.dataloader.batch",
)  # fmt: skip
_RESULTS = ("train/loss", "valid/loss", "valid/phoneme_error_rate", "valid/wer", "valid/cer")


def tag(head: Mapping[str, Any], name: str) -> str:
    """The tag of a value of a line of metrics; empty for the ends of an interval."""
    stage = str(head["stage"])
    if "step" in head:
        return _training_tag(name)
    for start, group in _HELD_OUT.items():
        if stage.startswith(start):
            return "" if name.endswith(("_low", "_high")) else f"{group}/{name}"
    group = _OTHER.get(stage, stage)
    return f"{group}/{'encoder_in_use' if name == 'in_use' else name}"


def _training_tag(name: str) -> str:
    if name in _LOSSES:
        return "train/loss"
    if name.startswith("lr_"):
        return f"train/lr/{name.removeprefix('lr_')}"
    group = "data" if name.endswith("_ms_per_s") else _GROUP_OF.get(name, "train")
    return f"{group}/{name}"


def hparams(recipe: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """The recipe's values that make one run differ from another, by dotted key."""
    rows: dict[str, str | float | bool] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                add(f"{key}.{name}" if key else str(name), inner)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            named = [isinstance(x, Mapping) and "name" in x for x in value]
            if value and all(named):
                add(key, {x["name"]: {k: v for k, v in x.items() if k != "name"} for x in value})
            else:
                rows[key] = ", ".join(map(str, value))
        elif value is not None:
            rows[key] = value if isinstance(value, (bool, int, float)) else str(value)

    add("", recipe)
    return {
        key: value
        for key, value in rows.items()
        if any(key == part or key.startswith(f"{part}.") for part in _HPARAMS)
    }


class TensorBoard:
    """Writes TensorBoard files below ``folder``, one folder a branch."""

    def __init__(
        self,
        folder: Path,
        stages: Mapping[str, str],
        hparams: Mapping[str, Any] | None = None,
        from_steps: int = 0,
    ):
        """``stages``: the branch of each stage, in the table's order. ``from_steps``: those of the
        checkpoint resumed from; what was written after it is hidden."""
        self.folder = folder
        self._stages = dict(stages)
        self._hparams = dict(hparams or {})
        self._purge = from_steps + 1 if from_steps else None
        self._writers: dict[str, Any] = {}

    def _writer(self, branch: str):
        if branch not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder / branch), purge_step=self._purge)
            writer.add_custom_scalars(CHARTS)
            if self._hparams:
                _add_hparams(writer, self._hparams)
            self._writers[branch] = writer
        return self._writers[branch]

    def line(self, head: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Write a line of metrics; ``head`` has its "steps", "branch" and "stage"."""
        writer, steps = self._writer(head["branch"]), head["steps"]
        for name, value in values.items():
            if name_in_board := tag(head, name):
                writer.add_scalar(name_in_board, value, steps)
        if "step" in head and head["stage"] in self._stages:
            number = list(self._stages).index(head["stage"]) + 1
            writer.add_scalar("train/stage", number, steps)

    def event(self, kind: str, fields: Mapping[str, Any], line: str, steps: int) -> None:
        """Write ``line`` about an event as a mark, if it is one of a stage or of an encoder."""
        branches = {
            "stage": fields.get("branch"),
            "stage_end": self._stages.get(str(fields.get("name"))),
            "published": "pretrain",
            "swap": "sft",
        }
        if branch := branches.get(kind):
            self.text(branch, "events", line, steps)

    def text(self, branch: str, name: str, text: str, steps: int) -> None:
        """Write Markdown."""
        self._writer(branch).add_text(name, text, steps)

    def audio(self, branch: str, name: str, wave: np.ndarray, rate: int, steps: int) -> None:
        """Write a sound: ``wave`` is float32 [n] in [−1, 1], at ``rate`` Hz."""
        self._writer(branch).add_audio(name, wave[None], steps, sample_rate=rate)

    def gradients(self, branch: str, counts_of: Mapping[str, Iterable[int]], steps: int) -> None:
        """Write histograms of log₁₀ |gradient|, by part: counts between `EDGES`."""
        for part, counts in counts_of.items():
            counts_N, left_N, right_N = np.asarray(list(counts)), EDGES[:-1], EDGES[1:]
            middle_N = (left_N + right_N) / 2
            self._writer(branch).add_histogram_raw(
                f"gradient/log10_{part}",
                min=float(EDGES[0]),
                max=float(EDGES[-1]),
                num=int(counts_N.sum()),
                sum=float((counts_N * middle_N).sum()),
                sum_squares=float((counts_N * middle_N**2).sum()),
                bucket_limits=right_N.tolist(),
                bucket_counts=counts_N.tolist(),
                global_step=steps,
            )

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _add_hparams(writer, values: Mapping[str, Any]) -> None:
    """Into the writer's own files: `SummaryWriter.add_hparams` would make a run of its own."""
    from torch.utils.tensorboard.summary import hparams as summaries

    for summary in summaries(dict(values), dict.fromkeys(_RESULTS, 0)):
        writer.file_writer.add_summary(summary)


def add_images(folder: Path, pictures: Sequence[Path], steps: int) -> None:
    """Write PNG files into a TensorBoard folder, as its run ``report``."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "report")) as writer:
        for path in pictures:
            image = np.asarray(Image.open(path).convert("RGB"))
            writer.add_image(f"report/{path.stem}", image, steps, dataformats="HWC")
