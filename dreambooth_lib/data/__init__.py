"""Read and check the user's photos, and turn them into tensors."""
