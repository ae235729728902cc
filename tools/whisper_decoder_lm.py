"""Write the decoder of a Whisper model as a causal language model, for recipe whisper-read.

    python tools/whisper_decoder_lm.py models/whisper-base models/whisper-base-lm \\
        --speech corpus/read/shards/train --lang en

The decoder loses its cross-attention: what remains is GPT-2's architecture, and is saved as such,
with Whisper's tokenizer. A decoder that was trained to look at speech writes nonsense without; with
``--speech`` the mean of what each layer's cross-attention adds, over the tokens of these
transcripts, stays as a bias.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, WhisperConfig, logging

from dsasr.data.text.normalization import TextConfig
from dsasr.data.text.tokenizers import has_tokenizer, load_tokenizer
from dsasr.evaluation.eval_sets import read_recordings
from dsasr.model.hf_config import read_hf_config
from dsasr.model.hf_weights import TensorFiles, check_present
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.library_warnings import silence_library_warnings
from dsasr.utils.progress import Bar

RATE, MAX_SECONDS = 16_000, 30.0
EMBEDDING = "decoder.embed_tokens.weight"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "normalizer.json",
)  # fmt: skip


class Decoder:
    """The tensors of a Whisper's decoder, by their names inside it."""

    def __init__(self, folder: Path):
        """Raises `UserError` for a folder that holds no Whisper with a decoder."""
        self.folder = folder
        self.config = read_hf_config(folder)
        if not isinstance(self.config, WhisperConfig):
            raise UserError(f"{folder} is no Whisper: its config.json has {self.config.model_type}")
        if not self.config.tie_word_embeddings:
            raise UserError(f"{folder} has an output layer of its own, which is not converted")
        if not has_tokenizer(folder):
            raise UserError(f"{folder} has no tokenizer.json: download all files of the model")
        self.files = TensorFiles(folder)
        check_present(self.files)
        found = [n for n in self.files.shapes if n == EMBEDDING or n.endswith(f".{EMBEDDING}")]
        if not found:
            raise UserError(f"{folder} has no {EMBEDDING}: give a whole Whisper, not its encoder")
        self.prefix = found[0][: -len("embed_tokens.weight")]

    def read(self, name: str, *shape: int) -> Tensor:
        """Raises `UserError` for a tensor that is missing or of another shape, as from another
        model's config.json."""
        name = self.prefix + name
        found = self.files.shapes.get(name)
        if found != shape:
            what = f"lacks {name}" if found is None else f"has {name} {[*found]}, not {[*shape]}"
            raise UserError(f"{self.folder} {what}: its weights are not those of its config.json")
        tensor = torch.empty(shape)
        self.files.read(name, tensor)
        return tensor


def gpt2_config(whisper: WhisperConfig) -> GPT2Config:
    return GPT2Config(
        vocab_size=whisper.vocab_size, n_positions=whisper.max_target_positions,
        n_embd=whisper.d_model, n_layer=whisper.decoder_layers,
        n_head=whisper.decoder_attention_heads, n_inner=whisper.decoder_ffn_dim,
        activation_function=whisper.activation_function, resid_pdrop=whisper.dropout,
        embd_pdrop=whisper.dropout, attn_pdrop=whisper.attention_dropout,
        bos_token_id=whisper.bos_token_id, eos_token_id=whisper.eos_token_id,
        pad_token_id=whisper.pad_token_id,
    )  # fmt: skip


def gpt2_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's tensors under GPT-2's names.

    GPT-2 stores a linear layer as [in, out], and query, key and value as one. Whisper's key has no
    bias. Both add learned positions to unscaled embeddings (transformers ignores scale_embedding),
    and their output layer is the embedding.
    """
    cfg = decoder.config
    width, inner = cfg.d_model, cfg.decoder_ffn_dim
    out = {
        "transformer.wte.weight": decoder.read("embed_tokens.weight", cfg.vocab_size, width),
        "transformer.wpe.weight": decoder.read(
            "embed_positions.weight", cfg.max_target_positions, width
        ),
    }

    def norm(target: str, source: str) -> None:
        for part in ("weight", "bias"):
            out[f"{target}.{part}"] = decoder.read(f"{source}.{part}", width)

    def linear(target: str, source: str, wide: int, narrow: int) -> None:
        out[f"{target}.weight"] = decoder.read(f"{source}.weight", wide, narrow).T.contiguous()
        out[f"{target}.bias"] = decoder.read(f"{source}.bias", wide)

    norm("transformer.ln_f", "layer_norm")
    for layer in range(cfg.decoder_layers):
        to, source = f"transformer.h.{layer}", f"layers.{layer}"
        q, k, v = (f"{source}.self_attn.{x}_proj" for x in "qkv")
        weights = [decoder.read(f"{x}.weight", width, width) for x in (q, k, v)]
        biases = decoder.read(f"{q}.bias", width), decoder.read(f"{v}.bias", width)
        out[f"{to}.attn.c_attn.weight"] = torch.cat(weights).T.contiguous()
        out[f"{to}.attn.c_attn.bias"] = torch.cat([biases[0], torch.zeros(width), biases[1]])
        linear(f"{to}.attn.c_proj", f"{source}.self_attn.out_proj", width, width)
        linear(f"{to}.mlp.c_fc", f"{source}.fc1", inner, width)
        linear(f"{to}.mlp.c_proj", f"{source}.fc2", width, inner)
        norm(f"{to}.ln_1", f"{source}.self_attn_layer_norm")
        norm(f"{to}.ln_2", f"{source}.final_layer_norm")
    return out


@torch.no_grad()
def mean_cross_attention(folder: Path, shards: Sequence[str], lang: str, limit: int) -> Tensor:
    """[layers, width]: the mean output of each layer's cross-attention over these transcripts.

    Raises `UserError` where no recording can be read, and for a language that Whisper does not
    know.
    """
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    tokenizer = load_tokenizer(folder)
    names = ("<|startoftranscript|>", f"<|{lang}|>", "<|transcribe|>", "<|notimestamps|>")
    prompt = [tokenizer.special_id(name) for name in names]
    if None in prompt:
        raise UserError(f"{folder}: its tokenizer has no {names[prompt.index(None)]}; see --lang")
    # As recipe whisper-read writes its text.
    text = TextConfig(case="lower", punctuation="strip", leading_space=True)
    recordings, _ = read_recordings(
        shards, rate=RATE, text=text, limit=limit, max_seconds=MAX_SECONDS
    )
    model = WhisperForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    layers = model.model.decoder.layers
    sums, count = torch.zeros(len(layers), model.config.d_model, dtype=torch.float64), 0

    def count_in(layer: nn.Module, _inputs: tuple, output: tuple) -> None:
        sums[layer.layer_idx] += output[0][0].double().sum(0)

    for layer in layers:
        layer.encoder_attn.register_forward_hook(count_in)
    for recording in Bar(recordings, desc="Cross-attention", delay=1):
        ids = torch.tensor([[*prompt, *tokenizer.encode(recording.text)]])
        ids = ids[:, : model.config.max_target_positions]
        mels = extractor(recording.wave, sampling_rate=RATE, return_tensors="pt").input_features
        model(mels, decoder_input_ids=ids, use_cache=False)
        count += ids.shape[1]
    return (sums / count).float()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("whisper", type=Path, help="a Hugging Face folder of Whisper, whole")
    parser.add_argument("out", type=Path, help="the language model's folder")
    parser.add_argument(
        "--speech", nargs="+", default=[], help="shards: keep the cross-attention's mean over them"
    )
    parser.add_argument("--lang", default="en", help="the language of the speech")
    parser.add_argument("--limit", type=int, default=50, help="utterances of each; 0: all")
    args = parser.parse_args(arguments)
    silence_library_warnings()
    logging.disable_progress_bar()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} is there already: give a new folder")
    decoder = Decoder(args.whisper)
    weights = gpt2_weights(decoder)
    if args.speech:
        means = mean_cross_attention(args.whisper, args.speech, args.lang, args.limit)
        for layer, mean in enumerate(means):
            weights[f"transformer.h.{layer}.attn.c_proj.bias"] += mean
    with torch.device("meta"):
        model = GPT2LMHeadModel(gpt2_config(decoder.config))
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(args.out)
    for name in TOKENIZER_FILES:
        if (args.whisper / name).is_file():
            shutil.copyfile(args.whisper / name, args.out / name)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.out}: a language model of {millions:.1f} M parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
