"""The options a tree is grown and scored with, and what is allowed in each.

Source of names and defaults: arXiv 2605.28109, section 5 (setting) and appendix; `TreeOptions`
in protos/ibtree/v1/tree.proto is the same on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ibtree.errors import FieldError

VALUE_ESTIMATORS = ("mean", "backup")
CONFIDENCE_FORMS = ("geometric", "product", "sibling")
_MAX_STOPS, _MAX_STOP_CHARACTERS, _MAX_STOP_IDS = 16, 256, 64


def check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False
) -> None:
    """Raises FieldError unless `value` is a number in [low, high], or (low, high] if `open_low`."""
    inside = low < value <= high if open_low else low <= value <= high
    if math.isnan(value) or not inside:
        raise FieldError(name, f"got {value}", f"{'(' if open_low else '['}{low}, {high}]")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FieldError(name, f"unknown value {value!r}", " | ".join(allowed))


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 2048
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_range("sampling.temperature", self.temperature, 0.0, 100.0, open_low=True)
        check_range("sampling.top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.top_k != -1 and not 1 <= self.top_k < 2**31:
            raise FieldError("sampling.top_k", f"got {self.top_k}", "[1, 2147483647] or -1 (all)")
        check_range("sampling.max_new_tokens", self.max_new_tokens, 1, 2**20)
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        check_range("sampling.stop: texts", len(self.stop), 0, _MAX_STOPS)
        for text in self.stop:
            check_range("sampling.stop: characters", len(text), 1, _MAX_STOP_CHARACTERS)
        check_range("sampling.stop_token_ids: ids", len(self.stop_token_ids), 0, _MAX_STOP_IDS)


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

    def __post_init__(self) -> None:
        for name in ("init_rollouts", "rounds", "branch_nodes", "branch_rollouts"):
            check_range(name, getattr(self, name), 1, 4096)
        check_range("beta", self.beta, 0.0, 1e6, open_low=True)
        check_range("zero_value_ratio", self.zero_value_ratio, 0.0, 1e6)
        check_choice("value_estimator", self.value_estimator, VALUE_ESTIMATORS)
        check_choice("confidence", self.confidence, CONFIDENCE_FORMS)
        if self.deadline_s is not None:
            check_range("deadline_s", self.deadline_s, 0.0, 86400.0 * 7, open_low=True)
        if self.max_generated_tokens is not None:
            check_range("max_generated_tokens", self.max_generated_tokens, 1, 2**62)
        if self.max_trajectories is not None:
            check_range("max_trajectories", self.max_trajectories, 1, 2**31 - 1)

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


def completed(
    options: TreeOptions | Mapping[str, Any] | None, defaults: TreeOptions
) -> TreeOptions:
    """The options, or `defaults` with those replaced that a mapping gives."""
    return options if isinstance(options, TreeOptions) else changed(defaults, **(options or {}))
