"""One address of this machine, and a server on it until it is stopped. A port in use is told before a model is loaded: it is bound first."""

import socket
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address

from posttrain.errors import PosttrainError

BACKLOG = 256


def need_ui(place: str, *packages: str) -> None:
    """Raises PosttrainError where a page's packages are missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise PosttrainError(place, f"{', '.join(missing)} not installed", "the extra [ui]", "Run `make install` in the checkout, or "
                             "`pip install -e '.[ui]'`.")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its address or the name localhost."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """port 0: any free one. Raises PosttrainError where the address cannot be had."""
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(BACKLOG)  # from here on a client waits and is not refused
    except OSError as e:
        raise PosttrainError(f"--host {host} --port {port}", f"cannot be listened on ({e.strerror})", "a free port of this machine",
                             "Name another --port, or stop what uses it.") from None
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app, lifespan: str = "off", patience: int = 3, **tls):
    """patience: seconds for what is under way when it is told to end; tls: uvicorn's ssl_certfile and ssl_keyfile."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan=lifespan,
                                         timeout_graceful_shutdown=patience, limit_concurrency=500, **tls))


def run(made, listener: socket.socket) -> None:
    """Serve until Ctrl-C or a request to end."""
    with listener, suppress(KeyboardInterrupt):
        made.run(sockets=[listener])
