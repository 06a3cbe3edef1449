"""Which addresses only this machine can reach, and where API keys are required."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that binds to `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keys_required(host: str, insecure: bool, mode: str) -> bool:
    """Whether a service that binds to `host` serves nobody without an API key.

    `mode` is LUMINA_API_KEYS: `required` asks for keys on a loopback address too. Raises ValueError
    where `insecure` contradicts it.
    """
    if mode == "required":
        if insecure:
            raise ValueError("--insecure contradicts LUMINA_API_KEYS=required: give only one")
        return True
    return not insecure and not is_loopback(host)
