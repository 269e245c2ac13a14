"""Exported folders: replaced as a whole, shared by names of the same weights, dropped when old."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.errors import WriteError
from learner.io.checkpoint import TrainState
from learner.io.export import Exports
from tests.learner.recorded import write_model


@pytest.fixture
def exports(tmp_path: Path) -> Exports:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors.index.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "onnx").mkdir()
    return Exports(model, tmp_path, tmp_path / "staged.safetensors", torch.bfloat16)


def write(exports: Exports, name: str, number: int) -> None:
    path = exports._out_dir / "staged.safetensors"
    save_file({"a": torch.full((4,), number, dtype=torch.bfloat16)}, path)
    exports.write(name, TrainState(version=number, version_digest=f"{number:064}"))


def exported(folder: Path) -> dict[str, float]:
    """The weight in each exported name."""
    return {
        path.name: float(load_file(path / "model.safetensors")["a"][0])
        for path in sorted(folder.iterdir())
        if path.is_symlink()
    }


def test_a_folder_holds_the_models_files_and_these_weights(exports, tmp_path):
    write(exports, "best", 1)
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "model.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    original = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config == original | {"dtype": "bfloat16"} and original["dtype"] == "float32"


def test_names_are_replaced_and_what_no_name_needs_goes(exports, tmp_path):
    for name, number in [("best", 1), ("last", 1), ("last", 2), ("best", 3), ("last", 4)]:
        write(exports, name, number)
    assert exported(tmp_path) == {"best": 3.0, "last": 4.0}
    assert len(list((tmp_path / "exports").iterdir())) == 2
    shutil.copytree(tmp_path / "best", tmp_path / "copy")  # a plain folder, wherever it goes
    assert not (tmp_path / "copy").is_symlink()


@pytest.mark.parametrize(
    "what", ["shutil.copyfile", "learner.io.export.sync", "pathlib.Path.rename"]
)
def test_an_export_that_fails_leaves_the_one_before(exports, tmp_path, monkeypatch, what):
    write(exports, "best", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="weights for best"):
        patch.setattr(what, full)
        write(exports, "best", 2)
    assert exported(tmp_path) == {"best": 1.0}
    write(exports, "best", 2)
    assert exported(tmp_path) == {"best": 2.0}
    assert [path.name[:2] for path in (tmp_path / "exports").iterdir()] == ["2-"]
