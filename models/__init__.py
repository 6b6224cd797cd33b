"""The Llama harness: a model that knows nothing of ranks, and its checkpoints."""
