"""Export a trained recognizer to a Hugging Face-style folder, and load it back.

::

    DIR/config.json          settings: encoder, adaptor, features, prompt, decoding
    DIR/cmvn.json            mean and standard deviation per mel bin; of a Conformer
    DIR/encoder/             settings of a pretrained encoder, and of its features
    DIR/phonemes.json        units of the CTC head, where the run has one
    DIR/model.safetensors    encoder.…, ctc.…, adaptor.…
    DIR/llm/                 a plain Hugging Face causal LM with its tokenizer, loadable by itself
    DIR/adapter/             on request, for a run with LoRA: the LoRA matrices as a peft folder
    DIR/SHA256SUMS           a checksum of each file, for `load_export` and for `sha256sum -c`

LoRA matrices are merged into the weights that they adapt (`dsasr.model.lora`) in float32, the
encoder's and the language model's, and the sum is rounded to the dtype that is written. Logits
before and after agree to 1e-5 of the largest logit in float32, and to about 1e-2 in bfloat16, which
is the rounding of the sum. ``adapter`` is of the language model, for the one that training started
from, not for the merged one in ``llm``.

Weights go from the checkpoint to the files one tensor at a time: memory does not grow with the
model, and the checkpoint may be of any world size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint import architecture
from dsasr.checkpoint.export_folder import (
    CMVN,
    ENCODER,
    LLM,
    LLM_FILES,
    PHONEMES,
    read_values,
    verify,
    write_checksums,
)
from dsasr.checkpoint.safetensors_writer import LazyTensor, write_tensors
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader, PrefixReader
from dsasr.data.audio.features import Cmvn
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.data.text.build_phonemizer import build_phonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.prompt import PromptIds
from dsasr.data.text.tokenizer_json import has_trained_tokenizer, write_tokenizer_json
from dsasr.data.text.tokenizers import check_tokenizer, load_tokenizer
from dsasr.evaluation.tuned import Tuned
from dsasr.inference.ctc_head import find_head, reading_speller
from dsasr.inference.export_config import Export, ExportConfig
from dsasr.inference.model_from_run import speech_statistics
from dsasr.model import lora
from dsasr.model.adaptors.protocol import build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.encoders.conformer import Encoder as Conformer
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.encoders.pretrained import (
    PREPROCESSOR,
    PROCESSOR,
    PretrainedEncoderConfig,
    build_encoder,
)
from dsasr.model.encoders.protocol import Encoder
from dsasr.model.llm import LlmConfig, default_attention, load_llm
from dsasr.model.llm_hub import is_hub_name
from dsasr.model.llm_properties import try_llm
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_folder, atomic_write
from dsasr.utils.progress import Bar

FILE_BYTES = 4 << 30  # the largest file of weights


# -- write -------------------------------------------------------------------------------------


def export_run(
    builder: Builder,
    reader: FragmentReader,
    target: Path,
    dtype: torch.dtype | None = None,
    adapter: bool = False,
) -> Path:
    """Write the recognizer in checkpoint ``reader`` to the new folder ``target``; returns it.

    ``dtype`` rounds the weights; None keeps their dtypes. ``adapter`` writes the LoRA matrices as
    a folder of their own too. The folder appears by rename ("Whole or not at all"). Raises
    `UserError` if the checkpoint holds no recognizer or ``target`` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already: give a new folder")
    weights = PrefixReader(reader, "sft/")
    if not any(key.startswith("llm.") for key in weights.shapes):
        raise UserError(
            f"{reader.folder} holds no recognizer: its sft branch has not started training"
        )
    _check_lora(builder, weights, adapter)
    try:
        architecture.check(reader, config.to_plain(builder.recipe.model))
        with atomic_folder(target) as folder:
            _write_model(builder, reader, weights, folder, dtype)
            if adapter:
                _write_adapter(builder, weights, folder / "adapter", dtype)
            write_checksums(folder)
    except FragmentError as error:
        raise UserError(f"{reader.folder}: {error}") from None
    return target


def _write_model(
    builder: Builder,
    reader: FragmentReader,
    weights: PrefixReader,
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    recipe, head = builder.recipe, find_head(builder, reader)
    prefix, suffix = builder.prompt()
    export_config = ExportConfig(
        encoder=_exported_encoder(builder, folder),
        adaptor=recipe.model.adaptor,
        prompt=PromptIds(tuple(prefix), tuple(suffix)),
        hinted=builder.hinted_prompts,
        template=recipe.model.prompt,
        languages=recipe.model.languages,
        fbank=recipe.data.fbank,
        decode=recipe.evaluation.decode,
        text=recipe.data.text,
        rules=recipe.evaluation.rules,
        max_seconds=recipe.data.dataloader.batch.max_seconds,
        steps=int(reader.manifest.get("steps", 0)),
        units=len(builder.phonemes) if head is not None else 0,
        head=recipe.model.pretrain.head,
        phonemizer=recipe.data.phonemizer,
        speech=speech_statistics(builder),
        tuned=Tuned.load(recipe.folder),
    )
    atomic_write(
        folder / "config.json", json.dumps(config.to_plain(export_config), indent=1) + "\n"
    )
    if head is not None:
        builder.phonemes.save(folder / PHONEMES)
    if recipe.pretrained_encoder is None:
        builder.cmvn.save(folder / CMVN)
    llm = folder / LLM
    llm.mkdir()
    _copy_llm(builder.llm_folder, builder.tokenizer_folder, llm, dtype)
    # Name in the file → key in the checkpoint.
    plain = [k for k in weights.shapes if not lora.is_adapter(k)]
    speech_keys = {k: k for k in plain if k.startswith(("encoder.", "adaptor."))}
    llm_keys = {k.removeprefix("llm."): k for k in plain if k.startswith("llm.")}
    matrices = ((speech_keys, recipe.model.encoder_lora), (llm_keys, recipe.model.lora))
    of_head = [] if head is None else [k for k in head.shapes if k.startswith("ctc.")]
    with Bar(desc="exporting", unit="B", unit_scale=True, total=0) as bar:
        for directory, (keys, cfg) in zip((folder, llm), matrices, strict=True):
            tensors = {name: _lazy(weights, key, dtype, bar, cfg) for name, key in keys.items()}
            if directory == folder:
                tensors |= {name: _lazy(head, name, dtype, bar, None) for name in of_head}
            _write_files(directory, tensors)


def _exported_encoder(builder: Builder, folder: Path) -> EncoderConfig | PretrainedEncoderConfig:
    """The encoder's settings for ``folder``, which gets the settings of its family."""
    cfg = builder.recipe.pretrained_encoder
    if cfg is None:
        return builder.recipe.model.encoder
    (folder / ENCODER).mkdir()
    for name in ("config.json", PREPROCESSOR, PROCESSOR):
        if (builder.encoder_folder / name).is_file():
            shutil.copyfile(builder.encoder_folder / name, folder / ENCODER / name)
    return replace(cfg, path=ENCODER)


def _check_lora(builder: Builder, weights: PrefixReader, adapter: bool) -> None:
    """Raise `UserError` if recipe and checkpoint disagree on LoRA, or if ``adapter`` is requested
    and the LoRA matrices are not all that the run trained of the language model."""
    model, stages = builder.recipe.model, builder.recipe.schedule().sft
    has = {}
    for part, base in lora.BASE.items():
        has[part] = any(k.startswith(f"{base}.") and lora.is_adapter(k) for k in weights.shapes)
        if has[part] != (getattr(model, part) is not None):
            raise UserError(
                f"the checkpoint and its recipe disagree on model.{part}: export with the run's "
                "own recipe"
            )
    trained = [stage.name for stage in stages if "llm" in stage.trains]
    if adapter and (not has["lora"] or trained):
        why = "its language model has no LoRA"
        if has["lora"]:
            why = f"stage '{trained[0]}' trains the language model itself"
        raise UserError(f"the run has no adapter to write beside the merged model: {why}")


def _write_adapter(
    builder: Builder, weights: PrefixReader, folder: Path, dtype: torch.dtype | None
) -> None:
    keys = [k for k in weights.shapes if k.startswith("llm.") and lora.is_adapter(k)]
    matrices = {k.removeprefix("llm."): weights.whole(k) for k in keys}
    if dtype is not None:
        matrices = {name: matrix.to(dtype) for name, matrix in matrices.items()}
    # The folder's name only: its path means nothing on another machine.
    path = builder.recipe.model.llm.path
    base = path if is_hub_name(path) else Path(path).name
    lora.save_adapter(folder, builder.recipe.model.lora, matrices, base)


def _lazy(
    weights: PrefixReader,
    key: str,
    dtype: torch.dtype | None,
    bar: Bar,
    lora_config: lora.LoraConfig | None,
) -> LazyTensor:
    """The tensor ``key``, merged with its LoRA matrices and rounded, read when it is written."""
    stored = weights.read(key, 0, 1).dtype
    written = dtype if dtype is not None and stored.is_floating_point else stored
    a, b = lora.factors(key)

    def get() -> torch.Tensor:
        tensor = weights.whole(key)
        if lora_config is not None and a in weights.shapes:
            tensor = lora.merged(tensor, weights.whole(a), weights.whole(b), lora_config)
        tensor = tensor.to(written)
        bar.update(tensor.nbytes)
        return tensor

    lazy = LazyTensor(written, weights.shapes[key], get)
    bar.total += lazy.bytes
    return lazy


def _write_files(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    """Write one file, or several of at most `FILE_BYTES` with the index that transformers reads."""
    files: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(t.bytes for t in files[-1].values()) + tensor.bytes > FILE_BYTES:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        write_tensors(folder / "model.safetensors", files[0], {"format": "pt"})
        return
    weight_map = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(folder / name, file, {"format": "pt"})
        weight_map |= dict.fromkeys(file, name)
    total = sum(t.bytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic_write(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _copy_llm(llm: Path, tokenizer: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy the language model's folder without its weights, with the tokenizer of the training."""
    try:
        values = json.loads((llm / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.llm.path: {llm}/config.json cannot be read: {error}") from None
    values.pop("auto_map", None)  # it points to remote code ("Data is not code")
    if dtype is not None:
        values.pop("torch_dtype", None)
        values["dtype"] = str(dtype).removeprefix("torch.")
    atomic_write(target / "config.json", json.dumps(values, indent=2) + "\n")
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, target / "tokenizer.model")
    for name in LLM_FILES:
        # Nothing of another tokenizer: it would be the one that is loaded.
        source = (llm if name == "generation_config.json" else tokenizer) / name
        if source.is_file():
            shutil.copyfile(source, target / name)
    if has_trained_tokenizer(tokenizer):
        write_tokenizer_json(tokenizer, target)


# -- load ---------------------------------------------------------------------------------------


def read_config(folder: Path) -> ExportConfig:
    """The ``config.json`` of an export. Raises `UserError` if it is none, or of another format."""
    # Other keys are those that transformers adds when it saves a config.
    known = set(ExportConfig.__dataclass_fields__)
    return config.build(ExportConfig, {k: v for k, v in read_values(folder).items() if k in known})


def load_export(folder: str | Path, attn: str = "") -> Export:
    """Load an exported folder onto the CPU, in float32 and in eval mode.

    ``attn``: the attention of transformers; empty: `default_attention`.

    Raises `UserError`, also where a file is not what its checksum says.
    """
    folder = Path(folder)
    export_config = read_config(folder)
    verify(folder)
    attn = attn or default_attention(folder / LLM)
    llm = load_llm(folder / LLM, attn=attn)
    tokenizer = load_tokenizer(folder / LLM)
    width = llm.get_input_embeddings().weight.shape
    check_tokenizer(tokenizer, width[0])
    properties = try_llm(llm.config, attn)
    encoder = _load_encoder(export_config, folder)
    ctc, speller, reads_ctc = None, None, export_config.adaptor.reads_ctc
    if export_config.units:
        phonemizer = build_phonemizer(export_config.phonemizer, tokenizer)
        speller = reading_speller(phonemizer, PhonemeVocab.load(folder / PHONEMES))
        ctc = CtcHead(encoder.width, export_config.units, export_config.head)
    units = export_config.units if reads_ctc else 0
    model = SpeechLLM(
        encoder,
        build_adaptor(export_config.adaptor, encoder.width, width[1], units=units),
        llm,
        export_config.prompt.prefix,
        export_config.prompt.suffix,
        tokenizer.pad_id,
        LlmConfig(attn=attn),
        ctc=ctc,
        speller=speller,
        cached=properties.caches,
        hinted=export_config.hinted,
    )
    parts = {"encoder": model.encoder, "ctc": model.ctc, "adaptor": model.adaptor}
    _load_weights({name: part for name, part in parts.items() if part is not None}, folder)
    front_end = encoder.front_end
    if front_end is None:
        front_end = FbankFrontEnd(export_config.fbank, Cmvn.load(folder / CMVN))
    return Export(export_config, model.eval(), tokenizer, front_end)


def _load_encoder(export_config: ExportConfig, folder: Path) -> Encoder:
    """The encoder of an export, before its weights are loaded."""
    cfg = export_config.encoder
    if isinstance(cfg, PretrainedEncoderConfig):
        return build_encoder(folder / cfg.path, cfg)
    return Conformer(cfg)


def _weight_files(folder: Path) -> Sequence[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        weight_map: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error}") from None


@torch.no_grad()
def _load_weights(modules: dict[str, nn.Module], folder: Path) -> None:
    """Fill parameters and persistent buffers, which must match the files name by name and shape by
    shape."""
    missing = {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no dict
                    target = missing.pop(name, None)
                    if target is None:
                        raise UserError(f"{path} holds '{name}', which this model lacks")
                    tensor = file.get_tensor(name)
                    if tensor.shape != target.shape:
                        raise UserError(
                            f"{path}: '{name}' has shape {tuple(tensor.shape)}, "
                            f"config.json asks for {tuple(target.shape)}"
                        )
                    target.copy_(tensor)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights, among them {min(missing)}")
