"""From a folder of recordings to shards and a recipe: what `dsasr init` does."""
