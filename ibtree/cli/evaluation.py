"""`ibtpo eval`: accuracy on prompts with answers."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ibtree.cli.output import Command, print_figures
from ibtree.data.questions import PLACEHOLDER, read_questions
from ibtree.evaluation.accuracy import evaluate
from ibtree.messages import Prompt
from ibtree.tree.options import TreeOptions, changed


def _evaluate(arguments: argparse.Namespace) -> None:
    questions = read_questions(
        arguments.prompts,
        arguments.prompt_field,
        arguments.answer_field,
        arguments.prompt_template,
    )
    prompts = [Prompt(q.prompt, "", q.answer, arguments.grader) for q in questions]
    options = changed(
        TreeOptions(),
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
    )
    print_figures(asdict(evaluate(arguments.server, prompts, options)), arguments.json)


def _options(command: argparse.ArgumentParser) -> None:
    source = "JSONL, JSON or .parquet file, folder or glob, or hf:NAME[:CONFIG[:SPLIT]]"
    command.add_argument("--prompts", required=True, metavar="SOURCE", help=source)
    fields = "default: prompt and answer, or GSM8K's question and answer"
    command.add_argument("--prompt-field", metavar="NAME", help=f"the prompt's; {fields}")
    command.add_argument("--answer-field", metavar="NAME", help="the answer's")
    template = "text to send, {prompt} in the place of the prompt"
    command.add_argument("--prompt-template", default=PLACEHOLDER, metavar="TEXT", help=template)
    command.add_argument("--grader", default="", help="grader by name; default: the server's")
    command.add_argument("--temperature", type=float, default=0.7, help="sampling temperature")
    command.add_argument("--max-new-tokens", type=int, default=2048, help="per rollout [tokens]")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus mass")
    command.add_argument("--top-k", type=int, default=-1, help="tokens kept; -1: all")


COMMANDS: tuple[Command, ...] = (
    ("eval", "accuracy on a file of prompts and answers", _evaluate, _options),
)
