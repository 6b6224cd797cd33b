"""What a rank runs: a training step, or attention alone, on which tokens."""
