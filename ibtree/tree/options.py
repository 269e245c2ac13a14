"""The options a tree is grown and scored with, and what is allowed in each.

Source of names and defaults: arXiv 2605.28109, section 5 (setting) and appendix; `TreeOptions`
in protos/ibtree/v1/tree.proto is the same on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ibtree.errors import FieldError

VALUE_ESTIMATORS = ("mean", "backup")
CONFIDENCE_FORMS = ("geometric", "product", "sibling")
STEP_RULES = ("text", "auto")
MAX_SEED = 2**63 - 1
MAX_TRAJECTORIES = 65_536
"""Most trajectories that a tree may hold wherever it goes; the server's own limit is lower."""
_MAX_TEXTS, _MAX_TEXT_CHARACTERS, _MAX_STOP_IDS = 16, 256, 64


def check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False
) -> None:
    """Raises FieldError unless `value` is a number in [low, high], or (low, high] if `open_low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(name, f"got {value!r}", f"a number in [{low}, {high}]")
    inside = low < value <= high if open_low else low <= value <= high
    if math.isnan(value) or not inside:
        raise FieldError(name, f"got {value}", f"{'(' if open_low else '['}{low}, {high}]")


def check_integer(name: str, value: int, low: int, high: int) -> None:
    """Raises FieldError unless `value` is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError(name, f"got {value!r}", f"a whole number in [{low}, {high}]")
    check_range(name, value, low, high)


def check_length(name: str, text: str, most: int) -> None:
    """Raises FieldError unless the text has at most so many characters."""
    if len(text) > most:
        raise FieldError(name, f"{len(text)} characters", f"at most {most}")


def check_texts(name: str, texts: object) -> tuple[str, ...]:
    """Up to 16 texts of 1 to 256 characters; one text alone is a list of one. Raises FieldError."""
    listed = (texts,) if isinstance(texts, str) else texts
    if not isinstance(listed, Iterable):
        raise FieldError(name, f"got {texts!r}", "a text, or a list of texts")
    listed = tuple(listed)
    check_range(f"{name}: texts", len(listed), 0, _MAX_TEXTS)
    for text in listed:
        if not isinstance(text, str):
            raise FieldError(name, f"got {text!r} in the list", "texts")
        check_range(f"{name}: characters", len(text), 1, _MAX_TEXT_CHARACTERS)
    return listed


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FieldError(name, f"unknown value {value!r}", " | ".join(allowed))


LOWEST_TEMPERATURE = 1e-6
"""Below it SGLang takes the likeliest token, and gives its log-probability at temperature 1."""


def _as_floats(options: object, names: Iterable[str]) -> None:
    """Whole numbers are numbers too: they become floats, as they do on their way over the wire."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, int) and not isinstance(value, bool):
            try:
                object.__setattr__(options, name, float(value))
            except OverflowError:
                object.__setattr__(options, name, math.copysign(math.inf, value))


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. Penalties are not among it: log-probabilities under them are not the
    model's, so trees could not be trained on; the server sends neutral ones."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 2048
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _as_floats(self, ("temperature", "top_p", "min_p"))
        check_range("sampling.temperature", self.temperature, 0.0, 100.0, open_low=True)
        if self.temperature < LOWEST_TEMPERATURE:
            allowed = f"at least {LOWEST_TEMPERATURE:g}; --top-k 1 takes the likeliest token"
            raise FieldError("sampling.temperature", f"got {self.temperature:g}", allowed)
        check_range("sampling.top_p", self.top_p, 0.0, 1.0, open_low=True)
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if not whole or (self.top_k != -1 and not 1 <= self.top_k < 2**31):
            raise FieldError("sampling.top_k", f"got {self.top_k!r}", "[1, 2147483647] or -1 (all)")
        check_integer("sampling.max_new_tokens", self.max_new_tokens, 1, 2**20)
        check_range("sampling.min_p", self.min_p, 0.0, 1.0)
        if self.min_p == 1.0:
            raise FieldError("sampling.min_p", "got 1", "[0, 1)")
        object.__setattr__(self, "stop", check_texts("sampling.stop", self.stop))
        ids = self.stop_token_ids
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise FieldError("sampling.stop_token_ids", f"got {ids!r}", "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        check_range("sampling.stop_token_ids: ids", len(self.stop_token_ids), 0, _MAX_STOP_IDS)
        for token in self.stop_token_ids:
            check_integer("sampling.stop_token_ids", token, 0, 2**32 - 1)


@dataclass(frozen=True)
class TreeOptions:
    """Shape, scoring and limits of a tree; the defaults are the paper's setting.

    A strategy's and a schedule's names are checked by the server, which knows them.
    """

    strategy: str = "ib"
    schedule: str = "rounds"
    init_rollouts: int = 4
    rounds: int = 9
    branch_nodes: int = 1
    branch_rollouts: int = 1
    beta: float = 5.0
    value_estimator: str = "mean"
    confidence: str = "geometric"
    zero_value_ratio: float = 0.0
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    deadline_s: float | None = None
    max_generated_tokens: int | None = None
    max_trajectories: int | None = None
    step_rule: str = "text"
    separators: tuple[str, ...] = ("\n\n",)
    max_step_tokens: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("init_rollouts", "rounds", "branch_nodes", "branch_rollouts"):
            check_integer(name, getattr(self, name), 1, 4096)
        _as_floats(self, ("beta", "zero_value_ratio", "deadline_s"))
        check_range("beta", self.beta, 0.0, 1e6, open_low=True)
        check_range("zero_value_ratio", self.zero_value_ratio, 0.0, 1e6)
        check_choice("value_estimator", self.value_estimator, VALUE_ESTIMATORS)
        check_choice("confidence", self.confidence, CONFIDENCE_FORMS)
        if self.deadline_s is not None:
            check_range("deadline_s", self.deadline_s, 0.0, 86400.0 * 7, open_low=True)
        if self.max_generated_tokens is not None:
            check_integer("max_generated_tokens", self.max_generated_tokens, 1, 2**62)
        if self.max_trajectories is not None:
            check_integer("max_trajectories", self.max_trajectories, 1, 2**31 - 1)
        check_choice("step_rule", self.step_rule, STEP_RULES)
        object.__setattr__(self, "separators", check_texts("separators", self.separators))
        if not self.separators:
            raise FieldError("separators", "empty", f"1 to {_MAX_TEXTS} texts")
        check_integer("max_step_tokens", self.max_step_tokens, 0, 2**20)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, MAX_SEED)
        for name in ("strategy", "schedule"):
            if not isinstance(getattr(self, name), str):
                raise FieldError(name, f"got {getattr(self, name)!r}", "a name")
        if not isinstance(self.sampling, SamplingOptions):
            raise FieldError("sampling", f"got {self.sampling!r}", "SamplingOptions")

    @property
    def shape_trajectories(self) -> int:
        """G = B0 + (L - 1) K B: trajectories of the full shape."""
        return self.init_rollouts + (self.rounds - 1) * self.branch_nodes * self.branch_rollouts

    @property
    def trajectories(self) -> int:
        """Trajectories the tree is to hold: the full shape's, or the limit if that is smaller."""
        limit = self.max_trajectories
        return self.shape_trajectories if limit is None else min(self.shape_trajectories, limit)


def options_from(settings: object) -> TreeOptions:
    """The options whose fields the settings have under the same names; the rest stay defaults."""
    inner = [f.name for f in fields(SamplingOptions) if hasattr(settings, f.name)]
    outer = [f.name for f in fields(TreeOptions) if hasattr(settings, f.name)]
    sampling = SamplingOptions(**{name: getattr(settings, name) for name in inner})
    return TreeOptions(sampling=sampling, **{name: getattr(settings, name) for name in outer})


def changed(options: TreeOptions, **changes: Any) -> TreeOptions:
    """`options` with fields replaced; keys are fields of TreeOptions or of SamplingOptions."""
    outer = [f.name for f in fields(TreeOptions) if f.name != "sampling"]
    inner = [f.name for f in fields(SamplingOptions)]
    values = {name: getattr(options, name) for name in outer}
    sampling = {name: getattr(options.sampling, name) for name in inner}
    for name, value in changes.items():
        if name not in inner and name not in outer:
            raise FieldError(name, "no such option", ", ".join(sorted([*outer, *inner])))
        (sampling if name in inner else values)[name] = value
    return TreeOptions(sampling=SamplingOptions(**sampling), **values)


def flat(options: TreeOptions) -> dict[str, Any]:
    """Every option by name, those of the sampling among them: what `changed` takes."""
    outer = {f.name: getattr(options, f.name) for f in fields(TreeOptions) if f.name != "sampling"}
    return outer | {f.name: getattr(options.sampling, f.name) for f in fields(SamplingOptions)}


def completed(
    options: TreeOptions | Mapping[str, Any] | None, defaults: TreeOptions
) -> TreeOptions:
    """The options, or `defaults` with those replaced that a mapping gives."""
    return options if isinstance(options, TreeOptions) else changed(defaults, **(options or {}))
