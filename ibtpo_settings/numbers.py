"""Settings that are numbers with a limit of their own."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ibtree.tree.options import LOWEST_TEMPERATURE


def _of_the_sampler(temperature: float) -> float:
    if temperature < LOWEST_TEMPERATURE:
        problem = f"below {LOWEST_TEMPERATURE:g} log-probabilities are not the sampler's"
        raise PydanticCustomError("temperature", problem)
    return temperature


Temperature = Annotated[float, Field(gt=0), AfterValidator(_of_the_sampler)]
"""A softmax temperature that the engine samples at, and gives log-probabilities at."""
