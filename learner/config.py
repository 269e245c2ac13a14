"""The learner's settings: one class for file, environment (IBTPO_LEARNER_*) and command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import SettingsConfigDict

from ibtpo_settings import Settings
from ibtpo_settings.numbers import Temperature
from ibtpo_settings.texts import Texts, added_up


class LearnerConfig(Settings):
    """Leases scored trees from an ibtpo-server, takes IB-TPO steps, pushes the weights back.

    `--version` prints the version.
    """

    model_config = SettingsConfigDict(env_prefix="IBTPO_LEARNER_")

    @field_validator("dtype", mode="before")
    @classmethod
    def _weights_stay_float32(cls, dtype: object) -> object:
        """AdamW moves a weight by about the learning rate, and bfloat16 resolves 2^-8 of it: at
        1e-6, 98 % of a model's weights did not move in 200 steps."""
        if dtype == "bfloat16":
            problem = "weights stay float32; --compute-dtype bfloat16 computes in bfloat16"
            raise PydanticCustomError("dtype", problem)
        return dtype

    @classmethod
    def resolve(cls, prog: str, argv: list[str]) -> Self:
        return super().resolve(prog, added_up(argv, ("--stop", "--separators")))

    server: str = "127.0.0.1:7300"
    """Address of the server's gRPC port."""
    model: Path
    """Hugging Face folder: the one the server was started from."""
    prompts: str
    """JSONL, JSON (.gz too) or Parquet file, a folder or glob of them, or Hugging Face dataset
    hf:NAME[:CONFIG[:SPLIT]]; rows of {"prompt": text or messages, "answer": text or number}. An
    answer with a line "#### 18" (GSM8K) is 18."""
    prompt_field: str | None = None
    """Field of the prompt; dots lead into fields. null: prompt, or question where there are only
    question and answer."""
    answer_field: str | None = None
    """Field of the answer. null: answer, or reward_model.ground_truth (verl's), if it is there."""
    prompt_template: str = "{prompt}"
    """What is sent: this text with the field's in the place of {prompt}."""
    chat: bool = False
    """Put prompts through the model's chat template, as messages of the user. Implied by
    system_prompt and chat_template_args; prompts that are lists of messages always are."""
    system_prompt: str | None = None
    """System message of every prompt, in the place of the rows' own. null: none but those."""
    chat_template_args: dict[str, str | bool | int | float] = Field(default={}, max_length=16)
    """Arguments of the model's chat template, such as {"enable_thinking": false}: texts, numbers,
    true or false."""
    drop_repeats: bool = False
    """Keep the first of equal prompts only."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and say how many, instead of ending."""
    out_dir: Path = Path("runs/learner")
    """Folder of checkpoints, metrics and the run's identity."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    dtype: Literal["float32"] = "float32"
    """Precision of the trained weights, of their gradients and of the optimiser."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of forward and backward passes, and of the frozen reference. null: float32 for a
    model folder that holds float32, else bfloat16."""
    rank_timeout_s: float = Field(default=600.0, gt=0)
    """Longest that a rank under torchrun waits for another before the run ends."""
    seed: int = 0
    """Seed of the prompts' order and of torch."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 leaves its default."""

    steps: int = Field(default=200, ge=1)
    """Steps of the whole run: batches of trees trained on."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Generated tokens after which the run ends, whatever its steps. null: no limit."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Trees a step trains on."""
    prompts_ahead_steps: float = Field(default=1.0, ge=0)
    """Steps' worth of prompts submitted ahead; 0 keeps every tree on-policy."""
    grader: str = ""
    """Grader by name; empty takes the server's default."""
    lease_s: float = Field(default=300.0, gt=5, le=86400)
    """How long a lease lasts; prolonged while trees are in hand."""
    shared_dir: Path | None = None
    """Folder that the server has as its --shared-dir: weights are left there. null: sent."""
    take_over: bool = False
    """Publish weights although another run published those that the server serves; that run's next
    push is refused then."""
    canary_tolerance: float = Field(default=1.0, ge=0)
    """With each version go the log-probabilities of a few tokens; a server that computes others, by
    more than this [nats], takes the version back. 0 sends none."""
    patience_s: float = Field(default=1800.0, gt=0)
    """Longest wait for a step's trees, or for a server that is away."""
    max_staleness: int | None = Field(default=None, ge=0)
    """Most weight versions between a tree's oldest token and the trainer; older trees are dropped
    and counted. null: no bound."""

    strategy: str = "ib"
    """Branching strategy by name (docs/design.md); independent with local-weight 0 is GRPO."""
    schedule: str = "rounds"
    """Schedule of a tree's rollouts: rounds (the paper's) or eager."""
    init_rollouts: int = Field(default=4, ge=1)
    """B0."""
    rounds: int = Field(default=9, ge=1)
    """L."""
    branch_nodes: int = Field(default=1, ge=1)
    """K."""
    branch_rollouts: int = Field(default=1, ge=1)
    """B. Trajectories of a tree: G = B0 + (L - 1) K B."""
    temperature: Temperature = 0.7
    """Sampling temperature; log-probabilities on both sides are at it."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus mass."""
    top_k: int = 20
    """Tokens kept; -1 keeps all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Tokens less likely than this times the likeliest are dropped; 0 keeps all."""
    step_rule: Literal["text", "auto"] = "text"
    """text: steps end at `separators`; auto: at paragraphs, or at lines or sentences where the
    first rollouts of a tree have hardly any."""
    separators: Texts = ("\n\n",)
    """Texts that close a step under the rule text. May be given several times, or as a JSON list.
    """
    max_step_tokens: int = Field(default=0, ge=0)
    """A step is closed after so many tokens in any case; 0: never."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Limit of one trajectory's generated tokens."""
    stop: Texts = ()
    """Texts that end a trajectory, besides the model's end of sequence. May be given several times,
    or as a JSON list."""
    beta: float = Field(default=5.0, gt=0)
    """Beta of the information bottleneck."""
    value_estimator: Literal["mean", "backup"] = "mean"
    """Estimate of a step's value."""
    confidence: Literal["geometric", "product", "sibling"] = "geometric"
    """Form of a step's confidence."""

    local_weight: float = Field(default=0.1, ge=0)
    """Lambda: weight of the local advantage."""
    local_scale: Literal["token", "step"] = "token"
    """token: the paper's form; step: the local term divided by the step's token count."""
    local_reference: Literal["behaviour", "reference"] = "behaviour"
    """Whose confidence in a step enters the local advantage: that of the policy that sampled it, or
    the frozen reference's."""
    std: Literal["population", "sample"] = "population"
    """Standard deviation of a tree's rewards."""
    advantage_eps: float = Field(default=0.0, ge=0)
    """Added to that standard deviation."""
    skip_uniform_trees: bool = True
    """Leave trees without reward variance out of the loss."""
    uniform_in_denominator: bool = False
    """Count the trees left out in the loss's denominator all the same."""
    trajectory_weight: Literal["visits", "draws"] = "visits"
    """visits: each trajectory 1 / G; draws: undoes the over-weighting of branched regions."""
    length_norm: Literal["trajectory", "token", "constant"] = "trajectory"
    """Normalisation of the loss over tokens."""
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """Upper clip of the ratio: 1 + clip_high."""
    kl_weight: float = Field(default=0.001, ge=0)
    """Weight of the KL to the frozen reference; 0 loads no reference unless local_reference asks
    for it."""
    reference_model: Path | None = None
    """Hugging Face folder of the frozen reference, with the model's vocabulary. null: the model's
    own."""
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """engine: ratio against the recorded log-probabilities; trainer: against a forward pass before
    the update, the engine's entering as truncated importance weight."""
    importance_cap: float = Field(default=2.0, gt=0)
    """C of the truncated importance weight."""

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate of AdamW, after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps over which the learning rate rises linearly to `lr`."""
    optimizer_steps_per_batch: int = Field(default=1, ge=1)
    """Optimiser steps on each step's trees, every one over all of them; the old log-probabilities
    stay those from before the first."""
    max_bad_steps: int = Field(default=3, ge=1)
    """Steps in a row without a finite loss and gradient after which the run stops; each is
    skipped."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Global norm the gradient is clipped to. One token on which the policy decides sharply can
    have ten times the usual `grad_norm`; about twice the usual keeps such steps small."""
    forward: Literal["packed", "trajectory"] = "packed"
    """packed: each token of a tree once, several trees in a sequence; trajectory: a row for each
    trajectory, slower, for models with sliding windows or layers that are no attention."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens, padding included, of one forward pass (one trajectory always fits)."""
    logits_chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose logits are in memory at a time."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    checkpoint_every_steps: int = Field(default=1, ge=1)
    """Steps between checkpoints; trees are acked only after one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest checkpoint in out_dir."""
    eval_prompts: str | None = None
    """Held-out prompts, read like prompts and evaluated through the server."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 evaluates before and after only."""
    eval_samples: int = Field(default=1, ge=1, le=4096)
    """Rollouts a held-out problem: its accuracy is their mean reward."""
    eval_temperature: Temperature | None = None
    """Sampling temperature of evaluations. null: temperature."""
    eval_top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus mass of evaluations. null: top_p."""
    eval_top_k: int | None = None
    """Tokens kept in evaluations; -1 keeps all. null: top_k."""
    eval_max_new_tokens: int | None = Field(default=None, ge=1)
    """Limit of a held-out rollout's generated tokens. null: max_new_tokens."""
    log_prob_gap_alarm: float = Field(default=0.05, gt=0)
    """Mean gap between engine and trainer log-probabilities [nats] above which it warns."""
