"""Weights of another model that a run starts from: an export, a checkpoint or a snapshot.

`locate_source` finds what a user's path means and verifies it, `open_source` opens it. Tensors have
the names of this package's modules (``encoder.…``, ``ctc.…``, ``adaptor.…``, ``llm.…``). As far as
they are stored, a source also knows the settings and the vocabularies that it was trained with.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsasr import config
from dsasr.checkpoint import export_folder, kept_head, stored_recipe
from dsasr.checkpoint.locate import open_checkpoint, open_run_checkpoint, run_folder
from dsasr.checkpoint.manifest import MANIFEST, FragmentError, read_manifest
from dsasr.checkpoint.merge import weight_keys
from dsasr.checkpoint.named_tensors import NamedTensors, in_files
from dsasr.checkpoint.stored_recipe import RECIPE
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.checkpoint.zero_partition import MASTER
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.tokenizers import load_tokenizer, vocabulary_fingerprint
from dsasr.model import lora
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.hf_weights import TensorFiles
from dsasr.utils.errors import UserError

PARTS = ("encoder", "head", "adaptor", "llm", "lora")  # head: the CTC head
# Of a checkpoint that has an encoder in both branches, each branch takes its own.
_PREFIXES = {"pretrain": ("pretrain/", "sft/"), "sft": ("sft/", "pretrain/")}


def part_of(name: str) -> str:
    """The part that a tensor belongs to, one of `PARTS`."""
    child = name.partition(".")[0]
    if child == "llm" and lora.is_adapter(name):
        return "lora"
    return "head" if child == "ctc" else child


@dataclass(frozen=True)
class WeightSource:
    """An opened source. ``shapes``: name → shape of every weight, without optimizer states.

    ``settings``: recipe keys of its training, nested, as far as known; ``recorded``: fingerprints
    of its vocabularies, by "phonemes" and "tokenizer"; ``architecture``: a fingerprint of the
    encoder's settings, of a snapshot; ``readers``: branch → what that branch reads, where
    ``master/NAME`` is the fp32 master of a weight: a float32 weight is its own.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any]
    readers: Mapping[str, NamedTensors]
    recorded: Mapping[str, str]
    architecture: str | None = None

    def setting(self, *keys: str) -> Any:
        """A value of ``settings``, or None."""
        value: Any = self.settings
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def fingerprint(self, vocabulary: str) -> str | None:
        """Of its "phonemes" or its "tokenizer": as recorded, else of the file that its recipe
        names; None where neither is there."""
        if vocabulary in self.recorded:
            return self.recorded[vocabulary]
        try:
            if vocabulary == "phonemes":
                path = Path(self.setting("data", "phonemes") or "")
                return PhonemeVocab.load(path).fingerprint if path.is_file() else None
            path = self.setting("model", "tokenizer") or self.setting("model", "llm", "path")
            if path and Path(path).exists():
                return vocabulary_fingerprint(load_tokenizer(path))
        except UserError:
            pass  # nothing to compare with
        return None

    def hf_config(self, *keys: str) -> dict[str, Any]:
        """The config.json in the Hugging Face folder of a setting; empty where there is none."""
        path = self.setting(*keys)
        return read_json(Path(path) / "config.json") if isinstance(path, str) and path else {}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


# -- find and open -------------------------------------------------------------------------------


def locate_source(path: Path) -> Path:
    """The folder of the weights that ``path`` means, with its checksums verified.

    An export or a folder with a manifest (checkpoint, snapshot, average) is itself; a run folder
    stands for its newest whole checkpoint. Raises `UserError` for all else.
    """
    if export_folder.is_export(path):
        export_folder.verify(path)
        open_source(path)  # of an older one without checksums the files must at least be whole
        return path
    if (path / MANIFEST).is_file():
        return open_checkpoint(path).folder
    jobs = [path, path / "sft", path / "pretrain"]
    for run in jobs:
        if (run / "checkpoints").is_dir():
            return open_run_checkpoint(run).folder
    if any((run / RECIPE).is_file() for run in jobs):
        raise UserError(f"{path} has no checkpoint yet: train it until its first one is written")
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    hint = ""
    if (path / "config.json").is_file():
        hint = "; a Hugging Face model belongs into model.llm.path or model.encoder.path"
    raise UserError(f"{path} is no exported model, run, checkpoint or snapshot{hint}")


def open_source(folder: Path) -> WeightSource:
    """Open what `locate_source` returned, without comparing checksums again.

    Raises `UserError` for an export, `FragmentError` for another folder that cannot be read.
    """
    if export_folder.is_export(folder):
        return _open_export(folder)
    return _open_fragments(folder)


def _open_export(folder: Path) -> WeightSource:
    settings = _export_settings(folder)
    tensors: dict[str, Any] = {}
    for directory, prefix in ((folder, ""), (folder / export_folder.LLM, "llm.")):
        files = TensorFiles(directory)
        if not files.shapes:
            raise UserError(f"{directory} has no weights: copy or export it again")
        for name in files.shapes:
            tensors[prefix + name] = in_files(files, name)
            if files.dtypes[name] == "F32":
                tensors[f"{MASTER}/{prefix}{name}"] = tensors[prefix + name]
    reader = NamedTensors(folder, tensors)
    shapes = {n: s for n, s in reader.shapes.items() if not n.startswith(f"{MASTER}/")}
    return WeightSource(folder, shapes, settings, {"pretrain": reader, "sft": reader}, {})


def _open_fragments(folder: Path) -> WeightSource:
    reader = FragmentReader(folder)
    snapshot = reader.manifest.get("kind") == "snapshot"
    weights = weight_keys(reader)
    readers = {}
    for branch, prefixes in _PREFIXES.items():
        keys: dict[str, str] = {}
        for prefix in ("",) if snapshot else prefixes:
            own = {k.removeprefix(prefix): k for k in weights if k.startswith(prefix)}
            # A part comes from one of the branches, never from both.
            known = {part_of(name) for name in keys}
            keys |= {name: key for name, key in own.items() if part_of(name) not in known}
        readers[branch] = _fragments_by_name(reader, keys)
    if not snapshot and "head" not in map(part_of, readers["pretrain"].shapes):
        readers["pretrain"] = _with_kept_head(readers["pretrain"])
    shapes = {
        name: shape
        for reader_of_branch in readers.values()
        for name, shape in reader_of_branch.shapes.items()
        if not name.startswith(f"{MASTER}/")
    }
    return WeightSource(
        folder,
        shapes,
        _manifest_settings(folder, reader.manifest),
        readers,
        reader.manifest.get("vocabularies") or {},
        reader.manifest.get("architecture") if snapshot else None,
    )


def _with_kept_head(reader: NamedTensors) -> NamedTensors:
    """``reader`` of a checkpoint, with the head that its run keeps, if it does (`kept_head`)."""
    try:
        run = run_folder(reader.folder)
    except UserError:  # it was moved
        return reader
    kept = kept_head.open_kept(run)
    return reader if kept is None else reader.with_all_of(kept)


def _fragments_by_name(reader: FragmentReader, keys: Mapping[str, str]) -> NamedTensors:
    tensors: dict[str, Any] = {}
    for name, key in keys.items():
        prefix = key.removesuffix(name)
        master = f"{prefix}{MASTER}/{name}"
        if master not in reader and reader.is_float32(key):
            master = key
        for target, stored in ((name, key), (f"{MASTER}/{name}", master)):
            if stored in reader:
                tensors[target] = (
                    reader.shapes[stored],
                    lambda start, stop, k=stored: reader.read(k, start, stop),
                )
    return NamedTensors(reader.folder, tensors)


# -- settings ------------------------------------------------------------------------------------


def _export_settings(folder: Path) -> dict[str, Any]:
    values = export_folder.read_values(folder)
    encoder = dict(values.get("encoder") or {})
    if "path" in encoder:
        encoder["path"] = str(folder / export_folder.ENCODER)
    data: dict[str, Any] = {"fbank": values.get("fbank") or {}}
    if (folder / export_folder.CMVN).is_file():
        data["cmvn"] = str(folder / export_folder.CMVN)
    if (folder / export_folder.PHONEMES).is_file():
        data["phonemes"] = str(folder / export_folder.PHONEMES)
    data |= {name: values[name] for name in ("text", "phonemizer") if values.get(name)}
    model = {"encoder": encoder, "adaptor": values.get("adaptor") or {}}
    model["llm"] = {"path": str(folder / export_folder.LLM)}
    model |= {"prompt": values.get("template", ""), "languages": values.get("languages") or {}}
    model["pretrain"] = {"head": values.get("head") or {}}
    return {"data": data, "model": model, "evaluation": {"decode": values.get("decode") or {}}}


def _manifest_settings(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a checkpoint; of a snapshot or an average, that of the run they lie in."""
    if manifest.get("recipe"):
        return manifest["recipe"]
    settings: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # it was moved
        settings = stored_recipe.read(run_folder(folder))
    if manifest.get("encoder"):
        return config.merge(settings, {"model": {"encoder": manifest["encoder"]}})
    encoder = (settings.get("model") or {}).get("encoder")
    architecture = manifest.get("architecture")
    return {} if architecture and config.fingerprint(encoder) != architecture else settings


def read_settings(path: Path) -> dict[str, Any]:
    """Recipe keys of what ``path`` means (`locate_source`), by a glance: nothing is verified.

    Empty where ``path`` is no source.
    """
    try:
        if export_folder.is_export(path):
            return _export_settings(path)
        if (path / MANIFEST).is_file():
            return _manifest_settings(path, read_manifest(path))
        for run in (path, path / "sft", path / "pretrain"):
            if (run / RECIPE).is_file():
                return stored_recipe.read(run)
    except (UserError, FragmentError):
        pass  # the checks before training say why
    return {}


def complete_recipe(
    values: Mapping[str, Any], settings: Mapping[str, Any], parts: Collection[str]
) -> dict[str, Any]:
    """A recipe's plain ``values``; what they leave out of ``parts`` is taken from ``settings``.

    encoder: its sizes, the features and their CMVN; adaptor: its sizes; llm: its folder and
    tokenizer, the prompt, the form of transcripts and decoding; head: its sizes, the phonemes and
    where they come from. An empty string counts as left out.
    """
    model, data = (
        value if isinstance(value := settings.get(name), Mapping) else {}
        for name in ("model", "data")
    )
    own_model = values.get("model") or {}
    from_source: dict[str, Any] = {"model": {}, "data": {}}
    if "encoder" in parts and _same_kind(own_model.get("encoder"), model.get("encoder")):
        from_source["model"]["encoder"] = model["encoder"]
        from_source["data"] |= {k: data[k] for k in ("fbank", "cmvn") if data.get(k)}
    if "adaptor" in parts and model.get("adaptor"):
        from_source["model"]["adaptor"] = model["adaptor"]
    own_llm = own_model.get("llm") or {}
    if "llm" in parts and not own_llm.get("path") and (model.get("llm") or {}).get("path"):
        from_source["model"]["llm"] = {"path": model["llm"]["path"]}
        kept = ("tokenizer", "prompt", "languages")
        from_source["model"] |= {k: model[k] for k in kept if model.get(k)}
        from_source["data"] |= {k: data[k] for k in ("text",) if data.get(k)}
        if decode := _decoding(values, settings, parts):
            from_source["evaluation"] = {"decode": decode}
    if "head" in parts and data.get("phonemes"):
        from_source["data"] |= {k: data[k] for k in ("phonemes", "phonemizer") if data.get(k)}
        head = (model.get("pretrain") or {}).get("head")
        from_source["model"] |= {"pretrain": {"head": head}} if head else {}
    return config.merge(from_source, _without_empty(values, from_source))


def _decoding(
    values: Mapping[str, Any], settings: Mapping[str, Any], parts: Collection[str]
) -> dict[str, Any]:
    """A source's ``evaluation.decode``; the CTC head's weight in it only with that head, and not
    for greedy decoding, which rescores nothing."""
    decode = dict((settings.get("evaluation") or {}).get("decode") or {})
    own = (values.get("evaluation") or {}).get("decode") or {}
    if "head" not in parts or own.get("beam") == 1:
        decode.pop("ctc_weight", None)
    return decode


def _same_kind(own: Any, theirs: Any) -> bool:
    """Whether two encoder settings are both of a Conformer or both of a pretrained one.

    Settings without ``path`` that a pretrained encoder has too may be of either kind.
    """
    if not isinstance(theirs, Mapping) or not theirs:
        return False
    if not own or not isinstance(own, Mapping):
        return not own
    if "path" in theirs and "path" not in own:
        return set(own) <= {item.name for item in fields(PretrainedEncoderConfig)}
    return ("path" in own) == ("path" in theirs)


def _without_empty(values: Mapping[str, Any], from_source: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without the empty strings for which ``from_source`` has a value."""
    kept = {}
    for key, value in values.items():
        other = from_source.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            kept[key] = _without_empty(value, other)
        elif not (value == "" and other):
            kept[key] = value
    return kept
