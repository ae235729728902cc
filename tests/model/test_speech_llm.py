import dataclasses
import itertools
import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from dsasr.data.batch import Batch
from dsasr.data.text.prompt import PromptIds
from dsasr.model.adaptors.mlp import MlpAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.dynamic_chunks import ChunkConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import FusedLmHead, LlmConfig, load_llm
from dsasr.model.sequence_layout import lay_out, plan_rows, ragged
from dsasr.model.speech_llm import SpeechLLM
from dsasr.model.token_embeddings import token_rms
from dsasr.utils.errors import UserError

VOCAB, PREFIX, SUFFIX, END = 41, [1, 2], [3], 4


def make_llm(tied=True, **options):
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **options,
    )
    return Qwen3ForCausalLM(config)


HINTED = {
    "en": PromptIds((1, 5, 6, 2), (3,)),
    "zh": PromptIds((), (7, 3)),
    "xx": PromptIds((9,), ()),
}


def make_model(cfg=None, dtype=torch.float64, dropout=0.0, chunks=None, llm=None):
    llm = llm or make_llm()
    torch.manual_seed(2)
    encoder = Encoder(
        EncoderConfig(width=12, layers=1, heads=2, ffn=24, kernel=3, mels=12, dropout=dropout)
    )
    adaptor = MlpAdaptor(AdaptorConfig(hidden=10), 12, 16, token_rms(llm))
    cfg = cfg or LlmConfig()
    return SpeechLLM(
        encoder, adaptor, llm, PREFIX, SUFFIX, 0, cfg, chunks=chunks, hinted=HINTED
    ).to(dtype)


def make_batch(frames=(70, 52, 17, 33), tokens=(6, 1, 3, 4), seed=3, mels=12):
    B = len(frames)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, max(frames, default=0), mels, generator=generator)
    ids = torch.randint(5, VOCAB, (B, max(tokens, default=0)), generator=generator)
    for row in range(B):
        features[row, frames[row] :] = 0
        ids[row, tokens[row] - 1] = END
        ids[row, tokens[row] :] = 0
    return Batch.blank(
        features,
        feature_lengths_B=torch.tensor(frames, dtype=torch.int64),
        tokens_BU=ids,
        token_lengths_B=torch.tensor(tokens, dtype=torch.int64),
        keys=tuple(f"key{row}" for row in range(B)),
        seed=seed,
    )


def plain_loss(model, batch):
    """One utterance at a time through the model's own forward, labels and all."""
    nll, count = 0.0, 0
    embed = model.llm.get_input_embeddings()
    for row, length in enumerate(batch.token_lengths_B.tolist()):
        T = batch.feature_lengths_B[row : row + 1]
        frames = model.encoder(batch.features_BTF[row : row + 1, : int(T)], T)
        speech, _ = model.adaptor(frames.frames_BSE, frames.lengths_B)
        ids = batch.tokens_BU[row, :length]
        hint = batch.hints[row] if batch.hints else ""
        before, after = dataclasses.astuple(HINTED[hint]) if hint else (PREFIX, SUFFIX)
        before, after = (embed(torch.tensor(side, dtype=torch.int64)) for side in (before, after))
        parts = [before, speech[0], after, embed(ids)]
        sequence = torch.cat(parts)
        labels = torch.full((len(sequence),), -100)
        labels[-length:] = ids
        output = model.llm(inputs_embeds=sequence[None], labels=labels[None])
        nll, count = nll + output.loss * length, count + length
    return nll / count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("hints", [(), ("zh", "", "en", "xx")], ids=["plain", "hinted"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pack", [0, 1, 16, 40, 1000])
def test_loss_and_gradients_equal_one_by_one_packed_or_not(pack, tied, hints):
    model = make_model(LlmConfig(pack=pack), llm=make_llm(tied)).eval()
    batch = dataclasses.replace(make_batch(), hints=hints)
    batch = dataclasses.replace(batch, features_BTF=batch.features_BTF.double())
    outputs = model(batch)
    plain = plain_loss(model, batch)
    torch.testing.assert_close(outputs.loss, plain, atol=1e-5, rtol=0, check_dtype=False)
    total, count = outputs.sums["nll"]
    assert float(count) == 14
    assert float(total / count) == pytest.approx(float(plain.detach()), abs=1e-5)
    expected = gradients(model, plain)
    for name, gradient in gradients(model, model(batch).loss).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_packing_holds_with_a_sliding_window(attn):
    options = {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    batch = make_batch()
    losses = []
    for pack in (0, 30):
        llm = make_llm(**options)
        llm.set_attn_implementation(attn)
        model = make_model(LlmConfig(pack=pack), dtype=torch.float32, llm=llm).eval()
        losses.append(model(batch).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


def test_an_utterance_does_not_depend_on_its_batch():
    model = make_model().eval()
    batch = make_batch()
    together = model(batch).sums["nll"][0]
    apart = 0
    for row in range(len(batch)):
        frames, tokens = int(batch.feature_lengths_B[row]), int(batch.token_lengths_B[row])
        utterance = make_batch((frames,), (tokens,))
        utterance = dataclasses.replace(
            utterance,
            features_BTF=batch.features_BTF[row : row + 1, :frames],
            tokens_BU=batch.tokens_BU[row : row + 1, :tokens],
        )
        apart = apart + model(utterance).sums["nll"][0]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_a_prompt_in_a_batch_is_that_of_its_hint_padded_on_the_left():
    model = make_model().eval()
    hints = ("zh", "", "en", "xx")
    batch = dataclasses.replace(make_batch(), hints=hints)
    batch = dataclasses.replace(batch, features_BTF=batch.features_BTF.double())
    embeds_BLD, lengths_B, speech = model.prompts(batch)
    embed = model.llm.get_input_embeddings()
    for row, hint in enumerate(hints):
        prompt = model.prompt_of(hint)
        own = embeds_BLD[row, embeds_BLD.shape[1] - int(lengths_B[row]) :]
        before, after = (
            embed(torch.tensor(s, dtype=torch.int64)) for s in (prompt.prefix, prompt.suffix)
        )
        heard, counts = model.adaptor(
            speech.frames_BSE[row : row + 1], speech.lengths_B[row : row + 1]
        )
        expected = torch.cat((before, heard[0, : int(counts[0])], after))
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=0)
    for audio in (True, False):
        plain = model(dataclasses.replace(batch, hints=("",) * 4), audio=audio).loss
        assert torch.equal(plain, model(dataclasses.replace(batch, hints=()), audio=audio).loss)
        assert not torch.equal(plain, model(batch, audio=audio).loss)


def test_a_language_is_named_if_training_named_it():
    model = make_model()
    assert [model.hint(lang) for lang in ("", "en", "en-GB", "ZH")] == ["", "en", "en", "zh"]
    with pytest.raises(UserError, match="'de' in its prompt: give one of en, xx, zh, or no"):
        model.hint("de")
    model.hinted = {}
    assert model.hint("de") == ""


def test_entropy_and_accuracy_are_of_the_same_predictions():
    model = make_model(llm=make_llm()).eval()
    head = model.head
    hidden, targets = torch.randn(9, 16, dtype=torch.float64), torch.arange(9)
    nll, entropy, correct = head(hidden, targets)
    log_probs = (hidden @ head.weight.T).log_softmax(-1)
    expected = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(entropy, expected, check_dtype=False, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        nll, -log_probs[targets, targets], check_dtype=False, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(correct, log_probs.argmax(-1) == targets)


def test_the_head_keeps_its_names_and_its_tie():
    tied, untied = make_model(llm=make_llm(True)), make_model(llm=make_llm(False))
    assert type(tied.head) is FusedLmHead
    assert tied.head.weight is tied.llm.get_input_embeddings().weight
    assert "llm.lm_head.weight" not in dict(tied.named_parameters())
    assert "llm.lm_head.weight" in dict(untied.named_parameters())
    assert FusedLmHead.replace(tied.llm) is tied.head


def test_without_audio_the_speech_is_left_out():
    model = make_model().eval()
    batch = make_batch()
    silent = dataclasses.replace(batch, features_BTF=torch.randn_like(batch.features_BTF))
    assert torch.equal(model(batch, audio=False).loss, model(silent, audio=False).loss)
    assert not torch.equal(model(batch).loss, model(silent).loss)


@pytest.mark.parametrize("recompute", ["", "all", "cheap"])
@pytest.mark.parametrize(
    "parts", [("adaptor",), ("adaptor", "llm"), ("encoder", "adaptor", "llm"), ("llm",)]
)
def test_gradients_reach_the_trained_parts_only(parts, recompute):
    config = LlmConfig(activation_checkpointing=bool(recompute), recompute=recompute or "all")
    model = make_model(config, dropout=0.5).train()
    model.requires_grad_(False)
    for part in parts:
        getattr(model, part).requires_grad_(True)
    loss = model(make_batch()).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name.split(".")[0] in parts), name
    assert model.encoder.training == ("encoder" in parts)


def test_what_is_recomputed_changes_no_gradient():
    gradients = []
    for config in (LlmConfig(), LlmConfig(activation_checkpointing=True, recompute="cheap")):
        model = make_model(config).train()
        model(make_batch()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, cheap in zip(*gradients, strict=True):
        assert torch.equal(plain, cheap)


def test_frozen_parts_drop_nothing_out():
    llm = make_llm(attention_dropout=0.5)
    model = make_model(LlmConfig(activation_checkpointing=True), dropout=0.5, llm=llm)
    model.requires_grad_(False)
    model.adaptor.requires_grad_(True)
    quiet = model.eval()(make_batch()).loss
    loss = model.train()(make_batch()).loss
    assert torch.equal(quiet, loss)
    # Yet the frozen layers recompute: gradients pass through them.
    layers = [m for m in model.llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    assert all(layer.training for layer in layers)
    assert not any(layer.self_attn.training for layer in layers)
    model.requires_grad_(True)
    assert not torch.equal(model(make_batch()).loss, quiet)
    assert model.encoder.training
    assert model.llm.training


def test_a_step_depends_on_its_batch_alone():
    model = make_model(dropout=0.3, chunks=ChunkConfig(full_share=0.2, max_size=4)).train()
    first = model(make_batch()).loss
    torch.manual_seed(99)
    assert torch.equal(first, model(make_batch()).loss)
    reseeded = dataclasses.replace(make_batch(), seed=4)
    assert not torch.equal(first, model(reseeded).loss)


@pytest.mark.parametrize("batch", [make_batch(), make_batch((), ())], ids=["batch", "empty"])
def test_targets_are_counted_before_the_forward_pass(batch):
    model = make_model()
    outputs = model(batch)
    assert model.count_targets(batch) == float(outputs.targets)
    assert float(outputs.sums["nll"][0]) == pytest.approx(float(outputs.loss_sum.detach()))


def test_a_batch_without_utterances_runs_every_part_and_weighs_nothing():
    model = make_model()
    outputs = model(make_batch((), ()))
    outputs.loss.backward()
    assert outputs.loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name
    assert all(float(count) == 0 for _, count in outputs.sums.values())


@pytest.mark.parametrize("pack", [0, 5, 12, 30])
def test_rows_hold_everything_once_and_no_more_than_they_may(pack):
    lengths = [3, 11, 5, 5, 1, 30, 8, 2]
    rows = plan_rows(lengths, pack)
    assert sorted(itertools.chain(*rows)) == list(range(8))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= pack
    if pack == 30:
        assert len(rows) == 3


def test_rows_are_filled_evenly_for_all_are_padded_to_the_longest():
    lengths = [40] * 9
    rows = plan_rows(lengths, 160)  # first fit: 4, 4 and 1
    assert [len(row) for row in rows] == [3, 3, 3]
    # Not where it would need longer rows: 3 + 3 and 2 + 2 + 2 fill two of 6.
    assert sorted(
        sum((3, 3, 2, 2, 2)[i] for i in row) for row in plan_rows([3, 3, 2, 2, 2], 6)
    ) == [6, 6]


def test_the_layout_is_a_partition_of_the_rows():
    speech, tokens = torch.tensor([3, 1, 5]), torch.tensor([2, 4, 1])
    layout = lay_out(speech, tokens, torch.tensor([2, 2, 2]), 1, pack=14)
    positions = torch.cat((layout.speech_N, layout.text_M)).tolist()
    assert len(set(positions)) == len(positions) == int((speech + tokens - 1 + 3).sum())
    assert layout.positions_RL.shape == (layout.rows, layout.length)
    flat = layout.positions_RL.flatten()
    assert flat[layout.starts_B].tolist() == [0, 0, 0]
    assert flat[layout.targets_N].tolist() == [5, 6, 3, 4, 5, 6, 7]
    assert ragged(torch.tensor([5, 0]), torch.tensor([0, 2])).tolist() == [0, 1]


def test_models_load_from_local_folders_alone(tmp_path):
    llm = make_llm(tied=False)
    llm.save_pretrained(tmp_path / "good")
    loaded = load_llm(tmp_path / "good", dtype=torch.bfloat16, dropout=0.1)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.attention_dropout == 0.1
    torch.testing.assert_close(
        loaded.lm_head.weight.float(), llm.lm_head.weight, atol=0.02, rtol=0.02
    )
    with torch.device("meta"):
        empty = load_llm(tmp_path / "good", weights=False)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert token_rms(llm) == pytest.approx(0.3, rel=0.1)


def test_bad_folders_end_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_llm(tmp_path / "none")
    for name, text in (("torn", "{"), ("odd", '{"model_type": "nonesuch"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot load|config\.json: ") as caught:
            load_llm(tmp_path / name)
        assert "\n" not in str(caught.value)
    make_llm().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load"):
        load_llm(tmp_path / "bare")
    make_llm().save_pretrained(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config.update(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="missing weights"):
        load_llm(tmp_path / "short")


def test_other_heads_and_empty_prompts_are_refused():
    llm = make_llm()
    llm.lm_head = torch.nn.Sequential(llm.lm_head)
    with pytest.raises(UserError, match="no linear LM head"):
        FusedLmHead.replace(llm)
    with pytest.raises(UserError, match="prompt"):
        model = make_model()
        SpeechLLM(model.encoder, model.adaptor, model.llm, [], [], 0, LlmConfig())
    with pytest.raises(UserError, match="prompt"):
        SpeechLLM(
            model.encoder, model.adaptor, model.llm, [1], [], 0, LlmConfig(),
            hinted={"en": PromptIds((), ())},
        )  # fmt: skip
    with pytest.raises(UserError, match="attn"):
        LlmConfig(attn="fast")
