"""From shards on disk to batches: audio, text, augmentation and the order of it all."""
