"""Training: data, schedules, checkpoints and the loop."""
