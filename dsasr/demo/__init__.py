"""The demo's synthetic corpus (sentences from a grammar, spoken by espeak-ng) and its small LM."""
