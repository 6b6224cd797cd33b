"""What can be asked: every key, mesh and rule, and what a row answers. No torch, so that whoever asks need not wait."""
