"""transformers' auto classes for exports: ``AutoModel.from_pretrained(DIR)`` after this import.

No code comes out of the folder (``trust_remote_code`` stays False): the class is this package's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from dsasr.inference.export import MODEL_TYPE, Parts, load_export
from dsasr.model.outputs import Outputs


class DsasrConfig(PretrainedConfig):
    """``config.json`` of an export, as transformers sees it."""

    model_type = MODEL_TYPE


class DsasrModel(PreTrainedModel):
    """A `SpeechLLM` (``.speech_llm``) with its tokenizer and settings (``.parts``)."""

    config_class = DsasrConfig
    base_model_prefix = "speech_llm"

    def __init__(self, config: DsasrConfig, parts: Parts):
        super().__init__(config)
        self.parts, self.speech_llm = parts, parts.model

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_args: Any, **given: Any) -> DsasrModel:
        """Load an exported folder; of transformers' options only ``attn_implementation`` counts."""
        chosen = given.get("config") or DsasrConfig.from_pretrained(folder)
        return cls(chosen, load_export(folder, given.get("attn_implementation") or "sdpa")).eval()

    def forward(self, batch) -> Outputs:
        """Losses of a `dsasr.data.batch.Batch`."""
        return self.speech_llm(batch)


AutoConfig.register(MODEL_TYPE, DsasrConfig, exist_ok=True)
AutoModel.register(DsasrConfig, DsasrModel, exist_ok=True)
