"""Launchers: submit a training or an evaluation to SLURM, or run it on this machine."""
