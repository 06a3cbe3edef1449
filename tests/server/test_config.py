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
    ],
)
def test_a_bad_value_is_one_sentence(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name}: .*got '{value}'") as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_sizes_to_warm_up_are_pairs():
    assert Settings().warmup == []
    assert Settings(warmup_sizes="512x256, 64x64").warmup == [(512, 256), (64, 64)]


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().drain_s = 1.0
