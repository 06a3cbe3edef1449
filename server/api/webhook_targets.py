"""WebhookGuard: where a webhook may go. Whatever a caller writes, only public addresses are called.

A URL is read strictly, its name resolved once, every address checked, and the caller gets one of
these addresses to connect to. So a name that answers differently the next time gains nothing.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from server.api.schemas import MAX_WEBHOOK_URL
from server.config import Network

LOOKUP_S = 3.0
WEB_PORTS = {"http": 80, "https": 443}
FIRST_FREE_PORT = 1024  # below it are mail, logins and the like, which a POST might reach

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str], Awaitable[Sequence[str]]]

# IPv6 that anybody may be given. It leaves out all that is local, and what embeds IPv4 addresses
# (mapped, compatible, NAT64); 6to4 and Teredo do so inside it.
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED = (
    ipaddress.IPv6Network("2002::/16"),
    ipaddress.IPv6Network("2001::/32"),
    ipaddress.IPv4Network("192.88.99.0/24"),  # relays of 6to4
    ipaddress.IPv4Network("168.63.129.16/32"),  # a cloud's own services, though formally public
)
_URL = re.compile(r"[!-\[\]-~]+")  # printable ASCII without blanks and backslash
_NAME = re.compile(
    r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")

# A name server that does not answer holds a thread for long; it must not be one that others need.
_THREADS = ThreadPoolExecutor(8, thread_name_prefix="webhook-lookup")


class ForbiddenTarget(ValueError):
    """A webhook may not go there; the message says why and tells nothing about our network."""


class LookupFailed(Exception):
    """The name server does not answer: the name may be good a moment later."""


@dataclass(frozen=True)
class Target:
    """A webhook's URL in parts; `host` is a lower-case name or an address without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        """What the receiver calls itself."""
        host = url_host(self.host)
        return host if self.port == WEB_PORTS[self.scheme] else f"{host}:{self.port}"

    def url_at(self, address: str) -> str:
        """The URL with the name replaced by one of its addresses."""
        return f"{self.scheme}://{url_host(address)}:{self.port}{self.path}"


def url_host(host: str) -> str:
    """A host as URLs write it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def parse_target(url: str) -> Target:
    """Read a webhook's URL; raises ForbiddenTarget unless it is plainly one to call over HTTP."""
    if len(url) > MAX_WEBHOOK_URL or not _URL.fullmatch(url):
        raise ForbiddenTarget(
            f"must be a URL of at most {MAX_WEBHOOK_URL} printable ASCII characters without blanks"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ForbiddenTarget("must be a valid URL") from None
    if parts.scheme not in WEB_PORTS:
        raise ForbiddenTarget("must begin with https:// or http://")
    if "@" in parts.netloc:
        raise ForbiddenTarget("must not contain a user or password")
    if port is None:
        port = WEB_PORTS[parts.scheme]
    if port not in WEB_PORTS.values() and port < FIRST_FREE_PORT:
        raise ForbiddenTarget(f"must have port 80, 443 or one from {FIRST_FREE_PORT}")
    return Target(parts.scheme, _host(host, parts), port, _path(parts))


def _host(host: str, parts: SplitResult) -> str:
    """The name or address; raises ForbiddenTarget for other ways to write addresses."""
    host = host.removesuffix(".")
    if "[" in parts.netloc:
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise ForbiddenTarget("must have a valid host") from None
    if _NUMBER.fullmatch(host.rsplit(".", 1)[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ForbiddenTarget("must write an IPv4 address as four decimal numbers") from None
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise ForbiddenTarget("must have a valid host")
    return host


def _path(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and embeds no other one."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC_V6:
        return False
    if any(address in network for network in _REFUSED if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def system_lookup(name: str) -> list[str]:
    """The addresses of a name, as the operating system knows them.

    Raises ForbiddenTarget for a name that does not exist, LookupFailed where nobody knows.
    """
    ask = asyncio.get_running_loop().run_in_executor(
        _THREADS, lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    )
    try:
        async with asyncio.timeout(LOOKUP_S):
            found = await ask
    except TimeoutError:
        raise LookupFailed("the name server is too slow") from None
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise LookupFailed("the name server does not answer") from None
        raise ForbiddenTarget("must have a host that exists") from None
    except (UnicodeError, OSError):
        raise LookupFailed("the name cannot be looked up") from None
    return [str(entry[4][0]) for entry in found]


class WebhookGuard:
    """Says whether and where a webhook may go.

    Args:
        networks: those that are allowed although they are not public.
        lookup: the addresses of a name; for tests.
    """

    def __init__(self, networks: Sequence[Network] = (), lookup: Lookup = system_lookup) -> None:
        self._networks = networks
        self._lookup = lookup

    async def resolve(self, target: Target) -> list[str]:
        """Return addresses that may be connected to; one lookup, which is all that counts.

        Raises ForbiddenTarget if any of them is forbidden, LookupFailed.
        """
        try:
            addresses: list[Address] = [ipaddress.ip_address(target.host)]
        except ValueError:
            found = await self._lookup(target.host)
            addresses = [ipaddress.ip_address(text) for text in dict.fromkeys(found)]
        if not addresses:
            raise ForbiddenTarget("must have a host that exists")
        if not all(self._allowed(address) for address in addresses):
            raise ForbiddenTarget("must not lead to a private or otherwise special address")
        return [str(address) for address in addresses]

    async def check(self, url: str) -> None:
        """Raise ForbiddenTarget for a URL that must not be accepted; a name server that does not
        answer is no reason: each delivery asks it again."""
        target = parse_target(url)
        try:
            await self.resolve(target)
        except LookupFailed:
            return

    def _allowed(self, address: Address) -> bool:
        listed = any(
            address in network for network in self._networks if network.version == address.version
        )
        return listed or is_public(address)
