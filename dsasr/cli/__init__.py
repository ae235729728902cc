"""The `dsasr` command: argument parsing only."""
