"""The demo world: procedural scenes with captions and an exact judge."""
