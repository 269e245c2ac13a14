"""IB-Score, value estimators, confidence, balance: pure functions over a Tree.

Source: arXiv 2605.28109, section 4 (IB objective with Tsallis entropy, alpha = 2) and its Monte
Carlo form; `backup`, `sibling` and the `draws` weights are this project's. N is the number of
nodes; arrays are float64 of shape [N] in node order.
"""

from __future__ import annotations

import numpy as np

from ibtree.tree import Floats, Tree


def values(tree: Tree, estimator: str) -> Floats:
    """p-hat(answer | s): estimated chance in [0, 1] of a right answer from each node, [N].

    `mean`: reward_sum / visits (the paper's reward density). `backup`:
    V(s) = (ends(s) reward(s) + sum_c draws(c) V(c)) / (ends(s) + sum_c draws(c)), which does not
    let subtrees that were branched more weigh more. 0 for an empty tree.
    """
    if estimator == "mean":
        visits = np.asarray(tree.visits, float)
        mean: Floats = np.divide(
            tree.reward_sums, visits, out=np.zeros(len(tree)), where=visits > 0
        )
        return mean
    value = np.zeros(len(tree))
    for node in reversed(list(tree.topological())):
        kids = tree.children(node)
        draws = np.asarray([tree.draws[c] for c in kids], float)
        own = tree.ends[node] * tree.reward(node) if tree.ends[node] else 0.0
        total = tree.ends[node] + draws.sum()
        value[node] = (own + draws @ value[kids]) / total if total else 0.0
    return value


def confidences(tree: Tree, form: str, logprobs: Floats | None = None) -> Floats:
    """Policy's confidence in each step, in [0, 1], [N]; 1 for the root.

    The policy is the behaviour policy, or another whose log-probability of each step is given, [N].

    `geometric`: exp(mean log-probability); `product`: exp(sum); `sibling`: `product` normalised
    over the siblings.
    """
    sums = logprobs
    if sums is None:
        sums = np.asarray([step.logprob for step in tree.steps], float)
    if form == "geometric":
        lengths = np.asarray([max(len(step.token_ids), 1) for step in tree.steps], float)
        sums = sums / lengths
    if form != "sibling":
        confidence: Floats = np.exp(sums)
        return confidence
    normalised = np.ones(len(tree))
    for node in range(len(tree)):
        kids = tree.children(node)
        if kids:
            relative = np.exp(sums[kids] - sums[kids].max())
            normalised[kids] = relative / relative.sum()
    return normalised


def info_gains(tree: Tree, value: Floats, beta: float, zero_value_ratio: float = 0.0) -> Floats:
    """eta_1(s) = value(s) / value(parent) - (1 + 1 / beta), [N]; 0 for the root.

    Where value(parent) is 0 the ratio is `zero_value_ratio`.
    """
    above = value[np.asarray(tree.parents)]
    ratio = np.divide(value, above, out=np.full(len(tree), zero_value_ratio), where=above > 0)
    gain: Floats = ratio - (1.0 + 1.0 / beta)
    gain[0] = 0.0
    return gain


def ib_scores(tree: Tree) -> Floats:
    """J_IB(n) = (1 + beta) / D * sum_c draws(c) info_gain(c) confidence(c), D = sum_c draws(c), [N]

    with the tree's own options; NaN for a node without children.
    """
    o = tree.options
    value = values(tree, o.value_estimator)
    gain = info_gains(tree, value, o.beta, o.zero_value_ratio)
    weighted = np.asarray(tree.draws) * gain * confidences(tree, o.confidence)
    parents, draws = np.asarray(tree.parents), np.asarray(tree.draws, float)
    total = np.bincount(parents, draws, len(tree))
    numerator = np.bincount(parents, weighted, len(tree))  # the root adds 0 to itself: draws = 0
    scores: Floats = np.full(len(tree), np.nan)
    np.divide((1 + o.beta) * numerator, total, out=scores, where=total > 0)
    return scores


def rest_tokens(tree: Tree) -> Floats:
    """r(n): mean number of tokens from the end of n to the ends of the rollouts through it, [N]."""
    length = np.asarray([len(step.token_ids) for step in tree.steps], float)
    below = np.zeros(len(tree))  # over the rollouts through n: tokens from its end on
    for node in reversed(list(tree.topological())):
        if node:
            below[tree.parents[node]] += below[node] + tree.visits[node] * length[node]
    return below / np.maximum(tree.visits, 1)


def budget_scores(tree: Tree) -> Floats:
    """exp(J_IB(n)) / (r(n) + r0), [N] up to one positive factor: the IB-Score per token that a
    rollout from n costs, r0 being the mean step length; NaN for a node without children. Ours:
    the paper ranks by J_IB alone.
    """
    scores = ib_scores(tree)
    steps = max(len(tree) - 1, 1)
    cost = rest_tokens(tree) + tree.unique_tokens / steps
    top = np.nanmax(scores) if np.isfinite(scores).any() else 0.0
    per_token: Floats = np.exp(scores - top) / np.maximum(cost, 1e-9)
    return per_token


def balance(tree: Tree) -> float:
    """Mean over nodes with >= 2 children of Cov(info_gain, confidence) over the children, weighted
    by draws: the paper's diagnosis of exploration against exploitation. NaN without such a node.
    """
    o = tree.options
    gain = info_gains(tree, values(tree, o.value_estimator), o.beta, o.zero_value_ratio)
    confidence = confidences(tree, o.confidence)
    covariances = []
    for node in range(len(tree)):
        kids = tree.children(node)
        if len(kids) >= 2:
            w = np.asarray([tree.draws[c] for c in kids], float)
            mean_gain, mean_conf = (
                np.average(gain[kids], weights=w),
                np.average(confidence[kids], weights=w),
            )
            covariances.append(
                np.average((gain[kids] - mean_gain) * (confidence[kids] - mean_conf), weights=w)
            )
    return float(np.mean(covariances)) if covariances else float("nan")


def trajectory_weights(tree: Tree, how: str) -> Floats:
    """Weight of all the trajectories that end with each node, [N], summing to 1.

    `visits` (the paper): ends / G. `draws`: omega(root) = 1 flows down; at a node with e = ends
    and D = sum_c draws(c), e / (e + D) stays and draws(c) / (e + D) goes to each child.
    """
    if how == "visits":
        return np.asarray(tree.ends, float) / max(tree.trajectories, 1)
    flow, weight = np.zeros(len(tree)), np.zeros(len(tree))
    flow[0] = 1.0
    for node in tree.topological():
        kids = tree.children(node)
        total = tree.ends[node] + sum(tree.draws[c] for c in kids)
        if total:
            weight[node] = flow[node] * tree.ends[node] / total
            for c in kids:
                flow[c] = flow[node] * tree.draws[c] / total
    return weight


def candidates(tree: Tree) -> list[int]:
    """Nodes a branch may start from: the non-leaf nodes with token budget left (root included)."""
    limit = tree.options.sampling.max_new_tokens
    tokens, _ = tree.depths()
    return [n for n in range(len(tree)) if not tree.is_leaf(n) and tokens[n] < limit]


def best(tree: Tree, scores: Floats, among: list[int], count: int) -> list[int]:
    """The `count` nodes of highest score; ties go to the shallower node [steps], then the older."""
    _, steps = tree.depths()
    return sorted(among, key=lambda n: (-scores[n], steps[n], tree.born[n]))[:count]
