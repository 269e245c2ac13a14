"""What a decoded tree must be to be trained on."""

from __future__ import annotations

from ibtree.tree import Tree


def tree_problem(tree: Tree, model_id: str, vocab_size: int) -> str:
    """Why the tree can not be trained on by this model; empty if it can."""
    if tree.model_id != model_id:
        return f"model_id: of model {tree.model_id[:12]}…, the learner trains {model_id[:12]}…"
    if not tree.prompt:
        return "prompt_token_ids: an empty prompt, nothing predicts its first token"
    if not tree.trajectories:
        return "visits: no trajectory"
    largest = max(max(ids) for ids in (tree.prompt, *(s.token_ids for s in tree.steps[1:])))
    if largest >= vocab_size:
        return f"token_ids: {largest} is beyond the vocabulary of {vocab_size}"
    return ""
