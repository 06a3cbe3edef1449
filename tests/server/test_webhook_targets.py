"""Server-side request forgery: whatever a caller writes, no private address is ever called."""

import asyncio
import ipaddress

import pytest

from server.api.webhook_targets import (
    ForbiddenTarget,
    LookupFailed,
    WebhookGuard,
    is_public,
    parse_target,
    system_lookup,
)

PUBLIC = "93.184.215.14"

# Addresses by what they are. Where a system's own parser would read one differently, it is refused
# for how it is written.
LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.1", "127.255.255.254", "0", "0.0.0.0", "2130706433",
    "017700000001", "0x7f000001", "0x7F.1", "0177.0.0.1", "0177.0.0.01", "127.0.0.0x1",
    "0x7f.0x0.0x0.0x1", "0x7f.1.", "127.0.0.1.", "00000177.0.0.1", "127.0.0.1e0",
    "127.000.000.001", "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[::1%25lo]", "[::1%lo]",
    "localhost", "LOCALHOST", "localhost.",
]  # fmt: skip
PRIVATE = [
    "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "169.254.0.1",
    "100.64.0.1", "100.100.100.200", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "168.63.129.16", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "3232235777", "012.1.2.3",
    "[fe80::1]", "[fe80::1%25eth0]", "[fc00::1]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]",
    "[2001:db8::1]", "[100::1]", "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]", "[::10.0.0.1]",
    "[64:ff9b::10.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::808:808]", "[64:ff9b:1::1]",
    "[2002:7f00:1::]", "[2002:a00:1::1]", "[2002:a9fe:a9fe::1]",
    "[2001:0:4136:e378:8000:63bf:f5ff:fffe]", "[::ffff:8.8.8.8]", "[5f00::1]", "[4000::1]",
]  # fmt: skip
FORMS = [
    "", "/", "//", "http:", "http://", "https:///x", "http:/x", "x", "x.example/hook",
    "//x.example/", "ftp://x.example/", "file:///etc/passwd", "gopher://x.example:6379/_",
    "javascript:alert(1)", "data:text/plain,x", "unix:///var/run/docker.sock", "ws://x.example/",
    "http+unix://x.example/", "http://user@x.example/", "http://user:pass@x.example/",
    "http://:@x.example/", "http://x.example@127.0.0.1/", "http://127.0.0.1#@x.example/",
    "http://127.0.0.1?@x.example/", "http://x.example\\@127.0.0.1/", "http://x.example\\.evil/",
    "http://x.example%00.evil/", "http://x.example%2f@127.0.0.1/",
    "http://127.0.0.1%2f.x.example/", "http://x.example/\r\nHost: y", "http://x.example/a b",
    " http://x.example/", "http://x.example/\t", "http://x.example/\x00",
    "http://x.example/\u00e9", "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/",
    "http://x\u3002example/", "http://\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54/",
    "http://x.example:0/", "http://x.example:22/", "http://x.example:25/",
    "http://x.example:445/", "http://x.example:65536/", "http://x.example:-1/",
    "http://x.example:80x/", "http://x.example:\u0661/", "http://[::1/", "http://[x.example]/",
    "http://[1.2.3.4]/", "http://[v1.x]/", "http://-x.example/", "http://x..y/",
    "http://.x.example/", "http://x_.-.example/", "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 127 + "example/", "http://x.example/" + "a" * 2048, "http://1.2.3.4.5/",
    "http://256.1.1.1/", "http://1.2.3/", "http://0x/", "http://99999999999/",
    "http://x.example:443:80/",
]  # fmt: skip


def run(awaitable):  # type: ignore[no-untyped-def]
    return asyncio.run(awaitable)


class Names:
    """A name server whose answers come one after another."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.mark.parametrize("host", LOOPBACK + PRIVATE)
def test_no_way_to_write_a_private_address_passes(host: str) -> None:
    """With the system's own resolver, which knows more ways to write an address than we do."""
    for scheme, port in (("http", ""), ("https", ""), ("http", ":8080")):
        with pytest.raises(ForbiddenTarget):
            run(WebhookGuard().check(f"{scheme}://{host}{port}/hook"))


@pytest.mark.parametrize("url", FORMS)
def test_a_url_must_be_plain(url: str) -> None:
    """Even where every name is public."""
    with pytest.raises(ForbiddenTarget, match=r"^must "):
        run(WebhookGuard(lookup=Names([PUBLIC])).check(url))


@pytest.mark.parametrize(
    ("url", "host", "port", "header", "path"),
    [
        ("https://x.example", "x.example", 443, "x.example", "/"),
        ("HTTPS://X.Example./a?b=c&d#e", "x.example", 443, "x.example", "/a?b=c&d"),
        ("http://x.example:8080/a%20b/../c", "x.example", 8080, "x.example:8080", "/a%20b/../c"),
        ("http://x.example:443/", "x.example", 443, "x.example:443", "/"),
        (f"http://{PUBLIC}/", PUBLIC, 80, PUBLIC, "/"),
        ("https://[2606:4700::1111]/", "2606:4700::1111", 443, "[2606:4700::1111]", "/"),
        ("http://xn--bcher-kva.test/", "xn--bcher-kva.test", 80, "xn--bcher-kva.test", "/"),
        ("http://hook_1.x-y.example:65535/", "hook_1.x-y.example", 65535,
         "hook_1.x-y.example:65535", "/"),
    ],
)  # fmt: skip
def test_a_plain_url_is_read(url: str, host: str, port: int, header: str, path: str) -> None:
    target = parse_target(url)
    assert (target.host, target.port, target.path) == (host, port, path)
    assert target.host_header == header
    assert target.url_at("2606:4700::1") == f"{target.scheme}://[2606:4700::1]:{port}{path}"


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses_pass(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_one_private_address_among_several_is_enough_to_refuse() -> None:
    target = parse_target("https://x.example/")
    assert run(WebhookGuard(lookup=Names([PUBLIC, PUBLIC])).resolve(target)) == [PUBLIC]
    for mixed in ([PUBLIC, "10.0.0.1"], ["::1", PUBLIC], ["fe80::1%eth0"], []):
        with pytest.raises(ForbiddenTarget):
            run(WebhookGuard(lookup=Names(mixed)).resolve(target))


def test_a_name_is_looked_up_once_and_an_address_never() -> None:
    names = Names([PUBLIC], ["127.0.0.1"])
    guard = WebhookGuard(lookup=names)
    target = parse_target("https://rebinding.example/")
    assert run(guard.resolve(target)) == [PUBLIC]
    assert names.asked == ["rebinding.example"]
    with pytest.raises(ForbiddenTarget):
        run(guard.resolve(target))
    run(guard.resolve(parse_target(f"https://{PUBLIC}/")))
    assert len(names.asked) == 2


def test_listed_networks_are_allowed_and_only_they() -> None:
    networks = [ipaddress.ip_network(text) for text in ("10.1.0.0/16", "fd00:1::/32", "::1/128")]
    guard = WebhookGuard(networks)
    for host in ("10.1.2.3", "[fd00:1::5]", "[::1]"):
        run(guard.check(f"http://{host}:9000/"))
    for host in ("10.2.0.1", "[fd00:2::5]", "[::ffff:10.1.2.3]", "127.0.0.1"):
        with pytest.raises(ForbiddenTarget):
            run(guard.check(f"http://{host}:9000/"))


def test_a_silent_name_server_is_no_reason_to_refuse_but_nothing_to_call() -> None:
    async def silent(name: str) -> list[str]:
        raise LookupFailed(name)

    guard = WebhookGuard(lookup=silent)
    run(guard.check("https://x.example/"))
    with pytest.raises(LookupFailed):
        run(guard.resolve(parse_target("https://x.example/")))


def test_the_system_knows_names() -> None:
    found = run(system_lookup("localhost"))
    assert {ipaddress.ip_address(text).is_loopback for text in found} == {True}
    with pytest.raises((LookupFailed, ForbiddenTarget)):  # by what the network's server says
        run(system_lookup("no-such-name.invalid"))
