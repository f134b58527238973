"""Measurements of icexport: latency, kernels and control fidelity."""
