import os

import pytest
from pydantic import ValidationError

from server.config import Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("LUMINA_")]:
        monkeypatch.delenv(name)


def test_environment_and_options(monkeypatch, tmp_path):
    monkeypatch.setenv("LUMINA_SYNC_TIMEOUT", "7")
    monkeypatch.setenv("LUMINA_REDIS_URL", "redis://one")
    settings = load_settings(redis_url="redis://two", drain_s=None, data_dir=tmp_path)
    assert (settings.sync_timeout, settings.redis_url, settings.drain_s) == (7, "redis://two", 25)
    assert settings.blob_store_url == f"file://{tmp_path}/blobs"
    assert load_settings(blob_url="s3://b/p").blob_store_url == "s3://b/p"


def test_build_variables_are_not_settings(monkeypatch):
    monkeypatch.setenv("LUMINA_TORCH_INDEX", "x")
    monkeypatch.setenv("LUMINA_ATTENTION", "sdpa")
    load_settings()


def test_a_misspelt_variable_is_refused(monkeypatch):
    monkeypatch.setenv("LUMINA_RESULT_TLL", "60")
    with pytest.raises(SettingsError, match="LUMINA_RESULT_TLL: unknown setting"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LUMINA_MAX_ATTEMPTS", "0"),
        ("LUMINA_LEASE_S", "soon"),
        ("LUMINA_LOG_LEVEL", "loud"),
        ("LUMINA_PRECISION", "fp16"),
        ("LUMINA_WARMUP_SIZES", "512"),
        ("LUMINA_API_KEYS", "sometimes"),
        ("LUMINA_WEBHOOK_ALLOW_CIDRS", "10.0.0.1/8"),
        ("LUMINA_WEBHOOK_ALLOW_CIDRS", "localhost"),
    ],
)
def test_a_bad_value_is_one_sentence(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name}: .*got '{value}'") as caught:
        load_settings()
    assert "\n" not in str(caught.value)
    assert "Value error" not in str(caught.value)


@pytest.mark.parametrize("secret", ["whsec_c2hvcnQ=", "whsec_no base64!", "c" * 40, "whsec_"])
def test_a_bad_secret_is_refused_without_repeating_it(monkeypatch, secret):
    monkeypatch.setenv("LUMINA_WEBHOOK_SECRET", secret)
    with pytest.raises(SettingsError, match=r"LUMINA_WEBHOOK_SECRET: .*base64 of 24") as caught:
        load_settings()
    assert "got" not in str(caught.value)


def test_a_secret_does_not_show_where_settings_do():
    secret = "whsec_" + "A" * 44
    assert secret not in repr(Settings(webhook_secret=secret))


def test_networks_are_lists():
    assert Settings().webhook_networks == []
    found = Settings(webhook_allow_cidrs="10.0.0.0/8, ::1/128,").webhook_networks
    assert [str(network) for network in found] == ["10.0.0.0/8", "::1/128"]


def test_sizes_to_warm_up_are_pairs():
    assert Settings().warmup == []
    assert Settings(warmup_sizes="512x256, 64x64").warmup == [(512, 256), (64, 64)]


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().drain_s = 1.0
