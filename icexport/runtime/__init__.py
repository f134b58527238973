"""Controlled generation on engines, with a fidelity reading at every step."""
