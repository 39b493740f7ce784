"""Ports of this machine, for the tests that start a server."""

import socket


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def listens(port: int) -> bool:
    """Whether a server answers there; Jupyter tells its address before it does."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
