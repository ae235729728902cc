"""What a recogniser is judged by: decoding, error rates, hallucinations."""
