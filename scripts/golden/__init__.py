"""Replays of recorded golden sets: one module per letter of the recordings, used by ``scripts/check_golden.py``."""
