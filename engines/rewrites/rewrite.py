"""What ONNX Runtime runs in place of a bundle's plain graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from engines.rewrites.attention import fuse_attention
from engines.rewrites.group_norm import split_group_norms


def rewrite(path: Path, output: Path) -> dict[str, int]:
    """Write a copy of a graph in which attentions and group normalisations have another form.

    Args:
        path: the ONNX file.
        output: path of the copy, whose folder is made; its weights stay those of ``path`` and are not written again.

    Returns:
        How many of each were replaced; with none at all, nothing is written.
    """
    model = ir.load(path)
    counts = {"fused_attentions": fuse_attention(model), "split_group_norms": split_group_norms(model)}
    if any(counts.values()):
        output.parent.mkdir(parents=True)
        ir.save(model, output)
    return counts
