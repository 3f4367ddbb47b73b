"""Figures and videos of what a frozen backbone computes: components, attention, similarity, neighbors."""
