"""Judging a model on held-out pictures: control fidelity, image statistics, a report."""
