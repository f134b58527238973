"""The probe on Triton kernels, in the place of any backend's probe engine."""

from __future__ import annotations

import torch

from engines.base import Engine
from icexport.bundle.manifest import PROBE_FOLDER
from icexport.bundle.store import Bundle
from icexport.errors import UnsupportedOptionError
from icexport.graphs import stable_diffusion as graphs
from icexport.graphs.graph import specs
from icexport.models.precision import precision
from icexport.models.probe import CONFIG_NAME, InnerControlProbe


def load_probe_kernels(bundle: Bundle, device: str | torch.device) -> Engine:
    """Load the probe on Triton kernels, from the bundle's weights; takes the place of any backend's probe engine.

    Args:
        bundle: a bundle with a probe.
        device: ``cuda`` or ``cuda:<i>``.

    Raises:
        UnsupportedOptionError: the device is no GPU, or the bundle is too old to hold the probe's weights.
        DamagedBundleError: a file was changed.
    """
    from engines.kernels.host import load_kernel
    from engines.torch_eager import TorchEngine
    from icexport.models.fused_probe import FusedProbe

    if torch.device(device).type != "cuda":
        raise UnsupportedOptionError(f"probe_kernels=True: the kernels run on a CUDA device, not on {device}.")
    load_kernel("residual_mix")  # a missing Triton must show now, not in the middle of a picture
    if f"{PROBE_FOLDER}/{CONFIG_NAME}" not in bundle.manifest.files:
        raise UnsupportedOptionError(f"{bundle.path} was built without the probe's weights. Build it again.")
    entry = bundle.graph("probe")
    probe = InnerControlProbe.from_pretrained(bundle.folder(PROBE_FOLDER)).eval()
    module = graphs.ProbeGraph(FusedProbe(probe.to(device, precision(bundle.manifest.dtype).torch)))
    return TorchEngine("probe", module, specs(entry.inputs), specs(entry.outputs), device)
