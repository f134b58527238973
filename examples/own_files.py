"""Build a bundle from files as people have them: a single-file model, a ControlNet, perhaps another autoencoder.

python examples/own_files.py --model v1-5.safetensors --controlnet control_canny.pth --cond canny
"""

from __future__ import annotations

import argparse
from pathlib import Path

import icexport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cond", default="canny")
    parser.add_argument("--model", required=True, help="folder, single file or Hub id")
    parser.add_argument("--model-config", help="folder with the configs that a single file lacks")
    parser.add_argument("--controlnet", required=True, help="folder, single file or Hub id")
    parser.add_argument("--vae", help="another autoencoder")
    parser.add_argument("--output", type=Path, default=Path("builds/own"))
    args = parser.parse_args()

    bundle = icexport.build(
        args.cond,
        model=args.model,
        model_config=args.model_config,
        controlnet=args.controlnet,
        vae=args.vae,
        probe="none",
        backend="onnxruntime",
        output=args.output,
    )
    for graph, outputs in bundle.manifest.parity["onnxruntime"].items():
        for name, result in outputs.items():
            print(f"{graph}.{name}: cosine {result.cosine:.6f}, relative error {result.relative_error:.1e}")


if __name__ == "__main__":
    main()
