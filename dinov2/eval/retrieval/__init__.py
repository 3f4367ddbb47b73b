"""Evaluation of image retrieval."""
