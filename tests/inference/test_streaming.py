"""Streams end in what decoding of the whole utterance gives, whatever company they are in."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dsasr.data.audio.features import Cmvn, FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.data.batch import Batch
from dsasr.data.text.characters import BOUNDARY, CharacterPhonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.prompt import PromptIds
from dsasr.data.text.speller import Speller
from dsasr.evaluation.decode import DecodeConfig, decode, decode_nbest
from dsasr.inference.recognizer import NoSpeechConfig, Recognizer
from dsasr.inference.segmentation import SegmentationConfig
from dsasr.inference.stream_events import Final, Partial
from dsasr.inference.streaming import StreamingConfig, StreamingRecognizer
from dsasr.model.adaptors.protocol import AdaptorConfig, build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import LlmConfig
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.errors import UserError

CHUNK = Chunk(16, 4)
FBANK = FbankFrontEnd(FbankConfig(mels=12), Cmvn(torch.full((12,), 12.0), torch.full((12,), 3.0)))
EVERYTHING = NoSpeechConfig(
    loudness_db=-1000, confidence=0, seconds=0, heard=-math.inf, scored_confidence=0
)


class Tokenizer:
    end_id = 4

    def decode(self, ids) -> str:
        return " ".join(f"w{i}" for i in ids)


class Marked:
    """Speech is where samples are not 0."""

    name = "marked"

    def feed(self, wave: np.ndarray) -> np.ndarray:
        return np.abs(wave.reshape(-1, 160)).max(axis=1) > 0


@pytest.fixture(autouse=True)
def marked_speech(monkeypatch):
    monkeypatch.setattr("dsasr.inference.streaming.build_vad", lambda kind, rate: Marked())


HINTED = {
    "en": PromptIds((1, 5, 2), (3,)),
    "zh": PromptIds((1, 2), (6, 3)),
    "xx": PromptIds((), (7,)),
    "yy": PromptIds((8,), ()),
}


def model_of(adaptor: AdaptorConfig, prefix=(1, 2), suffix=(3,), cached=True) -> SpeechLLM:
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
        initializer_range=0.5,
    )  # fmt: skip
    encoder = Encoder(EncoderConfig(width=12, layers=2, heads=2, ffn=24, kernel=5, mels=12))
    units = 6 if adaptor.reads_ctc else 0
    return SpeechLLM(
        encoder, build_adaptor(adaptor, 12, 16, 0.5, units), Qwen3ForCausalLM(config),
        list(prefix), list(suffix), 0, LlmConfig(), ctc=CtcHead(12, units) if units else None,
        cached=cached, hinted=HINTED,
    ).double().eval()  # fmt: skip


def recognizer_of(model: SpeechLLM, config: StreamingConfig | None = None) -> StreamingRecognizer:
    segmentation = SegmentationConfig(max_seconds=6, pause_seconds=0.5, margin_seconds=0.2)
    whole = Recognizer(
        model, Tokenizer(), FBANK, segmentation, DecodeConfig(max_tokens=20), EVERYTHING
    )
    return StreamingRecognizer(whole, config)


def speech(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * 16000), np.float32)


def whole_text(
    model: SpeechLLM, wave: np.ndarray, chunk: Chunk | None = CHUNK, hint: str = ""
) -> str:
    batch = batch_of(wave, hint)
    return decode(model, batch, Tokenizer(), DecodeConfig(max_tokens=20), chunk=chunk)[0].text


def batch_of(wave: np.ndarray, hint: str = "") -> Batch:
    features = FBANK.features(torch.from_numpy(wave))[None]
    return Batch.blank(
        features, keys=("a",), langs=("",), hints=(hint,), durations=(len(wave) / 16000,),
        feature_lengths_B=torch.tensor([features.shape[1]]),
    )  # fmt: skip


def run(stream, wave: np.ndarray, piece: int) -> list[Partial | Final]:
    events = []
    for start in range(0, len(wave), piece):
        events += stream.feed(wave[start : start + piece])
    return events + stream.finish()


def finals(events) -> list[str]:
    return [event.text for event in events if isinstance(event, Final)]


ADAPTORS = {
    "mlp": AdaptorConfig(hidden=10),
    "mlp-3": AdaptorConfig(hidden=10, stack=3),
    "conv": AdaptorConfig(kind="conv", hidden=10),
    "qformer": AdaptorConfig(kind="qformer", hidden=8, heads=2, queries=2),
    "ctc": AdaptorConfig(kind="ctc"),
    "ctc-frames": AdaptorConfig(kind="ctc", merge=False, frames=True),
}
WAVES = [speech(2.31, 0), speech(0.15, 1), speech(1.28, 2), speech(3.7, 3)]


@pytest.mark.parametrize("kind", ADAPTORS)
def test_a_stream_ends_in_the_text_of_the_whole_utterance(kind):
    model = model_of(ADAPTORS[kind])
    for wave in (WAVES[0], WAVES[3]):
        padded = np.concatenate((wave, silence(0.01 * (-len(wave) % 160 > 0))))
        expected = whole_text(model, padded[: -(-len(wave) // 160) * 160])
        assert finals(run(recognizer_of(model).stream(), wave, 1000)) == [expected]


@pytest.mark.parametrize(
    "cached,prefix,suffix", [(False, (1, 2), (3,)), (True, (), (3,)), (True, (1, 2), ())]
)
def test_other_prompts_and_models_without_a_cache(cached, prefix, suffix):
    model = model_of(ADAPTORS["mlp"], prefix, suffix, cached)
    wave = speech(1.6, 5)
    assert finals(run(recognizer_of(model).stream(), wave, 4000)) == [whole_text(model, wave)]


def test_each_stream_has_the_prompt_of_its_language():
    model, wave = model_of(ADAPTORS["mlp"]), speech(1.6, 5)
    langs = ["en", "", "zh-CN", "xx", "yy", "en"]
    expected = [whole_text(model, wave, hint=model.hint(lang)) for lang in langs]
    assert len(set(expected)) > 2
    recognizer = recognizer_of(model)
    streams = [recognizer.stream(lang) for lang in langs]
    for stream in streams:
        stream.push(wave)
        stream.end()
    assert [finals(events) for events in recognizer.advance(streams)] == [[t] for t in expected]
    own = StreamingRecognizer(recognizer.recognizer, lang="en")
    assert finals(own.feed(wave) + own.finish()) == expected[:1]
    for refused in (lambda: recognizer.stream("de"), lambda: StreamingRecognizer(
        recognizer.recognizer, lang="de"
    )):  # fmt: skip
        with pytest.raises(UserError, match="give one of en, xx, yy, zh"):
            refused()


@pytest.mark.parametrize("scores", ["joint", "rescoring"])
def test_final_texts_are_ranked_by_the_ctc_head_and_have_word_times(scores):
    model = model_of(ADAPTORS["mlp"])
    vocab = PhonemeVocab([*"0123456789w", BOUNDARY])
    speller = Speller(CharacterPhonemizer(), vocab)
    model.attach_ctc_head(CtcHead(12, len(vocab)).double().eval(), speller)
    cfg = DecodeConfig(beam=4, ctc_weight=0.8, ctc_scores=scores, max_tokens=9)
    greedy, waves, changed = DecodeConfig(max_tokens=9), (WAVES[0], WAVES[3], WAVES[2]), 0
    recognizer = recognizer_of(model)
    recognizer.recognizer = dataclasses.replace(recognizer.recognizer, decode=cfg)
    streams = [recognizer.stream() for _ in waves]
    for stream, wave in zip(streams, waves, strict=True):
        stream.push(np.concatenate((silence(0.5), wave)))
        stream.end()
    for events, wave in zip(recognizer.advance(streams), waves, strict=True):
        (final,) = [event for event in events if isinstance(event, Final)]
        padded = np.concatenate((silence(0.2), wave, silence(0.01)))
        padded = padded[: -(-len(wave) // 160) * 160 + 3200]
        (best,) = decode_nbest(
            model, batch_of(padded), Tokenizer(), cfg, chunk=CHUNK, with_ctc_score=True
        )[0]
        assert final.text == best.text
        changed += (
            best.text != decode(model, batch_of(padded), Tokenizer(), greedy, chunk=CHUNK)[0].text
        )
        assert final.heard == pytest.approx(best.ctc_score.margin_per_unit, abs=1e-3)
        assert [word.text for word in final.words] == final.text.split()
        times = [second for word in final.words for second in (word.start, word.end)]
        assert times == sorted(times) and times[0] >= 0.5 - 0.01
        assert times[-1] <= 0.5 + len(wave) / 16000 + 0.01
        frames = [0.3 + 0.04 * span.start for span in best.ctc_score.words]
        assert [w.start for w in final.words] == pytest.approx(
            [max(start, 0.5) for start in frames], abs=0.011
        )
    assert changed


def test_scores_that_the_model_cannot_give_are_refused_before_a_stream_begins():
    whole = recognizer_of(model_of(ADAPTORS["mlp"])).recognizer
    scored = dataclasses.replace(whole, decode=DecodeConfig(beam=4, ctc_weight=0.5))
    with pytest.raises(UserError, match="needs a model with its CTC head"):
        StreamingRecognizer(scored)


def test_an_encoder_without_chunks_hears_the_whole_utterance():
    model = model_of(ADAPTORS["mlp"])
    model.encoder.takes_chunks = False
    wave = speech(1.6, 5)
    events = run(recognizer_of(model).stream(), wave, 4000)
    assert finals(events) == [whole_text(model, wave, None)]
    assert sum(isinstance(event, Partial) for event in events) == 2


def test_streams_in_a_batch_are_each_as_alone():
    """Streams start at different times, with pauses and silence between utterances."""
    model = model_of(ADAPTORS["mlp"])
    waves = [
        np.concatenate([*(x for w in order for x in (silence(0.7), WAVES[w])), silence(0.7)])
        for order in ((0, 2), (3,), (1, 0, 2), (2, 2))
    ]
    alone = [run(recognizer_of(model).stream(), wave, 1600) for wave in waves]
    assert len(finals(alone[2])) == 3 and finals(alone[3])[0] == finals(alone[3])[1]
    recognizer = recognizer_of(model)
    streams = [recognizer.stream() for _ in waves]
    together: list[list] = [[] for _ in waves]
    for start in range(0, 16000 * 9, 1600):
        for index, (stream, wave) in enumerate(zip(streams, waves, strict=True)):
            part = wave[max(start - 3200 * index, 0) : max(start + 1600 - 3200 * index, 0)]
            if len(part):
                stream.push(part)
            elif start > 3200 * index:
                stream.end()
        for heard, events in zip(together, recognizer.advance(streams), strict=True):
            heard.extend(events)
    assert together == alone


def test_silence_after_a_transcript_gives_nothing():
    recognizer = recognizer_of(model_of(ADAPTORS["mlp"]))
    stream = recognizer.stream()
    heard = stream.feed(np.concatenate((speech(1.5, 1), silence(0.8))))
    assert len(finals(heard)) == 1 and not stream.utterances
    for _ in range(20):
        assert stream.feed(silence(1.0)) == []
    assert stream.finish() == []
    assert recognizer.stream().finish() == []


def test_partial_texts_come_each_chunk_and_keep_their_settled_part():
    recognizer = recognizer_of(model_of(ADAPTORS["mlp"]), StreamingConfig(open_words=2))
    events = run(recognizer.stream(), speech(5.5, 8), 1600)
    partial = [event for event in events if isinstance(event, Partial)]
    assert len(partial) == 8 and isinstance(events[-1], Final)
    for before, after in itertools.pairwise(partial):
        assert after.text.startswith(before.text[: before.settled])
        assert len(before.text[before.settled :].split()) <= 2
        assert after.end == pytest.approx(before.end + 0.64, abs=0.11)


def test_what_was_shown_is_taken_back_where_it_was_no_speech():
    recognizer = recognizer_of(model_of(ADAPTORS["mlp"]))
    recognizer.recognizer = dataclasses.replace(
        recognizer.recognizer, no_speech=NoSpeechConfig(loudness_db=0)
    )
    events = run(recognizer.stream(), speech(1.5, 1), 1600)
    assert events[-1].no_speech and events[-1].text == "" and len(events) > 1
    assert run(recognizer.stream(), speech(0.3, 1), 1600) == []


def test_bad_samples_are_named_and_change_nothing():
    model = model_of(ADAPTORS["mlp"])
    stream, wave = recognizer_of(model).stream(), speech(1.6, 5)
    events = stream.feed(wave[:8000])
    for bad, words in (
        (np.full(100, np.nan, np.float32), "not finite"),
        (np.full(100, 3e4, np.float32), "divide by 32,768"),
        (np.zeros((100, 2), np.float32), "mix its channels"),
        (np.zeros(100, np.int64), "int16 or float32"),
    ):
        with pytest.raises(UserError, match=words):
            stream.feed(bad)
    events += stream.feed(torch.from_numpy(wave[8000:])) + stream.finish()
    assert finals(events) == [whole_text(model, wave)]
    with pytest.raises(UserError, match="has ended"):
        stream.feed(wave)


def test_a_chunk_is_a_whole_number_of_encoder_frames():
    with pytest.raises(UserError, match="give 680ms"):
        recognizer_of(model_of(ADAPTORS["mlp"]), StreamingConfig(chunk_seconds=0.67))


def test_a_live_utterance_goes_on_where_a_file_would_be_cut():
    """Training's utterances and pauses say how files are cut; `pause_seconds` ends live ones."""
    live = recognizer_of(model_of(AdaptorConfig(hidden=10)), StreamingConfig(partials=False))
    files = dataclasses.replace(
        live.recognizer.segmentation, max_seconds=2.0, whole_seconds=4.0, pause_seconds=0.1
    )
    live.recognizer = dataclasses.replace(live.recognizer, segmentation=files)
    wave = np.concatenate((speech(1.0, 0), silence(0.2), speech(1.0, 1), silence(1.0)))
    (final,) = [e for e in run(live, wave, 1600) if isinstance(e, Final)]
    assert final.end - final.start >= 2.2
