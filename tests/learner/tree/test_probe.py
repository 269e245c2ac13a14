"""Which models packed trees refuse, with the reason, and that the other way takes them."""

from __future__ import annotations

import pytest
import torch

from ibtree.errors import FieldError
from learner.train.trainer import Trainer
from learner.tree.attention import NAME
from learner.tree.probe import enable_packed_attention
from tests.learner.tiny import CPU, causal_lm, config
from tests.learner.tree.test_layout import tree_of

HALF = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
REFUSED = {
    "window": ("Mistral", {"sliding_window": 8}, "sliding window"),
    "window in some layers": ("Qwen2", HALF, "sliding window"),
    "state space": ("Mamba", {"state_size": 4}, "2 of its 2 layers"),
    "hybrid": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "expert_layer_offset": 1,
         "use_mamba_kernels": False},
        "1 of its 2 layers",
    ),
    "attention of its own": ("Bloom", {"n_layer": 2, "n_head": 2}, "attention interface"),
    "head of its own": ("Granite", {"logits_scaling": 4.0}, "log-probabilities differ"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama", "Gemma", "Phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_models_that_attend_to_all_before_a_token_fit(kind, dtype):
    model = causal_lm(kind, head_dim=8).to(dtype)
    for _ in range(2):
        enable_packed_attention(model)
        assert model.config._attn_implementation == NAME


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_reads_more_than_ancestors_is_refused(kind, changes, reason):
    policy = causal_lm(kind, **changes)
    for _ in range(2):
        with pytest.raises(FieldError, match=reason) as caught:
            Trainer(policy, None, config(kl_weight=0.0), CPU)
        assert caught.value.field == "forward" and caught.value.allowed == "trajectory"
    chosen = config(kl_weight=0.0, forward="trajectory")
    figures = Trainer(policy, None, chosen, CPU).step([tree_of((6, 8, 3))], version=1)
    assert figures.trained_trees == 1 and 0 < figures.grad_norm < float("inf")


def test_the_reference_is_tried_too():
    window = causal_lm("Mistral", sliding_window=8)
    with pytest.raises(FieldError, match="sliding window"):
        Trainer(causal_lm("Mistral", sliding_window=None), window, config(), CPU)


def test_the_switch_is_not_saved_with_the_model(tmp_path):
    model = causal_lm()
    enable_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
