"""The HTTP API: validates, admits, enqueues and answers. It never imports torch."""
