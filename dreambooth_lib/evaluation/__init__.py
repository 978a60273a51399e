"""Run the paper's evaluation, sweeps over settings, and the demo."""
