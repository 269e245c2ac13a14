"""What is wrong at the start ends in one line that names the field and the remedy."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from processes import MODEL, command, server_command

from learner.train.model import load_policy
from tests.engine import Server
from tests.loop.learning import learner_command, write_prompts


def run(line: list[str], timeout_s: float = 90.0) -> str:
    """The message of a command that must end with status 1."""
    done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 1, (done.returncode, done.stderr)
    return done.stderr.strip().splitlines()[-1]


def server_says(folder: Path, *arguments: str, model: Path = MODEL, port: int = 0) -> str:
    return run(server_command(folder / "data", *arguments, model=model, port=port))


def test_unknown_model_path(tmp_path: Path) -> None:
    says = server_says(tmp_path, model=tmp_path / "nowhere")
    assert says.startswith("ibtpo-server: --model:") and "config.json" in says


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    line = [*command("ibtpo-server", f"--model={MODEL}", f"--data-dir={tmp_path}"), "--device=cuda"]
    assert "--device: cuda is not available here; allowed: auto | cpu" in run(line)


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port: port {port} cannot be listened on" in server_says(tmp_path, port=port)


def test_a_tokenizer_that_cannot_make_the_separator(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {t: i for t, i in vocabulary.items() if t != "Ċ"}  # newline
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    says = server_says(tmp_path, model=model)
    assert "--separator: the model's tokenizer cannot make" in says


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--strategy=guess", "options.strategy: unknown strategy 'guess'"),
        ("--grader=oracle", "grader: unknown grader 'oracle'"),
        ("--rounds=0", "rounds: got 0"),
        ("--limit-new-tokens=511", "--limit-new-tokens: got 511; allowed: at most 510"),
        ("--limit-trajectories=2", "trajectories; allowed: at most 2"),
        ("--temperature=nan", "temperature"),
        ("--value-estimator=median", "value-estimator: unknown value 'median'"),
        ("--colour=red", "colour"),
    ],
)
def test_bad_settings(tmp_path: Path, argument: str, says: str) -> None:
    line = server_command(tmp_path / "data", argument)
    done = subprocess.run(line, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode in (1, 2) and says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_bad_settings_end_the_supervisor_too(tmp_path: Path) -> None:
    line = server_command(tmp_path / "data", "--supervise", "--strategy=guess")
    done = subprocess.run(line, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1 and "started again" not in done.stderr
    assert "unknown strategy 'guess'" in done.stderr.splitlines()[-1]


def test_log_probabilities_at_temperature_1(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    assert "allowed: unset SGLANG_RETURN_ORIGINAL_LOGPROB" in server_says(tmp_path)


def test_a_data_folder_in_use(server: Server) -> None:
    says = run(server_command(server.data_dir))
    assert "--data-dir:" in says and "in use by another server" in says


def test_a_damaged_journal_before_the_engine_loads(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/journal.sqlite").write_text("nothing of a database\n" * 500)
    says = server_says(tmp_path)
    assert f"--data-dir: the journal in {tmp_path / 'data'} is damaged" in says


def test_sglang_arguments_that_sglang_refuses(tmp_path: Path) -> None:
    line = [*server_command(tmp_path / "data"), "--no-such-option=1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "no-such-option" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("argument", ["--disable-radix-cache", "--radix-cache-backend=flexkv"])
def test_a_radix_cache_chosen_behind_our_back(tmp_path: Path, argument: str) -> None:
    said = run([*server_command(tmp_path / "data"), argument])
    assert said.startswith("ibtpo-server: --: ")
    assert argument in said and "allowed: leave it out" in said


def test_learner_pointed_at_a_server_with_another_model(server: Server, tmp_path: Path) -> None:
    write_prompts(tmp_path)
    other = tmp_path / "other"
    model = load_policy(MODEL, torch.device("cpu"), "float32")
    model.config.num_attention_heads //= 2
    shutil.copytree(MODEL, other)
    model.config.save_pretrained(other)
    line = [*learner_command(server.address, tmp_path), f"--model={other}"]
    assert "give both the same model folder" in run(line)


def test_learner_without_a_server(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    line = learner_command("127.0.0.1:1", tmp_path, "--patience-s=2")
    assert "start ibtpo-server or give its address" in run(line)


def test_learner_with_broken_prompts(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=?"}\n{"question": 3}\n')
    says = run(learner_command("127.0.0.1:1", tmp_path))
    assert "train.jsonl:2:" in says and "allowed:" in says


def test_client_commands(server: Server) -> None:
    done = subprocess.run(
        command("ibtpo", "weights", f"--server={server.address}", "--json"),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["dtype"] == "F32"
    says = run(command("ibtpo", "queue", "--server=127.0.0.1:1"))
    assert says.startswith("ibtpo: GetQueueStats at 127.0.0.1:1: UNAVAILABLE")
