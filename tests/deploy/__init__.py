"""What deploys the service: its chart, its alerts."""
