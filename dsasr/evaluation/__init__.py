"""Evaluation: evaluation sets and the noise suite, decoding, error rates, hallucinations."""
