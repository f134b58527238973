"""The training loop; knows nothing of diffusion."""
