"""Inference: transcribe audio files with a trained model, and export it."""
