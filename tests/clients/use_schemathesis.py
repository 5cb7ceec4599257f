"""schemathesis: bodies drawn from /openapi.json for every operation. Prints the number of each status.

Completions are limited to a few tokens and choices, so that thousands of cases take minutes.
"""

import json
import sys
from collections import Counter

import hypothesis
import schemathesis

url, cases = sys.argv[1], int(sys.argv[2])
schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
statuses: dict[str, Counter] = {}


def shortened(body):
    if isinstance(body, dict):
        if type(body.get("n")) is int and 1 < body["n"] <= 128:
            body["n"] = 2
        for name in ("max_tokens", "max_completion_tokens"):
            if body.get(name) is None or (type(body[name]) is int and body[name] > 3):
                body[name] = 3
        if type(body.get("min_tokens")) is int and body["min_tokens"] > 3:
            body["min_tokens"] = 3


def call_all(operation, counts):
    examples = cases if operation.method == "post" and operation.path != "/flush_cache" else 20

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.seed(0)
    @hypothesis.given(case=operation.as_strategy())
    def run(case):
        if case.path.endswith("completions"):
            shortened(case.body)
        response = case.call()
        counts[response.status_code] += 1
        assert response.status_code < 500, (case.path, case.body, response.text)

    run()


for result in schema.get_all_operations():
    operation = result.ok()
    counts = statuses[f"{operation.method.upper()} {operation.path}"] = Counter()
    call_all(operation, counts)
print(json.dumps({name: dict(counts) for name, counts in statuses.items()}))
