"""Losses, log-probabilities, the trainer, several processes, checkpoints."""
