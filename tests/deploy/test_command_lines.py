"""What the pods are started with is what the settings classes take, and fits the objects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ibtpo_settings import Settings
from ibtree.data.questions import read_questions
from ibtree.tree.options import options_from
from learner.config import LearnerConfig
from server_ext.config import ServerConfig
from tests.deploy.manifests import (
    BAKED,
    DEPLOY,
    DOCKERFILES,
    ROOT,
    Manifests,
    containers,
    image_name,
    instructions,
    main_container,
    mount_of,
    mounts,
    pod,
    render,
    volumes,
)

PROGRAMS: dict[str, type[Settings]] = {
    "ibtpo-server": ServerConfig,
    "ibtpo-learner": LearnerConfig,
}
SGLANG = """
import json, sys
import server_ext.engine.cpu as cpu
cpu.select()
from server_ext.engine.arguments import server_arguments
arguments = server_arguments(sys.argv[1], "cpu", "float32", "ibtree", sys.argv[2:])
print(json.dumps({"max_total_tokens": arguments.max_total_tokens, "device": arguments.device}))
"""
TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def program(container: dict[str, Any]) -> str:
    """The image's entry point: the manifests give arguments only."""
    assert "command" not in container
    name = DOCKERFILES[image_name(container["image"])[0]]
    lines = dict(instructions(DEPLOY / "images" / name))
    (command,) = json.loads(lines["ENTRYPOINT"])
    return command


def command_line(container: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Our arguments, and SGLang's after `--`, as server_ext.__main__ splits them."""
    words = container["args"]
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def files(manifests: Manifests, workload: dict[str, Any]) -> dict[str, str]:
    """The text of each ConfigMap file in the main container, by its path there."""
    texts = {}
    for at, mount in mounts(main_container(workload)).items():
        volume = volumes(workload)[mount["name"]]
        if "configMap" in volume:
            data = manifests.named("ConfigMap", volume["configMap"]["name"])["data"]
            texts |= {f"{at}/{name}": text for name, text in data.items()}
    return texts


@pytest.fixture
def resolve(monkeypatch, tmp_path):
    """Resolves a workload's settings as its pod would: its arguments, environment and files."""

    def settings(manifests: Manifests, workload: dict[str, Any]) -> Any:
        container = main_container(workload)
        for name in [name for name in os.environ if name.upper().startswith("IBTPO_")]:
            monkeypatch.delenv(name)
        for variable in container.get("env", []):
            monkeypatch.setenv(variable["name"], variable["value"])
        words, _ = command_line(container)
        for path, text in files(manifests, workload).items():
            copy = tmp_path / path.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
            words = [word.replace(path, str(copy)) for word in words]
        assert any(str(tmp_path) in word for word in words), "no ConfigMap file is read"
        name = program(container)
        return PROGRAMS[name].resolve(name, words)

    return settings


def test_settings_resolve(manifests, resolve):
    server = resolve(manifests, manifests.server)
    learner = resolve(manifests, manifests.learner)
    assert isinstance(server, ServerConfig) and isinstance(learner, LearnerConfig)
    options_from(server)
    assert server.host == "0.0.0.0"
    assert learner.model == server.model, "the learner refuses another model than the server's"


def test_files_hold_known_fields(manifests):
    for workload in (manifests.server, manifests.learner):
        known = PROGRAMS[program(main_container(workload))].model_fields
        for text in files(manifests, workload).values():
            assert yaml.safe_load(text).keys() <= known.keys()


@pytest.mark.parametrize("variable", ["IBTPO_SERVER_SERVICE_HOST", "IBTPO_SERVER_PORT_7300_TCP"])
def test_service_links_would_break_the_settings(resolve, monkeypatch, variable):
    base = render("base")
    container = main_container(base.server)
    env = [*container.get("env", []), {"name": variable, "value": "10.0.0.1"}]
    monkeypatch.setitem(container, "env", env)
    with pytest.raises(ValueError, match=variable):
        resolve(base, base.server)


def test_ports_agree(manifests, resolve):
    server = resolve(manifests, manifests.server)
    container = main_container(manifests.server)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": server.port, "health": server.health_port, "web": server.web_port}
    service = manifests.named("Service", "ibtpo-server")["spec"]
    assert service["clusterIP"] == "None"
    assert {p["name"]: p["port"] for p in service["ports"]} == ports
    assert all(port["targetPort"] == port["name"] for port in service["ports"])


def test_probes_ask_the_health_port(manifests, resolve):
    server = resolve(manifests, manifests.server)
    container = main_container(manifests.server)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": server.health_port}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900, "large models load slowly"
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


def test_the_learner_finds_the_server(manifests, resolve):
    server = resolve(manifests, manifests.server)
    name = manifests.server["metadata"]["name"]
    service = manifests.server["spec"]["serviceName"]
    target = resolve(manifests, manifests.learner).server
    assert target in (f"{name}-0.{service}:{server.port}", f"{service}:{server.port}")


def test_the_server_may_shut_down_in_order(manifests, resolve):
    grace = resolve(manifests, manifests.server).shutdown_grace_s
    assert pod(manifests.server)["terminationGracePeriodSeconds"] >= grace + 20


def test_the_device_is_there(manifests, resolve):
    for workload in (manifests.server, manifests.learner):
        limits = main_container(workload)["resources"]["limits"]
        device = resolve(manifests, workload).device
        image, _ = image_name(main_container(workload)["image"])
        assert (device == "cuda") == ("nvidia.com/gpu" in limits)
        assert (device == "cpu") == image.endswith("-cpu")


def test_folders_are_where_volumes_are(manifests, resolve):
    server, learner = (resolve(manifests, w) for w in (manifests.server, manifests.learner))
    written = [(manifests.server, server.data_dir), (manifests.learner, learner.out_dir)]
    for workload, path in written:
        mount = mount_of(main_container(workload), path)
        assert mount and not mount.get("readOnly")
        assert "persistentVolumeClaim" in volumes(workload)[mount["name"]]
    read = [(manifests.server, server.model), (manifests.learner, learner.model)]
    files = [Path(p) for p in (learner.prompts, learner.eval_prompts) if p]
    read += [(manifests.learner, p) for p in files]
    for workload, path in read:
        container = main_container(workload)
        mount = mount_of(container, path)
        assert baked(container["image"], path) or (mount and mount["readOnly"])


def baked(image: str, path: Path) -> bool:
    """Whether the image's Dockerfile copies a folder that holds the path."""
    dockerfile = DEPLOY / "images" / DOCKERFILES[image_name(image)[0]]
    targets = [rest.split()[-1] for word, rest in instructions(dockerfile) if word == "COPY"]
    return any(path.is_relative_to(target) for target in targets if target.startswith(BAKED))


def test_the_prompts_are_made(resolve, tmp_path):
    smoke = render("overlays/cpu-smoke")
    learner = resolve(smoke, smoke.learner)
    (maker,) = pod(smoke.learner)["initContainers"]
    python, *words = maker["command"]
    assert python == "python"
    assert maker["workingDir"].startswith(BAKED)
    subprocess.run(
        [sys.executable, *(word.replace("/prompts", str(tmp_path)) for word in words)],
        cwd=ROOT / maker["workingDir"].removeprefix(BAKED),
        check=True,
        timeout=120,
    )
    train, held_out = (
        {question.prompt for question in read_questions(tmp_path / Path(path).name)}
        for path in (learner.prompts, learner.eval_prompts)
    )
    assert len(train) >= learner.prompts_per_step
    assert not train & held_out


def test_initial_containers_share_volumes(manifests):
    """What an initContainer writes is what the main container reads."""
    for workload in manifests.workloads:
        for container in containers(workload)[:-1]:
            names = {mount["name"] for mount in mounts(container).values()}
            assert names <= {m["name"] for m in mounts(main_container(workload)).values()}


def test_sglang_takes_its_arguments(tmp_path):
    container = main_container(render("overlays/cpu-smoke").server)
    _, arguments = command_line(container)
    assert arguments
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    run = subprocess.run(
        [sys.executable, "-c", SGLANG, str(tmp_path), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    arguments_read = json.loads(run.stdout.splitlines()[-1])
    assert arguments_read == {"max_total_tokens": 60000, "device": "cpu"}
