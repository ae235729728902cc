"""Register exports with transformers: after this import ``AutoModel.from_pretrained(DIR)`` works.

The class is this package's: no code is loaded from the folder (``trust_remote_code`` stays False).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from dsasr.checkpoint.export_folder import MODEL_TYPE
from dsasr.inference.export import Export, load_export
from dsasr.model.outputs import Outputs


class DsasrConfig(PretrainedConfig):
    """The ``config.json`` of an export as a transformers config."""

    model_type = MODEL_TYPE


class DsasrModel(PreTrainedModel):
    """A `SpeechLLM` (``.speech_llm``) with its tokenizer and settings (``.export``)."""

    config_class = DsasrConfig
    base_model_prefix = "speech_llm"

    def __init__(self, config: DsasrConfig, export: Export):
        super().__init__(config)
        self.export, self.speech_llm = export, export.model

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_args: Any, **kwargs: Any) -> DsasrModel:
        """Load an exported folder. Of transformers' options only ``attn_implementation`` counts."""
        config = kwargs.get("config") or DsasrConfig.from_pretrained(folder)
        return cls(config, load_export(folder, kwargs.get("attn_implementation") or "sdpa")).eval()

    def forward(self, batch) -> Outputs:
        """The losses of a `dsasr.data.batch.Batch`."""
        return self.speech_llm(batch)


AutoConfig.register(MODEL_TYPE, DsasrConfig, exist_ok=True)
AutoModel.register(DsasrConfig, DsasrModel, exist_ok=True)
