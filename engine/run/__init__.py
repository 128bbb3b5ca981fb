"""What a run needs besides its mathematics: random numbers, optimizer, checkpoints, logs."""
