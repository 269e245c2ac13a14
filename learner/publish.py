"""Pushing the policy's weights to the server as one version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ibtree.client import Client
from ibtree.errors import PreconditionError
from ibtree.weights import checkpoint_specs, make_manifest, model_identity
from learner.checkpoint import TrainState
from learner.errors import writing
from learner.ranks import ALONE, Ranks
from learner.shards import weights_of

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Publisher:
    """Sends versions in the server's dtype, under the checkpoint's tensor names."""

    def __init__(
        self,
        client: Client,
        model_dir: Path,
        out_dir: Path,
        patience_s: float,
        ranks: Ranks = ALONE,
    ) -> None:
        """Waits for the server. Raises PreconditionError if it runs another model."""
        self._client, self._patience_s, self._ranks = client, patience_s, ranks
        self.staged = out_dir / "publish.safetensors"
        """File of the staged version's weights, of dtype `dtype`."""
        with writing("the weights to publish", out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
        self._names = sorted(checkpoint_specs(model_dir))
        self.model_id = model_identity(model_dir)
        served = client.get_weights(timeout_s=patience_s, wait=True)
        if served.model_id != self.model_id:
            raise PreconditionError(
                f"model: {model_dir} is model {self.model_id[:12]}…, but the server at "
                f"{client.target} runs {served.model_id[:12]}…; give both the same model folder"
            )
        self.dtype = _DTYPES[served.dtype]

    def stage(self, model: Any, state: TrainState) -> None:
        """Writes the weights as version `state.version` and notes its digest in the state."""
        weights = weights_of(model, self._ranks)
        with writing("the weights to publish", self.staged.parent):
            save_file(
                {name: weights[name].to(self.dtype) for name in self._names},
                self.staged,
                metadata={"format": "pt"},  # transformers loads no others
            )
        self._manifest = make_manifest(self.staged, state.version, self.model_id)
        state.version_digest = self._manifest.digest.hex()

    def push(self) -> float:
        """Pushes the staged version; returns the server's pause [seconds]."""
        outcome = self._client.push_weights(
            self._manifest, self.staged, timeout_s=self._patience_s, wait=True
        )
        return outcome.pause_s

    def align(self, model: Any, state: TrainState) -> None:
        """After a start or a resume: stages this policy and makes the server serve it.

        Nothing is pushed if it does. A server that is behind gets the version it missed; one that
        is elsewhere gets a version above all it has seen.
        """
        served = self._client.get_weights(timeout_s=self._patience_s, wait=True)
        self.stage(model, state)
        if served.version == state.version == 0:
            return  # both are the model folder itself
        if served.digest.hex() == state.version_digest:
            state.version = served.version
            return
        state.version = max(served.version + 1, state.version)
        self._manifest = replace(self._manifest, version=state.version)
        self.push()
