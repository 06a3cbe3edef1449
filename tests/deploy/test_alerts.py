"""The alerts with Prometheus's own tool: each fires where it must and is quiet elsewhere."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "lumina" / "files" / "rules.yaml"
UNIT_TESTS = sorted((ROOT / "deploy" / "prometheus").glob("*tests.yaml"))
promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="NO PROMTOOL (Debian's prometheus): alerts untested here"
)


def alerts() -> list[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]


def test_every_alert_is_tested_both_ways():
    names = {
        case["name"] for path in UNIT_TESTS for case in yaml.safe_load(path.read_text())["tests"]
    }
    wanted = {f"{alert} {how}" for alert in alerts() for how in ("fires", "is quiet")}
    assert names == wanted


def test_every_alert_says_who_must_hear_of_it_and_what_happened():
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
                assert re.search(r"\{\{|nobody|disk|claim", rule["annotations"]["summary"])


@promtool
@pytest.mark.very_slow
def test_the_rules_are_valid():
    subprocess.run(["promtool", "check", "rules", RULES], check=True, capture_output=True)


@promtool
@pytest.mark.very_slow
@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_every_alert_fires_where_it_must(path):
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
@pytest.mark.very_slow
def test_the_unit_tests_can_fail(tmp_path):
    changed = RULES.read_text().replace(
        "lumina_redis_memory_ratio) > 0.7", "lumina_redis_memory_ratio) > 0.9"
    )
    (tmp_path / "rules.yaml").write_text(changed)
    text = (ROOT / "deploy" / "prometheus" / "tests.yaml").read_text()
    unit_tests = tmp_path / "tests.yaml"
    unit_tests.write_text(text.replace("../../helm/lumina/files/rules.yaml", "rules.yaml"))
    done = subprocess.run(["promtool", "test", "rules", unit_tests], capture_output=True, text=True)
    assert done.returncode != 0
    assert "RedisMemoryHigh fires" in done.stdout + done.stderr
