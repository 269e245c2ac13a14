"""`ibtpo eval`: accuracy on prompts with answers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibtree.cli.output import Command, print_figures
from ibtree.data.questions import PLACEHOLDER, read_questions
from ibtree.data.reading import reading_from
from ibtree.errors import FieldError
from ibtree.evaluation.run import evaluate
from ibtree.messages import Prompt
from ibtree.text import printable

_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "stop")


def _evaluate(arguments: argparse.Namespace) -> None:
    arguments.chat_template_args = _template_args(arguments.chat_template_args)
    questions = read_questions(arguments.prompts, reading_from(arguments), _tell)
    prompts = [Prompt(q.prompt, "", q.answer, arguments.grader) for q in questions]
    sampling = {name: getattr(arguments, name) for name in _SAMPLING}
    with _bar() as progress:
        accuracy = evaluate(
            arguments.server,
            prompts,
            {name: value for name, value in sampling.items() if value is not None},
            samples=arguments.samples,
            seed=arguments.seed,
            resume=arguments.resume,
            progress=progress,
            tell=_tell,
            timeout_s=arguments.timeout_s,
            patience_s=arguments.patience_s,
        )
    print_figures(asdict(accuracy), arguments.json)


def _template_args(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise FieldError("chat_template_args", f"got {text!r}", 'JSON such as {"thinking": false}')
    return arguments


def _tell(line: str) -> None:
    print(f"ibtpo: {printable(line)}", file=sys.stderr)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Shows how many problems are done, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("problems"), BarColumn(), MofNCompleteColumn(), Elapsed(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _text(word: str) -> str:
    """A word of the command line as UTF-8 text."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{error}; allowed: text in UTF-8") from error


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--samples", type=int, default=1, metavar="N", help="rollouts a problem; mean: avg@N")
    add("--temperature", type=float, default=0.7, help="sampling temperature")
    add("--max-new-tokens", type=int, help="per rollout [tokens]; default: the server's")
    add("--top-p", type=float, default=1.0, help="nucleus mass")
    add("--top-k", type=int, default=-1, help="tokens kept; -1: all")
    add("--stop", action="append", type=_text, metavar="TEXT", help="ends a rollout; repeatable")
    add("--seed", type=int, help="of the rollouts, if the server samples by seeds")
    add("--grader", default="", help="grader by name; default: the server's")
    resume = "keep finished problems in this file, and ask none of those in it again"
    add("--resume", type=Path, metavar="FILE", help=resume)
    timeout = "a problem that takes longer fails [seconds]"
    add("--timeout-s", type=float, default=3600.0, help=timeout)
    patience = "longest wait for a server that went away [seconds]"
    add("--patience-s", type=float, default=300.0, help=patience)
    _add_prompt_options(command.add_argument_group("prompts"))


def _add_prompt_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    source = (
        "JSONL, JSON (.gz too) or .parquet file, folder or glob, or hf:NAME[:CONFIG[:SPLIT]]; "
        "prompts are texts or lists of messages"
    )
    add("--prompts", required=True, metavar="SOURCE", help=source)
    names = "dots lead into fields; default: prompt and answer, or GSM8K's or verl's"
    add("--prompt-field", metavar="NAME", help=f"the prompt's; {names}")
    add("--answer-field", metavar="NAME", help="the answer's")
    template = "text to send, {prompt} in the place of the prompt"
    add("--prompt-template", type=_text, default=PLACEHOLDER, metavar="TEXT", help=template)
    chat = "put texts through the model's chat template; implied by the next two"
    add("--chat", action=argparse.BooleanOptionalAction, default=False, help=chat)
    system = "system message, in the place of the rows' own"
    add("--system-prompt", type=_text, metavar="TEXT", help=system)
    arguments = """arguments of the chat template, such as '{"enable_thinking": false}'"""
    add("--chat-template-args", default="{}", metavar="JSON", help=arguments)
    repeats = "keep the first of equal prompts only"
    add("--drop-repeats", action=argparse.BooleanOptionalAction, default=False, help=repeats)
    bad = "leave out rows that cannot be read, and say how many"
    add("--skip-bad-rows", action=argparse.BooleanOptionalAction, default=False, help=bad)


COMMANDS: tuple[Command, ...] = (
    ("eval", "accuracy on a file of prompts and answers", _evaluate, _add_options),
)
