"""Evaluation of checkpoints: suites of prompts, scorers and reports."""
