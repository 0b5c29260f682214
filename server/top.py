"""`tucka top`: a line of figures every few seconds, from a server's /metrics."""

import time

from prometheus_client.parser import text_string_to_metric_families

from tucka_runtime.server.client import Client


def top(client: Client, interval: float, lines: int | None) -> int:
    """`interval` in seconds; ends after `lines` lines, or with Ctrl-C."""
    print(f"{'running':>8} {'waiting':>8} {'KV used':>8} {'tokens/s':>9} {'adapters':>9}")
    before, since = _sample(client), time.monotonic()
    printed = 0
    while lines is None or printed < lines:
        time.sleep(interval)
        now, at = _sample(client), time.monotonic()
        rate = (now["tucka_generation_tokens_total"] - before["tucka_generation_tokens_total"]) / (at - since)
        used = 100 * now["tucka_kv_blocks_used"] / max(now["tucka_kv_blocks"], 1)
        print(
            f"{now['tucka_requests_running']:8.0f} {now['tucka_requests_waiting']:8.0f} {used:7.0f}% {rate:9.1f} "
            f"{now['tucka_adapters_loaded']:9.0f}",
            flush=True,
        )
        before, since = now, at
        printed += 1
    return 0


def _sample(client: Client) -> dict[str, float]:
    """The series without labels, by name."""
    families = text_string_to_metric_families(client.get("/metrics").decode())
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
