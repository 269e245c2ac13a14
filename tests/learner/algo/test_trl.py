"""GRPO of TRL 1.16.0 itself, an independent implementation, against the learner's own path.

With single-step trajectories and lambda 0, `std: sample`, `advantage_eps: 1e-4` and
`length_norm: trajectory`, IB-TPO is GRPO. Ours is Trainer.step, either way through the model;
theirs is in trl_grpo.py.
"""

from __future__ import annotations

import copy
import random
from importlib.metadata import version
from typing import Any

import pytest
import torch

from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import TreeOptions
from learner.train.model import token_logprobs
from learner.train.trainer import StepFigures, Trainer
from learner.tree.rows import Row
from tests.learner.algo.trl_grpo import Rollout, grpo
from tests.learner.tiny import CPU, causal_lm, config, rows_of

PROMPTS = [(3, 4, 5, 6), (7, 8), (9,)]
GROUP = 5


def draw_rollouts(seed: int, rewards: list[float], twins: bool) -> list[Rollout]:
    """GROUP trajectories a prompt, of 1 to 9 tokens; with `twins` the first two are alike."""
    rng = random.Random(seed)
    rollouts = []
    for prompt in PROMPTS:
        group = [
            Rollout(
                prompt,
                ids := tuple(rng.randrange(2, 40) for _ in range(rng.randint(1, 9))),
                rng.choice(rewards),
                (0.0,) * len(ids),
            )
            for _ in range(GROUP)
        ]
        rollouts += [group[0], *group[:-1]] if twins else group
    return rollouts


def with_old(
    rollouts: list[Rollout], model: Any, temperature: float, noise: float
) -> list[Rollout]:
    """Recorded log-probabilities: the policy's, moved by a function of the tokens."""
    recorded = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt, *rollout.ids]])
        with torch.no_grad():
            start = torch.tensor([len(rollout.prompt)])
            logp = token_logprobs(
                model, ids, torch.ones_like(ids), start, len(rollout.ids), temperature=temperature
            )[0]
        rng = random.Random(str(rollout.ids))
        recorded.append(
            rollout._replace(old_logp=tuple(float(x) + noise * rng.uniform(-1, 1) for x in logp))
        )
    return recorded


def trees_of(rollouts: list[Rollout]) -> list[Tree]:
    """A tree for each prompt, each trajectory a single step."""
    trees = []
    for prompt in PROMPTS:
        tree = Tree(prompt=prompt, options=TreeOptions(strategy="independent"))
        for rollout in rollouts:
            if rollout.prompt == prompt:
                step = Step(rollout.ids, rollout.old_logp, (0,) * len(rollout.ids))
                tree.insert(0, [step], rollout.reward, Finish.STOP)
        trees.append(tree)
    return trees


def ours(
    rollouts: list[Rollout], model: Any, reference: Any, chosen: Any
) -> tuple[list[Row], StepFigures, torch.Tensor]:
    trees, policy = trees_of(rollouts), copy.deepcopy(model)
    figures = Trainer(policy, reference, chosen, CPU).step(trees, version=0)
    gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    return rows_of(trees, chosen), figures, gradient


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("forward", ["packed", "trajectory"])
@pytest.mark.parametrize(
    ("temperature", "beta", "noise", "clip", "rewards", "twins"),
    [
        (1.0, 0.0, 0.0, (0.2, 0.2), [0.0, 1.0], False),
        (1.0, 0.0, 0.5, (0.2, 0.2), [0.0, 1.0], False),
        (0.7, 0.04, 0.5, (0.2, 0.2), [0.0, 1.0], False),
        (0.7, 0.04, 0.5, (0.1, 0.28), [0.0, 0.25, 1.0], True),
        (1.0, 0.04, 0.5, (0.2, 0.2), [1.0], False),
    ],
    ids=["on-policy", "clipped", "kl", "asymmetric-twins", "uniform"],
)
def test_advantages_loss_and_gradient_are_those_of_trl(
    tmp_path, temperature, beta, noise, clip, rewards, twins, forward
):
    assert version("trl") == "1.16.0"
    model, reference = causal_lm(seed=1), causal_lm(seed=1)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(0.9)
    rollouts = draw_rollouts(11, rewards, twins)
    rollouts = with_old(rollouts, model, temperature, noise)
    low, high = clip
    trl_args = {"temperature": temperature, "beta": beta, "epsilon": low, "epsilon_high": high}
    want = grpo(rollouts, GROUP, model, reference, tmp_path, **trl_args)
    chosen = config(
        forward=forward,
        strategy="independent",
        local_weight=0.0,
        std="sample",
        advantage_eps=1e-4,
        length_norm="trajectory",
        skip_uniform_trees=False,  # trl keeps groups without spread in the mean
        temperature=temperature,
        kl_weight=beta,
        clip_low=low,
        clip_high=high,
        grad_clip=1e9,
        micro_batch_tokens=60,
    )
    rows, figures, gradient = ours(rollouts, model, reference if beta else None, chosen)

    advantages = {(row.prompt, row.token_ids): row.advantages for row in rows}
    assert len(rows) == len({(rollout.prompt, rollout.ids) for rollout in rollouts})
    worst = 0.0
    for rollout, advantage in zip(rollouts, want.advantages, strict=True):
        for own_advantage in advantages[rollout.prompt, rollout.ids]:
            worst = max(worst, abs(own_advantage - advantage))
    assert worst < 1e-6
    assert abs(figures.loss - want.loss) < 1e-6
    relative = (gradient - want.gradient).norm() / want.gradient.norm().clamp(min=1e-9)
    assert relative < 1e-5
    if not twins:  # trl counts a trajectory that came twice twice
        means = figures.means()
        assert means["clip_share"] == pytest.approx(want.clipped, abs=1e-6)
        assert means["kl"] == pytest.approx(want.kl, abs=1e-6)
    assert (want.clipped > 0.1) == (noise > 0 and len(rewards) > 1)
