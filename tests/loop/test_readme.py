"""The README's commands run as they stand, from the repository's root with nothing activated.

The server is the one that the README starts on a CPU, on ports of its own: whatever listens on
7300 is left alone. Installations are asked for and not made. What takes a GPU, or fetches the
repository, is only read (tests/contract); `make demo` and `make test` are tests/fault's and CI's.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import running, wait_until_serving

from tests import ROOT
from tests.contract.test_readme import README, commands

BIN = Path(sys.executable).parent
LINES = commands("bash")
INLINE = sorted(set(re.findall(r"`(ibtpo(?:-\w+)? [^`…]+)`", README)))
"""Those in the text: no more than their names and an option."""


def program(line: str) -> str:
    return Path(shlex.split(line)[0]).name


def here(line: str) -> str:
    """The line with the environment of the tests in the place of `.venv`."""
    return line.replace(".venv/bin/", f"{BIN}/")


def run(line: str, timeout_s: float = 180.0) -> str:
    """What it prints, in a shell that knows no environment of Python's."""
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "HOME"))}
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=kept | {"PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


def only(*words: str) -> list[str]:
    """The lines that have all the words."""
    return [line for line in LINES if all(word in line for word in words)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the server that the README starts on a CPU."""
    (line,) = only("ibtpo-server", "--device cpu")
    folder = tmp_path_factory.mktemp("readme")
    ports = ["--port=0", "--health-port=0", "--web-port=0"]
    words = ["env", "-C", str(ROOT), *shlex.split(here(line)), f"--data-dir={folder}/data", *ports]
    with running(words, folder / "server.log") as process:
        yield wait_until_serving(process).grpc


def test_a_client_asks_it(address: str) -> None:
    """In the README's order: `ibtpo eval` reads the file that the line before it writes."""
    printed = {}
    for line in LINES:
        if program(line) == "echo":
            run(line)
        elif program(line) == "ibtpo":
            printed[shlex.split(line)[1]] = run(f"{here(line)} --server {address}")
    assert set(printed) == {"queue", "trees", "weights", "eval", "sample"}
    assert "problems" in printed["eval"] and "reward" in printed["sample"]


@pytest.mark.parametrize("line", [line for line in INLINE if line.startswith("ibtpo ")])
def test_a_client_of_the_text_asks_it(line: str, address: str) -> None:
    command = here(f".venv/bin/{line} --server {address}")
    if "rollback" not in line:
        run(command)
        return
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr  # nothing was pushed, so nothing is there to go back to
    assert done.returncode in (0, 1) and len(done.stderr.splitlines()) <= 1


@pytest.mark.parametrize("line", [line for line in INLINE if line.endswith("--help")])
def test_help(line: str) -> None:
    assert "--model" in run(here(f".venv/bin/{line}"))


@pytest.mark.parametrize("line", only("pip install"))
def test_an_installation_can_be_asked_for(line: str) -> None:
    if "gpu" in line:
        pytest.skip("resolved by tests/contract/test_install.py")
    run(f"{here(line)} --dry-run --quiet")


def test_an_environment_can_be_made_and_mended(tmp_path: Path) -> None:
    lines = {line.replace(" .venv", f" {tmp_path}/venv") for line in only("-m venv")}
    (made,) = lines
    run(f"{made} --without-pip")
    assert (tmp_path / "venv/bin/python").exists()
    (mended,) = only("-m ibtpo_torchvision")
    run(here(mended))


def test_sglang_takes_its_arguments_of_the_server_on_gpus() -> None:
    (line,) = only("ibtpo-server", "--device cuda")
    words = shlex.split(line)
    code = """
        import sys
        import server_ext.engine.cpu as cpu
        cpu.select()
        from sglang.srt.server_args import ServerArgs
        import argparse
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        print(parser.parse_args(["--model-path=m", *sys.argv[1:]]).tp_size)
    """
    given = words[words.index("--") + 1 :]
    done = subprocess.run(
        [sys.executable, "-c", re.sub(r"^        ", "", code, flags=re.M), *given],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == given[given.index("--tp-size") + 1]
