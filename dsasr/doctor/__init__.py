"""Checks of a job's machines, network and disks, before hours are spent on them."""
