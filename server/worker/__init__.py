"""The worker process: claims jobs, runs the model, stores pictures."""
