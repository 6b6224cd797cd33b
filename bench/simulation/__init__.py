"""Ranks that are not there: one that stands for many (emulated.py), and one that has shapes alone (simulate.py)."""
