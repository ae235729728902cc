"""Whether weights of another model fit a recipe's: names, shapes, settings and vocabularies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint import architecture, zero_partition
from dsasr.checkpoint.weight_source import PARTS, WeightSource, part_of, read_json
from dsasr.model.ctc import CtcHead
from dsasr.utils.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
# Of a Hugging Face config.json, parts of the names of settings that no shape shows
# (`architecture.HIDDEN`).
_HIDDEN_HF = ("head", "hidden_act", "activation_function", "norm", "eps", "rope", "window", "tie_")
_HIDDEN_HF += ("scal", "softcap", "position_embeddings_type")


class SourceFit:
    """A source beside a recipe's model; what does not fit raises a `UserError` that names the fix.

    ``shapes``: name → shape of the weights of this job's branches; ``key``: the recipe's key of the
    source, encoder_from or init_from.
    """

    def __init__(self, builder: Builder, shapes: Shapes, source: WeightSource, key: str):
        self.builder, self.shapes, self.source, self.key = builder, shapes, source, key
        self.model = config.to_plain(builder.recipe.model)
        recipe = builder.recipe
        model_parts, source_parts = ({part_of(n) for n in s} for s in (shapes, source.shapes))
        self.named = ("encoder",) if key == "encoder_from" else recipe.model.init_parts
        self.parts = [p for p in self.named or recipe.init_parts if p in model_parts & source_parts]
        self.kept_head = self._head_to_keep(model_parts)
        # Of a concurrent run the recipe names parts of both jobs.
        known = {p for s in recipe.stages for p in recipe.parts(s.branch)}
        known |= {"head"} if "ctc" in known or self.kept_head else set()
        for part in self.named:
            if part not in known:
                raise UserError(f"this recipe's model has no part '{part}'{self._without(part)}")
            if part not in source_parts:
                has = ", ".join(p for p in PARTS if p in source_parts)
                raise UserError(f"it has no part '{part}', only {has}{self._without(part)}")
        if not self.parts and not self.named:
            raise UserError("it has no part of this recipe's model")
        read = recipe.model.adaptor.reads_ctc and key == "init_from"
        if read and not recipe.trains_ctc_head and "head" not in self.parts:
            raise UserError(
                "it has no CTC head, which model.adaptor.kind=ctc reads and no stage trains: give "
                "a stage of branch pretrain"
            )

    def _head_to_keep(self, model_parts: Collection[str]) -> set[str]:
        """The names of the source's CTC head where the run takes its encoder and has no head of its
        own: the run keeps it beside its checkpoints. Empty where it does not fit the recipe."""
        recipe = self.builder.recipe
        wanted = self.key == "encoder_from" or "head" in recipe.init_parts
        if not wanted or "encoder" not in self.parts or "head" in model_parts:
            return set()
        names = set(self._names("head", self.source.shapes))
        if recipe.schedule().pretrain or not names:
            return set()
        try:
            vocab = self.builder.phonemes
        except UserError:  # no phonemes are named
            return set()
        if self.source.fingerprint("phonemes") not in (None, vocab.fingerprint):
            return set()
        with torch.device("meta"):
            head = CtcHead(self.builder.encoder_shape.width, len(vocab), recipe.model.pretrain.head)
        own = {
            f"ctc.{name}": tuple(t.shape) for name, t in zero_partition.named_tensors(head).items()
        }
        return names if own == {name: tuple(self.source.shapes[name]) for name in names} else set()

    def weight_names(self) -> set[str]:
        """The names of the weights to load."""
        for part in self.parts:
            self._check_names(part)
            self._check_shapes(part)
            self._check_settings(part)
        self._check_lora()
        if "encoder" in self.parts:
            self._check_architecture()
            self._check_hf_config("encoder", ("model", "encoder", "path"))
        if "llm" in self.parts:
            self._check_hf_config("llm", ("model", "llm", "path"))
        self._check_vocabularies()
        return {name for part in self.parts for name in self._common(part)}

    def _without(self, part: str) -> str:
        """The end of a message: how to leave a part out."""
        others = ", ".join(p for p in self.parts if p != part)
        if self.key == "encoder_from" or not others:
            return ""
        return f"; or leave {part} out with model.init_parts=[{others}]"

    def _names(self, part: str, shapes: Shapes) -> list[str]:
        return [name for name in shapes if part_of(name) == part]

    def _common(self, part: str) -> list[str]:
        return [name for name in self._names(part, self.shapes) if name in self.source.shapes]

    def _check_names(self, part: str) -> None:
        ours, theirs = (self._names(part, s) for s in (self.shapes, self.source.shapes))
        common = self._common(part)
        missing = [name for name in ours if name not in self.source.shapes]
        unused = [name for name in theirs if name not in self.shapes]
        # The lower blocks of an encoder are an encoder, but half of a head is none.
        if unused and part in ("head", "adaptor"):
            raise UserError(
                f"its {part} has '{unused[0]}', which this model's has not: {self._fix(part)}"
                f"{self._without(part)}"
            )
        if missing and part == "head" and common:
            raise UserError(
                f"its head has no '{missing[0]}': {self._fix(part)}{self._without(part)}"
            )
        if not common:
            raise UserError(
                f"its {part} has '{theirs[0]}', this model's '{ours[0]}', and no name in common: "
                f"{self._fix(part)}{self._without(part)}"
            )
        if missing and self.key == "encoder_from":
            raise UserError(f"its encoder has no '{missing[0]}': {self._fix(part)}")

    def _check_shapes(self, part: str) -> None:
        for name in self._common(part):
            theirs, ours = self.source.shapes[name], self.shapes[name]
            if theirs != ours:
                raise UserError(
                    f"'{name}' is {list(theirs)} there and {list(ours)} here: "
                    f"{self._fix(part, name)}{self._without(part)}"
                )

    def _fix(self, part: str, name: str = "") -> str:
        """What a part that does not fit is, and the setting that would make it fit."""
        if part == "head":
            theirs = self.source.setting("model", "pretrain", "head")
            differ = architecture.differing("pretrain.head", theirs, self.model["pretrain"]["head"])
            if differ:
                return f"another architecture; give {' '.join(differ)}"
            return "another vocabulary; give the data.phonemes that it was trained with"
        if part == "llm" and name and self.source.shapes[name][1:] == self.shapes[name][1:]:
            return "another vocabulary; give the tokenizer and language model of its training"
        if part == "llm":
            return "another architecture; give the model.llm.path of its training"
        differ = self._differing(part)
        return f"another architecture{'; give ' if differ else ''}{' '.join(differ)}"

    def _differing(self, part: str, keys: Iterable[str] = ()) -> list[str]:
        """``key=value`` of the source's settings of a part that are not this recipe's; of all, or
        of ``keys``."""
        theirs, ours = self.source.setting("model", part), self.model.get(part)
        return architecture.differing(part, theirs, ours, keys)

    def _check_settings(self, part: str) -> None:
        """Settings that no shape shows: with others the same weights compute something else."""
        # LoRA's matrices in the encoder belong to it.
        parts = ("encoder", "encoder_lora") if part == "encoder" else (part,)
        hidden = architecture.HIDDEN
        differ = [x for p in parts if p in hidden for x in self._differing(p, hidden[p])]
        if part == "encoder" and self.builder.recipe.pretrained_encoder is None:
            theirs = self.source.setting("data", "fbank") or {}
            ours = config.to_plain(self.builder.recipe.data.fbank)
            differ += [
                f"data.fbank.{k}={v}"
                for k, v in theirs.items()
                if k in ours and v != ours[k] and k != "dither"
            ]
        if differ:
            raise UserError(
                f"its {part} was trained with other settings, which its shapes do not show: give "
                f"{' '.join(differ)}{self._without(part)}"
            )

    def _check_architecture(self) -> None:
        """Of a snapshot whose settings are not known: their fingerprint."""
        known = self.source.setting("model", "encoder")
        published = self.source.architecture
        if not known and published not in (None, config.fingerprint(self.model["encoder"])):
            raise UserError(
                "its encoder may be of another architecture: its settings are not this recipe's "
                "model.encoder, and the run that published it is not there to say how; copy that "
                f"run's recipe.yaml into the folder above it{self._without('encoder')}"
            )

    def _check_hf_config(self, part: str, keys: tuple[str, ...]) -> None:
        theirs = self.source.hf_config(*keys)
        if part == "llm":
            ours = read_json(self.builder.llm_folder / "config.json")
        elif self.builder.recipe.pretrained_encoder is not None:
            ours = read_json(self.builder.encoder_folder / "config.json")
        else:
            return
        for key in theirs:
            hidden = any(word in key for word in _HIDDEN_HF) and "dropout" not in key
            if hidden and key in ours and ours[key] != theirs[key]:
                where = "model.llm.path" if part == "llm" else "model.encoder.path"
                raise UserError(
                    f"its {part} was trained with {key}={theirs[key]}, config.json in this "
                    f"recipe's {where} has {ours[key]}: give the folder that it was trained with"
                    f"{self._without(part)}"
                )

    def _check_lora(self) -> None:
        theirs = self._names("lora", self.source.shapes)
        if theirs and "llm" in self.parts and "lora" not in self.parts and not self.named:
            raise UserError(
                "its language model has LoRA matrices, which this recipe has not: give "
                f"model.lora={{{self._lora_settings()}}}, or start from an export of it, in which "
                "they are merged"
            )
        unused = [name for name in theirs if name not in self.shapes]
        if unused and "lora" in self.parts:
            raise UserError(
                f"it has '{unused[0]}', which this recipe's model.lora has not: give "
                f"model.lora={{{self._lora_settings()}}}"
            )

    def _lora_settings(self) -> str:
        lora = self.source.setting("model", "lora") or {}
        return ", ".join(
            f"{key}: {str(value).replace(chr(39), '')}"
            for key, value in lora.items()
            if key not in architecture.FREE and value not in ((), [])
        )

    def _check_vocabularies(self) -> None:
        pairs = {"head": ("phonemes", "data.phonemes"), "llm": ("tokenizer", "model.tokenizer")}
        for part, (vocabulary, key) in pairs.items():
            if part not in self.parts:
                continue
            theirs = self.source.fingerprint(vocabulary)
            ours = self.builder.vocabularies[vocabulary]
            if theirs not in (None, ours):
                raise UserError(
                    f"its {part} was trained with another vocabulary (fingerprint {theirs}, this "
                    f"recipe's {vocabulary}: {ours}): give its own as {key}{self._without(part)}"
                )
