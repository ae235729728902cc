import pytest

from dsasr.data.dataloader.dataloader import DatasetConfig
from dsasr.stages import StageConfig
from dsasr.utils.errors import UserError
from dsasr.utils.names import is_language, is_speaker

BAD = ["", "a b", "../x", "a/b", "<script>", "a\x1b[2J", "a\n", "-x", ".x", "x" * 65, "$x$", "a'b"]


@pytest.mark.parametrize("name", BAD)
def test_names_of_stages_and_datasets_have_a_form(name):
    for make in (
        lambda: StageConfig(name, "sft", {"adaptor": 1e-3}, steps=1),
        lambda: DatasetConfig(name, "x"),
    ):
        with pytest.raises(UserError, match="is called") as error:
            make()
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["ia_sft", "align.2", "对齐", "stage-1", "a+b", "1", "x" * 64])
def test_names_that_are_taken(name):
    assert DatasetConfig(name, "x").name == StageConfig(name, "sft", {"adaptor": 1.0}, 1).name


def test_languages():
    assert all(map(is_language, ("", "en", "zh-CN", "cmn_Hans", "Chinese (Mandarin)", "en+zh")))
    assert not any(map(is_language, ("e/n", "en\x1b[2J", "<b>", "x" * 65, " en", "a\nb")))
    with pytest.raises(UserError, match="no name of a language"):
        DatasetConfig("d", "x", lang="e\x1bn")


def test_speakers():
    assert all(map(is_speaker, ("", "Speaker 1", "说话人/07", "a" * 256)))
    assert not any(map(is_speaker, ("a\x1b", "a\n", "a" * 257)))
