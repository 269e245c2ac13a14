"""IB-Score, value estimators, confidence, balance: pure functions over a Tree.

Source: arXiv 2605.28109, section 4 (IB objective with Tsallis entropy, alpha = 2) and its Monte
Carlo form; `backup`, `sibling` and the `draws` weights are this project's. N is the number of
nodes; arrays are float64 of shape [N] in node order.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from ibtree.tree import Floats, Ints, Tree


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
    parents, ends = np.asarray(tree.parents), np.asarray(tree.ends, float)
    draws, rewards = np.asarray(tree.draws, float), np.asarray(tree.reward_sums)
    # the root is its own parent: what it would add to itself is left out
    kids = np.bincount(parents[1:], rewards[1:], len(tree))
    weighted = np.where(ends > 0, rewards - kids, 0.0)  # of the node itself, then of all below too
    total = ends + np.bincount(parents, draws, len(tree))
    value = np.zeros(len(tree))
    for level in reversed(_levels(tree)):
        value[level] = weighted[level] / np.maximum(total[level], 1.0)  # 0 / 1 where none ended
        np.add.at(weighted, parents[level], draws[level] * value[level])
    return value


def _levels(tree: Tree) -> list[Ints]:
    """Nodes of the tree by their depth in steps, the root's level first."""
    depths = np.array(tree.depths_steps)
    order = np.argsort(depths, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(depths[order])) + 1)


def confidences(tree: Tree, form: str, logprobs: Floats | None = None) -> Floats:
    """Policy's confidence in each step, in [0, 1], [N]; 1 for the root.

    The policy is the behaviour policy, or another whose log-probability of each step is given, [N].

    `geometric`: exp(mean log-probability); `product`: exp(sum); `sibling`: `product` normalised
    over the siblings.
    """
    sums = np.array(tree.logprob_sums) if logprobs is None else logprobs
    if form == "geometric":
        sums = sums / np.maximum(tree.lengths, 1)
    if form != "sibling":
        confidence: Floats = np.exp(sums)
        return confidence
    children, parents = _children(tree)
    highest = np.full(len(tree), -np.inf)
    np.maximum.at(highest, parents, sums[children])
    relative = np.exp(sums[children] - highest[parents])
    normalised = np.ones(len(tree))
    normalised[children] = relative / np.bincount(parents, relative, len(tree))[parents]
    return normalised


def _children(tree: Tree) -> tuple[Ints, Ints]:
    """Every node that is a child (neither the root nor merged away), and its parent."""
    children = np.flatnonzero(tree.lengths)
    return children, np.asarray(tree.parents)[children]


def info_gains(tree: Tree, value: Floats, beta: float, zero_value_ratio: float = 0.0) -> Floats:
    """eta_1(s) = value(s) / value(parent) - (1 + 1 / beta), [N]; 0 for the root.

    Where value(parent) is 0 the ratio is `zero_value_ratio`.
    """
    above = value[np.asarray(tree.parents)]
    ratio = np.full(len(tree), zero_value_ratio, np.float64)
    np.divide(value, above, out=ratio, where=above > 0)
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
    parents, draws = np.asarray(tree.parents), np.asarray(tree.draws, float)
    weighted = draws * gain * confidences(tree, o.confidence)
    total = np.bincount(parents, draws, len(tree))
    numerator = np.bincount(parents, weighted, len(tree))  # the root adds 0 to itself: draws = 0
    scores: Floats = np.full(len(tree), np.nan)
    np.divide((1 + o.beta) * numerator, total, out=scores, where=total > 0)
    return scores


def rest_tokens(tree: Tree) -> Floats:
    """r(n): mean number of tokens from the end of n to the ends of the rollouts through it, [N]."""
    parents, visits = np.asarray(tree.parents), np.asarray(tree.visits, float)
    to_node = visits * np.array(tree.lengths)  # over the rollouts through n: tokens of its own step
    below = np.zeros(len(tree))  # and from its end on
    for level in reversed(_levels(tree)[1:]):
        np.add.at(below, parents[level], below[level] + to_node[level])
    rest: Floats = below / np.maximum(visits, 1)
    return rest


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
    children, parents = _children(tree)
    weight = np.asarray(tree.draws, float)[children]
    total = np.maximum(np.bincount(parents, weight, len(tree)), 1.0)

    def centred(of_nodes: Floats) -> Floats:
        of_children = of_nodes[children]
        mean = np.bincount(parents, weight * of_children, len(tree)) / total
        return of_children - mean[parents]

    products = weight * centred(gain) * centred(confidence)
    covariances = np.bincount(parents, products, len(tree)) / total
    several = np.bincount(parents, minlength=len(tree)) >= 2
    return float(covariances[several].mean()) if several.any() else float("nan")


def trajectory_weights(tree: Tree, how: str) -> Floats:
    """Weight of all the trajectories that end with each node, [N], summing to 1.

    `visits` (the paper): ends / G. `draws`: omega(root) = 1 flows down; at a node with e = ends
    and D = sum_c draws(c), e / (e + D) stays and draws(c) / (e + D) goes to each child.
    """
    if how == "visits":
        return np.asarray(tree.ends, float) / max(tree.trajectories, 1)
    parents, ends = np.asarray(tree.parents), np.asarray(tree.ends, float)
    draws = np.asarray(tree.draws, float)
    total = np.maximum(ends + np.bincount(parents, draws, len(tree)), 1.0)
    flow = np.ones(len(tree))
    for level in _levels(tree)[1:]:
        above = parents[level]
        flow[level] = flow[above] * draws[level] / total[above]
    weight: Floats = flow * ends / total
    return weight


def candidates(tree: Tree) -> list[int]:
    """Nodes a branch may start from: the non-leaf nodes with token budget left (root included)."""
    limit, depths = tree.options.sampling.max_new_tokens, tree.depths_tokens
    return [node for node in tree.inner_nodes() if depths[node] < limit]


def best(tree: Tree, scores: Floats, among: list[int], count: int) -> list[int]:
    """The `count` nodes of highest score; ties go to the shallower node [steps], then the older."""
    if not among or count < 1:
        return []
    nodes = np.asarray(among, np.int64)
    ranks, last = -scores[nodes], min(count, len(nodes)) - 1
    chosen = ~(ranks > np.partition(ranks, last)[last])  # a bound that is no number keeps all
    nodes, ranks = nodes[chosen], ranks[chosen]
    depths, born = np.array(tree.depths_steps)[nodes], [tree.born[node] for node in nodes]
    return [int(node) for node in nodes[np.lexsort((born, depths, ranks))][:count]]


def unlikeliest_token(tree: Tree, busy: Set[int]) -> tuple[int, int] | None:
    """The token of lowest log-probability that no rollout started before: its node, and where in
    it; None if there is none. From the nodes in `busy` one is about to start. Ties: the older."""
    inside = np.array([step.likeliest_fork[0] for step in tree.steps])
    first = np.array([step.logprobs[0] if step.logprobs else np.inf for step in tree.steps])
    used = np.asarray(tree.starts) > 0
    used[[*busy]] = True
    first[used[tree.parents]] = np.inf
    lowest = min(inside.min(), first.min())
    if lowest == np.inf:
        return None
    at_first = np.flatnonzero(first == lowest).tolist()
    at_inside = np.flatnonzero(inside == lowest).tolist()
    forks = [(tree.born[n], 0, n) for n in at_first]
    forks += [(tree.born[n], tree.steps[n].likeliest_fork[1], n) for n in at_inside]
    _, at, node = min(forks)
    return node, at
