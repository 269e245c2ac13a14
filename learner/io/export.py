"""Weights as plain Hugging Face folders beside the checkpoints: the best and the last.

out_dir/exports/<version>-<digest>/   the model folder's own files, with the trained weights
out_dir/best, out_dir/last            links to them, replaced atomically
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from learner.errors import writing
from learner.io.checkpoint import TrainState, sync

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


class Exports:
    """Folders that `from_pretrained` and SGLang load, of the weights in the safetensors file
    `weights`: those published, in the server's dtype, so what is exported is what was evaluated."""

    def __init__(self, model_dir: Path, out_dir: Path, weights: Path, dtype: torch.dtype) -> None:
        self._model_dir, self._out_dir = model_dir, out_dir
        self._weights, self._dtype = weights, str(dtype).removeprefix("torch.")
        self._dir = out_dir / "exports"

    def write(self, name: str, state: TrainState) -> None:
        """Makes `out_dir/<name>` the published weights. Raises WriteError; what was there then
        stays."""
        folder = self._dir / f"{state.version}-{state.version_digest[:12]}"
        with writing(f"the weights for {name}", self._out_dir):
            self._dir.mkdir(parents=True, exist_ok=True)
            if not folder.is_dir():
                self._fill(folder)
            link = self._out_dir / f"{name}.new"
            link.unlink(missing_ok=True)
            link.symlink_to(folder.relative_to(self._out_dir))
            link.rename(self._out_dir / name)
            sync(self._out_dir)
        self._drop_unnamed()

    def _fill(self, folder: Path) -> None:
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for path in self._model_dir.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, part / path.name)
        shutil.copyfile(self._weights, part / "model.safetensors")
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        text = json.dumps(config | {"dtype": self._dtype}, indent=2)
        (part / "config.json").write_text(f"{text}\n", encoding="utf-8")
        for path in (*part.iterdir(), part):
            sync(path)
        part.rename(folder)

    def _drop_unnamed(self) -> None:
        named = {p.readlink().name for p in self._out_dir.iterdir() if p.is_symlink()}
        for folder in self._dir.iterdir():
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)
