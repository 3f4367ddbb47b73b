"""Evaluation of patch features: semantic segmentation and depth."""
