"""Draw plots, image grids and contact sheets."""
