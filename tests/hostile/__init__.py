"""Hostile tests: damaged files, kills and failing disks, from seeds that repeat each case."""
