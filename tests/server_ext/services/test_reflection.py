"""Services that describe themselves."""

from __future__ import annotations

import importlib.util

import grpc
import pytest

from ibtree.errors import FieldError
from server_ext.config import ServerConfig
from server_ext.services import reflection as module
from server_ext.services.health import SERVICES
from server_ext.services.reflection import add_reflection, check_installed


def test_off_by_default():
    assert ServerConfig(model="m").reflection is False


def test_without_its_package_the_start_is_refused(monkeypatch):
    monkeypatch.setattr(module, "installed", lambda name: False)
    with pytest.raises(
        FieldError, match=r"grpcio-reflection is not installed.*\[reflection\]"
    ) as caught:
        check_installed()
    assert caught.value.as_option().startswith("--reflection: ")


@pytest.mark.skipif(
    not importlib.util.find_spec("grpc_reflection"), reason="needs the extra `reflection`"
)
def test_a_client_lists_the_services_and_reads_their_protos():
    from concurrent.futures import ThreadPoolExecutor

    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    check_installed()
    server = grpc.server(ThreadPoolExecutor(1))
    add_reflection(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert {name for name in SERVICES if name} < set(database.get_services())
            file = database.FindFileContainingSymbol("ibtree.v1.TreeQueueService")
            assert [service.name for service in file.service] == ["TreeQueueService"]
    finally:
        server.stop(0).wait()
