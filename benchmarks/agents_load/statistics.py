"""A run's numbers, and the medians of several runs."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.agents_load.config import Numbers
from benchmarks.agents_load.runner import Run

PERCENTILES = (50, 95, 99)


def percentiles(values: Sequence[float]) -> Numbers | None:
    """p50, p95, p99 and the mean; None without values."""
    if not values:
        return None
    numbers = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {**numbers, "mean": statistics.fmean(values)}


def summarize(run: Run) -> Numbers:
    """The numbers of a run. Latencies, tokens and rates are those of calls that succeeded; failures are counted by name.

    `token_s` are the mean seconds a token after a call's first, `gap_s` those between a stream's chunks.
    `prefilled_tokens` is sum(prompt - 1 - cached).
    """
    good = [call for call in run.calls if call.failure is None]
    failures = Counter(call.failure for call in run.calls if call.failure is not None)
    failed = {call.session for call in run.calls if call.failure is not None}
    duration = max((call.ended for call in run.calls), default=run.began) - run.began
    prompt, cached = sum(call.prompt_tokens for call in good), sum(call.cached_tokens for call in good)
    completion = sum(call.completion_tokens for call in good)
    per_token = [
        (call.ended - call.first) / (call.completion_tokens - 1)
        for call in good
        if call.first is not None and call.completion_tokens > 1
    ]
    return {
        "duration_s": duration,
        "sessions": len(run.sessions),
        "calls": len(good),
        "calls_per_s": len(good) / duration if duration else 0.0,
        "tokens_per_s": completion / duration if duration else 0.0,
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "completion_tokens": completion,
        "prefilled_tokens": sum(call.prefilled_tokens for call in good),
        "hit_ratio": cached / prompt if prompt else 0.0,
        "call_s": percentiles([call.seconds for call in good]),
        "ttft_s": percentiles([call.first - call.began for call in good if call.first is not None]),
        "token_s": percentiles(per_token),
        "gap_s": percentiles([gap for call in good for gap in call.gaps]),
        "session_s": percentiles([one.ended - one.began for one in run.sessions if one.name not in failed]),
        "failures": dict(failures),
        "failure_details": sorted({f"{call.failure}: {call.detail}" for call in run.calls if call.failure})[:10],
        "failed_sessions": len(failed),
        "unsent_calls": sum(session.num_unsent for session in run.sessions),
    }


def spread(values: Iterable[float]) -> Numbers:
    """Median, least and greatest."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def value(numbers: Numbers, path: str) -> Any:
    """A number by its dotted path, such as `call_s.p95`; None where it does not exist."""
    found: Any = numbers
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def spread_of(runs: Sequence[Numbers], path: str) -> Numbers | None:
    """The spread of one number over several runs; None if a run has none."""
    values = [value(run, path) for run in runs]
    return None if not values or None in values else spread(values)


def ratios(runs: Sequence[Numbers], others: Sequence[Numbers], path: str) -> Numbers | None:
    """`runs` / `others` of one number: the medians' ratio, and least and greatest of the ratios by repetition."""
    pairs = [(value(run, path), value(other, path)) for run, other in zip(runs, others, strict=False)]
    if not pairs or not all(run is not None and other for run, other in pairs):
        return None
    each = [run / other for run, other in pairs]
    median: Callable = statistics.median
    of_medians = median([run for run, _ in pairs]) / median([other for _, other in pairs])
    return {"median": of_medians, "min": min(each), "max": max(each)}
