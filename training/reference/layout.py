"""Text encoder and tokenizer on disk, in the layout that every Stable Diffusion repository has.

transformers 5 writes another one, which transformers 4 cannot read: it would take random weights, with only a warning.
Both read this one.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

_PREFIX = "text_model."


def save_text_encoder(text_encoder: CLIPTextModel, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    text_encoder.config.save_pretrained(folder)
    tensors = text_encoder.state_dict().items()
    state = {f"{_PREFIX}{name.removeprefix(_PREFIX)}": tensor.contiguous() for name, tensor in tensors}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``."""
    tokenizer.save_pretrained(folder)
    whole = folder / "tokenizer.json"
    if not whole.exists():  # transformers 4
        return
    model = json.loads(whole.read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), encoding="utf-8")
    whole.unlink()
