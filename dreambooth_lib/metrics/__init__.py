"""Embed images and prompts with CLIP, SigLIP or DINO, and score images by the embeddings."""
