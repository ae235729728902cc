"""dsasr trains LLM-based speech recognizers: Conformer encoder → adaptor → LLM.

Tensors carry their shape as a suffix: B batch, T feature frames, F mel bins, S encoder frames,
E encoder width, A adaptor frames, D LLM width, L LLM positions, V LLM vocabulary, P phoneme
vocabulary (or a phoneme sequence's length), U transcript tokens, N flattened valid positions.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """``dsasr.Recognizer`` and ``dsasr.StreamingRecognizer``, imported at first access."""
    if name == "Recognizer":
        from dsasr.inference.recognizer import Recognizer

        return Recognizer
    if name == "StreamingRecognizer":
        from dsasr.inference.streaming import StreamingRecognizer

        return StreamingRecognizer
    raise AttributeError(f"module 'dsasr' has no attribute '{name}'")
