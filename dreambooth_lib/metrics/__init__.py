"""Embed images and prompts with CLIP or DINO, and compare them."""
