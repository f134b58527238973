"""Stable Diffusion 1.5's architecture from folders to pictures: what each stage takes of time and memory."""
