"""The one real server that the tests share, and weights to push to it."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import MODEL, Process, server_command, wait_until_serving
from safetensors.torch import load_file, save_file

from ibtree.client import Client
from ibtree.messages import PushOutcome
from ibtree.weights.model_folder import model_identity
from ibtree.weights.tensor_files import make_manifest

Weights = dict[str, torch.Tensor]


class Server:
    """An ibtpo-server process that can be killed and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data_dir = folder, folder / "data"
        self.process: Process | None = None
        self.address = self.health = self.web = ""

    def start(self) -> None:
        """On the port it had before, if it had one."""
        port = int(self.address.rpartition(":")[2] or 0)
        command = server_command(self.data_dir, port=port)
        self.process = Process(command, self.folder / "server.log")
        self.address, self.health, self.web = wait_until_serving(self.process)

    def stop(self) -> None:
        if self.process:
            self.process.stop()

    def kill(self) -> None:
        assert self.process
        self.process.kill()

    def push(self, weights: Weights) -> PushOutcome:
        """Pushes these weights as the next version."""
        path = self.folder / "push.safetensors"
        save_file(weights, path)
        with Client(self.address) as client:
            version = client.get_weights().version + 1
            return client.push_weights(make_manifest(path, version, model_identity(MODEL)), path)

    def push_original(self) -> None:
        """Serves the arith model's own weights again, whatever an earlier test pushed."""
        with Client(self.address) as client:
            served = client.get_weights()
        if served.version:
            self.push(model_weights())


def model_weights(noise: float = 0.0, seed: int = 0) -> Weights:
    """The arith model's weights in float32, moved by Gaussian noise relative to their spread."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        value = tensor.float()
        if noise and value.ndim == 2:
            value = value + noise * value.std() * torch.randn(value.shape, generator=generator)
        weights[name] = value.contiguous()
    return weights
