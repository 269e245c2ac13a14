"""A random Qwen2 of 50 M parameters with the arith tokenizer, so that recomputing costs time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from learner.train.model import mend_torchvision

mend_torchvision()  # before anything imports transformers

from transformers import Qwen2Config, Qwen2ForCausalLM

ARITH = Path(__file__).parents[1] / "examples" / "arith" / "model"


def make_model(folder: Path) -> Path:
    """Writes the model there. Returns its folder."""
    torch.manual_seed(0)
    vocabulary = Qwen2Config.from_pretrained(ARITH).vocab_size
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model = folder / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        model.mkdir(exist_ok=True)
        shutil.copy(ARITH / name, model)
    Qwen2ForCausalLM(config).save_pretrained(model)
    return model
