"""The file of `tucka serve --ray`: what it may say, what it may not, and what of it Serve's policy is given."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tucka_runtime.cli.main import main
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.server.ray.fleet import base_names, check_shared, fleet_of, read_fleet
from tucka_runtime.server.ray.scaling import LoadPolicy

FILE = """
serve: {adapters-file: /shared/adapters.yaml, adapter_slots: 8}
autoscaling: {min_replicas: 2, max_replicas: 4, target_ongoing_requests: 16, target_waiting: 4}
resources: {num_cpus: 2, num_gpus: 0.5}
routing: {copies: {law: 2}, spill_at: 4}
"""


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FILE)
    fleet = read_fleet(tmp_path / "fleet.yaml")
    assert fleet.serve == {"adapters-file": "/shared/adapters.yaml", "adapter_slots": 8}
    assert fleet.replicas is None and fleet.autoscaling is not None
    assert fleet.autoscaling.own_targets == {"waiting": 4.0}
    assert (fleet.resources.num_cpus, fleet.resources.num_gpus) == (2, 0.5)
    assert (fleet.routing.copies, fleet.routing.spill_at) == ({"law": 2}, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "one of `replicas`, a number, and `autoscaling`"),
        ({"replicas": 1, "autoscaling": {"max_replicas": 2, "target_ongoing_requests": 1}}, "one of `replicas`"),
        ({"replicas": 0}, "replicas: "),
        ({"replicas": 2, "replica": {}}, "replica: "),
        ({"replicas": 2, "routing": {"spill": 3}}, "routing.spill: "),
        ({"replicas": 2, "routing": {"copies": {"law": "two"}}}, "routing.copies.law: "),
        ({"replicas": 2, "routing": {"copies": {"law": 0}}}, "routing.copies.law: "),
        ({"autoscaling": {"max_replicas": 2}}, "autoscaling.target_ongoing_requests: "),
        (
            {"autoscaling": {"min_replicas": 3, "max_replicas": 2, "target_ongoing_requests": 1}},
            "min_replicas must not be over max_replicas",
        ),
        *(
            (
                {
                    "autoscaling": {
                        "min_replicas": 1,
                        "max_replicas": 2,
                        "initial_replicas": wrong,
                        "target_ongoing_requests": 1,
                    }
                },
                "initial_replicas must be from min_replicas to",
            )
            for wrong in (0, 3)
        ),
        ({"replicas": 1, "resources": {"num_cpus": float("inf")}}, "resources.num_cpus: "),
        ({"replicas": 1, "resources": {"resources": {"x": -1}}}, "resources.resources.x: "),
        (
            {"replicas": 1, "resources": {"resources": {"a": 1, "CPU": 1}}},
            "resources.resources: Value error, CPU cannot",
        ),
        (["replicas"], "the file: "),
    ],
)
def test_what_is_wrong_is_said_by_its_place(given: object, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        fleet_of(given, "--ray f")
    assert raised.value.message.startswith("--ray f") and said in raised.value.message


@pytest.mark.parametrize("text", ["a: [", "\x00", "a: 2020-13-45"])
def test_what_is_no_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_fleet(tmp_path / "f")


def test_what_replicas_cannot_share() -> None:
    check_shared(ServerConfig())
    for config in (ServerConfig(state_dir="s"), ServerConfig(metrics_port=0), ServerConfig(audit_log="a")):
        with pytest.raises(ConfigError, match="replicas of --ray"):
            check_shared(config)


def test_what_requests_call_the_base(tmp_path: Path) -> None:
    """A file that only the replicas have is one by its name."""
    (tmp_path / "Llama-3.Q4.bin").touch()
    for model, name in (
        (str(tmp_path), tmp_path.name),
        (str(tmp_path / "Llama-3.Q4.bin"), "Llama-3.Q4"),
        ("/nowhere/Llama 3.Q4.gguf", "Llama-3.Q4"),
        ("org/tiny@main", "org/tiny"),
    ):
        assert base_names(EngineConfig(model=model), ServerConfig()) == (name,)
    assert base_names(EngineConfig(model="x"), ServerConfig(served_model_name=("a", "b"))) == ("a", "b")


def test_settings_of_the_replicas_are_checked_as_the_files_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "f").write_text("replicas: 2\nserve: {no_such: 1}")
    assert main(["serve", "--ray", str(tmp_path / "f")]) == 1
    assert "unknown settings: no_such" in capsys.readouterr().err
    assert main(["serve", "--ray", str(tmp_path / "f"), "--config", "c"]) == 1
    assert "--config has no place beside --ray" in capsys.readouterr().err


def test_without_ray_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tucka_runtime.cli.main.installed", lambda extra: False)
    (tmp_path / "f").write_text("replicas: 2")
    assert main(["serve", "--ray", str(tmp_path / "f")]) == 1
    assert "sh deploy/install.sh ray" in capsys.readouterr().err


@dataclass
class Context:
    """What the policy reads of Serve's context."""

    current_num_replicas: int = 2
    target_num_replicas: int = 2
    total_num_requests: float = 24.0
    aggregated_metrics: dict[str, dict[str, float]] | None = field(
        default_factory=lambda: {"waiting": {"a": 6, "b": 14}, "tokens_per_second": {"a": 100, "b": 100}}
    )


def test_the_most_pressing_target_decides() -> None:
    assert LoadPolicy(8, {})(Context()) == (3.0, {})
    assert LoadPolicy(8, {"waiting": 4})(Context()) == (5.0, {})
    assert LoadPolicy(8, {"waiting": 10, "tokens_per_second": 20})(Context()) == (10.0, {})
    assert LoadPolicy(8, {"waiting": 4})(Context(aggregated_metrics=None)) == (3.0, {})
    assert LoadPolicy(8, {"waiting": 4})(Context(current_num_replicas=0)) == (2, {})
