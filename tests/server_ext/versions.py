"""A tiny model folder, weight versions for it, and an updater over a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ibtree.weights.delta import write_delta
from ibtree.weights.manifest import WeightManifest
from ibtree.weights.model_folder import checkpoint_specs
from ibtree.weights.tensor_files import make_manifest
from server_ext.weights.inbox import Source
from server_ext.weights.store import WeightStore
from server_ext.weights.updater import WeightUpdater
from tests.server_ext.fakes import FakeEngine

MODEL_ID = "m" * 64
SHAPES = {"model.a": (2, 3), "model.b": (4,), "model.c": (5, 1)}
Tensors = dict[str, torch.Tensor]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


@dataclass
class Version:
    """A safetensors file and its manifest; `whole` is the whole file of the same version."""

    path: Path
    manifest: WeightManifest
    whole: Path

    def but(self, **changes: object) -> WeightManifest:
        return replace(self.manifest, **changes)

    def source(self, size: int = 100) -> Source:
        async def chunks(start: int) -> AsyncIterator[bytes]:
            data = self.path.read_bytes()
            for at in range(start, len(data), size):
                yield data[at : at + size]

        return chunks


def moved(content: Tensors, number: int, *names: str) -> Tensors:
    """The content with one element of each named tensor (default: all but the last) replaced."""
    new = {name: tensor.clone() for name, tensor in content.items()}
    for name in names or list(content)[:-1]:
        new[name].view(-1)[number % new[name].numel()] = float(number)
    return new


def delta_of(folder: Path, base: Version, number: int, *names: str) -> Version:
    """Version `number` as a delta on the base: its content is `moved`."""
    content = moved(load_file(base.whole), number, *names)
    whole = version_of(folder, number, content)
    path = folder / f"push-{number}.delta.safetensors"
    size = write_delta(base.whole, whole.path, path)
    manifest = replace(
        whole.manifest,
        file_bytes=size,
        base_version=base.manifest.version,
        base_digest=base.manifest.digest,
    )
    return Version(path, manifest, whole.path)


def version_of(folder: Path, number: int, content: Tensors | None = None) -> Version:
    path = folder / f"push-{number}.safetensors"
    save_file(tensors(number) if content is None else content, path)
    return Version(path, make_manifest(path, number, MODEL_ID), path)


def same_tensors(loaded: Tensors, number: int, expected: Tensors | Version | None) -> None:
    """Fails unless these are the tensors of version `number`, or those expected."""
    if isinstance(expected, Version):
        expected = load_file(expected.whole)
    expected = tensors(number) if expected is None else expected
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), f"{name} is of another version"


class Served:
    """A server's weights on disk; `restart` is a new process with a new engine."""

    def __init__(
        self,
        folder: Path,
        switch: str = "interrupt",
        keep: int = 2,
        push_idle_timeout_s: float = 60.0,
    ) -> None:
        self.folder, self.model_dir = folder, folder / "model"
        self.switch, self.keep, self._idle_timeout_s = switch, keep, push_idle_timeout_s
        self.model_dir.mkdir(exist_ok=True)
        save_file(tensors(0), self.model_dir / "model.safetensors")
        self.model_id = MODEL_ID
        self._build()

    def new_engine(self, tensors: Tensors) -> FakeEngine:
        engine = FakeEngine(self.switch)
        engine.weights = tensors
        return engine

    def _build(self) -> None:
        self.engine = self.new_engine(load_file(self.model_dir / "model.safetensors"))
        self.store = WeightStore(self.folder / "weights", self.model_id, self.keep)
        specs = checkpoint_specs(self.model_dir)
        self.updater = WeightUpdater(
            self.engine, self.store, self.model_dir, specs, self.model_id, self._idle_timeout_s
        )

    async def restart(self, model_id: str = MODEL_ID) -> None:
        self.model_id = model_id
        self._build()
        await self.updater.restore()

    async def push(self, number: int, content: Tensors | None = None) -> Version:
        version = version_of(self.folder, number, content)
        await self.updater.push(version.manifest, version.source())
        return version

    async def push_delta(self, base: Version, number: int, *names: str) -> Version:
        version = delta_of(self.folder, base, number, *names)
        await self.updater.push(version.manifest, version.source())
        return version

    def check(self, number: int, expected: Tensors | Version | None = None) -> None:
        """The engine holds exactly version `number` (by default that of `push`), and the updater
        says so."""
        same_tensors(self.engine.weights, number, expected)
        assert self.updater.serving.version == number
        assert self.engine.version == number
        assert not self.updater.broken.is_set()
        assert not self.engine.updating

    def stored(self, number: int) -> Path:
        return self.folder / "weights" / f"{number}.safetensors"

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "weights").iterdir()}
