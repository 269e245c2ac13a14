"""A tiny model folder, weight versions for it, and an updater over a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ibtree.weights import WeightManifest, checkpoint_specs, make_manifest
from server_ext.weights.store import WeightStore
from server_ext.weights.updater import WeightUpdater
from tests.server.fakes import FakeEngine

MODEL_ID = "m" * 64
SHAPES = {"model.a": (2, 3), "model.b": (4,), "model.c": (5, 1)}
Tensors = dict[str, torch.Tensor]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


@dataclass
class Version:
    """A safetensors file and its manifest."""

    path: Path
    manifest: WeightManifest

    def but(self, **changes: object) -> WeightManifest:
        return replace(self.manifest, **changes)

    async def chunks(self, size: int = 100) -> AsyncIterator[bytes]:
        data = self.path.read_bytes()
        for at in range(0, len(data), size):
            yield data[at : at + size]


def version_of(folder: Path, number: int, content: Tensors | None = None) -> Version:
    path = folder / f"push-{number}.safetensors"
    save_file(tensors(number) if content is None else content, path)
    return Version(path, make_manifest(path, number, MODEL_ID))


class Served:
    """A server's weights on disk; `restart` is a new process with a new engine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model_dir = folder, folder / "model"
        self.model_dir.mkdir(exist_ok=True)
        save_file(tensors(0), self.model_dir / "model.safetensors")
        self.model_id = MODEL_ID
        self._build()

    def _build(self) -> None:
        self.engine = FakeEngine()
        self.engine.weights = load_file(self.model_dir / "model.safetensors")
        self.store = WeightStore(self.folder / "weights", self.model_id)
        specs = checkpoint_specs(self.model_dir)
        self.updater = WeightUpdater(self.engine, self.store, self.model_dir, specs, self.model_id)

    async def restart(self, model_id: str = MODEL_ID) -> None:
        self.model_id = model_id
        self._build()
        await self.updater.restore()

    async def push(self, number: int, content: Tensors | None = None) -> Version:
        version = version_of(self.folder, number, content)
        await self.updater.push(version.manifest, version.chunks())
        return version

    def check(self, number: int, seed: int | None = None) -> None:
        """The engine holds exactly version `number`, and the updater says so."""
        expected = tensors(number if seed is None else seed)
        assert self.engine.weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(self.engine.weights[name], tensor), f"{name} is of another version"
        assert self.updater.serving.version == number
        assert self.engine.version == number
        assert not self.updater.broken.is_set()
        assert not self.engine.updating

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "weights").iterdir()}
