"""The server's settings: one class for file, environment (IBTPO_SERVER_*) and command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ibtpo_settings import Settings
from ibtpo_settings.numbers import Temperature
from ibtree.tree.options import MAX_TRAJECTORIES
from server_ext.cache.names import DEFAULT_FRACTION


class ServerConfig(Settings):
    """Grows IB-guided reasoning trees with SGLang behind a gRPC API.

    SGLang's own server arguments follow after `--` (for example `-- --tp-size 2`). `--version`
    prints the version.
    """

    model_config = SettingsConfigDict(env_prefix="IBTPO_SERVER_")

    model: Path
    """Hugging Face folder with config.json, tokenizer and *.safetensors."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where SGLang runs; auto takes the GPU if there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision the model runs in; the learner sends weights in it."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of each engine process; 0 leaves its default, all cores. A small model beside
    other busy processes is many times faster with 1: threads wait for each other at every layer."""
    host: str = "127.0.0.1"
    """Address to listen on. There is no authentication: keep it on a network you trust."""
    port: int = Field(default=7300, ge=0, le=65535)
    """gRPC port; 0 takes a free one and prints it."""
    health_port: int = Field(default=7302, ge=0, le=65535)
    """Port for plain gRPC health, answered from the first second on; 0 takes a free one."""
    web_port: int = Field(default=7301, ge=0, le=65535)
    """Port of the web page: metrics for Prometheus under /metrics; 0 takes a free one."""
    reflection: bool = False
    """Let clients ask for the services' descriptions (gRPC server reflection), for tools such as
    grpcurl; needs the extra `reflection`."""
    stuck_after_s: float = Field(default=60.0, gt=0)
    """Health says NOT_SERVING when the engine's work has stood still for so long. More where one
    pass over a long prompt may take that long."""
    data_dir: Path = Path("runs/server")
    """Folder of the journal and of the weight store; survives restarts."""

    separator: str = Field(default="\n\n", min_length=1)
    """Text that closes a reasoning step under the step rule text."""
    step_rule: Literal["text", "auto"] = "text"
    """text: steps end at the separator; auto: at paragraphs, or at lines or sentences where the
    first rollouts of a tree have hardly any."""
    max_step_tokens: int = Field(default=0, ge=0)
    """A step is closed after so many tokens in any case; 0: never."""
    grader: str = "math"
    """Grader of prompts that name none: exact, math, regex, self_consistency, remote, or one that
    is installed."""
    grader_workers: int = Field(default=2, ge=1, le=256)
    """Processes that run graders which may hang: math, regex and those of installed packages."""
    grade_timeout_s: float = Field(default=10.0, gt=0)
    """Time one grade may take there. One that takes longer is tried once more, in a process of
    its own; then it counts as wrong (0)."""
    answer_marker: str = Field(default="####", min_length=1)
    """Text before the final answer, which ends with the line."""
    reward_address: str = ""
    """host:port of your RewardService, for the grader `remote`."""
    reward_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of a call to it, retries included; a tree whose trajectory got no reward is grown
    again later."""

    max_open_trees: int = Field(default=0, ge=0)
    """Most trees of queued prompts growing at once; more wait. 0: as many as keep max_rollouts in
    flight."""
    max_calls: int = Field(default=64, ge=1)
    """Trees of SampleTree calls growing at once."""
    max_waiting_calls: int = Field(default=256, ge=0)
    """SampleTree calls that may wait; one more is told to come back later."""
    message_timeout_s: float = Field(default=30.0, gt=0)
    """How long a call's message may take to arrive; then the call ends. Pushes of weights have a
    rule of their own."""
    max_queued_prompts: int = Field(default=100_000, ge=1)
    """Prompts that may be queued; whoever submits more is told to come back later."""
    max_rollouts: int = Field(default=0, ge=0)
    """Rollouts in flight in the engine; more wait, shared fairly between the trees. 0: as many as
    SGLang runs at once."""
    call_share: float = Field(default=0.75, gt=0, lt=1)
    """Share of those rollouts, and of the KV pool's room for open trees, that SampleTree calls have
    while queued prompts want them too; queued prompts have the rest. What one does not want the
    other may use."""
    tree_cache_fraction: float = Field(default=DEFAULT_FRACTION, gt=0, le=1)
    """Share of the KV pool in which open trees' prefixes are kept; beyond it trees wait, or the
    oldest loses its protection."""
    audit_every_s: float = Field(default=0.0, ge=0)
    """Compare one cached prefix with a computed one this often; 0: never."""
    limit_trajectories: int = Field(default=256, ge=1, le=MAX_TRAJECTORIES)
    """Most trajectories a prompt may ask for."""
    limit_new_tokens: int | None = Field(default=None, ge=1)
    """Largest max_new_tokens a prompt may ask for. null: what the model's context leaves."""
    limit_temperature: Temperature | None = None
    """Highest temperature a prompt may ask for. null: 100."""
    limit_deadline_s: float | None = Field(default=None, gt=0)
    """Longest deadline of a tree, and that of a tree whose prompt asks for none. null: no limit."""
    lease_s: float = Field(default=600.0, gt=0)
    """How long a lease lasts unless the caller says."""
    max_returns: int = Field(default=5, ge=0)
    """Times a learner may give a tree back as bad; once more and it is dead. Leases that run out
    and trees given back for other reasons do not count."""
    max_failures: int = Field(default=3, ge=1)
    """Growths that failed by the prompt's own fault after which it is dead. What an absent engine,
    grader or disk interrupts does not count."""
    min_free_bytes: int = Field(default=256 * 1024**2, ge=0)
    """Room on the journal's disk below which no prompt begins to grow; leasing and acking go on."""
    max_graded: int | None = Field(default=None, ge=1)
    """Most trees of a run that grow or wait to be leased; its next prompts wait. null: no limit."""
    max_weight_lag: int | None = Field(default=None, ge=0)
    """A run's prompts wait while a tree of it that waits to be leased is more weight versions than
    this behind the served one. null: no limit."""
    keep_acked: int = Field(default=100_000, ge=0)
    """Acked trees whose ids are remembered, so that submitting and acking them again changes
    nothing; older ones are forgotten."""
    keep_dead_bytes: int = Field(default=1024**3, ge=0)
    """Bytes of dead trees that are kept, the newest; prompts of dead ones stay until purged."""
    weight_switch: Literal["interrupt", "drain"] = "interrupt"
    """What a weight update does to running rollouts: interrupt lets them go on with the new weights
    (each token keeps its version); drain waits until they end."""
    drain_timeout_s: float = Field(default=120.0, gt=0)
    """Longest such wait before a weight update is given up."""
    push_idle_timeout_s: float = Field(default=60.0, gt=0)
    """A push of weights that sends nothing for so long ends; the next one of the same goes on."""
    keep_weights: int = Field(default=4, ge=1)
    """Weight versions kept for rollbacks, the served one included."""
    shared_dir: Path | None = None
    """Folder in which learners may leave weight files instead of sending them. null: none."""
    shutdown_grace_s: float = Field(default=20.0, ge=0)
    """How long calls in flight may go on after SIGTERM, and trees grow that are near their end."""
    supervise: bool = True
    """Start the server again when it dies, after a growing pause; off where something else does so,
    such as Kubernetes."""

    strategy: str = "ib"
    """Default branching strategy: ib, ib_budget, independent, random, fixed_width, entropy, or
    one that is installed."""
    schedule: str = "rounds"
    """Default schedule of a tree's rollouts: rounds or eager."""
    init_rollouts: int = 4
    """B0: default rollouts from the prompt."""
    rounds: int = 9
    """L: default rounds."""
    branch_nodes: int = 1
    """K: default nodes branched from in each later round."""
    branch_rollouts: int = 1
    """B: default rollouts from each of them."""
    beta: float = 5.0
    """Default beta of the information bottleneck."""
    value_estimator: str = "mean"
    """Default value estimator: mean or backup."""
    confidence: str = "geometric"
    """Default confidence: geometric, product or sibling."""
    zero_value_ratio: float = 0.0
    """Default value(child)/value(node) where value(node) is 0."""
    temperature: float = 0.7
    """Default sampling temperature."""
    top_p: float = 0.95
    """Default nucleus mass."""
    top_k: int = 20
    """Default number of tokens kept; -1 keeps all."""
    max_new_tokens: int = 2048
    """Default limit of one trajectory's generated tokens."""
