"""Trains, evaluates and exports the checkpoints that the server serves."""
