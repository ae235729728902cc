import dataclasses
import itertools

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dsasr.data.batch import Batch
from dsasr.evaluation.decode import DecodeConfig, decode, decode_phonemes
from dsasr.model.adaptor import Adaptor, AdaptorConfig
from dsasr.model.ctc_model import CtcModel, CtcModelConfig
from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import LlmConfig
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.errors import UserError

END = 4


class Tokenizer:
    end_id = END

    def decode(self, ids):
        return " ".join(map(str, ids))


def make_model(vocab=12, seed=1):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    encoder = Encoder(EncoderConfig(width=12, layers=1, heads=2, ffn=24, kernel=3, mels=12))
    adaptor = Adaptor(AdaptorConfig(hidden=10), 12, 16, 0.5)
    llm = Qwen3ForCausalLM(config)
    return SpeechLLM(encoder, adaptor, llm, [1, 2], [3], 0, LlmConfig()).double()


def make_batch(*frames, seed=3):
    B = len(frames)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, max(frames, default=0), 12, generator=generator).double()
    for row in range(B):
        features[row, frames[row] :] = 0
    return Batch.blank(
        features,
        feature_lengths_B=torch.tensor(frames, dtype=torch.int64),
        tokens_BU=torch.full((B, 1), END),
        keys=tuple(f"key{row}" for row in range(B)),
        durations=tuple(length / 100 for length in frames),
        seed=seed,
    )


def one_of(batch, row):
    T = int(batch.feature_lengths_B[row])
    one = make_batch(T)
    return dataclasses.replace(
        one, features_BTF=batch.features_BTF[row : row + 1, :T], keys=(batch.keys[row],)
    )


def next_log_probs(model, batch, ids):
    """The model's own forward over the whole sequence; the last position's prediction."""
    embeds, _ = model.prompts(batch)
    tokens = model.llm.get_input_embeddings()(torch.tensor([ids], dtype=torch.int64))
    logits = model.llm(inputs_embeds=torch.cat((embeds, tokens), 1)).logits
    return logits[0, -1].log_softmax(-1)


def score(model, batch, ids):
    return sum(float(next_log_probs(model, batch, ids[:n])[ids[n]]) for n in range(len(ids)))


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_greedy_is_the_best_token_at_each_step(seed):
    model, batch = make_model(seed=seed).eval(), make_batch(50)
    cfg = DecodeConfig(max_tokens=9)
    (found,) = decode(model, batch, Tokenizer(), cfg)
    ids, entropies = [], []
    while len(ids) < 9 and (not ids or ids[-1] != END):
        log_probs = next_log_probs(model, batch, ids)
        entropies.append(float(-(log_probs.exp() * log_probs).sum()))
        ids.append(int(log_probs.argmax()))
    assert found.finished == (ids[-1] == END)
    assert list(found.ids) == ids[: -1 if found.finished else None]
    assert found.text == " ".join(map(str, found.ids))
    assert found.logprob == pytest.approx(score(model, batch, ids), abs=1e-4)
    assert found.token_entropies == pytest.approx(entropies, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("seed", [0, 4])
def test_a_batch_decodes_as_its_utterances_one_by_one(beam, seed):
    model = make_model(seed=seed)
    batch = make_batch(90, 5, 41, 64, 17)
    cfg = DecodeConfig(beam=beam, tokens_per_second=20, extra_tokens=2)
    together = decode(model, batch, Tokenizer(), cfg)
    assert model.training
    for row, found in enumerate(together):
        (alone,) = decode(model, one_of(batch, row), Tokenizer(), cfg)
        assert (found.key, found.ids, found.finished) == (alone.key, alone.ids, alone.finished)
        assert found.logprob == pytest.approx(alone.logprob, abs=1e-5)
        assert found.token_entropies == pytest.approx(alone.token_entropies, abs=1e-5)
        assert len(found.ids) <= cfg.limit(batch.durations[row])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@torch.no_grad()
def test_a_beam_that_holds_everything_finds_the_best_transcript(penalty):
    """Against all sequences of up to three tokens over a vocabulary of five."""
    model, batch = make_model(vocab=5, seed=2).eval(), make_batch(40)
    cfg = DecodeConfig(beam=200, max_tokens=3, length_penalty=penalty)
    (found,) = decode(model, batch, Tokenizer(), cfg)
    others = [token for token in range(5) if token != END]
    ended = [(*body, END) for n in range(3) for body in itertools.product(others, repeat=n)]
    best = max(ended, key=lambda ids: score(model, batch, ids) / len(ids) ** penalty)
    assert found.finished
    assert found.ids == best[:-1]
    assert found.logprob == pytest.approx(score(model, batch, best), abs=1e-4)


@pytest.mark.parametrize("beam", [1, 2])
def test_ranks_keep_step_until_the_last_is_done(beam):
    """Each rank runs as many forward passes as the slowest, also one without utterances."""
    model = make_model()
    cfg = DecodeConfig(beam=beam, max_tokens=6)
    passes = []
    model.llm.base_model.register_forward_hook(lambda *_: passes.append(1))

    def run(batch, others):
        """``others``: how often some other rank still asks for a step."""
        passes.clear()
        asked = iter([True] * others)
        found = decode(
            model, batch, Tokenizer(), cfg, any_rank=lambda running: next(asked, False) or running
        )
        return found, len(passes)

    alone, used = run(make_batch(50, 30), 0)
    assert run(make_batch(50, 30), 20) == (alone, 21)
    assert run(make_batch(), 20) == ([], 21)
    assert run(make_batch(), 0) == ([], 1)
    assert used <= 6


def test_the_limit_follows_the_audio():
    cfg = DecodeConfig(max_tokens=50, tokens_per_second=10, extra_tokens=3)
    assert [cfg.limit(seconds) for seconds in (0.0, 1.01, 60.0)] == [3, 14, 50]
    with pytest.raises(UserError):
        DecodeConfig(beam=0)


def test_streaming_changes_what_the_encoder_sees():
    model, batch = make_model(), make_batch(90)
    full, _ = model.prompts(batch)
    chunked, _ = model.prompts(batch, Chunk(2, 0))
    assert not torch.allclose(full, chunked)
    assert decode(model, batch, Tokenizer(), DecodeConfig(max_tokens=3), chunk=Chunk(2, 0))


def test_phonemes_are_the_best_path():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=12, layers=1, heads=2, ffn=24, kernel=3, mels=12))
    model = CtcModel(encoder, 5, CtcModelConfig()).double()
    torch.nn.init.normal_(model.ctc.project.weight)
    batch = make_batch(90, 33)
    found = decode_phonemes(model, batch, ["<blk>", "a", "b", "c", "d"])
    model.eval()
    for row, hypothesis in enumerate(found):
        one = one_of(batch, row)
        log_probs = model.ctc(model.encoder(one.features_BTF, one.feature_lengths_B).frames_BSE)[0]
        path = [key for key, _ in itertools.groupby(log_probs.argmax(-1).tolist()) if key]
        assert list(hypothesis.ids) == path
        assert hypothesis.text.split() == ["-abcd"[key] for key in path]
        assert hypothesis.logprob == pytest.approx(float(log_probs.amax(-1).sum().detach()))
        assert len(hypothesis.token_entropies) == len(log_probs)
    assert decode_phonemes(model, make_batch(), ["<blk>"]) == []
