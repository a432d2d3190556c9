"""One address of this machine, and a server on it until it is stopped. A port in use is told before a model is loaded: it is bound first."""

import socket
import ssl
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import PosttrainError
from posttrain.log import say

BACKLOG = 256
MINE = "an address of this machine, such as 127.0.0.1 or 0.0.0.0"

Certificate = Annotated[Path | None, typer.Option("--tls-certificate", help="a PEM file: https in the place of http", show_default=False)]
Key = Annotated[Path | None, typer.Option("--tls-key", help="the certificate's key, a PEM file without a passphrase", show_default=False)]


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
    except socket.gaierror as e:
        raise PosttrainError(f"--host {host}", f"no address of this machine ({e.strerror})", MINE, "Correct it, or leave --host out.") from None
    except TypeError:  # of what cannot be a host's name
        raise PosttrainError(f"--host {host}", "no host's name", MINE, "Correct it, or leave --host out.") from None
    except OSError as e:
        raise PosttrainError(f"--host {host} --port {port}", f"cannot be listened on ({e.strerror})", "a free port of this machine",
                             "Name another --port, or stop what uses it.") from None
    return listener


def address(listener: socket.socket, tls: bool = False) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' * tls}://[{host}]:{port}" if ":" in host else f"http{'s' * tls}://{host}:{port}"


def tls(certificate: Path | None, key: Path | None) -> dict[str, Path]:
    """What `server` takes for https: both files, read once to see that they fit; {} where neither is given."""
    if certificate is None and key is None:
        return {}
    if certificate is None or key is None:
        raise PosttrainError("--tls-certificate, --tls-key", "one without the other", "both, or neither", "Give both: the certificate and its key.")
    for option, file, mark, what in (("--tls-certificate", certificate, "-----BEGIN CERTIFICATE-----", "a certificate"),
                                     ("--tls-key", key, "PRIVATE KEY-----", "a private key")):
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as e:
            raise PosttrainError(f"{option} {file}", f"cannot be read ({e.strerror})", f"a PEM file with {what}",
                                 "Check the path and its permissions.") from None
        if mark not in text:
            raise PosttrainError(f"{option} {file}", f"no {what.removeprefix('a ')} in it", f"a PEM file with {what} ('{mark}')", "Name that file.")

    def locked() -> str:
        raise PosttrainError(f"--tls-key {key}", "is locked with a passphrase", "a key without one",
                             f"Unlock a copy that only you can read: `openssl pkey -in {key} -out KEY.pem`.")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, locked)
    except (ssl.SSLError, ValueError) as e:
        why = "do not belong together" if getattr(e, "reason", "") == "KEY_VALUES_MISMATCH" else f"cannot be used ({getattr(e, 'reason', None) or e})"
        raise PosttrainError(f"--tls-certificate {certificate}, --tls-key {key}", why, "a certificate and the key that it was made with",
                             "Name the two files that were made together.") from None
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


def note_unless(tls: dict, what: str | None, before: str, as_it: str = "it is") -> None:
    """Say that something goes unencrypted over the network. what: 'the password crosses'; nothing is said where it is empty."""
    if what and not tls:
        say(f"note: without --tls-certificate {what} the network as {as_it}: put a proxy with https before {before}, or reach it through ssh -L")


def server(app, lifespan: str = "off", patience: int = 3, **files):
    """patience: seconds for what is under way when it is told to end; files: what `tls` returns."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan=lifespan,
                                         timeout_graceful_shutdown=patience, limit_concurrency=500, **files))


def run(made, listener: socket.socket) -> None:
    """Serve until Ctrl-C or a request to end."""
    with listener, suppress(KeyboardInterrupt):
        made.run(sockets=[listener])
