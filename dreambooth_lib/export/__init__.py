"""Export a trained model: diffusers folder, model card, Hub, zip, A1111 and ComfyUI."""
