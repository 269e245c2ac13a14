"""Run as a process: watches the health of a server on its main port, says what it sees, ends.

python -m tests.server_ext.services.health_child WATCHERS
"""

from __future__ import annotations

import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server_ext.services.health import Health


async def main(watchers: int) -> None:
    health, server = Health(), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        calls = [stub.Watch(request, timeout=20) for _ in range(watchers)]
        await asyncio.wait([asyncio.ensure_future(call.read()) for call in calls], timeout=0.3)
        health.serving(True)
        print(
            "a thread is free", await asyncio.wait_for(asyncio.to_thread(int, "1"), 3), flush=True
        )
        print("checked", (await stub.Check(request, timeout=3)).status, flush=True)
        for call in calls:
            call.cancel()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
    print("ended", flush=True)
