"""Typed settings of both daemons: command line over environment over file over defaults.

The same field names everywhere, units in the names; an unknown key is an error in each source.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from ibtree import __version__

_file: ContextVar[Path | None] = ContextVar("settings_file", default=None)


class Settings(BaseSettings):
    """Base of ServerConfig and LearnerConfig."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    config: Path | None = Field(default=None, exclude=True)
    """YAML file with the same fields; the environment and the command line override it."""
    print_config: bool = Field(default=False, exclude=True)
    """Print the resolved configuration as YAML and exit."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = YamlConfigSettingsSource(settings_cls, yaml_file=_file.get())
        return init_settings, env_settings, file

    @classmethod
    def load(cls, prog: str, argv: list[str]) -> Self:
        """Resolves the settings or exits with one line that names the field and the remedy."""
        if "--version" in argv:  # whatever else is there, or missing
            print(f"{prog} {__version__}")
            sys.exit(0)
        try:
            return cls.resolve(prog, argv)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
            got = "" if first["type"] == "missing" else f" (got {first['input']!r})"
            sys.exit(f"{prog}: --{name}: {first['msg']}{got}; see {prog} --help")
        except (OSError, ValueError) as error:
            sys.exit(f"{prog}: {' '.join(str(error).split())}; see {prog} --help")

    @classmethod
    def resolve(cls, prog: str, argv: list[str]) -> Self:
        """Resolves them as `load` does, but raises ValidationError, ValueError or OSError."""
        cls._reject_unknown_environment()
        path = _config_path(argv) or os.environ.get(f"{cls.model_config['env_prefix']}CONFIG")
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"--config: no file {path}")
        if path:
            _check_file(Path(path))
        token = _file.set(Path(path) if path else None)
        try:
            line = _whole_lines(argv)
            settings = cls(_cli_parse_args=line, _cli_prog_name=prog)  # type: ignore[call-arg]
        finally:
            _file.reset(token)
        if settings.print_config:
            print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")
            sys.exit(0)
        return settings

    @classmethod
    def _reject_unknown_environment(cls) -> None:
        prefix = cls.model_config["env_prefix"]
        known = {f"{prefix}{name}".upper() for name in cls.model_fields}
        for name in os.environ:
            if name.upper().startswith(prefix.upper()) and name.upper() not in known:
                raise ValueError(f"environment variable {name}: no such setting; unset it")


def _check_file(path: Path) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"--config: {path} holds no settings; allowed: lines of `name: value`")


def _whole_lines(argv: list[str]) -> list[str]:
    """The arguments, with a value of several lines as an argument of its own: of `--name=value`
    pydantic-settings 2.16 keeps the first line alone."""
    line: list[str] = []
    for word in argv:
        name, _, value = word.partition("=")
        line += [name, value] if word.startswith("--") and "\n" in value else [word]
    return line


def _config_path(argv: list[str]) -> str | None:
    """The path of the last --config: as for every other option, the last one counts."""
    path = None
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            path = argv[i + 1]
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
    return path
