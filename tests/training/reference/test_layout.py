"""What is saved is read again by transformers 5 here, and has the names and files that transformers 4 reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import icexport
from tests.tiny_models import tiny_tokenizer
from training.reference.layout import save_text_encoder, save_tokenizer


def test_text_encoder(tmp_path: Path) -> None:
    model = CLIPTextModel(CLIPTextConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1))
    save_text_encoder(model, tmp_path)
    again = CLIPTextModel.from_pretrained(tmp_path)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118  not a mapping


def test_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("", "a red apple", "what? 42%"):
        assert again(text).input_ids == tokenizer(text).input_ids


def test_the_reference_model_has_this_layout() -> None:
    folder = icexport.reference_path()
    assert not (folder / "tokenizer" / "tokenizer.json").exists()
    with safe_open(folder / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
