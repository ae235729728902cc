"""Write dsasr/recipes/LANGUAGE_MODELS.md: what holds of transformers' families of language models.

    python tools/llm_families.py            # write the page
    python tools/llm_families.py --check    # exit code 2 if the page is not current

Tries tiny random models as a run tries its own at its start (dsasr/model/llm_properties.py).
The page is that of one release of transformers; with another, --check compares nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dsasr.model import lora
from dsasr.model.llm_properties import try_llm
from dsasr.model.lora import LoraConfig
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.package_data import RECIPES

PAGE = RECIPES / "LANGUAGE_MODELS.md"
ATTENTIONS = ("sdpa", "eager")
_SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_MHA = {k: v for k, v in _SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}
_GPT = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}  # fmt: skip
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
          "mamba_n_groups": 1, "mamba_chunk_size": 16}  # fmt: skip
_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_NO_HEAD_DIM = {k: v for k, v in _SHAPE.items() if k != "head_dim"}
# family → settings of its tiny model
FAMILIES: dict[str, dict] = {
    "llama": _SHAPE,
    "qwen2": _NO_HEAD_DIM,
    "qwen3": _SHAPE,
    "qwen2_moe": _NO_HEAD_DIM | _MOE,
    "qwen3_moe": _SHAPE | _MOE,
    "qwen3_next": _SHAPE | _MOE | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "gemma": _SHAPE,
    "gemma2": _SHAPE | _WINDOW,
    "gemma3_text": _SHAPE | _WINDOW,
    "gemma3n_text": _SHAPE | {
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "mistral": _SHAPE | {"sliding_window": 4},
    "mixtral": _SHAPE | _MOE,
    "ministral3": _SHAPE,
    "phi": _NO_HEAD_DIM,
    "phi3": _NO_HEAD_DIM,
    "phimoe": _NO_HEAD_DIM | _MOE,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": _MHA,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_oss": _SHAPE | _WINDOW | _MOE,
    "opt": _MHA | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "falcon": _MHA | {"alibi": False},
    "falcon (ALiBi)": _MHA | {"alibi": True},
    "falcon_h1": _SHAPE | _MAMBA | {"lm_head_multiplier": 1.0, "embedding_multiplier": 5.5},
    "falcon_h1 (scaled logits)": _SHAPE | _MAMBA | {"lm_head_multiplier": 0.5},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    "mamba2": {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
               "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "bamba": _SHAPE | _MAMBA | {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "recurrent_gemma": _SHAPE | {"lru_width": 32, "attention_window_size": 4},
    "lfm2": _NO_HEAD_DIM | {"layer_types": ["conv", "full_attention"]},
    "olmo": _NO_HEAD_DIM,
    "olmo2": _NO_HEAD_DIM,
    "olmo3": _NO_HEAD_DIM | _WINDOW,
    "olmoe": _NO_HEAD_DIM | _MOE,
    "granite": _NO_HEAD_DIM | {"embedding_multiplier": 12.0, "logits_scaling": 1.0},
    "granite (scaled logits)": _NO_HEAD_DIM | {"logits_scaling": 8.0},
    "starcoder2": _NO_HEAD_DIM,
    "stablelm": _NO_HEAD_DIM,
    "cohere": _NO_HEAD_DIM | {"logit_scale": 1.0},
    "cohere (scaled logits)": _NO_HEAD_DIM,
    "smollm3": _NO_HEAD_DIM,
    "glm4": _SHAPE,
    "exaone4": _SHAPE,
    "ernie4_5": _SHAPE,
    "nemotron": _SHAPE,
    "minicpm3": _SHAPE | {
        "scale_emb": 12, "dim_model_base": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "xglm": {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
             "max_position_embeddings": 64},
    "ctrl": _GPT | {"dff": 48},
    "bert": _MHA | {"is_decoder": True},
    "roberta": _MHA | {"is_decoder": True},
    "modernbert-decoder": _MHA | {"layer_types": ["full_attention"] * 2},
}  # fmt: skip
HEAD = """# Language models

What holds of the families of transformers {version}, each tried on a tiny random model. A run
tries its own model in the same way when it starts, and `dsasr train --check` does so beforehand.

- **packing**: `model.llm.pack` may put several utterances into a row. Where not, it is switched
  off, and a line says so.
- **cache**: decoding keeps keys, values and states. Where not, each step runs over the whole
  sequence: the same transcripts, slower.
- **LoRA on all layers**: `model.lora` with empty `targets`. Where not, name linear layers there.
- **refused**: training and `--check` end with this line.

This page is generated: `python tools/llm_families.py`.

| family | attention | packing | cache | LoRA on all layers |
|---|---|---|---|---|
"""


class Row(NamedTuple):
    packing: str
    cache: str
    lora: str


def config_of(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family.partition(" ")[0], **FAMILIES[family])


def try_family(family: str, attn: str) -> Row:
    """What a run would say of the family."""
    config = config_of(family)
    try:
        found = try_llm(config, attn)
    except UserError as error:
        return Row(f"refused: {error}", "", "")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn, trust_remote_code=False
        )
    try:
        lora.check(llm, LoraConfig())
        adapts = "yes"
    except UserError as error:
        reason = str(error).removeprefix("model.lora: ")
        # Without the share, which is the tiny model's, and the layers.
        reason = re.sub(
            r"^peft refuses this model: Target module (\w+)\(.*", r"peft cannot adapt \1", reason
        )
        reason = re.sub(
            r"^\d+% of the weights of the language model's blocks are", "some are", reason
        )
        adapts = "no: " + re.split(r", which|\. ", reason)[0]
    return Row("yes" if found.packs else "off", "yes" if found.caches else "off", adapts)


def page() -> str:
    lines = []
    for family in FAMILIES:
        rows: dict[Row, list[str]] = {}
        for attn in ATTENTIONS:
            rows.setdefault(try_family(family, attn), []).append(attn)
        for row, attentions in rows.items():
            cells = (family, ", ".join(attentions), *row)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"the file ({PAGE.name})")
    options = parser.parse_args(arguments)
    written = options.page.read_text("utf-8") if options.page.is_file() else ""
    if options.check and written and f"transformers {transformers.__version__}," not in written:
        print(f"{options.page} is of another release of transformers: not compared")
        return 0
    text = page()
    if not options.check:
        options.page.write_text(text, encoding="utf-8")
    elif written != text:
        raise UserError(f"{options.page} is not current: run 'python tools/llm_families.py'")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny matrices
    sys.exit(run_tool(main))
