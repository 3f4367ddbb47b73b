"""What features look like, in numbers and in colors: functions of tensors that know no model and no run."""
