"""Which running requests step together: ids and costs, no torch."""
