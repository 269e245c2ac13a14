"""Pushing the policy's weights to the server as one version."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import torch
from safetensors.torch import save_file

from ibtree.client import Client, RpcFailed
from ibtree.errors import PreconditionError
from ibtree.messages import PushOutcome
from ibtree.weights.delta import write_delta
from ibtree.weights.manifest import Canary, WeightManifest
from ibtree.weights.model_folder import checkpoint_specs, model_identity
from ibtree.weights.push import SharedFolderTransport, StreamTransport, Transport
from ibtree.weights.tensor_files import make_manifest
from learner.dist.process_group import ALONE, Ranks
from learner.dist.state import weights_of
from learner.errors import writing
from learner.io.checkpoint import TrainState
from learner.train.names import as_stored

_log = logging.getLogger(__name__)
_SETTLE_S = 10.0
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
        shared_dir: Path | None = None,
        run_id: str = "",
        take_over: bool = False,
    ) -> None:
        """Waits for the server. `shared_dir`: leave files there instead of sending them. `run_id`:
        who publishes; with `take_over` the first push may follow another run's. Raises
        PreconditionError if it runs another model."""
        self._client, self._patience_s, self._ranks = client, patience_s, ranks
        self._run_id, self._take_over = run_id, take_over
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
        self._transport: Transport = StreamTransport(client)
        if shared_dir is not None:
            run = hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:16]
            self._transport = SharedFolderTransport(client, shared_dir, run)
        self._shared_dir = shared_dir or out_dir
        self._base, self._delta = out_dir / "published.safetensors", out_dir / "publish.delta"
        self._served: WeightManifest | None = None
        """What the staged file's version serves as; from the next `stage` on, the base's."""
        self._worker = ThreadPoolExecutor(1, "publish")
        self._pushing: Future[float] | None = None
        self.pause_s = 0.0
        """The server's pause at the last push that is over [seconds]."""

    def stage(self, model: Any, state: TrainState, canary: Canary | None = None) -> None:
        """Writes the weights as version `state.version` and notes its digest in the state; waits
        for the push in the background first. Raises what that raised."""
        self.wait()
        weights = as_stored(model, weights_of(model, self._ranks, self.dtype))
        with writing("the weights to publish", self.staged.parent):
            if self._served:
                self.staged.replace(self._base)
            save_file(
                {name: weights[name].contiguous() for name in self._names},
                self.staged,
                metadata={"format": "pt"},  # transformers loads no others
            )
        self._manifest = make_manifest(self.staged, state.version, self.model_id)
        self._manifest = replace(self._manifest, canary=canary)
        state.version_digest = self._manifest.digest.hex()

    def push(self) -> float:
        """Pushes the staged version; returns the server's pause [seconds]."""
        self.push_later()
        return self.wait()

    def push_later(self) -> None:
        """Pushes the staged version in the background."""
        self._pushing = self._worker.submit(self._push)

    def wait(self) -> float:
        """Returns when no push is under way: the server's pause at the last one [seconds]. Raises
        what it raised."""
        if self._pushing:
            pushing, self._pushing = self._pushing, None
            self.pause_s = pushing.result()
        return self.pause_s

    def settle(self) -> None:
        """Gives the push that is under way, if any, a little time; whatever becomes of it."""
        pushing, self._pushing = self._pushing, None
        try:
            if pushing:
                pushing.result(_SETTLE_S)
        except Exception as error:
            _log.warning("the last version was not published: %r", error)

    def _push(self) -> float:
        """Pushes a delta on the version pushed before, if that is smaller and the server has it."""
        manifest, before, self._served = self._manifest, self._served, None
        outcome = self._push_delta(manifest, before) if before else None
        if outcome is None:
            outcome = self._sent(manifest, self.staged)
        self._served = manifest
        return outcome.pause_s

    def _push_delta(self, manifest: WeightManifest, base: WeightManifest) -> PushOutcome | None:
        """Pushes the delta on `base`; None if the whole version has to be pushed."""
        with writing("the weights to publish", self.staged.parent):
            size = write_delta(self._base, self.staged, self._delta)
        if size >= manifest.file_bytes:
            return None
        delta = replace(
            manifest, file_bytes=size, base_version=base.version, base_digest=base.digest
        )
        try:
            return self._sent(delta, self._delta)
        except RpcFailed as failed:
            if failed.code is grpc.StatusCode.FAILED_PRECONDITION and "base_version" in str(failed):
                _log.info("pushing version %s whole: %s", manifest.version, failed.details)
                return None
            raise

    def _sent(self, manifest: WeightManifest, path: Path) -> PushOutcome:
        manifest = replace(manifest, run_id=self._run_id, take_over=self._take_over)
        with writing("the weights to publish", self._shared_dir):
            outcome = self._transport.push(manifest, path, timeout_s=self._patience_s, wait=True)
        self._take_over = False  # from now on another run is told of this one
        return outcome

    def align(self, model: Any, state: TrainState) -> None:
        """Stages this policy after a start or a resume, and makes the server serve it.

        Nothing is pushed if it does. A server that is behind gets the version it missed; one that
        is elsewhere gets a version above all it has seen.
        """
        self.stage(model, state)
        for last_attempt in (False, True):  # the run before may still be pushing
            served = self._client.get_weights(timeout_s=self._patience_s, wait=True)
            if served.version == state.version == 0:
                return  # both are the model folder itself
            if served.digest.hex() == state.version_digest:
                state.version = served.version
                self._served = replace(self._manifest, version=served.version)
                return
            state.version = max(served.version + 1, state.version)
            self._manifest = replace(self._manifest, version=state.version)
            try:
                self.push()
                return
            except RpcFailed as failed:
                if last_attempt or "not newer" not in failed.details:
                    raise
