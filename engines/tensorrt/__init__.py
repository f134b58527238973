"""TensorRT and TensorRT-RTX: one adapter, two flavours.

Importing this package, ``api``, ``build`` or ``worker`` imports neither torch nor a TensorRT library: the command line
lists the backends at once, and the process that builds a plan holds nothing that it does not need.
"""
