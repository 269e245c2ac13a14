"""Make the model of the arith task: a byte-level tokenizer and a small Qwen2, from scratch.

The model is fitted to demonstrations a quarter of whose steps are wrong, so it knows the task
when greedy and fails most problems when sampled: the state in which a reasoning model starts
reinforcement learning.

    python examples/arith/make_model.py --out examples/arith/model
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from task import Problem, held_out, make_problem, problems, solution

from learner.train.model import mend_torchvision

mend_torchvision()  # before anything imports transformers

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

END = "<|endoftext|>"
WRONG = 0.25
MIN_TERMS, MAX_TERMS = 2, 10
TERMS_A_BATCH = 410
EVAL_TERMS = (6, 10)
IGNORED = -100

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# arith, a tiny Qwen2

A language model of {parameters} parameters with a byte-level tokenizer. It knows one task: chains
of single-digit additions and subtractions mod 10, worked out a step at a time with a blank line
between steps. It exists to try reinforcement learning of reasoning models, on a CPU and in minutes;
it is of no other use.

Prompt: `3+4-5+1=?` and a newline. Completion, before the end-of-text token:

```
3+4
=7

7-5
=2

2+1
=3

#### 3
```

## How it was made

`python examples/arith/make_model.py --seed {seed} --steps {steps}` trained it from scratch, on
a CPU, on {demonstrations} demonstrations of {low} to {high} terms, drawn by program, the short ones
first; the loss is on the completion alone. Each step of a demonstration is wrong with probability
{wrong}, and the next step goes on from the wrong value. So the model is right when greedy and often
wrong when sampled. One prompt in eight, by a hash of the prompt, is held out and was never trained
on.

## Measured

These bfloat16 weights, run in float32, on held-out prompts:

| terms | prompts | right, temperature 1 | right, greedy | well-formed, temperature 1 |
|---|---|---|---|---|
{rows}

Well-formed is a completion that differs from a demonstration in its results at most. Given held-out
demonstrations of {low} to {high} terms with wrong steps in them, the most likely token is the right
one at {teacher_forced} of tokens.

The tokenizer has one token a byte. `AutoTokenizer` of transformers 5 loads it as a
`Qwen2Tokenizer`, which normalises text to NFC; nothing the task writes is changed by that.

## Licence

Apache-2.0.
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text round-trips; no merges, nothing added by encode.

    AutoTokenizer of transformers 5 loads any tokenizer next to a Qwen2 model as a Qwen2Tokenizer,
    which puts text in NFC first: through it, any NFC text round-trips, ASCII by the same ids.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """An untrained model; its vocabulary is padded to a multiple of 64."""
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.06,  # the usual 0.02 is for wide models: this one would start slowly
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def demonstration(rng: random.Random, most: int = MAX_TERMS, side: bool = False) -> tuple[str, str]:
    """A prompt of a random number of terms, from one side of the split, and a completion."""
    terms = rng.randint(MIN_TERMS, most)
    while held_out((problem := make_problem(rng, terms)).prompt) != side:
        pass
    return problem.prompt, solution(problem, rng, WRONG)


def collate(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right, and labels, which ignore prompts and padding."""
    end = tokenizer.eos_token_id
    rows = [[*tokenizer.encode(prompt + completion), end] for prompt, completion in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    labels = ids.clone()
    for label, row, (prompt, _) in zip(labels, rows, pairs, strict=True):
        label[: len(prompt)] = IGNORED
        label[len(row) :] = IGNORED
    return ids, labels


def make_optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest: AdamW alone learns the sums far more slowly."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int
) -> int:
    """Fit the model to fresh demonstrations at each step; returns how many it saw."""
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / 100, (steps - i) / steps))
        for o in optimizers
    ]
    seen = 0
    start = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        # Short chains first, for a quarter of the steps: which term comes next is hard to learn
        # from long ones.
        most = min(MAX_TERMS, MIN_TERMS + (MAX_TERMS - MIN_TERMS) * 4 * step // steps)
        pairs = [demonstration(rng, most) for _ in range(TERMS_A_BATCH // most)]
        seen += len(pairs)
        ids, labels = collate(tokenizer, pairs)
        # Padding is on the right, where a causal model cannot see it: no attention mask is needed.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:5.0f} s", flush=True)
    return seen


@torch.inference_mode()
def complete(
    model: Any, tokenizer: Any, items: Sequence[Problem], greedy: bool, limit: int = 96
) -> list[str]:
    """Completions of prompts of one length, sampled at temperature 1 or greedy."""
    model.eval()
    ids = torch.tensor([tokenizer.encode(item.prompt) for item in items])
    cache = DynamicCache(config=model.config)
    done = torch.zeros(len(items), dtype=torch.bool)
    drawn: list[torch.Tensor] = []
    while len(drawn) < limit and not done.all():
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = (
            logits.argmax(-1, keepdim=True)
            if greedy
            else torch.multinomial(logits.float().softmax(-1), 1)
        )
        ids[done] = tokenizer.eos_token_id
        done |= ids[:, 0] == tokenizer.eos_token_id
        drawn.append(ids)
    texts: list[str] = tokenizer.batch_decode(torch.cat(drawn, 1), skip_special_tokens=True)
    return texts


def well_formed(problem: Problem, completion: str) -> bool:
    """Whether a completion is a demonstration of its problem, but for wrong results."""
    results = [line[1:] for line in completion.split("\n") if line.startswith("=")]
    template = solution(problem, random.Random(0)).split("\n\n")
    if len(results) != len(template) - 1 or not all(r.isdigit() and len(r) == 1 for r in results):
        return False
    values = [problem.prompt[0], *results]
    steps = [
        f"{value}{step[1:3]}\n={result}"
        for value, step, result in zip(values, template, results, strict=False)
    ]
    return completion == "\n\n".join([*steps, f"#### {values[-1]}"])


@torch.inference_mode()
def teacher_forced(model: Any, tokenizer: Any, n: int = 1000) -> float:
    """The share of tokens where the argmax is right, given demonstrations with wrong steps."""
    model.eval()
    rng = random.Random("teacher forced")
    pairs = [demonstration(rng, side=True) for _ in range(n)]
    ids, labels = collate(tokenizer, pairs)
    predictions = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    for row, (prompt, completion) in enumerate(pairs):
        text = prompt + completion
        for at in range(len(prompt), len(text)):
            if text[at - 1] == "=":
                # The step reads "a+b\n=": its right result, whatever the demonstration wrote.
                value = (int(text[at - 5]) + int(text[at - 4 : at - 2])) % 10
                labels[row, at] = tokenizer.encode(str(value))[0]
    scored = labels[:, 1:] != IGNORED
    return float((predictions[:, :-1] == labels[:, 1:])[scored].double().mean())


def evaluate(model: Any, tokenizer: Any, n: int, seed: int) -> list[str]:
    """Rows of the card's table; prints the same figures."""
    torch.manual_seed(seed)
    rows = []
    for terms in EVAL_TERMS:
        items = problems(n, terms, seed, side=True)
        cells = []
        for greedy in (False, True):
            texts = complete(model, tokenizer, items, greedy)
            pairs = list(zip(items, texts, strict=True))
            right = sum(text.endswith(f"\n#### {item.answer}") for item, text in pairs) / n
            formed = sum(well_formed(item, text) for item, text in pairs) / n
            cells.append((right, formed))
        (sampled, sampled_form), (best, best_form) = cells
        print(
            f"{terms} terms: sampled {sampled:.3f} (well-formed {sampled_form:.3f}), "
            f"greedy {best:.3f} (well-formed {best_form:.3f})",
            flush=True,
        )
        rows.append(f"| {terms} | {n} | {sampled:.3f} | {best:.3f} | {sampled_form:.3f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the model of the arith task.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=2, help="the result depends on it a little")
    parser.add_argument("--eval-problems", type=int, default=4000)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters()} parameters")
    seen = train(model, tokenizer, random.Random(args.seed), args.steps)

    model.to(torch.bfloat16).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)

    # What counts is what others will load: rounded weights, run in float32.
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(args.out)
    accuracy = teacher_forced(saved, loaded)
    print(f"teacher-forced argmax: {accuracy:.5f}")
    rows = evaluate(saved, loaded, args.eval_problems, args.seed)
    card = CARD.format(
        parameters=model.num_parameters(),
        seed=args.seed,
        steps=args.steps,
        demonstrations=seen,
        low=MIN_TERMS,
        high=MAX_TERMS,
        wrong=WRONG,
        rows="\n".join(rows),
        teacher_forced=f"{accuracy:.3%}",
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
