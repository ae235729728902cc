"""``dsasr demo …``: the corpus and the language model of the demo."""
