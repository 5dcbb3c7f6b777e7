"""The socket that the server listens on."""

import asyncio
import socket

import pytest

from preftune.server.run import _listen
from preftune.server.settings import ServerSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_in_two_writes_does_not_wait_for_the_clients_acknowledgement(host):
    """Without TCP_NODELAY every answer on a kept connection takes the 40 ms of the client's delayed acknowledgement."""

    async def option_of_an_accepted_connection() -> int:
        found = asyncio.get_running_loop().create_future()

        def accepted(_, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        try:
            listener = _listen(ServerSettings(host=host, port=0))
        except OSError:
            pytest.skip(f"this machine has no address {host}")
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            option = await asyncio.wait_for(found, 10)
            writer.close()
        return option

    assert asyncio.run(option_of_an_accepted_connection())
