"""Provide what every other wing needs: the config, atomic files, GPU memory, processes."""
