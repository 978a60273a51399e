"""Read and check photos, and turn them into tensors."""
