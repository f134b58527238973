"""Benchmarks of a bundle, for ``icexport bench`` and for the scripts in ``benchmarks/``."""
