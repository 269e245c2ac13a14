"""What the operator allows one prompt to ask for."""

from __future__ import annotations

from dataclasses import dataclass

from ibtree.errors import FieldError
from ibtree.tree.options import TreeOptions, changed


@dataclass(frozen=True)
class Limits:
    """The most that one prompt may ask for; None: no limit but the model's context."""

    trajectories: int = 256
    new_tokens: int | None = None
    temperature: float | None = None
    deadline_s: float | None = None

    def applied(self, options: TreeOptions) -> TreeOptions:
        """The options, with the longest deadline if they have none. Raises FieldError."""
        if options.trajectories > self.trajectories:
            problem = f"the shape asks for {options.trajectories} trajectories"
            allowed = f"at most {self.trajectories} (the server's --limit-trajectories)"
            raise FieldError("options.rounds", problem, allowed)
        sampling = options.sampling
        for field, value, most, setting in (
            ("sampling.max_new_tokens", sampling.max_new_tokens, self.new_tokens, "new-tokens"),
            ("sampling.temperature", sampling.temperature, self.temperature, "temperature"),
            ("deadline_s", options.deadline_s or 0.0, self.deadline_s, "deadline-s"),
        ):
            if most is not None and value > most:
                allowed = f"at most {most:g} (the server's --limit-{setting})"
                raise FieldError(field, f"got {value:g}", allowed)
        if options.deadline_s is None and self.deadline_s is not None:
            return changed(options, deadline_s=self.deadline_s)
        return options
