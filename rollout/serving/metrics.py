"""What Prometheus reads at /metrics: the service's own counters at the time of the scrape, and latencies of requests.

Labels take few values: a path that is not a route is "other".
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rollout.service import EngineService

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_GAUGES = {
  "slots": "Sequences decoded at once.",
  "running": "Sequences in slots.",
  "waiting": "Sequences without a slot.",
  "version": "Version of the weights.",
  "paused": "1 while no dispatch begins.",
}
_COUNTERS = {
  "requests": "Sequences taken in.",
  "finished": "Sequences that ended by themselves.",
  "aborted": "Sequences given up: clients that left, stop strings.",
  "refused": "Sequences for which the queue was full.",
  "prompt_tokens": "Tokens of prompts.",
  "drawn_tokens": "Tokens drawn.",
  "dispatches": "Decode dispatches.",
  "prefill_seconds": "Time in prefills.",
  "decode_seconds": "Time in decode dispatches.",
}
# Of `CacheUse`, where keys and values are in pages.
_CACHE_GAUGES = {
  "pages": "Pages of keys and values.",
  "page_size": "Positions of a page.",
  "in_use": "Pages that slots hold.",
  "shared": "Pages that several slots hold.",
  "cached": "Pages that no slot holds and whose content is known.",
  "peak": "The most pages that were held at once.",
}
_CACHE_COUNTERS = {
  "asked": "Tokens whose keys and values new sequences needed.",
  "saved": "Of them, those that did not have to be computed.",
  "evicted": "Slots that gave their sequence back so that others could go on.",
  "refused": "Sequences that found no room, each time that they were tried.",
}


class Metrics:
  """The registry of one server."""

  def __init__(self, service: EngineService, draining: Callable[[], bool]):
    self._service, self._draining = service, draining
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(self)
    self.answers = prometheus_client.Counter(
      "ring_jax_http_requests", "HTTP requests by path and status.", ("path", "status"), registry=self._registry
    )
    self.first_token = prometheus_client.Histogram(
      "ring_jax_time_to_first_token_seconds", "From the request to its first token.", buckets=_SECONDS,
      registry=self._registry,
    )  # fmt: skip
    self.request = prometheus_client.Histogram(
      "ring_jax_request_seconds", "From a request to the end of its answer.", buckets=_SECONDS, registry=self._registry
    )

  def collect(self) -> Iterator[Metric]:
    stats = self._service.stats()
    yield from _families("ring_jax", stats, _GAUGES, _COUNTERS)
    if stats.cache is not None:
      yield from _families("ring_jax_cache", stats.cache, _CACHE_GAUGES, _CACHE_COUNTERS)
    healthy = not (stats.error or self._draining())
    yield GaugeMetricFamily("ring_jax_healthy", "0 when the engine failed or the server drains.", value=float(healthy))

  def text(self) -> bytes:
    return prometheus_client.generate_latest(self._registry)


def _families(prefix: str, values: Any, gauges: Mapping[str, str], counters: Mapping[str, str]) -> Iterator[Metric]:
  """Fields of `values` by name, each with its help text."""
  for name, text in gauges.items():
    yield GaugeMetricFamily(f"{prefix}_{name}", text, value=float(getattr(values, name)))
  for name, text in counters.items():
    yield CounterMetricFamily(f"{prefix}_{name}", text, value=float(getattr(values, name)))
