"""Checks of a job's machines, network and disks, before a job starts on them."""
