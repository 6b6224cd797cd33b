"""What the records mean: predictions made without the strategies' code, and readers of what was measured."""
