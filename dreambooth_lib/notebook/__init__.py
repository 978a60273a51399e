"""Support notebooks on Colab and Jupyter: installation, checks, Drive, widgets."""
