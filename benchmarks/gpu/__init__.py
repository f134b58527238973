"""The parts of ``benchmarks.kernels`` and ``benchmarks.gpu_suite``."""
