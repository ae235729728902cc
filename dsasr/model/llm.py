"""The language model: any Hugging Face causal LM from a local folder, and its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from dsasr.kernels import dispatch
from dsasr.model.hf_config import FAULTS, read_hf_config, reason_of
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Dropout, NonNegativeInt

_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_DROPOUTS = (
    "attention_dropout",
    "hidden_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
)

# What families call the cap of a tanh around their logits.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LlmConfig:
    """``path``: a local Hugging Face folder, or a hub name (`dsasr.model.llm_hub`).

    ``pack``: the most positions in a row of several utterances; 0 for one utterance a row.

    Attention without flash computes whole rows: let ``pack`` be a few times the longest utterance.
    With a flash ``attn`` any ``pack`` above 0 puts the whole batch into one row, without padding.
    Without packing transformers syncs with the GPU once a batch, to see whether rows are packed.
    """

    path: str = ""  # Hugging Face folder, or a hub name such as Qwen/Qwen3-1.7B
    # load the weights; false: only config.json, with weights drawn from the seed
    weights: bool = True
    # positions of a row that utterances are packed into; 0: one utterance a row
    pack: NonNegativeInt = 0
    attn: str = "sdpa"  # attention of transformers: sdpa, eager, flash_attention_2, …
    dropout: Dropout = 0.0  # dropout wherever the language model has one
    activation_checkpointing: bool = False  # recompute each layer in the backward pass
    # with activation_checkpointing; all: the whole layer, cheap: all but its matrix products
    recompute: Literal["all", "cheap"] = "all"

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.attn not in _ATTENTION:
            raise UserError(f"llm attn {self.attn!r}: choose one of {', '.join(_ATTENTION)}")


class FusedLmHead(nn.Linear):
    """The LM head; with targets it returns losses and entropies without computing [N, V] logits.

    It replaces the model's own head and shares its weight, tied or not. So the fused kernel runs
    inside the module that owns the weight, where ZeRO-3 gathers it, and names in checkpoints stay
    the same.
    """

    soft_cap: float | None = None

    @classmethod
    def replace(cls, llm: PreTrainedModel) -> FusedLmHead:
        """Replace ``llm``'s own head, which must be linear (`UserError`).

        That logits are W·h + b, soft-capped or not, is tried by `dsasr.model.llm_properties`.
        """
        head = llm.get_output_embeddings()
        if isinstance(head, cls):
            return head
        if type(head) is not nn.Linear:
            raise UserError(
                f"{llm.config.model_type} has no linear LM head: choose another language model"
            )
        with torch.device("meta"):
            fused = cls(head.in_features, head.out_features, bias=head.bias is not None)
        fused.weight, fused.bias = head.weight, head.bias
        fused.soft_cap = read_soft_cap(llm.config)
        llm.set_output_embeddings(fused)
        return fused

    def forward(
        self, input: Tensor, targets_N: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits of any [..., D]; or for [N, D] and targets: (nll_N, entropy_N, correct_N).

        nll and entropy are in nats, float32 at least; correct (bool): greedy prediction is right.
        """
        if targets_N is None:
            return F.linear(input, self.weight, self.bias)
        return dispatch.linear_cross_entropy(
            input,
            self.weight,
            targets_N,
            bias_V=self.bias,
            soft_cap=self.soft_cap,
            return_entropy=True,
            return_accuracy=True,
        )

    def cap(self, logits: Tensor) -> Tensor:
        """Logits as the loss sees them: float32 at least, soft-capped where the model does so."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if not self.soft_cap else self.soft_cap * (logits / self.soft_cap).tanh()


def read_soft_cap(config: PretrainedConfig) -> float | None:
    """The c of logits c·tanh(x / c) that the config asks for; None for plain logits."""
    text = config.get_text_config()
    return next((cap for name in _SOFT_CAPS if (cap := getattr(text, name, None))), None)


def load_llm(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    dropout: float = 0.0,
    weights: bool = True,
) -> PreTrainedModel:
    """A causal LM from a local Hugging Face folder (safetensors only, no remote code).

    ``weights=False`` takes config.json alone and draws the weights; under ``torch.device("meta")``
    that costs no memory. Raises `UserError` for a folder without such a model, and for one whose
    files lack some of the weights.
    """
    folder = Path(path)
    config = read_llm_config(folder, dropout)
    try:
        if not weights:
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn, trust_remote_code=False
            )
        with _no_progress_bar():
            llm, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attn,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except FAULTS as error:
        raise _unreadable(folder, error) from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(kind, ())):
            what = kind.replace("_keys", "")
            raise UserError(
                f"the language model in {folder} has {len(names)} {what} weights, among them"
                f" {names[0]}: export it again, whole"
            )
    return llm


def default_attention(folder: Path) -> str:
    """The attention that transformers takes for the model in ``folder``: sdpa where it has that."""
    with torch.device("meta"):
        try:
            llm = AutoModelForCausalLM.from_config(read_llm_config(folder), trust_remote_code=False)
        except FAULTS as error:
            raise _unreadable(folder, error) from error
    return llm.config.get_text_config()._attn_implementation


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar of its own for a file that is read in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_llm_config(folder: Path, dropout: float = 0.0) -> PretrainedConfig:
    """The folder's config, with ``dropout`` wherever the model has one; raises `UserError`."""
    if not (folder / "config.json").is_file():
        raise UserError(f"no language model in {folder}: there is no config.json")
    config = read_hf_config(folder)
    if config.is_encoder_decoder:
        raise UserError(
            f"{folder} holds an encoder-decoder ({config.model_type}), whose decoder alone is no "
            "language model: give a causal one; tools/whisper_decoder_lm.py makes one of Whisper's"
        )
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(f"cannot load the language model in {folder}: {explain(error)}")


def explain(error: Exception) -> str:
    """Why transformers does not build a language model, with the fix where it is known."""
    reason = reason_of(error)
    if "does not support an attention implementation" in reason:
        return "its architecture has eager attention only; give model.llm.attn=eager"
    return reason
