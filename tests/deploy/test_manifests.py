"""The manifests are valid, hang together, and keep to the restricted pod security standard."""

from __future__ import annotations

import re
import tomllib

import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import (
    DOCKERFILES,
    ROOT,
    containers,
    image_name,
    labels,
    main_container,
    mounts,
    pod,
    selects,
    user_of,
    volumes,
)

KUBERNETES = "1.34"


def test_every_object_is_valid(manifests):
    for manifest in manifests.objects:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        assert "namespace" not in manifest["metadata"]


def test_the_pod_of_the_documentation_is_valid():
    text = (ROOT / "docs/kubernetes.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    pods = [block for block in blocks if block.get("kind") == "Pod"]
    assert pods
    for manifest in pods:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        assert {c["image"].rpartition(":")[0] for c in manifest["spec"]["containers"]} <= set(
            DOCKERFILES
        )


def test_validation_would_notice():
    broken = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spek": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_images_are_ours_and_of_this_version(manifests):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for workload in manifests.workloads:
        for container in containers(workload):
            name, tag = image_name(container["image"])
            assert name in DOCKERFILES
            assert tag == version


def test_nothing_runs_as_root(manifests):
    for workload in manifests.workloads:
        security = pod(workload)["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"]["type"] == "RuntimeDefault"
        for container in containers(workload):
            own = container["securityContext"]
            assert not {"runAsUser", "runAsNonRoot", "privileged", "seccompProfile"} & own.keys()
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert user_of(container["image"]) == security["runAsUser"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod(workload).keys()
        assert not any("hostPath" in volume for volume in volumes(workload).values())


def test_pods_have_accounts_without_tokens(manifests):
    for workload in manifests.workloads:
        account = manifests.named("ServiceAccount", pod(workload)["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False
        assert pod(workload)["automountServiceAccountToken"] is False


def test_service_links_are_off(manifests):
    for workload in manifests.workloads:
        assert pod(workload)["enableServiceLinks"] is False


def test_selectors_select(manifests):
    for workload in manifests.workloads:
        assert selects(workload["spec"]["selector"]["matchLabels"], workload)
    service = manifests.named("Service", manifests.server["spec"]["serviceName"])
    assert selects(service["spec"]["selector"], manifests.server)
    assert not selects(service["spec"]["selector"], manifests.learner)


def test_volumes_and_mounts_match(manifests):
    for workload in manifests.workloads:
        used = [mount for container in containers(workload) for mount in mounts(container).values()]
        mounted = {mount["name"] for mount in used}
        assert mounted == volumes(workload).keys()
        for volume in volumes(workload).values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in manifests.of("ConfigMap")
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in manifests.of("PersistentVolumeClaim")


def test_claims_and_configuration_are_used(manifests):
    used = [volume for workload in manifests.workloads for volume in volumes(workload).values()]
    claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in used}
    maps = {volume.get("configMap", {}).get("name") for volume in used}
    assert manifests.of("PersistentVolumeClaim").keys() <= claims
    assert manifests.of("ConfigMap").keys() <= maps


def test_what_is_written_to_is_writable(manifests):
    """The root file system is read-only: scratch folders are volumes."""
    for workload in manifests.workloads:
        container_mounts = mounts(main_container(workload))
        scratch = ["/tmp", "/home/ibtpo"]
        if workload is manifests.server:
            scratch.append("/dev/shm")
        for path in scratch:
            assert "emptyDir" in volumes(workload)[container_mounts[path]["name"]]
            assert not container_mounts[path].get("readOnly")
    shm = volumes(manifests.server)[mounts(main_container(manifests.server))["/dev/shm"]["name"]]
    assert shm["emptyDir"]["medium"] == "Memory"


def test_the_model_is_read_only(manifests):
    for workload in manifests.workloads:
        for container in containers(workload):
            model = mounts(container).get("/model")
            assert model is None or model["readOnly"] is True


def test_a_dead_engine_ends_the_server(manifests):
    """SGLang kills its own process, which would survive that as process 1."""
    assert pod(manifests.server)["shareProcessNamespace"] is True


def test_one_learner_at_a_time(manifests):
    assert manifests.learner["spec"]["replicas"] == 1
    assert manifests.learner["spec"]["strategy"] == {"type": "Recreate"}


def test_only_clients_reach_grpc(manifests):
    (policy,) = manifests.of("NetworkPolicy").values()
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert selects(policy["spec"]["podSelector"]["matchLabels"], manifests.server)
    ports = {p["name"]: p["containerPort"] for p in main_container(manifests.server)["ports"]}
    rules = {}
    for rule in policy["spec"]["ingress"]:
        for port in rule["ports"]:
            rules[ports.get(port["port"], port["port"])] = rule.get("from")
    assert rules.keys() == {7300, 7301, 7302}
    assert rules[7302] is None and rules[7301] is None
    (peer,) = rules[7300]
    assert peer.keys() == {"podSelector"}
    assert peer["podSelector"]["matchLabels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels(manifests.learner).items()
