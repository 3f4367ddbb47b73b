"""Self-supervised training: student, teacher, losses, loop."""
