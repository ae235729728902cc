"""Tokenizers of both kinds, trained on the same sentences."""

import pytest

from dsasr.data.text.tokenizers import IM_END, IM_START, Tokenizer, load_tokenizer
from dsasr.data.text.train_tokenizer import train_tokenizer

SENTENCES = [
    "turn on the kitchen lights",
    "play happy music",
    "turn off the radio",
    "打开卧室的灯",
    "请打开 wifi 吧",
    "anna 喜欢唱歌",
] * 10
LEXICON = """\
;;; a comment
HELLO  HH AH0 L OW1
HELLO(2)  HH EH0 L OW1
read  R EH1 D # past tense
don't\tD OW1 N T
你好 n i3 h ao3
你 n i3
好 h ao3
"""


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return SENTENCES


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    train_tokenizer([folder / "text.txt"], folder / "tok", size=400)
    return folder / "tok"


@pytest.fixture(scope="session")
def trained_tokenizer(trained):
    return load_tokenizer(trained)


@pytest.fixture(scope="session")
def hugging_face(make_hugging_face):
    """A byte-level BPE tokenizer with Qwen's special tokens, as a saved folder."""
    return make_hugging_face(
        ["<|endoftext|>", IM_START, IM_END], eos_token=IM_END, pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def make_hugging_face(tmp_path_factory):
    """``make(specials, bos=…, template=…, eos_token=…)``: a byte-level BPE tokenizer's folder.

    ``bos``: what it puts before a text itself; ``template``: its chat template.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def make(specials, bos="", template=None, **names):
        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=alphabet
        )
        fast.train_from_iterator(SENTENCES, trainer)
        if bos:
            fast.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, specials.index(bos))]
            )
        others = [token for token in specials if token not in names.values()]
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=fast, additional_special_tokens=others, **names
        )
        wrapped.chat_template = template
        folder = tmp_path_factory.mktemp("hf")
        wrapped.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(params=["trained", "hugging_face"])
def tokenizer(request) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture
def lexicon(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text(LEXICON, encoding="utf-8")
    return path
