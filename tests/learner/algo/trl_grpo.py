"""What a real trl.GRPOTrainer makes of given trajectories: advantages, loss, gradient.

trl 1.16.0, trl/trainer/grpo_trainer.py: the trajectories enter through `rollout_func`;
`_generate_and_score_completions` makes the advantages and the reference's log-probabilities,
`_compute_loss` the loss (loss_type "grpo"). Nothing of the learner is used here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Rollout(NamedTuple):
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    reward: float
    old_logp: tuple[float, ...]


class Theirs(NamedTuple):
    advantages: list[float]
    loss: float
    gradient: torch.Tensor
    kl: float
    clipped: float


def grpo(
    rollouts: list[Rollout], group: int, model: Any, reference: Any, folder: Path, **args: Any
) -> Theirs:
    """`group` rollouts in a row share a prompt; `args` are fields of GRPOConfig."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    reference.save_pretrained(folder / "reference")  # trl loads its reference from this path
    model = copy.deepcopy(model)
    model.config._name_or_path = model.name_or_path = str(folder / "reference")
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(40)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")
    texts = [{"prompt": " ".join(f"t{i}" for i in rollout.prompt)} for rollout in rollouts]
    trainer = GRPOTrainer(
        model,
        lambda completion_ids, **_: [rollout.reward for rollout in rollouts],
        GRPOConfig(
            str(folder / "trl"),
            loss_type="grpo",
            num_generations=group,
            per_device_train_batch_size=len(rollouts),
            max_completion_length=16,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            use_bias_correction_kl=False,  # trl's default multiplies the KL by the ratio
            **args,
        ),
        train_dataset=Dataset.from_list(texts[::group]),
        processing_class=tokenizer,
        rollout_func=lambda prompts, _: {
            "prompt_ids": [list(rollout.prompt) for rollout in rollouts],
            "completion_ids": [list(rollout.ids) for rollout in rollouts],
            "logprobs": None,
        },
    )
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions(texts)
    old = torch.zeros(inputs["completion_ids"].shape)
    for b, rollout in enumerate(rollouts):
        old[b, : len(rollout.ids)] = torch.tensor(rollout.old_logp)
    loss = trainer._compute_loss(model, inputs | {"old_per_token_logps": old})
    loss.backward()
    metrics = trainer._metrics["train"]
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return Theirs(
        inputs["advantages"].tolist(),
        float(loss.detach()),
        gradient,
        metrics["kl"][-1] if "kl" in metrics else 0.0,
        metrics["clip_ratio/region_mean"][-1],
    )
