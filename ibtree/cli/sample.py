"""`ibtpo sample`: grows one tree and shows it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ibtree.cli.output import Command, print_json
from ibtree.client import Client
from ibtree.errors import FieldError
from ibtree.messages import Chat, ChatMessage, Expansion, Progress, Prompt
from ibtree.tree import Tree

Event = Expansion | Progress | Tree
_OPTIONS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("strategy", str, "where it branches: ib, ib_budget, independent, random, ..."),
    ("schedule", str, "rounds (the paper's) or eager"),
    ("init_rollouts", int, "B0: rollouts from the prompt"),
    ("rounds", int, "L: rounds, the first rollouts being round 1"),
    ("branch_nodes", int, "K: nodes branched from in each later round"),
    ("branch_rollouts", int, "B: rollouts from each of those nodes"),
    ("beta", float, "beta of the information bottleneck"),
    ("value_estimator", str, "mean or backup"),
    ("confidence", str, "geometric, product or sibling"),
    ("zero_value_ratio", float, "value(child) / value(node) where value(node) is 0"),
    ("deadline_s", float, "the tree ends with what it has after that long [seconds]"),
    ("max_generated_tokens", int, "no rollout starts after that many [tokens]"),
    ("max_trajectories", int, "most trajectories of the tree"),
    ("temperature", float, "softmax temperature"),
    ("top_p", float, "nucleus mass"),
    ("top_k", int, "tokens kept; -1: all"),
    ("min_p", float, "least probability, as a fraction of the likeliest token's; 0: none"),
    ("max_new_tokens", int, "per trajectory [tokens]"),
    ("seed", int, "of the tree; default: one that the server draws"),
    ("step_rule", str, "text or auto: where steps end"),
    ("max_step_tokens", int, "a step is closed after that many [tokens]; 0: never"),
)


def _sample(arguments: argparse.Namespace) -> None:
    prompt = _prompt(arguments)
    with Client(arguments.server) as client:
        events = client.sample_events(prompt, include_text=True, timeout_s=arguments.timeout_s)
        tree = _grown(events) if arguments.json else _watched(events)
    if arguments.json:
        from ibtree.cli.tree_json import tree_object

        print_json(tree_object(tree))
    else:
        from ibtree.cli.tree_view import print_tree

        print_tree(tree, prompt.content)


def _watched(events: Iterator[Event]) -> Tree:
    """Shows the rollouts as they come, on a terminal."""
    from rich.console import Console

    from ibtree.cli.live import growth

    console = Console()
    if not console.is_terminal:
        return _grown(events)
    with growth(console) as view:
        return _grown(events, view.add)


def _grown(
    events: Iterator[Event], show: Callable[[Expansion | Progress], None] = lambda _: None
) -> Tree:
    for event in events:
        if isinstance(event, Tree):
            return event
        show(event)
    raise ConnectionError("SampleTree: the stream ended without a tree")


def _prompt(arguments: argparse.Namespace) -> Prompt:
    values = vars(arguments)
    names = [name for name, _, _ in _OPTIONS] + ["stop", "stop_token_ids", "separators"]
    options = {name: values[name] for name in names if values[name] is not None}
    stdin = arguments.prompt == "-"
    asked = _text("prompt", sys.stdin.buffer.read() if stdin else os.fsencode(arguments.prompt))
    content: str | Chat = asked
    if arguments.chat or arguments.chat_system is not None:
        turns = [ChatMessage("user", asked)]
        if arguments.chat_system is not None:
            rules = _text("chat_system", os.fsencode(arguments.chat_system))
            turns.insert(0, ChatMessage("system", rules))
        content = Chat(tuple(turns))
    answer = _text("answer", os.fsencode(arguments.answer))
    return Prompt(content, answer=answer, grader=arguments.grader, options=options)


def _text(field: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FieldError(field, str(error), "text in UTF-8") from error


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--prompt", required=True, help="the question, used as it is; -: read from stdin")
    add("--answer", default="", help="reference answer for the grader")
    add("--grader", default="", help="grader by name; default: the server's")
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--chat-system", metavar="TEXT", help="the same, with a system message")
    add("--timeout-s", type=float, default=600.0, help="longest wait for the tree [seconds]")
    group = command.add_argument_group("options of the tree; those left out are the server's")
    for name, kind, text in _OPTIONS:
        word = kind.__name__ if kind is not str else "name"
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=word.upper(), help=text
        )
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends a trajectory")
    group.add_argument(
        "--separator", action="append", dest="separators", metavar="TEXT", help="closes a step"
    )
    group.add_argument(
        "--stop-token-ids", type=int, nargs="+", metavar="ID", help="end a trajectory"
    )


COMMANDS: tuple[Command, ...] = (
    ("sample", "grow one tree, watch it, and show its steps", _sample, _add_options),
)
