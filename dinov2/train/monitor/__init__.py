"""Monitoring of a training run: statistics of targets, measurements of features, alarms, the best teacher."""
