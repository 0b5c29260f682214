"""The chart, by Helm's own engine, and its plain files: held to Kubernetes' schemas, to the custom resources', and to
what this server is."""

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support import ROOT
from tests.support.figures import adapter, serve_one
from tests.support.monitoring import DEPLOY
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.declared import read_declaration

FOLDER = DEPLOY / "kubernetes"
VERSIONS = ("1.29", "1.33", "1.37")
ALL = {part: {"enabled": True} for part in ("autoscaling", "gateway", "monitoring", "network")}
OWN = {
    "keysSecret": "",
    "replicas": 3,
    "settings": {"TUCKA_MODEL": "/models/llama", "TUCKA_MAX_NUM_SEQS": 16},
    "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "adapters": [{"id": "law", "source": "/adapters/law"}, {"id": "org/tax", "source": "prod:tax"}],
    "adaptersToUnload": [{"id": "old", "source": "/adapters/old"}],
    "network": {
        "enabled": True,
        "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}],
        "monitoringNamespace": "observed",
    },
}


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, str], dict]:
    """Of the plain files, by kind and name."""
    texts = [path.read_text() for path in sorted((FOLDER / "plain").glob("*.yaml"))]
    return by_name(texts)


def by_name(texts: list[str]) -> dict[tuple[str, str], dict]:
    manifests = [manifest for text in texts for manifest in yaml.safe_load_all(text)]
    found = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    assert len(found) == len(manifests)
    return found


def closed(schema: object) -> object:
    """The schema with which Kubernetes drops no fields without a word: those that it does not name are refused."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def custom() -> Iterator[tuple[tuple[str, str], object]]:
    for path in (ROOT / "tests" / "deploy" / "crds").glob("*.json"):
        resource = json.loads(path.read_text())
        yield (resource["apiVersion"], resource["kind"]), closed(resource["schema"])


CUSTOM = dict(custom())


def validate(manifest: dict, version: str) -> None:
    """Raises a ValidationError."""
    schema = CUSTOM.get((manifest["apiVersion"], manifest["kind"]))
    if schema is None:
        kubernetes_validate.validate(manifest, version, strict=True)
    else:
        jsonschema.validate(manifest, schema)  # type: ignore[arg-type]


def test_the_plain_files_are_the_chart_rendered(render: ModuleType) -> None:
    assert {path.name: path.read_text() for path in (FOLDER / "plain").iterdir()} == render.plain(), (
        "run .venv/bin/python deploy/kubernetes/render.py"
    )


@pytest.mark.parametrize("values", [{}, ALL, ALL | OWN], ids=["defaults", "all", "own"])
def test_what_it_renders_is_valid(render: ModuleType, values: dict) -> None:
    manifests = by_name(list(render.rendered(values).values()))
    assert {kind for kind, _ in manifests} >= {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget"}
    for manifest in manifests.values():
        for version in VERSIONS:
            validate(manifest, version)
    linted = helm_python.lint(FOLDER / "chart")
    assert not linted["errors"] and all(message["severity"] < 2 for message in linted["messages"])


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "replica"), 2),
        ("Deployment", ("spec", "replicas"), "two"),
        ("HorizontalPodAutoscaler", ("spec", "maxReplicas"), None),
        ("InferencePool", ("spec", "targetPortNumber"), 8000),
        ("HTTPRoute", ("spec", "rules", 0, "backendRefs", 0, "name"), ""),
        ("ServiceMonitor", ("spec", "endpoints", 0, "ports"), "metrics"),
        ("NetworkPolicy", ("spec", "ingress", 0, "port"), [{"port": "http"}]),
        ("NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
        ("Service", ("spec", "ports", 0, "port"), "http"),
        ("ConfigMap", ("data", "adapters.yaml"), 7),
        ("PodDisruptionBudget", ("spec", "minAvailables"), 1),
    ],
)
def test_what_is_wrong_is_not(plain: dict, kind: str, path: tuple, value: object) -> None:
    manifest = json.loads(json.dumps(next(found for (of, _), found in plain.items() if of == kind)))
    validate(manifest, VERSIONS[0])
    inner = manifest
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest, VERSIONS[0])


def test_it_gives_the_server_the_time_it_is_told_to_take(plain: dict) -> None:
    pod = plain["Deployment", "tucka"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    settings = {item["name"]: item["value"] for item in server["env"]}
    known = {f"TUCKA_{field.name.upper()}" for kind in (EngineConfig, ServerConfig) for field in fields(kind)}
    assert set(settings) <= known and not pod["enableServiceLinks"], "TUCKA_PORT would be the Service's"
    delay, timeout = int(settings["TUCKA_DRAIN_DELAY"]), int(settings["TUCKA_SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] >= delay + timeout + 5
    assert delay > server["readinessProbe"]["periodSeconds"] * server["readinessProbe"]["failureThreshold"]
    assert {server[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/ready"}
    assert server["livenessProbe"]["httpGet"]["path"] == "/health"
    assert server["image"] == "tucka-runtime:cpu", "as compose.yaml builds it"
    assert set(server["resources"]) == {"requests", "limits"}
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"http": 8000, "metrics": int(settings["TUCKA_METRICS_PORT"])}


def test_its_server_has_keys_unless_it_is_said_that_others_keep_strangers_out(render: ModuleType, plain: dict) -> None:
    pod = plain["Deployment", "tucka"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    folder = next(mount for mount in server["volumeMounts"] if mount["name"] == "keys")["mountPath"]
    assert {"name": "TUCKA_API_KEY_FILE", "value": f"{folder}/keys.json"} in server["env"]
    (secret,) = [volume["secret"]["secretName"] for volume in pod["volumes"] if volume["name"] == "keys"]
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert f"kubectl create secret generic {secret} --from-file=keys.json" in page
    without = render.rendered({"keysSecret": ""})["server.yaml"]
    assert '{name: TUCKA_INSECURE, value: "true"}' in without and "keys" not in without


def test_all_of_it_finds_the_servers(plain: dict) -> None:
    deployment = plain["Deployment", "tucka"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ports = {
        port["name"]: port["containerPort"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        plain["PodDisruptionBudget", "tucka"]["spec"]["selector"]["matchLabels"],
        plain["InferencePool", "tucka"]["spec"]["selector"]["matchLabels"],
        plain["NetworkPolicy", "tucka"]["spec"]["podSelector"]["matchLabels"],
        *(service["spec"]["selector"] for (kind, _), service in plain.items() if kind == "Service"),
    ]
    assert len(selectors) == 6 and all(selector.items() <= labels.items() for selector in selectors)
    assert plain["InferencePool", "tucka"]["spec"]["targetPorts"] == [{"number": ports["http"]}]
    (backend,) = plain["HTTPRoute", "tucka"]["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) in plain
    target = plain["HorizontalPodAutoscaler", "tucka"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in plain
    monitor = plain["ServiceMonitor", "tucka"]["spec"]
    (scraped,) = [
        service
        for (kind, _), service in plain.items()
        if kind == "Service" and monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ]
    assert [port["name"] for port in scraped["spec"]["ports"]] == [monitor["endpoints"][0]["port"]]


def test_the_api_is_open_to_all_or_to_some_and_the_metrics_to_the_monitoring_alone(
    render: ModuleType, plain: dict
) -> None:
    container = plain["Deployment", "tucka"]["spec"]["template"]["spec"]["containers"][0]
    named = {port["name"] for port in container["ports"]}
    own = by_name([render.rendered(OWN)["network.yaml"]])["NetworkPolicy", "tucka"]
    for policy, clients, namespace in (
        (plain["NetworkPolicy", "tucka"], None, "monitoring"),
        (own, OWN["network"]["clients"], "observed"),
    ):
        api, metrics = policy["spec"]["ingress"]
        assert [port["port"] for rule in (api, metrics) for port in rule["ports"]] == ["http", "metrics"]
        assert named == {"http", "metrics"} and policy["spec"]["policyTypes"] == ["Ingress"]
        assert api.get("from") == clients
        (scraper,) = metrics["from"]
        assert scraper == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}


def test_the_server_reads_the_adapters_it_declares(render: ModuleType, tmp_path: Path) -> None:
    for values, wanted, unwanted in (
        ({}, {}, set()),
        (OWN, {"law": "/adapters/law", "org/tax": "prod:tax"}, {"old"}),
    ):
        manifests = by_name([render.rendered(values)["server.yaml"]])
        ((name, text),) = manifests["ConfigMap", "tucka-adapters"]["data"].items()
        (tmp_path / name).write_text(text)
        declared = read_declaration(tmp_path / name)
        assert (declared.wanted, declared.unwanted) == (wanted, unwanted)
        (server,) = manifests["Deployment", "tucka"]["spec"]["template"]["spec"]["containers"]
        folder = next(mount["mountPath"] for mount in server["volumeMounts"] if mount["name"] == "declared")
        assert {"name": "TUCKA_ADAPTERS_FILE", "value": f"{folder}/{name}"} in server["env"]


def test_what_reads_metrics_names_those_there_are(plain: dict) -> None:
    metrics = Metrics("base", max_adapters=4, block_size=16)
    metrics.adapter_arrived(adapter("fin"))
    serve_one(metrics)
    there = set(re.findall(r"^# TYPE (\S+)", metrics.render().decode(), re.MULTILINE))
    picker = yaml.safe_load(plain["ConfigMap", "tucka-picker"]["data"]["tucka.yaml"])
    (extractor,) = [plugin for plugin in picker["plugins"] if plugin["type"] == "core-metrics-extractor"]
    (engine,) = extractor["parameters"]["engineConfigs"]
    specs = {engine[key] for key in engine if key.endswith("Spec")}
    assert len(specs) == 5 and specs <= there
    labels = plain["Deployment", "tucka"]["spec"]["template"]["metadata"]["labels"]
    assert engine["name"] == labels["llm-d.ai/engine-type"] == extractor["parameters"]["defaultEngine"]
    named = {plugin["type"] for plugin in picker["plugins"]}
    assert {plugin["pluginRef"] for profile in picker["schedulingProfiles"] for plugin in profile["plugins"]} <= named
    (metric,) = plain["HorizontalPodAutoscaler", "tucka"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in there


def test_the_dashboard_is_the_one_of_grafana(plain: dict) -> None:
    shown = json.loads(plain["ConfigMap", "tucka-dashboard"]["data"]["tucka.json"])
    assert shown == json.loads((DEPLOY / "grafana" / "tucka.json").read_text())
