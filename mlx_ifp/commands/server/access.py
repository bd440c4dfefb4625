"""Who may talk to the server: the address, the key, and the pages of a browser."""

import email.message
import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from ...errors import IFPError

_LOOPBACK_NAMES = ("localhost",)


def is_loopback(host: str) -> bool:
    """Whether every address of a host is this machine's own.

    Raises:
        IFPError: if the host has no address.
    """
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise IFPError(f"--host {host}: there is no such address.") from error
    return all(ipaddress.ip_address(str(info[4][0]).split("%")[0]).is_loopback for info in infos)


def _is_loopback_name(name: str | None) -> bool:
    if name is None:
        return False
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() in _LOOPBACK_NAMES


def _host_of(header: str) -> str | None:
    """The name in a Host header, without its port; None if it is none."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


class Access:
    """The rules of one server.

    Args:
        host: the address that is bound.
        key: the key that requests must have, or None.
        open_to_all: an address that is not loopback may go without a key.
        origins: of web pages that may ask; None for those of this machine, ``*`` for all.

    Raises:
        IFPError: if the address is not loopback, and nothing says who may use it.
    """

    def __init__(
        self,
        host: str,
        key: str | None = None,
        *,
        open_to_all: bool = False,
        origins: list[str] | None = None,
    ) -> None:
        self.host, self.loopback, self.origins = host, is_loopback(host), origins
        if key is not None and not key.strip():
            raise IFPError("The API key is empty; give one, or unset MLX_IFP_API_KEY.")
        self._key = None if key is None else key.encode()
        if not self.loopback and key is None and not open_to_all:
            raise IFPError(
                f"--host {host} lets other machines in. Give a key with --api-key or "
                "MLX_IFP_API_KEY, or say --no-auth to let everybody in."
            )

    def knows_host(self, header: str | None) -> bool:
        """Whether a Host header names this server.

        A page on the internet can let its own name resolve to 127.0.0.1 (DNS rebinding), and so
        reach a server on loopback past the browser's rules. The name in the header gives it away.
        On other addresses the server cannot know its names, and there the key protects it.
        """
        if not self.loopback:
            return True
        name = None if header is None else _host_of(header)
        return _is_loopback_name(name) or (name is not None and name == self.host.lower())

    def allows_origin(self, origin: str | None) -> bool:
        """Whether a page of this origin may ask; a request without an origin is no page's."""
        if origin is None or self.origins == ["*"]:
            return True
        if self.origins is not None:
            return origin in self.origins
        try:
            parts = urlsplit(origin)
            return parts.scheme in ("http", "https") and _is_loopback_name(parts.hostname)
        except ValueError:
            return False

    def has_key(self, headers: email.message.Message) -> bool:
        """Whether a request has the key. How long this takes says nothing about the key."""
        if self._key is None:
            return True
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        # Header values are latin-1; a key that is not ASCII is compared as its bytes.
        given = [key.encode("latin-1", "replace") for key in (bearer, headers.get("x-api-key", ""))]
        return any([hmac.compare_digest(key, self._key) for key in given])
