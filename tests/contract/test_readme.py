"""Every path and every command in README and docs exists and parses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from learner.config import LearnerConfig
from server_ext.config import ServerConfig
from tests import ROOT

README = (ROOT / "README.md").read_text()
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "BENCHMARKS.md"]
ROOMS = ("ibtree/", "server_ext/", "learner/", "tests/", "deploy/", "examples/", "protos/", "docs/")
CONFIGS = {"ibtpo-server": ServerConfig, "ibtpo-learner": LearnerConfig}


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_paths_exist(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    local = [link for link in links if "://" not in link]
    named = [word for word in re.findall(r"`([\w./-]+)`", text) if word.startswith(ROOMS)]
    missing = [link for link in local if not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def commands(language: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


@pytest.mark.parametrize("line", commands("bash"))
def test_commands_parse(line: str) -> None:
    words = shlex.split(line)
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "make":
        dry = ["make", "--dry-run", *words[1:]]
        subprocess.run(dry, cwd=ROOT, check=True, capture_output=True)
    elif words[0] in CONFIGS:
        ours = words[1 : words.index("--")] if "--" in words else words[1:]
        assert "--model" in ours
        needed = [] if words[0] == "ibtpo-server" or "--prompts" in ours else ["--prompts=x"]
        CONFIGS[words[0]].resolve(words[0], [*ours, *needed])
    elif words[0] == "torchrun":
        LearnerConfig.resolve("ibtpo-learner", words[words.index("learner") + 1 :])
    elif words[0] == "ibtpo":
        line_ = [str(Path(sys.executable).with_name("ibtpo")), *words[1:], "--help"]
        subprocess.run(line_, check=True, capture_output=True)
    else:
        assert words[0] in ("git", "cd", "pip", "python", "python3", "echo")
        if words[0] == "pip" and "[" in words[-1]:
            extras = re.findall(r"\[(.*)\]", words[-1])[0].split(",")
            assert all(
                f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras
            )


def test_options_of_the_table_exist_with_their_defaults() -> None:
    rows = [line.split(" | ") for line in README.splitlines() if line.startswith("| ")]
    checked = 0
    for row in rows:
        options = re.findall(r"--([a-z][a-z-]+)", row[1]) if len(row) == 4 else []
        where = row[-1] if options else ""
        for name in options:
            field = name.replace("-", "_")
            for daemon, config in (("learner", LearnerConfig), ("server", ServerConfig)):
                if daemon in where:
                    assert field in config.model_fields, (name, daemon)
                    default = config.model_fields[field].default
                    if default is not None:
                        shown = default if isinstance(default, str) else f"{default:g}"
                        assert shown in row[2], (name, daemon)
                    checked += 1
    assert checked >= 25


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in commands("bash")
    assert (ROOT / ".ci/run").read_text().endswith("\nexec make test\n")


def test_the_readmes_python_compiles_and_names_what_exists() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in block.splitlines() if line.strip()]) <= 11
    compile(block, "README.md", "exec")
