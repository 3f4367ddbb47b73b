"""What watches a training run: statistics of targets, measurements of the teacher, alarms, the best teacher."""
