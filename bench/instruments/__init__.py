"""What watches a step: clock, bytes, memory, FLOPs, a trace. No strategy knows them (strategies/ops/hooks.py)."""
