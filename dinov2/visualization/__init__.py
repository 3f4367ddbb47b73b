"""Figures and videos of frozen features: principal components, attention, patch similarity, nearest neighbors."""
