"""Inspecting and converting weights and checkpoints."""
