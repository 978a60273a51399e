"""Hand a trained model on: folder, model card, Hub, zip, A1111 and ComfyUI."""
