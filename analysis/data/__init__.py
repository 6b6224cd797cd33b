"""Figures that others have published, with source and conditions: memory.csv, read by analysis/published.py."""
