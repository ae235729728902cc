"""From a trained model to transcripts and figures: decoding, error rates, hallucination."""
