"""A trained recognizer as a folder that leaves the building, and back.

::

    DIR/config.json          settings: encoder, adaptor, features, text, prompt, decoding
    DIR/cmvn.json            mean and standard deviation per mel bin
    DIR/model.safetensors    encoder.… and adaptor.…
    DIR/llm/                 a plain Hugging Face causal LM with its tokenizer, loadable by itself
    DIR/adapter/             on request, of a run with LoRA: what it learned, as a folder of peft's

LoRA matrices are merged into the language model's weights (`dsasr.model.lora`): in float32, then
rounded to what is written. Logits of both agree to 1e-5 of the largest in float32; in bfloat16,
also of a run trained in it, to about 1e-2: what rounding the sum costs. ``adapter`` is for the
language model that training started from, not for the merged one beside it.

Weights go from the checkpoint to the files one tensor at a time: memory does not grow with the
model, and the checkpoint may be of any world size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint.safetensors_writer import LazyTensor, write_tensors
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader, PrefixReader
from dsasr.data.audio.features import Cmvn, FbankConfig
from dsasr.data.text.prompt import Prompt, Tokenizer, check_tokenizer, load_tokenizer
from dsasr.evaluation.decode import DecodeConfig
from dsasr.model import lora
from dsasr.model.adaptor import Adaptor, AdaptorConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import LlmConfig, load_llm
from dsasr.model.llm_hub import is_hub_name
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_folder, atomic_write
from dsasr.utils.progress import Bar

MODEL_TYPE, FORMAT = "dsasr", 1
FILE_BYTES = 4 << 30  # a file of weights grows no larger
# What belongs to a language model beside its weights; nothing else is taken along.
_BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "dsasr_tokenizer.json",
)  # fmt: skip


@dataclass(frozen=True)
class PromptIds:
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class ExportConfig:
    """``config.json``: all that is needed beside the weights, and nothing of the training."""

    encoder: EncoderConfig
    adaptor: AdaptorConfig
    prompt: PromptIds
    fbank: FbankConfig = field(default_factory=FbankConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    max_seconds: float = 30.0  # of the utterances that it was trained on
    steps: int = 0  # of the run, at the checkpoint
    model_type: str = MODEL_TYPE
    architectures: tuple[str, ...] = ("DsasrModel",)
    format: int = FORMAT


@dataclass(frozen=True)
class Parts:
    """An export, loaded."""

    config: ExportConfig
    model: SpeechLLM
    tokenizer: Tokenizer
    cmvn: Cmvn


# -- out ---------------------------------------------------------------------------------------


def export_run(
    build: Builder,
    reader: FragmentReader,
    target: Path,
    dtype: torch.dtype | None = None,
    adapter: bool = False,
) -> Path:
    """Write the recognizer in checkpoint ``reader`` to the new folder ``target``.

    ``dtype`` rounds the weights; None keeps them as they are. ``adapter`` writes LoRA matrices by
    themselves too. Raises `UserError` if the checkpoint holds no recognizer or ``target`` exists.
    It appears by rename, whole or not at all.
    """
    if target.exists():
        raise UserError(f"{target} exists: give a new folder")
    weights = PrefixReader(reader, "sft/")
    if not any(key.startswith("llm.") for key in weights.shapes):
        raise UserError(f"{reader.folder} holds no recognizer: its sft branch has not begun")
    _check_lora(build, weights, adapter)
    try:
        with atomic_folder(target) as folder:
            _write(build, reader, weights, folder, dtype)
            if adapter:
                _write_adapter(build, weights, folder / "adapter", dtype)
    except FragmentError as error:
        raise UserError(f"{reader.folder}: {error}") from None
    return target


def _write(
    build: Builder,
    reader: FragmentReader,
    weights: PrefixReader,
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    recipe = build.recipe
    prefix, suffix = Prompt.build(build.tokenizer)
    chosen = ExportConfig(
        encoder=recipe.model.encoder,
        adaptor=recipe.model.adaptor,
        prompt=PromptIds(tuple(prefix), tuple(suffix)),
        fbank=recipe.data.fbank,
        decode=recipe.evaluation.decode,
        max_seconds=recipe.data.dataloader.batch.max_seconds,
        steps=int(reader.manifest.get("steps", 0)),
    )
    atomic_write(folder / "config.json", json.dumps(config.to_plain(chosen), indent=1) + "\n")
    build.cmvn.save(folder / "cmvn.json")
    llm = folder / "llm"
    llm.mkdir()
    _copy_llm(build.llm_folder, build.tokenizer_folder, llm, dtype)
    own = {k: k for k in weights.shapes if k.startswith(("encoder.", "adaptor."))}
    of_llm = [k for k in weights.shapes if k.startswith("llm.") and not lora.is_adapter(k)]
    plain = {k.removeprefix("llm."): k for k in of_llm}
    with Bar(desc="exporting", unit="B", unit_scale=True, total=0) as bar:
        for place, names in ((folder, own), (llm, plain)):
            tensors = {
                n: _lazy(weights, key, dtype, bar, recipe.model.lora) for n, key in names.items()
            }
            _write_files(place, tensors)


def _check_lora(build: Builder, weights: PrefixReader, adapter: bool) -> None:
    """Raise `UserError` where recipe and checkpoint disagree, or an adapter is no whole answer."""
    model, stages = build.recipe.model, build.recipe.schedule().sft
    held = any(map(lora.is_adapter, weights.shapes))
    if held != (model.lora is not None):
        raise UserError(
            "the checkpoint and its recipe disagree on model.lora: export with the run's own recipe"
        )
    trained = [stage.name for stage in stages if "llm" in stage.trains]
    if adapter and (not held or trained):
        why = f"stage '{trained[0]}' trains the language model itself" if held else "it has no LoRA"
        raise UserError(f"the run has no adapter to write beside the merged model: {why}")


def _write_adapter(
    build: Builder, weights: PrefixReader, folder: Path, dtype: torch.dtype | None
) -> None:
    keys = [k for k in weights.shapes if lora.is_adapter(k)]
    matrices = {k.removeprefix("llm."): weights.whole(k) for k in keys}
    if dtype is not None:
        matrices = {name: matrix.to(dtype) for name, matrix in matrices.items()}
    # The name alone: where it lies is of no use elsewhere.
    path = build.recipe.model.llm.path
    base = path if is_hub_name(path) else Path(path).name
    lora.save_adapter(folder, build.recipe.model.lora, matrices, base)


def _lazy(
    weights: PrefixReader,
    key: str,
    dtype: torch.dtype | None,
    bar: Bar,
    adapted: lora.LoraConfig | None,
) -> LazyTensor:
    held = weights.read(key, 0, 1).dtype
    chosen = dtype if dtype is not None and held.is_floating_point else held
    a, b = lora.factors(key)

    def get() -> torch.Tensor:
        tensor = weights.whole(key)
        if adapted is not None and a in weights.shapes:
            tensor = lora.merged(tensor, weights.whole(a), weights.whole(b), adapted)
        tensor = tensor.to(chosen)
        bar.update(tensor.nbytes)
        return tensor

    lazy = LazyTensor(chosen, weights.shapes[key], get)
    bar.total += lazy.bytes
    return lazy


def _write_files(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    """One file, or several and the index that transformers reads."""
    files: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(t.bytes for t in files[-1].values()) + tensor.bytes > FILE_BYTES:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        write_tensors(folder / "model.safetensors", files[0], {"format": "pt"})
        return
    place = {}
    for number, held in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(folder / name, held, {"format": "pt"})
        place |= dict.fromkeys(held, name)
    total = sum(t.bytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    atomic_write(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _copy_llm(llm: Path, tokenizer: Path, to: Path, dtype: torch.dtype | None) -> None:
    """The language model's folder without its weights, with the tokenizer that was trained with."""
    try:
        values = json.loads((llm / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.llm.path: {llm}/config.json cannot be read: {error}") from None
    values.pop("auto_map", None)  # remote code has no place here
    if dtype is not None:
        values.pop("torch_dtype", None)
        values["dtype"] = str(dtype).removeprefix("torch.")
    atomic_write(to / "config.json", json.dumps(values, indent=2) + "\n")
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, to / "tokenizer.model")
    for name in _BESIDE:
        source = tokenizer / name if tokenizer.is_dir() else llm / name
        if name == "generation_config.json":
            source = llm / name
        if source.is_file() and not (to / name).exists():
            shutil.copyfile(source, to / name)


# -- and back ----------------------------------------------------------------------------------


def is_export(folder: Path) -> bool:
    """Whether that is a folder that `export_run` wrote."""
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("model_type") == MODEL_TYPE


def read_config(folder: Path) -> ExportConfig:
    """``config.json`` of an export; `UserError` if it is none, or of another version."""
    if not is_export(folder):
        raise UserError(f"{folder} is no exported recognizer: make one with tools/export.py")
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if held.get("format") != FORMAT:
        raise UserError(f"{folder} is of format {held.get('format')!r}, this code reads {FORMAT}")
    known = set(ExportConfig.__dataclass_fields__)
    # transformers adds keys of its own when it saves a config.
    return config.build(ExportConfig, {k: v for k, v in held.items() if k in known})


def load_export(folder: str | Path, attn: str = "sdpa") -> Parts:
    """The recognizer of an exported folder, on the CPU and in eval mode, in float32."""
    folder = Path(folder)
    chosen = read_config(folder)
    llm = load_llm(folder / "llm", attn=attn)
    tokenizer = load_tokenizer(folder / "llm")
    width = llm.get_input_embeddings().weight.shape
    check_tokenizer(tokenizer, width[0])
    model = SpeechLLM(
        Encoder(chosen.encoder),
        Adaptor(chosen.adaptor, chosen.encoder.width, width[1]),
        llm,
        chosen.prompt.prefix,
        chosen.prompt.suffix,
        tokenizer.pad_id,
        LlmConfig(attn=attn),
    )
    parts = {"encoder": model.encoder, "adaptor": model.adaptor}
    _fill(parts, folder)
    return Parts(chosen, model.eval(), tokenizer, Cmvn.load(folder / "cmvn.json"))


def _files(folder: Path) -> Sequence[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        held: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / Path(name).name for name in sorted(set(held.values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error}") from None


@torch.no_grad()
def _fill(parts: dict[str, nn.Module], folder: Path) -> None:
    wanted = {f"{part}.{n}": p for part, m in parts.items() for n, p in m.named_parameters()}
    wanted |= {f"{part}.{n}": b for part, m in parts.items() for n, b in m.named_buffers()
               if n in m.state_dict()}  # fmt: skip
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no dict
                    target = wanted.pop(name, None)
                    if target is None:
                        raise UserError(f"{path} holds '{name}', which this model lacks")
                    tensor = file.get_tensor(name)
                    if tensor.shape != target.shape:
                        raise UserError(f"{path}: '{name}' has shape {tuple(tensor.shape)}")
                    target.copy_(tensor)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    if wanted:
        raise UserError(f"{folder} lacks {len(wanted)} weights, among them {min(wanted)}")
