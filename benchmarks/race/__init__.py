"""The race: our training runs and the peers' on the same base, examples and batches, step by step in turn."""
