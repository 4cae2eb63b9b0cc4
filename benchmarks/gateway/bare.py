"""A pass-through on the server and the client that the gateway is built of, and nothing else: what these two cost.

python bare.py BASE_URL
"""

import asyncio
import sys

import uvloop

from walras.gateway.serve import server_of
from walras.gateway.transport import Endpoint, HttpTransport, Request

KEEP = (b"content-type", b"content-length")


async def main(base_url: str) -> None:
    transport = HttpTransport()
    endpoint = Endpoint.of("POST", f"{base_url}/chat/completions", [("content-type", "application/json")])

    async def app(_scope, receive, send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        response = await transport.send(Request(endpoint, body, resend=True))
        headers = [(k.encode(), v.encode()) for k, v in response.headers.items() if k.encode() in KEEP]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        async for chunk in response:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    server = server_of(app)
    server.config.port = 0
    running = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await running
    await transport.aclose()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
