"""What the tests ask of rendered manifests and of the Dockerfiles behind their images."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT

DEPLOY = ROOT / "deploy"
BAKED = "/opt/ibtpo/"
DOCKERFILES = {
    "ibtpo-server": "server.Dockerfile",
    "ibtpo-server-cpu": "server-cpu.Dockerfile",
    "ibtpo-learner": "learner.Dockerfile",
    "ibtpo-learner-cpu": "learner.Dockerfile",
}
"""Which Dockerfile each image of the manifests is built from."""


@dataclass(frozen=True)
class Manifests:
    """Everything that one folder renders to."""

    objects: tuple[dict[str, Any], ...]

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        return {o["metadata"]["name"]: o for o in self.objects if o["kind"] == kind}

    def named(self, kind: str, name: str) -> dict[str, Any]:
        return self.of(kind)[name]

    @property
    def server(self) -> dict[str, Any]:
        return self.named("StatefulSet", "ibtpo-server")

    @property
    def learner(self) -> dict[str, Any]:
        return self.named("Deployment", "ibtpo-learner")

    @property
    def workloads(self) -> tuple[dict[str, Any], ...]:
        return tuple(o for o in self.objects if "template" in o.get("spec", {}))


@cache
def render(folder: str) -> Manifests:
    """`kubectl kustomize` of a folder below deploy/; needs no cluster."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    run = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / folder)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return Manifests(tuple(yaml.safe_load_all(run.stdout)))


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def labels(workload: dict[str, Any]) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod(workload).get("initContainers", []), *pod(workload)["containers"]]


def main_container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    return only


def selects(selector: dict[str, str], workload: dict[str, Any]) -> bool:
    return bool(selector) and selector.items() <= labels(workload).items()


def mounts(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}


def mount_of(container: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The mount that holds a path of the container."""
    mount_paths = [at for at in mounts(container) if path.is_relative_to(at)]
    return mounts(container)[max(mount_paths, key=len)] if mount_paths else None


def volumes(workload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod's volumes and a StatefulSet's claims, by name."""
    templates = workload["spec"].get("volumeClaimTemplates", [])
    claims = {
        t["metadata"]["name"]: {"persistentVolumeClaim": {"claimName": None}} for t in templates
    }
    return claims | {volume["name"]: volume for volume in pod(workload)["volumes"]}


def image_name(image: str) -> tuple[str, str]:
    """`name:tag` apart; no tag is an empty one."""
    name, _, tag = image.rpartition(":") if ":" in image.rsplit("/", 1)[-1] else (image, "", "")
    return name, tag


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, comments and line continuations removed."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def arguments_of(dockerfile: Path) -> dict[str, str]:
    """Build arguments and their defaults."""
    definitions = [rest for word, rest in instructions(dockerfile) if word == "ARG"]
    return dict(text.split("=", 1) for text in definitions if "=" in text)


def expanded(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], text)


def user_of(image: str) -> int:
    """The uid an image of ours runs as."""
    dockerfile = DEPLOY / "images" / DOCKERFILES[image_name(image)[0]]
    last = [rest for word, rest in instructions(dockerfile) if word == "USER"][-1]
    return int(last.partition(":")[0])
