"""SGLang's server arguments: ours, the operator's after `--`, and what of them is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ibtree.errors import FieldError
from server_ext.attention import registry
from server_ext.engine import cpu, names
from server_ext.engine.modes import MODES, Launch

_VERSION_BEFORE_ANY_PUSH = "0"
_OFF = ("", "0", "false", "f", "no", "n", "off")


@dataclass(frozen=True)
class Resolved:
    """The arguments as SGLang takes them: `server_args` is its own record, resolved or not."""

    server_args: Any

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """Every argument by SGLang's name for it, with what SGLang decided itself."""
        values: Mapping[str, Any] = self.server_args.resolved_dict()
        return values

    @cached_property
    def model(self) -> Any:
        """SGLang's ModelConfig: what it knows of the model before it loads weights."""
        from sglang.srt.configs.model_config import ModelConfig

        return ModelConfig.from_server_args(self.server_args)

    @property
    def context_tokens(self) -> int:
        """The longest sequence, prompt and generated tokens together."""
        return int(self.model.context_len)


def server_arguments(
    model: str,
    device: str,
    dtype: str,
    backend: str,
    arguments: Sequence[str],
    stored_types: Mapping[str, str] | None = None,
) -> Any:
    """SGLang's ServerArgs; no weights are read. `backend`: name of the radix cache backend, empty
    for SGLang's own. `stored_types`: safetensors dtypes of the folder's tensors, by name.

    What the operator passes comes last and wins. Raises FieldError for arguments that SGLang
    rejects, and for a launch mode that the server does not work in (modes.py); OtherSglangError if
    SGLang is not the one this is written against.
    """
    names.check()
    from sglang.srt.server_args import prepare_server_args

    _check_environment(os.environ)
    registry.add_choice()  # SGLang loads plugins only after it has read its arguments
    ours = [f"--model-path={model}", f"--dtype={dtype}", "--page-size=1"]
    ours += [f"--weight-version={_VERSION_BEFORE_ANY_PUSH}", f"--radix-cache-backend={backend}"]
    quiet = ["--log-level=error", "--skip-server-warmup"]
    defaults = cpu.SERVER_ARGUMENTS if device == "cpu" else []

    with _rejections():
        server_args = prepare_server_args([*ours, *quiet, *defaults, *arguments])
    if not backend:  # the engine is one to compare with, and SGLang's own matter
        return server_args

    def launch() -> Launch:
        known = Resolved(server_args)
        stored = stored_types or {}
        return Launch(known.values, known.model, device, dtype, model, backend, stored)

    with _rejections():
        asked = launch()
    try:
        with _rejections():
            server_args.resolve_once()  # as the engine would do: decides what was left open
            decided = launch()
    except FieldError:
        check(asked)  # SGLang may refuse the same, but does not know our reasons
        raise
    check(decided)
    return server_args


def check(launch: Launch) -> None:
    """Raises FieldError for the first mode of the table that is used and does not work."""
    for mode in MODES:
        if found := mode.found(launch):
            raise FieldError(mode.field, f"{mode.name} ({found}): {mode.why}", mode.instead)


@contextmanager
def _rejections() -> Iterator[None]:
    """Raises FieldError for what SGLang raises: its checks are spread over many functions."""
    try:
        yield
    except SystemExit as error:  # argparse has said what
        raise FieldError("--", "SGLang rejected its arguments", "sglang's options") from error
    except (ValueError, AssertionError, NotImplementedError, ImportError) as error:
        problem = f"SGLang rejected its arguments: {' '.join(str(error).split())}"
        raise FieldError("--", problem, "what SGLang can combine") from error


def _check_environment(environment: Mapping[str, str]) -> None:
    """Raises FieldError for a variable under which log-probabilities are not the sampler's."""
    name = "SGLANG_RETURN_ORIGINAL_LOGPROB"
    if environment.get(name, "").lower() not in _OFF:
        problem = f"{name}={environment[name]}: log-probabilities would be those at temperature 1"
        raise FieldError("--", problem, f"unset {name}")
