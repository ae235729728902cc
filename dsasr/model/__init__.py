"""The recognizer's parts: encoder, CTC head, adaptor, and the language model that they feed."""
