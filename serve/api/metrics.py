"""Figures for Prometheus, by vLLM's names, so that its dashboards work.

Labels are the served model's name, which is one of a few, the engine's number, and the finish
reason: their number never grows with what clients send.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_ds.decode.request import PromptFigures
from serve.api.engines import EnginePool
from serve.api.jobs import Figures

_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_REASONS = ("stop", "length", "abort", "error")


_OLDER_NAME = "Deprecated alias of kv_cache_usage_perc."
_LOOKED_UP = "Prefix-cache look-ups, in tokens."
_Value = Callable[[Figures], float]
_OF_ENGINES: tuple[tuple[type, str, str, _Value], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Running requests.", lambda f: f.running),
    (GaugeMetricFamily, "num_requests_waiting", "Waiting requests.", lambda f: f.waiting),
    (GaugeMetricFamily, "kv_cache_usage_perc", "Share of pages in use.", lambda f: f.pages_used),
    (GaugeMetricFamily, "gpu_cache_usage_perc", _OLDER_NAME, lambda f: f.pages_used),
    (CounterMetricFamily, "num_preemptions", "Preempted requests.", lambda f: f.put_back),
    (
        CounterMetricFamily,
        "prefix_cache_hits",
        "Prefix-cache hits, in tokens.",
        lambda f: f.cached_tokens,
    ),
    (CounterMetricFamily, "prefix_cache_queries", _LOOKED_UP, lambda f: f.prompt_tokens),
)


class Metrics:
    """The figures of one front."""

    def __init__(self, pool: EnginePool, models: tuple[str, ...]) -> None:
        self.registry = CollectorRegistry()
        self._models = models

        def counter(name: str, about: str, *labels: str) -> Counter:
            names = ("model_name", *labels)
            return Counter(f"vllm:{name}", about, names, registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(
                f"vllm:{name}", about, ("model_name",), buckets=buckets, registry=self.registry
            )

        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "New tokens.")
        self._success = counter("request_success", "Finished requests.", "finished_reason")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = histogram("inter_token_latency_seconds", "From token to token.")
        self._per_token = histogram(
            "time_per_output_token_seconds", "Deprecated alias of inter_token_latency_seconds."
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token."
        )
        self._decode = histogram("request_decode_time_seconds", "From the first to the last token.")
        self._prompt_sizes = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_sizes = histogram(
            "request_generation_tokens", "New tokens of a request.", _TOKENS
        )
        self._most = histogram(
            "request_max_num_generation_tokens",
            "New tokens of a request's longest answer.",
            _TOKENS,
        )
        self._asked = histogram("request_params_max_tokens", "max_tokens of a request.", _TOKENS)
        self.registry.register(_Engines(pool, models[0]))
        for model in models:
            self._prompt.labels(model)
            self._generated.labels(model)
            for reason in _REASONS:
                self._success.labels(model, reason)

    def timer(self, model: str, max_tokens: int, began: float) -> RequestTimer:
        """The figures of one answer to a request that came at `began` (monotonic) for a served
        model."""
        assert model in self._models
        self._asked.labels(model).observe(max_tokens)
        return RequestTimer(self, model, began)

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)


class RequestTimer:
    """The path of one answer, and the time of each of its stages."""

    def __init__(self, metrics: Metrics, model: str, began: float) -> None:
        self._metrics, self._model = metrics, model
        # Looked up once: these three are used for each token.
        self._generated = metrics._generated.labels(model)
        self._between = metrics._between.labels(model)
        self._per_token = metrics._per_token.labels(model)
        self._began = self._last = began
        self.prompt_tokens = self.cached_tokens = self.new_tokens = 0
        self._is_over = False
        self.first_seconds: float | None = None

    def token(
        self, prompt: PromptFigures | None, prompt_tokens: int, begun: float | None = None
    ) -> None:
        """Take a new token. With the first come `prompt`, and when its work was `begun`."""
        now, m = time.monotonic(), self._metrics
        self.new_tokens += 1
        if prompt is not None:
            self.prompt_tokens, self.cached_tokens = prompt_tokens, prompt.cached_tokens
            self.first_seconds = now - self._began
            m._prompt.labels(self._model).inc(prompt_tokens)
            m._first.labels(self._model).observe(self.first_seconds)
            m._prompt_sizes.labels(self._model).observe(prompt_tokens)
            begun = self._began if begun is None else begun
            m._queue.labels(self._model).observe(max(0.0, begun - self._began))
            m._prefill.labels(self._model).observe(max(0.0, now - begun))
        else:
            self._between.observe(now - self._last)
            self._per_token.observe(now - self._last)
        self._generated.inc()
        self._last = now

    def end(self, reason: str) -> None:
        """End it: stop, length, abort (nobody waits any more) or error. The first end counts."""
        if self._is_over:
            return
        self._is_over = True
        m = self._metrics
        m._success.labels(self._model, reason).inc()
        m._whole.labels(self._model).observe(time.monotonic() - self._began)
        m._answer_sizes.labels(self._model).observe(self.new_tokens)
        m._most.labels(self._model).observe(self.new_tokens)
        if self.first_seconds is not None:
            m._decode.labels(self._model).observe(self._last - self._began - self.first_seconds)


class _Engines(Collector):
    """Figures that engines send after each step."""

    def __init__(self, pool: EnginePool, model: str) -> None:
        self._pool, self._model = pool, model

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "engine"]
        for kind, name, about, value_of in _OF_ENGINES:
            family = kind(f"vllm:{name}", about, labels=labels)
            for engine in self._pool.engines:
                value = float(value_of(engine.figures))
                family.add_metric([self._model, str(engine.number)], value)
            yield family
