"""The terminal's view of trees that are long, deep or cut."""

from __future__ import annotations

from ibtree.cli.tree_view import print_tree
from ibtree.messages import Chat, ChatMessage
from ibtree.tree import Finish, StopCause, Tree
from tests.ibtree.tree.growing import step_of


def finished(tree: Tree) -> Tree:
    tree.texts = ["", *(f"step {step.token_ids[0]}" for step in tree.steps[1:])]
    tree.stop_cause = StopCause.DEADLINE
    return tree


def printed(tree: Tree, capsys) -> list[str]:
    print_tree(finished(tree), Chat((ChatMessage("system", "Hush."), ChatMessage("user", "Why?"))))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_long_trajectory_is_not_indented(capsys):
    tree = Tree(prompt=(1,))
    tree.insert(0, [step_of((i,)) for i in range(3000)], 1.0, Finish.LENGTH)
    _, root, *steps, last = printed(tree, capsys)
    assert root.endswith("Why?")
    assert [line.split()[-2:] for line in steps[:-1]] == [["step", str(i)] for i in range(2999)]
    assert steps[-1].endswith("step 2999 ⇒ 1.00 cut by the limit")
    assert {line.index("1.00") for line in steps} == {steps[0].index("1.00")}
    assert last.startswith("deadline: 1 trajectories, mean reward 1.00; 0 tokens generated, 3000 ")


def test_a_tree_that_branches_at_every_step_is_not_squeezed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    tree, node = Tree(prompt=(1,)), 0
    for i in range(60):
        tree.insert(node, [step_of((1000 + i,)), step_of((9,))], 0.0, Finish.STOP)
        end = tree.insert(node, [step_of((2000 + i,)), step_of((9,))], 1.0, Finish.STOP)
        node = tree.parents[end]
    lines = printed(tree, capsys)
    for i in range(60):
        for first in (1000, 2000):
            (line,) = (line for line in lines if line.endswith(f"step {first + i}"))
            assert line.index("1×") >= 4 * i
