"""Builds and pre-trains the demo's language model: a small Qwen3 on the corpus' text.

Its training sequences are those of speech recognition: the prompt, then the transcript and the end
token, with the loss on the latter two. Some sentences come without the prompt.

A large language model knows pronunciations from its text (dictionaries, pinyin, rhyme); with a
phonemizer this one learns them from text-only batches, as any run does: phonemes with drawn errors
(`dsasr.data.dataloader.text_dataloader`), which `SpeechLLM` reads in the place of speech. The
adaptor (`dsasr.demo.simulated_frames`) is discarded afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dsasr.data.dataloader.text_dataloader import Line, TextDataLoader, TextOnlyConfig
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.text.normalization import normalize_text
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.phonemizer import Phonemizer, UnknownWord
from dsasr.data.text.prompt import Prompt
from dsasr.data.text.tokenizers import Tokenizer, load_tokenizer
from dsasr.demo.simulated_frames import SimulatedFrames
from dsasr.model.llm import LlmConfig
from dsasr.model.speech_llm import SpeechLLM
from dsasr.model.token_embeddings import token_rms
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_folder, atomic_write, to_json
from dsasr.utils.progress import Bar

REPORT = "pretraining.json"
# What a head gets wrong is left to the speech of a run: this model is to learn pronunciations.
ERRORS = {"substitutions": 0.0, "deletions": 0.0, "insertions": 0.0}
_TOKENIZER_FILES = (
    "tokenizer.model",
    "dsasr_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class SmallLmConfig:
    """Shape and pre-training. ``bare``: share of the batches without the prompt; ``spoken``: share
    of the batches with phonemes instead of the speech, if there are phonemes.

    AdamW, linear warm-up over a tenth of ``steps``, then cosine decay to a tenth of ``lr``.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 384
    positions: int = 2048
    steps: int = 300
    batch: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05
    bare: float = 0.5
    spoken: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.ffn)
        if min(*sizes, self.positions, self.batch) < 1 or self.steps < 0 or self.lr <= 0:
            raise UserError("a small LM needs sizes, batch and learning rate above 0")
        if self.heads % self.kv_heads:
            raise UserError(f"heads ({self.heads}) must be a multiple of kv_heads")
        if self.head_dim % 2 or not 0 <= self.bare <= 1 or not 0 <= self.spoken <= 1:
            raise UserError("head_dim must be even, bare and spoken from 0 to 1")


def build_small_lm(config: SmallLmConfig, tokenizer: Tokenizer):
    """A randomly initialized ``Qwen3ForCausalLM`` with tied embeddings, seeded by ``config``.

    The vocabulary is ``tokenizer``'s, padded to a multiple of 64 rows. Torch's global random state
    is left as it was.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = Qwen3Config(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.positions,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Qwen3ForCausalLM(shape).float()


def make_random_lm(out: Path, tokenizer_folder: str | Path, width: int, layers: int) -> None:
    """A folder with an untrained Qwen3 of any size: bf16, two safetensors files, tied embeddings.

    For measurements: shapes as Qwen3's (feed-forward 3x, heads of 64, half as many for keys). The
    vocabulary is the tokenizer's, whose files are copied in.
    """
    config = SmallLmConfig(
        hidden=width, layers=layers, heads=max(2, width // 64), kv_heads=max(1, width // 128),
        head_dim=64, ffn=3 * width,
    )  # fmt: skip
    llm = build_small_lm(config, load_tokenizer(tokenizer_folder))
    out.mkdir(parents=True)
    llm.config.architectures, llm.config.dtype = [type(llm).__name__], torch.bfloat16
    llm.config.save_pretrained(out)
    names = sorted(set(llm.state_dict()) - {"lm_head.weight"})
    files = {n: f"model-{1 + i * 2 // len(names):05d}-of-00002.safetensors"
             for i, n in enumerate(names)}  # fmt: skip
    weights = llm.state_dict()
    for file in sorted(set(files.values())):
        part = {n: weights[n].bfloat16() for n in names if files[n] == file}
        save_file(part, out / file, metadata={"format": "pt"})
    atomic_write(
        out / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": files})
    )
    for name in _TOKENIZER_FILES:
        if (Path(tokenizer_folder) / name).is_file():
            shutil.copyfile(Path(tokenizer_folder) / name, out / name)


def lm_batch(
    sequences: Sequence[Sequence[int]], prompt: Sequence[int], end_id: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, L] of ``prompt + sequence + end``; targets are -100 where no loss is.

    Position i of the targets is what position i of the inputs predicts. Without a prompt the first
    token is predicted by nothing and has no loss.
    """
    length = len(prompt) + max(map(len, sequences))
    inputs_BL = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    targets_BL = torch.full_like(inputs_BL, -100)
    for row, sequence in enumerate(sequences):
        ids = [*prompt, *sequence, end_id]
        inputs_BL[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        start = max(len(prompt), 1)
        targets_BL[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return inputs_BL, targets_BL


def _nll(llm, inputs_BL: Tensor, targets_BL: Tensor, reduction: str) -> Tensor:
    """Causal attention hides the padding on the right from every position with a target."""
    hidden_BLD = llm.model(input_ids=inputs_BL, use_cache=False).last_hidden_state
    has_target = targets_BL != -100
    return F.cross_entropy(
        llm.lm_head(hidden_BLD[has_target]), targets_BL[has_target], reduction=reduction
    )


@torch.no_grad()
def perplexity(llm, sequences: Sequence[Sequence[int]], prompt: Sequence[int]) -> float:
    """Perplexity per token of ``sequences`` after ``prompt``, end tokens included."""
    llm.eval()
    total, count = 0.0, 0
    config = llm.config
    for start in range(0, len(sequences), 128):
        block = sequences[start : start + 128]
        batch = lm_batch(block, prompt, config.eos_token_id, config.pad_token_id)
        total += float(_nll(llm, *batch, reduction="sum").double())
        count += int((batch[1] != -100).sum())
    return math.exp(total / max(1, count))


def reading_batches(
    lines: Sequence[str], phonemizer: Phonemizer, tokenizer: Tokenizer, config: SmallLmConfig
) -> TextDataLoader:
    """Text-only batches of ``lines``: their phonemes with drawn errors, and their tokens.

    Raises `UserError` for a word without a pronunciation.
    """
    try:
        vocab = PhonemeVocab.build(phonemizer.phonemes(line, "") for line in lines)
    except UnknownWord as error:
        raise UserError(f"the text for the language model: {error}") from None
    return TextDataLoader(
        # Unsorted: batches of one length have one language, and so a small model learns slowly.
        TextOnlyConfig(path="text", samples=config.batch, window=1, **ERRORS),
        TextEncoder(phonemizer=phonemizer, vocab=vocab, tokenizer=tokenizer),
        bins=0,
        seed=config.seed,
        lines=[Line(line, "", "text", number) for number, line in enumerate(lines, 1)],
    )


def _reader(
    llm, prompt: tuple[Sequence[int], Sequence[int]], units: int, generator: torch.Generator
) -> SpeechLLM:
    """``llm`` with an adaptor for ``units``, and no encoder: it reads text alone."""
    adaptor = SimulatedFrames(llm.config.hidden_size, token_rms(llm), units)
    adaptor.reset_parameters(generator)
    return SpeechLLM(None, adaptor, llm, *prompt, llm.config.pad_token_id, LlmConfig()).train()


def pretrain(
    llm,
    sequences: Sequence[Sequence[int]],
    prompt: tuple[Sequence[int], Sequence[int]],
    config: SmallLmConfig,
    *,
    reading: TextDataLoader | None = None,
    progress: bool = True,
) -> list[float]:
    """Train ``llm`` in place; returns the loss of each step, in nats per token.

    ``prompt`` is (prefix, suffix). ``reading``: batches with phonemes instead of speech
    (`reading_batches`). Sentences are reshuffled each epoch; equal arguments give equal weights on
    one machine.
    """
    llm.train()
    reader = None
    if reading is not None:
        generator = torch.Generator().manual_seed(config.seed)
        reader = _reader(llm, prompt, len(reading.text.vocab), generator)
    decayed = [p for p in llm.parameters() if p.ndim > 1]
    rest = [p for p in llm.parameters() if p.ndim <= 1]
    rest += reader.adaptor.parameters() if reader is not None else ()
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
    )
    warmup = max(1, config.steps // 10)
    rng = np.random.default_rng(config.seed)
    order: list[int] = []
    losses: list[float] = []
    bar = Bar(range(config.steps), desc="language model", unit="step", disable=not progress)
    for step in bar:
        share = (step - warmup) / max(1, config.steps - warmup)
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, share)))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / warmup, 1.0) * decay
        if reader is not None and rng.random() < config.spoken:
            loss = reader(next(reading)).loss
        else:
            if len(order) < config.batch:
                order += rng.permutation(len(sequences)).tolist()
            batch_ids, order = order[: config.batch], order[config.batch :]
            context = () if rng.random() < config.bare else [*prompt[0], *prompt[1]]
            ids = llm.config.eos_token_id, llm.config.pad_token_id
            batch = lm_batch([sequences[i] for i in batch_ids], context, *ids)
            loss = _nll(llm, *batch, reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    llm.eval()
    return losses


def make_small_lm(
    texts: Sequence[str | Path],
    tokenizer_folder: str | Path,
    out: str | Path,
    config: SmallLmConfig | None = None,
    *,
    heldout: str | Path | None = None,
    phonemizer: Phonemizer | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> dict:
    """Build, pre-train and save a language model; returns its report (also `REPORT` in ``out``).

    ``texts``: UTF-8 files, one sentence a line. ``heldout``: such a file, whose perplexity is
    reported; without it every 50th line is held out. ``phonemizer``: for batches with phonemes
    instead of speech. ``out`` becomes a Hugging Face folder with the tokenizer's files. If it
    already has the same model, nothing is done unless ``fresh``. Raises `UserError`.
    """
    config = config or SmallLmConfig()
    out, tokenizer_folder = Path(out), Path(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    lines = [line for path in texts for line in _lines(path)]
    heldout_lines = _lines(heldout) if heldout else lines[::50]
    if not heldout:
        lines = [line for number, line in enumerate(lines) if number % 50]
    if not lines or not heldout_lines:
        raise UserError("the text for the language model is empty")
    source = _fingerprint(config, lines, heldout_lines, tokenizer_folder)
    source += "-reads" if phonemizer is not None else ""
    if not fresh and (out / REPORT).is_file():
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        if report.get("source") == source:
            return report
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UserError(f"{out} holds something else than a language model: choose another --out")
    start = time.monotonic()
    prefix, suffix = Prompt.build(tokenizer)
    llm = build_small_lm(config, tokenizer)
    losses = pretrain(
        llm,
        [tokenizer.encode(x) for x in lines],
        (prefix, suffix),
        config,
        reading=phonemizer and reading_batches(lines, phonemizer, tokenizer, config),
        progress=progress,
    )
    report = {
        "source": source,
        "config": asdict(config),
        "parameters": llm.num_parameters(),
        "sentences": len(lines),
        "last_loss": losses[-1] if losses else None,
        "heldout_sentences": len(heldout_lines),
        "heldout_perplexity": perplexity(
            llm, [tokenizer.encode(x) for x in heldout_lines], prefix + suffix
        ),
        "seconds": round(time.monotonic() - start, 1),
    }
    _save(llm, tokenizer_folder, out, report)
    return report


def _lines(path: str | Path) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {path} cannot be read: {error}") from None
    return [normalize_text(line) for line in text.splitlines() if line.strip()]


def _fingerprint(
    config: SmallLmConfig, lines: list[str], heldout: list[str], tokenizer: Path
) -> str:
    digest = hashlib.sha256(json.dumps([asdict(config), Prompt.template, heldout]).encode())
    for line in lines:
        digest.update(line.encode() + b"\n")
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            digest.update((tokenizer / name).read_bytes())
    return digest.hexdigest()[:16]


def _save(llm, tokenizer: Path, out: Path, report: dict) -> None:
    """Write the Hugging Face folder ``out``, whole or not at all."""
    with atomic_folder(out) as folder:
        # Not llm.save_pretrained: it would draw another progress bar for one small file.
        llm.config.architectures = [type(llm).__name__]
        llm.config.dtype = torch.float32
        llm.config.save_pretrained(folder)
        weights = {name: w.contiguous() for name, w in llm.state_dict().items()}
        weights.pop("lm_head.weight")  # tied to the embedding
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
        (folder / REPORT).write_text(to_json(report, indent=1) + "\n", encoding="utf-8")
