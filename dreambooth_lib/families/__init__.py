"""Load base models; one module for each model family."""
