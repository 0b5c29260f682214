"""The application for Ray Serve, and `tucka serve --ray`, which runs it."""

import logging
import os
import signal
import threading
from typing import Any

import ray
from ray import serve

from tucka_runtime.bases import with_base
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.embedded import with_embedded_default
from tucka_runtime.errors import TuckaError
from tucka_runtime.server.http.server import bind, check_open
from tucka_runtime.server.ray.fleet import Fleet, base_names, check_shared
from tucka_runtime.server.ray.ingress import Ingress
from tucka_runtime.server.ray.replica import Replica
from tucka_runtime.server.settings_check import check_settings

log = logging.getLogger("tucka_runtime.server")

NAME = "tucka"
"""Of the application: another of that name on the cluster is replaced by it."""

MOST_TO_INGRESS = 10_000  # requests that one ingress may have: it waits for replicas, which have bounds of their own
ROUTING_STATS_SECONDS = 2.0
WAIT_LOOP_SECONDS = 0.5  # how often a replica that is to go looks whether its last request has ended
TRIES = 2  # of a replica's start: what is wrong with its settings stays so


def build(fleet: Fleet, engine_config: EngineConfig, config: ServerConfig) -> serve.Application:
    """Raises ConfigError."""
    check_shared(config)
    leaving = {
        "graceful_shutdown_timeout_s": fleet.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": WAIT_LOOP_SECONDS,
    }
    replica = serve.deployment(
        Replica,
        ray_actor_options=fleet.resources.model_dump(),
        max_ongoing_requests=fleet.max_ongoing_requests,
        health_check_period_s=fleet.health_check_period_s,
        max_constructor_retry_count=TRIES,
        request_router_config={
            "request_router_class": "tucka_runtime.server.ray.router:AdapterRouter",
            "request_router_kwargs": fleet.routing.model_dump(),
            "request_routing_stats_period_s": ROUTING_STATS_SECONDS,
        },
        **leaving,
        **_how_many(fleet),
    ).bind(engine_config, config)
    ingress = serve.deployment(
        Ingress,
        num_replicas=fleet.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MOST_TO_INGRESS,
        **leaving,
    )
    return ingress.bind(replica, base_names(engine_config, config), config.max_body_bytes)


def _how_many(fleet: Fleet) -> dict[str, Any]:
    scaling = fleet.autoscaling
    if scaling is None:
        return {"num_replicas": fleet.replicas}
    own = {"target_waiting", "target_tokens_per_second"}
    settings = scaling.model_dump(exclude_none=True, exclude=own)
    if scaling.own_targets:
        settings["policy"] = {
            "policy_function": "tucka_runtime.server.ray.scaling:LoadPolicy",
            "policy_kwargs": {"ongoing": scaling.target_ongoing_requests, "targets": scaling.own_targets},
        }
    return {"autoscaling_config": settings}


def run(fleet: Fleet, engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serves until a signal, on the cluster that RAY_ADDRESS names, or else on one of its own on this machine. Returns
    the exit status: 0 after SIGINT or SIGTERM, 1 when it could not start."""
    own = "RAY_ADDRESS" not in os.environ
    try:
        if own:
            check_settings(*with_base(*with_embedded_default(engine_config, config)))
        application = build(fleet, engine_config, config)
        listener = bind(config.host, config.port)
        check_open(config, listener)
        host, port = listener.getsockname()[:2]
        listener.close()  # Serve's proxy takes it
    except TuckaError as error:
        log.error("%s", error.message)
        return 1
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send its makers figures of this installation
    try:
        ray.init(
            address="local" if own else None, include_dashboard=False if own else None, logging_level=logging.WARNING
        )
    except Exception as error:  # Ray raises whatever it likes, and plain ones where a machine is too busy
        log.error("Ray is not reached, or does not start: %s", error)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        serve.start(http_options={"host": host, "port": port, "keep_alive_timeout_s": config.keep_alive_timeout})
        serve.run(application, name=NAME)
        log.info("ready at http://%s:%d", f"[{host}]" if ":" in host else host, port)
        threading.Event().wait()
        return 1
    except KeyboardInterrupt:
        log.info("stopping: replicas finish what they work at, for up to %g s", fleet.graceful_shutdown_timeout_s)
        return 0
    except RuntimeError as error:  # Serve's, with what the replica's start raised
        log.error("the application does not start: %s", error)
        return 1
    finally:
        if own:
            serve.shutdown()
        else:
            serve.delete(NAME)
        ray.shutdown()
