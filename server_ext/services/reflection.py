"""gRPC server reflection: the services describe themselves to tools such as grpcurl."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ibtree.errors import FieldError
from ibtree.extras import installed
from server_ext.services.health import SERVICES

_PACKAGE = "grpc_reflection"


def check_installed() -> None:
    """Raises FieldError if its package is not installed."""
    if not installed(_PACKAGE):
        problem = "grpcio-reflection is not installed"
        allowed = "leave it off, or pip install '.[reflection]' in the checkout of ibtpo"
        raise FieldError("reflection", problem, allowed)


def add_reflection(server: Any) -> None:
    """Lets clients of the server's port list its services and read their protos."""
    reflection: Any = import_module(f"{_PACKAGE}.v1alpha.reflection")
    health = "grpc.health.v1.Health"
    services = [name for name in SERVICES if name]
    reflection.enable_server_reflection([*services, health, reflection.SERVICE_NAME], server)
