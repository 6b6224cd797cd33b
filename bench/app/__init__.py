"""The app: a command line, a configuration that becomes a row, a sweep of them, and what the terminal shows."""
