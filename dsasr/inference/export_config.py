"""``config.json`` of an exported recognizer, and the recognizer when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsasr.checkpoint.export_folder import FORMAT, MODEL_TYPE
from dsasr.data.audio.features import FbankConfig
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.data.text.build_phonemizer import PhonemizerConfig
from dsasr.data.text.normalization import TextConfig
from dsasr.data.text.prompt import PromptIds
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.evaluation.decode import DecodeConfig
from dsasr.evaluation.tuned import Tuned
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.ctc import CtcHeadConfig
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import SUBSAMPLING


@dataclass(frozen=True)
class ExportConfig:
    """``config.json``: what inference needs besides the weights, and nothing of the training."""

    encoder: EncoderConfig | PretrainedEncoderConfig
    adaptor: AdaptorConfig
    prompt: PromptIds
    hinted: dict[str, PromptIds] = field(default_factory=dict)  # prompts that name a language
    template: str = ""  # the recipe's model.prompt, for a training that starts here
    languages: dict[str, str] = field(default_factory=dict)  # its model.languages
    fbank: FbankConfig = field(default_factory=FbankConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    text: TextConfig = field(default_factory=TextConfig)  # form of the transcripts
    rules: str = "standard"  # of scores
    max_seconds: float = 30.0  # the longest utterance of the training
    steps: int = 0  # training steps of the checkpoint
    units: int = 0  # of the CTC head, blank included; 0: there is none
    head: CtcHeadConfig = field(default_factory=CtcHeadConfig)
    phonemizer: PhonemizerConfig = field(default_factory=PhonemizerConfig)  # of the head's units
    speech: SpeechStatistics = field(default_factory=SpeechStatistics)  # of the training
    tuned: Tuned = field(default_factory=Tuned)  # by `dsasr evaluate --tune`
    model_type: str = MODEL_TYPE
    architectures: tuple[str, ...] = ("DsasrModel",)
    format: int = FORMAT


@dataclass(frozen=True)
class Export:
    """An exported recognizer, loaded."""

    config: ExportConfig
    model: SpeechLLM
    tokenizer: Tokenizer
    front_end: FrontEnd

    @property
    def frame_seconds(self) -> float:
        """Seconds of an encoder frame."""
        if isinstance(self.config.encoder, EncoderConfig):
            return SUBSAMPLING * self.config.fbank.shift_ms / 1000
        return self.model.encoder.frame_seconds
