"""A Qwen2 of about 100 million parameters, with the arith task's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

ARITH = Path(__file__).parent.parent / "examples" / "arith" / "model"


def make_model(parameters: float, vocabulary: int = 32_768) -> Any:
    """Freshly initialised, in float32."""
    from learner.train.model import mend_torchvision

    mend_torchvision()  # before transformers is imported
    from transformers import Qwen2Config, Qwen2ForCausalLM

    width, layer = 768, 6_300_000
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2048,
        num_hidden_layers=max(1, round((parameters - width * vocabulary) / layer)),
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=256,
        pad_token_id=256,
    )
    return Qwen2ForCausalLM(config)


def save_model(folder: Path, parameters: float) -> None:
    """Saves the model as a folder that ibtpo-server takes."""
    folder.mkdir(parents=True)
    for path in ARITH.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    make_model(parameters, vocabulary=320).save_pretrained(folder)


def train(model: Any, steps: int, lr: float) -> Any:
    """Steps of AdamW on random text, in float32, one at a time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids_BT = torch.randint(0, model.config.vocab_size, (2, 64), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        yield
