"""What a model is worth: tasks, recovery, size and speed, side by side."""
