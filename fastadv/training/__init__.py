"""The training system: data, schedules, checkpoints and the loop that puts them together."""
