"""The gRPC client, blocking and asyncio, for anyone who wants trees.

Every call has a deadline. Within it a server that was there and is away is asked again until it is
back, and one that is too busy when it said; a tree that was growing is taken up again. Other
failures are `RpcFailed` with one readable line. Clients are context managers.
"""

from ibtree.client.asynchronous import AsyncClient
from ibtree.client.blocking import Client
from ibtree.client.channel import DEFAULT_TARGET, RpcFailed

__all__ = ["DEFAULT_TARGET", "AsyncClient", "Client", "RpcFailed"]
