"""The probe head as custom torch operators, ``torch.ops.icexport.*``: references on a CPU, Triton kernels on a GPU.

Importing this package registers the operators; it needs torch but not Triton.
"""

from engines.kernels.spec import SPECS, KernelSpec

__all__ = ["SPECS", "KernelSpec"]
