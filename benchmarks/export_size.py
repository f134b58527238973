"""Time and memory of exporting Stable Diffusion 1.5's true architecture, with random weights.

    python -m benchmarks.export_size --graph unet --dtype fp32

One graph per process, so that the peak is this graph's. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from icexport.export import DEFAULT_OPSET
from icexport.export.onnx import export_graph
from icexport.export.precision import read_precision
from icexport.graphs.graph import Graph
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.stable_diffusion import (
    controlnet_graph,
    probe_graph,
    text_encoder_graph,
    unet_graph,
    vae_decoder_graph,
)
from icexport.models.precision import precision
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.sizes import latent_multiple, size_multiple
from icexport.models.taps import Taps

GRAPHS = ("text_encoder", "controlnet", "unet", "probe", "vae_decoder")
VAE_CONFIG = {"block_out_channels": (128, 256, 512, 512)}


def sd15_unet() -> UNet2DConditionModel:
    """Return Stable Diffusion 1.5's UNet: 859.5 M parameters."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd15_text_encoder() -> Any:
    """Return Stable Diffusion 1.5's text encoder, that of CLIP ViT-L/14: 123.1 M parameters."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, hidden_act="quick_gelu"
    )
    return CLIPTextModel(config)


def sd15_vae() -> AutoencoderKL:
    """Return Stable Diffusion 1.5's autoencoder: 83.7 M parameters, 49.5 M of them in the decoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        **VAE_CONFIG,
    )


def sd15_graph(name: str, dtype: torch.dtype) -> Graph:
    """Return one graph of the size of SD 1.5 with random weights; zero convolutions are not left at zero."""
    torch.manual_seed(0)
    if name == "text_encoder":
        return text_encoder_graph(sd15_text_encoder().to(dtype).eval(), dtype)
    if name == "vae_decoder":
        return vae_decoder_graph(sd15_vae().to(dtype).eval(), latent_multiple(sd15_unet_config()), dtype)
    with torch.device("meta") if name == "probe" else torch.device("cpu"):
        unet = sd15_unet()
    config = ProbeConfig(dims=Taps(unet).dims, condition="canny")
    if name == "unet":
        return unet_graph(unet.to(dtype).eval(), 77, config, dtype)
    if name == "probe":
        return probe_graph(InnerControlProbe(config).to(dtype).eval(), unet, dtype)
    controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    del unet
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return controlnet_graph(controlnet.to(dtype).eval(), 77, 8, dtype)


def peak_bytes() -> int:
    """Return the largest resident size of this process since the last ``forget_peak``; Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def forget_peak() -> None:
    """Begin a new peak at the present size: making the random weights needs more memory than they do afterwards."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, dtype: str, opset: int, dynamic: bool) -> dict[str, Any]:
    """Export one graph into a temporary folder and report seconds, bytes and operators."""
    libraries = peak_bytes()
    graph = sd15_graph(name, precision(dtype).torch)
    forget_peak()
    loaded = peak_bytes()
    weights = sum(p.numel() * p.element_size() for p in graph.module.parameters())
    side = SizeRange(512, 512, 768) if dynamic else SizeRange(512, 512, 512)
    symbols = Profile(SizeRange(1, 1, 4), side, side).symbols(size_multiple(sd15_unet_config(), VAE_CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        started = time.perf_counter()
        export_graph(graph, path, symbols, opset)
        seconds = time.perf_counter() - started
        elements = read_precision(path, precision(dtype))
        model = onnx.load(path, load_external_data=False)
        sizes = {p.name: p.stat().st_size for p in Path(folder).iterdir()}
    operators = [node.op_type for node in model.graph.node]
    return {
        "graph": name,
        "dtype": dtype,
        "opset": opset,
        "dynamic_size": dynamic,
        "seconds": round(seconds, 1),
        "weight_bytes": weights,
        "library_bytes": libraries,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "files": sizes,
        "elements": elements,
        "nodes": len(operators),
        "group_norms": operators.count("GroupNormalization"),
        "attention": operators.count("Attention"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def sd15_unet_config() -> dict[str, Any]:
    """Return what ``size_multiple`` needs of the UNet's config."""
    return {"block_out_channels": (320, 640, 1280, 1280)}


def main() -> None:
    """Run the command line of ``python -m benchmarks.export_size``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", choices=GRAPHS, required=True)
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET)
    parser.add_argument("--dynamic", action="store_true", help="free height and width, 512 to 768 px")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sys.stdout.write(json.dumps(measure(args.graph, args.dtype, args.opset, args.dynamic)) + "\n")


if __name__ == "__main__":
    main()
