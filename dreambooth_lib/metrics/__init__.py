"""Embed images and prompts with CLIP or DINO, and score images by the embeddings."""
