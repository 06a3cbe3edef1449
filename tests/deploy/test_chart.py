"""The Helm chart as a real helm renders it. No cluster is needed, and none has run it."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "lumina"
HELM = shutil.which("helm") or str(ROOT / ".venv" / "bin" / "helm")
CASES = [path.name.removesuffix("-values.yaml") for path in sorted((CHART / "ci").iterdir())]
pytestmark = [
    pytest.mark.very_slow,
    pytest.mark.skipif(not Path(HELM).exists(), reason="NO HELM (`make helm`): untested"),
]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, cwd=CHART, timeout=60)


def render(case: str, *sets: str) -> list[dict]:
    options = [word for each in sets for word in ("--set", each)]
    done = helm("template", "demo", ".", "-f", f"ci/{case}-values.yaml", *options)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(documents: list[dict], kind: str) -> dict[str, dict]:
    return {d["metadata"]["name"]: d for d in documents if d["kind"] == kind}


def pod_specs(documents: list[dict]) -> list[dict]:
    return [
        d["spec"] if d["kind"] == "Pod" else d["spec"]["template"]["spec"]
        for d in documents
        if d["kind"] in ("Pod", "Deployment", "StatefulSet", "Job")
    ]


@pytest.mark.parametrize("case", CASES)
def test_lint(case):
    done = helm("lint", "--strict", ".", "-f", f"ci/{case}-values.yaml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", CASES)
def test_no_pod_has_rights_it_does_not_need(case):
    for pod in pod_specs(render(case)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("case", CASES)
def test_probes_and_grace(case):
    deployments = of_kind(render(case), "Deployment")
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]["spec"]
        container = pod["containers"][0]
        paths = {
            kind: container[f"{kind}Probe"]["httpGet"]
            for kind in ("startup", "liveness", "readiness")
        }
        assert {kind: get["path"] for kind, get in paths.items()} == {
            "startup": "/startupz", "liveness": "/livez", "readiness": "/readyz",
        }  # fmt: skip
        assert {get["port"] for get in paths.values()} == {"internal"}
        if "-worker-" in name:
            startup = container["startupProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] >= 20 * 60
            drain = next(a for a in container["args"] if a.startswith("--drain-s="))
            assert pod["terminationGracePeriodSeconds"] == float(drain.split("=")[1]) + 30
        else:
            assert "preStop" in container["lifecycle"]


def test_everything_that_runs_may_be_disrupted_one_at_a_time_and_is_spread():
    documents = render("production")
    budgets = of_kind(documents, "PodDisruptionBudget")
    for name, deployment in of_kind(documents, "Deployment").items():
        spec = budgets[name]["spec"]
        assert spec["maxUnavailable"] == 1
        assert spec["selector"] == deployment["spec"]["selector"]
        keys = {
            c["topologyKey"]
            for c in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
        }
        assert keys == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}


def test_workers_scale_with_the_work_there_is():
    (scaled,) = of_kind(render("production"), "ScaledObject").values()
    (trigger,) = scaled["spec"]["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("metrics-api", "AverageValue")
    assert trigger["metadata"]["valueLocation"] == "work_seconds"
    assert trigger["metadata"]["url"].endswith(":8001/internal/scale?pool=default")
    assert scaled["spec"]["fallback"]["replicas"] >= 1
    (worker,) = (n for n in of_kind(render("production"), "Deployment") if "-worker-" in n)
    assert scaled["spec"]["scaleTargetRef"]["name"] == worker
    assert "replicas" not in of_kind(render("production"), "Deployment")[worker]["spec"]


def test_nothing_is_reached_that_is_not_named():
    policies = of_kind(render("default"), "NetworkPolicy")
    deny = policies["demo-lumina-default-deny"]["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    redis = policies["demo-lumina-redis"]["spec"]["ingress"]
    assert [port["port"] for port in redis[0]["ports"]] == [6379]
    who = redis[0]["from"][0]["podSelector"]["matchExpressions"][0]["values"]
    assert who == ["api", "worker", "hook"]


def test_a_gpu_worker_has_its_device_and_its_model():
    (name,) = (n for n in of_kind(render("gpu"), "Deployment") if "-worker-" in n)
    pod = of_kind(render("gpu"), "Deployment")[name]["spec"]["template"]["spec"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    assert pod["initContainers"][0]["args"] == ["inspect", "/models/lumina"]
    mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"] is True


def test_events_pass_the_ingress_as_they_come():
    (ingress,) = of_kind(render("production"), "Ingress").values()
    assert (
        ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    )
    assert ingress["spec"]["tls"] == [
        {"hosts": ["pictures.example.com"], "secretName": "pictures-tls"}
    ]


def test_the_first_key_comes_from_its_secret_and_stands_in_no_command_line():
    job = of_kind(render("production"), "Job")["demo-lumina-first-key"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    (key,) = (each for each in container["env"] if each["name"] == "FIRST_API_KEY")
    assert key["valueFrom"]["secretKeyRef"]["name"] == "lumina-first-key"
    assert "--from-env=FIRST_API_KEY" in container["args"]


def test_settings_of_the_chart_are_settings_of_the_service():
    from server.config import ENV_PREFIX, FOREIGN_VARIABLES, Settings

    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | FOREIGN_VARIABLES
    for case in CASES:
        for pod in pod_specs(render(case)):
            for container in pod["containers"]:
                names = {each["name"] for each in container.get("env", [])}
                assert {n for n in names if n.startswith(ENV_PREFIX)} <= known


@pytest.mark.parametrize(
    "wrong",
    [
        "api.replicas=0", "pools[0].image=gpu", "pools[0].name=No Name", "blobs.url=/tmp/pictures",
        "redis.url=http://redis", "unknown=1", "monitoring.interval=often", "api.service.port=0",
    ],
)  # fmt: skip
def test_wrong_values_are_refused(wrong):
    done = helm("template", "demo", ".", "--set", wrong)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (["blobs.sharedClaim.create=false"], "one pod's own disk"),
        (["redis.bundled=false"], "redis.url or redis.existingSecret is needed"),
        (["models.enabled=true"], "models.existingClaim is needed"),
    ],
)
def test_what_could_not_work_is_refused_with_a_sentence(sets, sentence):
    options = [word for each in sets for word in ("--set", each)]
    done = helm("template", "demo", ".", *options)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_rules_and_settings_reach_the_cluster():
    documents = render("production")
    (rule,) = of_kind(documents, "PrometheusRule").values()
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    (monitor,) = of_kind(documents, "ServiceMonitor").values()
    assert monitor["spec"]["endpoints"][0]["port"] == "internal"
