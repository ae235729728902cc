import dataclasses
import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dsasr.data.batch import Batch
from dsasr.evaluation.beam_search import BeamSearch
from dsasr.evaluation.decode import DecodeConfig, decode, decode_nbest
from dsasr.model.adaptors.mlp import MlpAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.ctc import CtcHead, ctc_log_prob
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
    adaptor = MlpAdaptor(AdaptorConfig(hidden=10), 12, 16, 0.5)
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


def select(batch, row):
    """The utterance ``row`` as a batch of its own."""
    T = int(batch.feature_lengths_B[row])
    return dataclasses.replace(
        make_batch(T), features_BTF=batch.features_BTF[row : row + 1, :T], keys=(batch.keys[row],)
    )


def next_log_probs(model, batch, ids):
    """The model's own forward over the whole sequence; the last position's prediction."""
    embeds, *_ = model.prompts(batch)
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
    (hypothesis,) = decode(model, batch, Tokenizer(), cfg)
    ids, entropies = [], []
    while len(ids) < 9 and (not ids or ids[-1] != END):
        log_probs = next_log_probs(model, batch, ids)
        entropies.append(float(-(log_probs.exp() * log_probs).sum()))
        ids.append(int(log_probs.argmax()))
    assert hypothesis.finished == (ids[-1] == END)
    assert list(hypothesis.ids) == ids[: -1 if hypothesis.finished else None]
    assert hypothesis.text == " ".join(map(str, hypothesis.ids))
    assert hypothesis.logprob == pytest.approx(score(model, batch, ids), abs=1e-4)
    assert hypothesis.token_entropies == pytest.approx(entropies, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("seed", [0, 4])
def test_a_batch_decodes_like_its_utterances_one_by_one(beam, seed):
    model = make_model(seed=seed)
    batch = make_batch(90, 5, 41, 64, 17)
    cfg = DecodeConfig(beam=beam, tokens_per_second=20, extra_tokens=2)
    together = decode(model, batch, Tokenizer(), cfg)
    assert model.training
    for row, batched in enumerate(together):
        (single,) = decode(model, select(batch, row), Tokenizer(), cfg)
        assert (batched.key, batched.ids, batched.finished) == (
            single.key,
            single.ids,
            single.finished,
        )
        assert batched.logprob == pytest.approx(single.logprob, abs=1e-5)
        assert batched.token_entropies == pytest.approx(single.token_entropies, abs=1e-5)
        assert len(batched.ids) <= cfg.token_limit(batch.durations[row])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@torch.no_grad()
def test_an_exhaustive_beam_finds_the_best_transcript(penalty):
    """Against all sequences of up to three tokens over a vocabulary of five."""
    model, batch = make_model(vocab=5, seed=2).eval(), make_batch(40)
    cfg = DecodeConfig(beam=200, max_tokens=3, length_penalty=penalty)
    (hypothesis,) = decode(model, batch, Tokenizer(), cfg)
    tokens = [token for token in range(5) if token != END]
    ended = [(*body, END) for n in range(3) for body in itertools.product(tokens, repeat=n)]
    best = max(ended, key=lambda ids: score(model, batch, ids) / len(ids) ** penalty)
    assert hypothesis.finished
    assert hypothesis.ids == best[:-1]
    assert hypothesis.logprob == pytest.approx(score(model, batch, best), abs=1e-4)


class Table:
    """A language model of random next-token logits, one row per prefix."""

    def __init__(self, seed, vocab=5, spread=2.5):
        self.seed, self.vocab, self.spread = seed, vocab, spread

    def logits(self, ids):
        number = hash((self.seed, tuple(ids))) % 2**31
        generator = torch.Generator().manual_seed(number)
        return self.spread * torch.randn(self.vocab, generator=generator)

    def search(self, cfg, limit, **options):
        """The best beam, and the steps that it took."""
        search, steps = BeamSearch([limit], END, cfg, **options), 0
        while search.active:
            prefixes = [[step.token for step in beam.path()] for beam in search.active]
            search.advance(torch.stack([self.logits(ids) for ids in prefixes]))
            steps += 1
        return search.best(0), steps


@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (2, 0.0), (5, 0.6), (10, 1.0)])
def test_a_beam_is_never_less_likely_than_greedy(width, penalty):
    greedy_cfg = DecodeConfig(length_penalty=penalty)
    cfg = DecodeConfig(beam=width, length_penalty=penalty)
    better = 0
    for seed in range(50):
        table = Table(seed)
        greedy, _ = table.search(greedy_cfg, 8)
        beam, _ = table.search(cfg, 8)
        if greedy.token != END:
            continue  # cut: the beam may end, which is worth more than to be likely
        scores = [b.logprob / b.length**penalty for b in (greedy, beam)]
        assert beam.token == END and scores[1] >= scores[0] - 1e-9, seed
        better += scores[1] > scores[0] + 1e-9
    assert better > 3


def test_a_search_goes_on_until_no_open_beam_can_win():
    # At once three endings that are unlikely, and one path that is nearly sure at each later step.
    class Model(Table):
        def logits(self, ids):
            probs = torch.full((5,), 1e-9)
            if ids and ids[0] == 0 and len(ids) < 6:
                probs[0] = 1.0
            elif ids:
                probs[END] = 1.0
            else:
                probs[:] = torch.tensor([0.3, 0.35, 0.2, 0.1, 0.05])
            return probs.log()

    best, steps = Model(0).search(DecodeConfig(beam=3), 40)
    assert [step.token for step in best.path()] == [0] * 6 + [END]
    # Then no open beam can: it does not run to the limit.
    assert steps < 12
    # Without a penalty for length the short one is likelier, and found at once.
    best, steps = Model(0).search(DecodeConfig(beam=3, length_penalty=0), 40)
    assert [step.token for step in best.path()] == [1, END] and steps == 2


def test_what_the_head_heard_decides_the_end_of_a_search():
    # The head hears five tokens; what the language model alone prefers ends earlier.
    def heard(beam):
        return -1.0 * abs(beam.length - 5)

    cfg = DecodeConfig(beam=4, ctc_weight=2.0)
    for seed in range(10):
        table = Table(seed, spread=1.0)
        best, _ = table.search(cfg, 8, ctc_log_prob=heard)
        wide, _ = table.search(DecodeConfig(beam=60, ctc_weight=2.0), 8, ctc_log_prob=heard)
        score = [b.logprob + 2.0 * heard(b) for b in (best, wide)]
        assert score[0] <= score[1] + 1e-9
        greedy, _ = table.search(DecodeConfig(), 8)
        if greedy.token == END:
            assert score[0] >= greedy.logprob + 2.0 * heard(greedy) - 1e-9
    none, _ = Table(1).search(cfg, 8, ctc_log_prob=lambda beam: -math.inf)
    assert none.token == END


@pytest.mark.parametrize("beam", [1, 2])
def test_ranks_keep_step_until_the_last_is_done(beam):
    """Each rank runs as many forward passes as the slowest, also one without utterances."""
    model = make_model()
    cfg = DecodeConfig(beam=beam, max_tokens=6)
    passes = []
    model.llm.base_model.register_forward_hook(lambda *_: passes.append(1))

    def run(batch, steps_of_others):
        passes.clear()
        others_active = iter([True] * steps_of_others)
        hypotheses = decode(
            model, batch, Tokenizer(), cfg,
            any_rank=lambda active: next(others_active, False) or active,
        )  # fmt: skip
        return hypotheses, len(passes)

    hypotheses, count = run(make_batch(50, 30), 0)
    assert run(make_batch(50, 30), 20) == (hypotheses, 21)
    assert run(make_batch(), 20) == ([], 21)
    assert run(make_batch(), 0) == ([], 1)
    assert count <= 6


def test_the_limit_follows_the_audio():
    cfg = DecodeConfig(max_tokens=50, tokens_per_second=10, extra_tokens=3)
    assert [cfg.token_limit(seconds) for seconds in (0.0, 1.01, 60.0)] == [3, 14, 50]
    with pytest.raises(UserError):
        DecodeConfig(beam=0)


def test_streaming_changes_what_the_encoder_sees():
    model, batch = make_model(), make_batch(90)
    full, *_ = model.prompts(batch)
    chunked, *_ = model.prompts(batch, Chunk(2, 0))
    assert not torch.allclose(full, chunked)
    assert decode(model, batch, Tokenizer(), DecodeConfig(max_tokens=3), chunk=Chunk(2, 0))


@pytest.mark.parametrize("beam", [1, 3])
def test_without_the_cache_the_same_is_decoded(beam):
    model, batch = make_model(seed=4), make_batch(90, 5, 41, 64)
    cfg = DecodeConfig(beam=beam, max_tokens=7)
    cached = decode(model, batch, Tokenizer(), cfg)
    model.cached = False
    for a, b in zip(cached, decode(model, batch, Tokenizer(), cfg), strict=True):
        assert a.ids == b.ids and a.logprob == pytest.approx(b.logprob, abs=1e-6)


@pytest.mark.parametrize("beam", [1, 3])
@torch.no_grad()
def test_a_state_space_model_decodes_from_its_state(beam):
    """Mamba-2 takes its cache under another name, and passed under a wrong one it is ignored."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba2", vocab_size=12, hidden_size=16, state_size=8, num_hidden_layers=2, num_heads=4,
        head_dim=8, n_groups=1, chunk_size=16, initializer_range=0.5,
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config)
    encoder = Encoder(EncoderConfig(width=12, layers=1, heads=2, ffn=24, kernel=3, mels=12))
    adaptor = MlpAdaptor(AdaptorConfig(hidden=10), 12, 16, 0.5)
    model = SpeechLLM(encoder, adaptor, llm, [1, 2], [3], 0, LlmConfig(attn="eager")).eval()
    batch = make_batch(90, 5, 41)
    batch = dataclasses.replace(batch, features_BTF=batch.features_BTF.float())
    for hypothesis in decode(model, batch, Tokenizer(), DecodeConfig(beam=beam, max_tokens=8)):
        row = batch.keys.index(hypothesis.key)
        ids = [*hypothesis.ids, END] if hypothesis.finished else list(hypothesis.ids)
        expected = score(model, select(batch, row), ids)
        assert hypothesis.logprob == pytest.approx(expected, abs=1e-3)


def test_n_best_are_the_best_of_an_exhaustive_search():
    cfg = DecodeConfig(beam=300, length_penalty=0.0)
    for seed in range(5):
        table = Table(seed)
        search = BeamSearch([4], END, cfg, keep=6)
        while search.active:
            prefixes = [[step.token for step in beam.path()] for beam in search.active]
            search.advance(torch.stack([table.logits(ids) for ids in prefixes]))
        found = [(score, [step.token for step in beam.path()]) for score, beam in search.results(0)]
        every = {}
        for length in range(4):
            for ids in itertools.product(range(END), repeat=length):
                path = [*ids, END]
                log_probs = [table.logits(path[:i]).log_softmax(-1)[t] for i, t in enumerate(path)]
                every[tuple(path)] = float(sum(log_probs))
        expected = sorted(every.values(), reverse=True)[:6]
        assert [score for score, _ in found] == pytest.approx(expected, abs=1e-4)
        assert [every[tuple(ids)] for _, ids in found] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_the_first_of_n_best_is_what_decode_gives(beam):
    model = make_model()
    cfg = DecodeConfig(beam=beam, max_tokens=6)
    batch = make_batch(60, 40)
    lists = decode_nbest(model, batch, Tokenizer(), cfg, nbest=beam)
    alone = decode(model, batch, Tokenizer(), cfg)
    assert [found[0].ids for found in lists] == [h.ids for h in alone]
    for found in lists:
        assert len({h.text for h in found}) == len(found) <= beam
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        assert all(h.ctc_score is None for h in found)


class Letters:
    """Token i writes i % 3 units, of five that there are."""

    writes_text = True

    def __call__(self, text, lang):
        return [1 + int(t) % 5 for t in text.split() for _ in range(int(t) % 3)]

    def pronunciations(self, text, lang):
        return [self(text, lang)]


def hearing_model(seed=1):
    model = make_model(seed=seed)
    model.attach_ctc_head(CtcHead(12, 6).double(), Letters())
    return model


def test_joint_scores_in_a_batch_are_those_of_the_transcripts_alone():
    model, batch = hearing_model().eval(), make_batch(90, 25, 61, 40)
    batch = dataclasses.replace(batch, langs=("",) * 4)
    cfg = DecodeConfig(beam=3, ctc_weight=0.8, tokens_per_second=20, extra_tokens=2)
    assert cfg.is_joint(model)
    speech = model.prompts(batch).speech
    together = decode_nbest(model, batch, Tokenizer(), cfg, nbest=2)
    for row, found in enumerate(together):
        single = dataclasses.replace(select(batch, row), langs=("",))
        for batched, alone in zip(
            found, decode_nbest(model, single, Tokenizer(), cfg, nbest=2)[0], strict=True
        ):
            assert (batched.ids, batched.finished) == (alone.ids, alone.finished)
            assert batched.score == pytest.approx(alone.score, abs=1e-5)
            heard = ctc_log_prob(
                speech.log_probs_BSP[row, : int(speech.log_prob_lengths_B[row])].double(),
                Letters()(batched.text, ""),
            )
            expected = batched.logprob + cfg.ctc_weight * heard
            assert batched.score == pytest.approx(expected, abs=1e-4)


def test_units_decide_whether_the_head_scores_each_token():
    model, cfg = hearing_model(), DecodeConfig(beam=4, ctc_weight=0.5)
    assert cfg.is_joint(model)
    assert not dataclasses.replace(cfg, ctc_scores="rescoring").is_joint(model)
    assert not DecodeConfig(beam=4).is_joint(model)
    model.speller.writes_text = False  # phonemes
    assert not cfg.is_joint(model)
    with pytest.raises(UserError, match="ctc_scores=joint needs a CTC head that writes characters"):
        dataclasses.replace(cfg, ctc_scores="joint").is_joint(model)
    assert decode(hearing_model(), make_batch(), Tokenizer(), cfg) == []


def test_a_joint_search_finds_no_worse_transcripts_than_rescoring():
    """The score at the end is the same; what is open is ranked by what the head heard too."""
    better = 0
    for seed in range(8):
        model, batch = hearing_model(seed), make_batch(60, 45)
        batch = dataclasses.replace(batch, langs=("", ""))
        cfg = DecodeConfig(beam=2, ctc_weight=1.0, max_tokens=8)
        scores = [
            [h.score if h.finished else -math.inf for h in decode(model, batch, Tokenizer(), c)]
            for c in (cfg, dataclasses.replace(cfg, ctc_scores="rescoring"))
        ]
        better += sum(a > b + 1e-6 for a, b in zip(*scores, strict=True))
        better -= sum(b > a + 1e-6 for a, b in zip(*scores, strict=True))
    assert better > 0
