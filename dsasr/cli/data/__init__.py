"""``dsasr data …``: shards, and what is computed from them before training."""
