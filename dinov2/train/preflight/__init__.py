"""What is checked and reported before the first step: settings, memory, the plan of a dry run."""
