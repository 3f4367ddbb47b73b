"""Evaluation of tracking: objects of the first frame of a video are segmented in all frames."""
