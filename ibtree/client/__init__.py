"""The gRPC client, blocking and asyncio, for anyone who wants trees.

Every call has a deadline. Within it UNAVAILABLE is retried by the channel, and a server that is
too busy is asked again when it said; other failures are `RpcFailed` with one readable line. Clients
are context managers.
"""

from ibtree.client.asynchronous import AsyncClient
from ibtree.client.blocking import Client
from ibtree.client.channel import DEFAULT_TARGET, RpcFailed

__all__ = ["DEFAULT_TARGET", "AsyncClient", "Client", "RpcFailed"]
