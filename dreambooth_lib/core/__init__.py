"""Provide what every other package needs: the config, atomic files, GPU memory, processes."""
