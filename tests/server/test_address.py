"""Where API keys are required: wherever others than this machine can connect."""

import pytest

from server.api.address import keys_required


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost", "LOCALHOST"])
def test_keys_are_off_on_loopback_unless_asked_for(host: str) -> None:
    assert not keys_required(host, insecure=False, mode="auto")
    assert not keys_required(host, insecure=True, mode="auto")
    assert keys_required(host, insecure=False, mode="required")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.x", ""])
def test_keys_are_required_elsewhere_unless_waived(host: str) -> None:
    assert keys_required(host, insecure=False, mode="auto")
    assert not keys_required(host, insecure=True, mode="auto")


def test_they_cannot_be_both() -> None:
    with pytest.raises(ValueError, match="only one"):
        keys_required("0.0.0.0", insecure=True, mode="required")
