"""What features look like, in numbers and in colours: functions of tensors that know no model and no run."""
