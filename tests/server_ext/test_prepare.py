"""The first act of a start: all that can fail in a second fails there, and leaves nothing open."""

from __future__ import annotations

import shutil
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from ibtree.errors import FieldError
from server_ext import app
from server_ext.config import ServerConfig
from server_ext.engine import cpu
from tests import ROOT

MODEL = ROOT / "examples/arith/model"


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    cpu.select()


def config(folder: Path, **settings) -> ServerConfig:
    ports = dict.fromkeys(("port", "health_port", "web_port"), 0)
    own = {"model": MODEL, "device": "cpu", "dtype": "float32", "data_dir": folder / "data"}
    return ServerConfig(**own | ports | {"grader": "exact", "max_new_tokens": 96} | settings)


async def prepared(config: ServerConfig, *arguments: str) -> str:
    """What was prepared, in short; everything is closed again."""
    async with AsyncExitStack() as stack:
        done = app._prepare(config, arguments, stack)
        return f"{done.addresses}, context {done.arguments.context_tokens}"


async def test_twice_in_a_row(tmp_path):
    for _ in range(2):
        assert (await prepared(config(tmp_path))).endswith("context 512")


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        ({"strategy": "guess"}, "options.strategy", "unknown"),
        ({"grader": "oracle"}, "grader", "unknown"),
        ({"grader": "remote"}, "grader", "--reward-address"),
        ({"limit_trajectories": 3}, "options.rounds", "--limit-trajectories"),
        ({"limit_new_tokens": 10}, "sampling.max_new_tokens", "--limit-new-tokens"),
        ({"limit_temperature": 0.5}, "sampling.temperature", "--limit-temperature"),
        ({"limit_new_tokens": 511}, "limit_new_tokens", "at most 510: the model's context is 512"),
        ({"max_new_tokens": 600}, "max_new_tokens", "at most 510: the model's context is 512"),
        ({"model": ROOT}, "model", "config.json"),
    ],
)
async def test_bad_settings(tmp_path, settings, field, says):
    with pytest.raises(FieldError) as caught:
        await prepared(config(tmp_path, **settings))
    assert caught.value.field == field and says in str(caught.value)
    await prepared(config(tmp_path))


async def test_a_default_gives_way_to_the_context(tmp_path):
    """Nobody asked for it."""
    settings = config(tmp_path).model_dump(exclude={"max_new_tokens", "config", "print_config"})
    assert ServerConfig.model_fields["max_new_tokens"].default > 512
    await prepared(ServerConfig(**settings))


@pytest.mark.parametrize("field", ["port", "health_port", "web_port"])
async def test_ports_in_use(tmp_path, field):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FieldError, match="cannot be listened on") as caught:
            await prepared(config(tmp_path, **{field: taken.getsockname()[1]}))
    assert caught.value.field == field


async def test_sglangs_arguments(tmp_path):
    with pytest.raises(FieldError, match="pipeline parallelism"):
        await prepared(config(tmp_path), "--pp-size=2")


async def test_a_folder_in_use(tmp_path):
    async with AsyncExitStack() as stack:
        app._prepare(config(tmp_path), [], stack)
        with pytest.raises(FieldError, match="in use by another server"):
            await prepared(config(tmp_path))


async def test_a_list_of_versions_that_is_damaged(tmp_path):
    pointer = tmp_path / "data" / "weights" / "serving.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text("{")
    with pytest.raises(FieldError, match=r"serving\.json"):
        await prepared(config(tmp_path))


async def test_weights_of_several_types(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    router = next(name for name in weights if "norm" in name)
    save_file(weights | {router: weights[router].float()}, model / "model.safetensors")
    with pytest.raises(
        FieldError, match=f"several types.*{router} is F32.*--dtype float32"
    ) as caught:
        await prepared(config(tmp_path, model=model, dtype="bfloat16"))
    assert caught.value.field == "model"
    await prepared(config(tmp_path, model=model, dtype="float32"))  # nothing is cut off
    save_file({n: t.float() for n, t in weights.items()}, model / "model.safetensors")
    await prepared(config(tmp_path, model=model, dtype="bfloat16"))  # all are, as was asked for
