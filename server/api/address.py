"""Which addresses only this machine can reach, and the rule about all others."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that binds to `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_loopback(host: str, insecure: bool) -> None:
    """Raise ValueError unless `host` is a loopback address or `insecure` allows any other."""
    if not insecure and not is_loopback(host):
        raise ValueError(
            f"--host {host} opens the service to other machines without API keys; "
            f"give --insecure to allow that, or use 127.0.0.1"
        )
