"""The row of an allocation measurement: the figures of one encoder on one probe set.

One type from the probe to its last reader: allocation.jsonl (`AllocationRow.to_json`),
metrics.jsonl and TensorBoard (`AllocationRow.scalars`), the report and the experiments
(`AllocationRow.from_json`, `AllocationRow.from_scalars`). Entropies are in nats. What was not
measured is None or NaN in a row, and absent from a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from dsasr.utils.io import nonfinite_to_none


@dataclass(frozen=True)
class Estimate:
    """PAI or CSAI in nats per frame, with its bootstrap interval ``low`` … ``high``.

    ``entropy_before`` is the entropy without the encoder (H(P), or H_V(S | P)), ``entropy_after``
    the entropy with it; ``value`` is their difference. ``shuffled`` and, of CSAI, ``phoneme_only``
    are the controls (`probe_controls`), NaN if they were left out. ``split_by`` is ``"speaker"``
    where the speakers held out are new to the probes, else ``"utterance"``. ``detection_limit`` is
    the smallest gain that would have been detected (`pai_csai`), infinite if no tried one is, NaN
    if it was not searched. ``folds_won`` of ``folds`` chose a probe that uses the encoder on their
    validation frames.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    entropy_before: float = math.nan
    entropy_after: float = math.nan
    shuffled: float = math.nan
    phoneme_only: float = math.nan
    frames: int = 0
    utterances: int = 0
    split_by: str = ""
    detection_limit: float = math.nan
    folds: int = 1
    folds_won: int = 1

    DERIVED: ClassVar = ("share", "detected", "underfit")

    @property
    def share(self) -> float:
        """The part of ``entropy_before`` that the encoder resolves."""
        return self.value / self.entropy_before if self.entropy_before else math.nan

    @property
    def detected(self) -> bool:
        """Whether the whole interval lies above 0 and above the controls that there are."""
        controls = (c for c in (self.shuffled, self.phoneme_only) if not math.isnan(c))
        return self.low > max([0.0, *controls])

    @property
    def underfit(self) -> bool:
        """Whether the whole interval lies below 0, which only says that the probe failed."""
        return self.high < 0


@dataclass(frozen=True)
class CtcEntropy:
    """Mean entropy of the CTC posteriors in nats per frame.

    ``entropy`` is that of all frames, ``speech_entropy`` that of the frames whose best symbol is
    not blank (NaN without such frames), ``speech_share`` their share.
    """

    entropy: float = math.nan
    speech_entropy: float = math.nan
    speech_share: float = math.nan

    DERIVED: ClassVar = ()


@dataclass(frozen=True)
class LlmAllocation:
    """What the audio resolves of the transcript, in nats per transcript token over ``tokens``.

    **Ours**: H₀ = ``nll_without_audio`` is the mean nll of the LLM without audio, H₁ =
    ``nll_with_audio`` that of the full model on the same tokens. The other two are the means of the
    predictive entropy.
    """

    nll_without_audio: float = math.nan
    nll_with_audio: float = math.nan
    entropy_without_audio: float = math.nan
    entropy_with_audio: float = math.nan
    tokens: int = 0

    DERIVED: ClassVar = ("resolved", "share", "gap")

    @property
    def resolved(self) -> float:
        """H₀ − H₁, what the audio resolves; negative if it misleads the model."""
        return self.nll_without_audio - self.nll_with_audio

    @property
    def share(self) -> float:
        """The part of H₀ that the audio resolves."""
        return self.resolved / self.nll_without_audio if self.nll_without_audio else math.nan

    @property
    def gap(self) -> float:
        """nll − entropy with audio: 0 for a calibrated model, positive for an overconfident one."""
        return self.nll_with_audio - self.entropy_with_audio


@dataclass(frozen=True)
class EncoderSource:
    """Which encoder a row is of. Fields that do not apply are None.

    ``run`` is its run folder, ``path`` the folder of a ``pretrained`` or ``export``ed one. A
    checkpoint has ``steps`` of both branches, ``pretrain`` steps and ``stage``, and on the sft
    branch the ``snapshot`` in use; an average and an export have ``steps``; a snapshot has
    ``pretrain`` and the ``cause`` of its publication. A
    ``live`` encoder was probed during training, in ``stage`` of ``branch``, after ``seconds`` of
    training.
    """

    name: str
    kind: Literal["checkpoint", "average", "snapshot", "export", "pretrained", "random", "live"]
    run: str | None = None
    path: str | None = None
    branch: str | None = None
    stage: str | None = None
    steps: int | None = None
    seconds: float | None = None
    pretrain: int | None = None
    snapshot: str | None = None
    cause: str | None = None

    DERIVED: ClassVar = ()


@dataclass(frozen=True)
class AllocationRow:
    """The measurement of one encoder.

    ``nse`` in [0, 1] and ``effective_rank`` are of ``frames`` of ``width`` features out of
    ``utterances``. ``cka_to_reference`` is the CKA to the encoder named ``reference`` on the same
    frames. ``probe_seconds`` is the time of the measurement. Only rows with the same ``settings``
    are comparable.
    """

    encoder: EncoderSource
    nse: float = math.nan
    effective_rank: float = math.nan
    pai: Estimate | None = None
    csai: Estimate | None = None
    cka_to_reference: float = math.nan
    reference: str | None = None
    ctc: CtcEntropy | None = None
    llm: LlmAllocation | None = None
    width: int | None = None
    frames: int | None = None
    utterances: int | None = None
    probe_seconds: float = math.nan
    settings: dict[str, Any] = field(default_factory=dict)

    DERIVED: ClassVar = ()
    PARTS: ClassVar = {
        "encoder": EncoderSource,
        "pai": Estimate,
        "csai": Estimate,
        "ctc": CtcEntropy,
        "llm": LlmAllocation,
    }

    def to_json(self) -> dict[str, Any]:
        """Nested plain data with derived values; without what is None or not finite."""
        return _plain(self)

    def value(self, name: str) -> float:
        """``nse``, or the value of ``pai`` or ``csai``; NaN where it was not measured."""
        if name == "nse":
            return self.nse
        estimate = getattr(self, name)
        return math.nan if estimate is None else estimate.value

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> AllocationRow:
        """What `to_json` gave. Raises ValueError for a field that a row does not have."""
        _check(cls, row)
        parts = {
            name: _build(kind, row[name])
            for name, kind in cls.PARTS.items()
            if row.get(name) is not None
        }
        return _build(cls, {**row, **parts})

    def scalars(self) -> dict[str, float]:
        """The finite figures by flat names, such as ``nse``, ``pai``, ``pai_low``,
        ``llm_resolved``; without counts and without the encoder."""
        values = {name: getattr(self, name) for name in _floats(type(self))}
        for prefix in _figures():
            part = getattr(self, prefix)
            for name in () if part is None else (*_floats(type(part)), *part.DERIVED):
                values[_flat(prefix, name)] = float(getattr(part, name))
        return {name: value for name, value in values.items() if math.isfinite(value)}

    @classmethod
    def from_scalars(cls, encoder: EncoderSource, scalars: Mapping[str, Any]) -> AllocationRow:
        """The row whose `scalars` are among ``scalars``, with counts and settings at defaults."""
        values = {name: scalars[name] for name in _floats(cls) if name in scalars}
        for prefix, kind in _figures().items():
            part = {
                name: scalars[_flat(prefix, name)]
                for name in _floats(kind)
                if _flat(prefix, name) in scalars
            }
            if part:
                values[prefix] = _build(kind, part)
        return _build(cls, {**values, "encoder": encoder})


def _figures() -> dict[str, type]:
    return {name: kind for name, kind in AllocationRow.PARTS.items() if name != "encoder"}


def _floats(kind: type) -> list[str]:
    return [f.name for f in fields(kind) if f.type == "float"]


def _flat(prefix: str, name: str) -> str:
    return prefix if name == "value" else f"{prefix}_{name}"


def _plain(part: Any) -> dict[str, Any]:
    """A dataclass's fields and derived values, without what is None or not finite."""
    out = {}
    for name in (*(f.name for f in fields(part)), *part.DERIVED):
        value = getattr(part, name)
        value = _plain(value) if is_dataclass(value) else nonfinite_to_none(value)
        if value is not None and value != {}:
            out[name] = value
    return out


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of ``values``; what is None or not finite leaves a field at its default, derived
    values are dropped."""
    _check(kind, values)
    names = {f.name for f in fields(kind)}
    return kind(
        **{k: v for k, v in values.items() if k in names and nonfinite_to_none(v) is not None}
    )


def _check(kind: type, values: Mapping[str, Any]) -> None:
    unknown = set(values) - {f.name for f in fields(kind)} - set(kind.DERIVED)
    if unknown:
        raise ValueError(f"an allocation row has no field {', '.join(sorted(unknown))}")
