"""The real CLIP tokenizer, built from the byte-pair-encoding file that OpenAI published with CLIP (MIT).

The file travels in the package ``open-clip-torch``, which needs torchvision to import: install it with
``pip install --no-deps open-clip-torch==3.3.0``. Only the file is read, the package is never imported.
"""

from __future__ import annotations

import gzip
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894
"""Number of merges that CLIP uses of the file."""


def find_bpe_file() -> Path:
    """Return the file inside the installed ``open-clip-torch`` distribution.

    Raises:
        FileNotFoundError: the distribution is not installed; the message says how to install it.
    """
    try:
        files = metadata.files("open-clip-torch") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == BPE_FILE:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{BPE_FILE} not found: pip install --no-deps open-clip-torch==3.3.0")


def clip_tokenizer(bpe_file: Path) -> CLIPTokenizer:
    """Make CLIP's tokenizer: 49,408 tokens, 77 per prompt, padded with the end token as in Stable Diffusion."""
    lines = gzip.decompress(bpe_file.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : MERGES + 1]
    symbols = _byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    pairs: Any = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=77)


def _byte_symbols() -> list[str]:
    """Return each byte's printable stand-in, in the order of the vocabulary: printable bytes first, as GPT-2's BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [chr(256 + i) for i in range(256 - len(printable))]
    return [chr(b) for b in printable] + shifted
