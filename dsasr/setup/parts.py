"""The machine, and the models that a recipe is made of: what decides about it besides the data."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dsasr.checkpoint.export_folder import is_export
from dsasr.data.text.chat_template import SPEECH
from dsasr.data.text.tokenizers import load_tokenizer
from dsasr.launch.deepspeed_launcher import gpus
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.encoders.published import fresh_encoder
from dsasr.model.llm_hub import config_folder, find_model, llm_config
from dsasr.planning.measure_batch import free_bytes
from dsasr.planning.measure_rate import measure_rate
from dsasr.planning.memory import Machine
from dsasr.utils.errors import UserError, message_of

SCRATCH = "scratch"  # in place of an encoder's name: pretrain one
DEFAULT_ENCODER = {"cpu": "openai/whisper-base", "gpu": "openai/whisper-large-v3"}
# Of the rate of plain matrix products, what training sustains (**ours**): guesses, for want of
# measured steps of several models.
SUSTAINED = {"cpu": 0.4, "gpu": 0.4}


@dataclass(frozen=True)
class Device:
    """The machine that the recipe is for. ``memory``: GB of a rank; ``rate``: TFLOP/s sustained."""

    gpus: int
    memory: float
    rate: float
    cores: int

    @classmethod
    def here(cls) -> Device:
        count = gpus()
        kind = "gpu" if count else "cpu"
        memory = free_bytes(torch.device("cuda" if count else "cpu")) / 1e9
        return cls(count, memory, measure_rate(0.5) * SUSTAINED[kind], os.cpu_count() or 1)

    @property
    def is_cpu(self) -> bool:
        return not self.gpus

    @property
    def world(self) -> int:
        """Ranks that `dsasr train` starts."""
        return max(self.gpus, 1)

    @property
    def machine(self) -> Machine:
        """As the planner takes it."""
        reserve = 0.0 if self.is_cpu else Machine().reserve
        return Machine(1, self.world, self.memory, self.rate, reserve=reserve, cpu=self.is_cpu)

    def __str__(self) -> str:
        if self.is_cpu:
            return f"{self.cores} CPU cores, {self.memory:.0f} GB free, no GPU"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.memory:.0f} GB"


@dataclass(frozen=True)
class SpeechEncoder:
    """The encoder. ``path``: as the recipe names it, "": one to pretrain; ``most_seconds``: of the
    longest audio that it reads; ``bins``: 1 where it reads waves."""

    path: str = ""
    most_seconds: float = float("inf")
    bins: int = 80
    frame_seconds: float = 0.04

    @property
    def is_pretrained(self) -> bool:
        return bool(self.path)


@dataclass(frozen=True)
class LanguageModel:
    """The language model. ``path``: as the recipe names it."""

    path: str
    parameters: int
    kind: str  # as transformers calls the family
    chats: bool  # its tokenizer has a chat template
    is_whisper: bool  # a decoder of Whisper's, with its special tokens
    spaced: bool  # a text's first word has a space before it


def is_installed(module: str) -> bool:
    """Whether an optional library is there."""
    return importlib.util.find_spec(module) is not None


def look_at_encoder(name: str, device: Device, fetch: bool) -> SpeechEncoder:
    """The encoder that the user names; "": the default of the device, `SCRATCH`: none.

    ``fetch``: a hub's model is downloaded where it is not here; without, its shape is enough.
    Raises `UserError` where it is not to be had, or is no encoder of a known family.
    """
    if name == SCRATCH:
        return SpeechEncoder()
    given = bool(name)
    name = name or DEFAULT_ENCODER["cpu" if device.is_cpu else "gpu"]
    if fetch:
        try:
            find_model(name, "--encoder")
        except UserError as error:
            hint = "" if given else f"; or pretrain one: --encoder {SCRATCH}"
            raise UserError(f"{error}{hint}") from None
    path = _absolute(name)
    with torch.device("meta"):
        shape = fresh_encoder(PretrainedEncoderConfig(path))
    front_end = shape.front_end
    return SpeechEncoder(path, front_end.max_seconds, front_end.bins, shape.frame_seconds)


def look_at_llm(name: str, fetch: bool) -> LanguageModel:
    """The language model that the user names; ``fetch`` as in `look_at_encoder`.

    Raises `UserError` where it is not to be had, or cannot be used.
    """
    folder = Path(name)
    if folder.is_dir() and is_export(folder):
        raise UserError(
            f"--llm: {name} is a whole recognizer; fine-tune it: dsasr train --recipe finetune "
            f"model.init_from={name} (--help of init says how to make the shards)"
        )
    found = find_model(name, "--llm") if fetch else config_folder(name)
    config = llm_config(str(found or name))
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError as error:
            raise UserError(
                f"--llm: {name} is no causal language model: {message_of(error)}"
            ) from None
    parameters = sum(p.numel() for p in llm.parameters())
    if found is None:  # a plan without its tokenizer
        return LanguageModel(name, parameters, config.model_type, True, False, False)
    tokenizer = load_tokenizer(found)
    chats = tokenizer.chat_prompt("Write what is said.", SPEECH) is not None
    is_whisper = tokenizer.special_id("<|startoftranscript|>") is not None
    # A byte-level vocabulary writes a word's space into its token.
    byte_level = any(piece.startswith("Ġ") for piece in tokenizer.pieces().values())
    return LanguageModel(
        _absolute(name), parameters, config.model_type, chats, is_whisper,
        byte_level and not chats,
    )  # fmt: skip


def _absolute(name: str) -> str:
    """A folder by its whole path, so that the recipe works from anywhere; a hub name as it is."""
    return str(Path(name).resolve()) if (Path(name) / "config.json").is_file() else name
