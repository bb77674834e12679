"""schemathesis drives the real engine from its own /openapi.json: no 5xx, no hang, no leaked request."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.e2e.serving import Served, serve
from tests.e2e.test_server import complete, gauge, post, wait_idle
from toolkit.engine.frontend.openapi import document

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))  # a path; more of them by hand
PARALLEL = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}
ENGINE = {"context_length": 96, "max_total_tokens": 512, "max_running_requests": 16, "max_queued_requests": 16}

# Rules between fields, and between a prompt and the context, cannot be written in the schema.
EXCLUDED: list[CheckFunction] = [positive_data_acceptance]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(
        tmp_path_factory.mktemp("fuzz") / "run", parallel=PARALLEL, engine=ENGINE, deploy={"api_servers": 2}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def api(served: Served) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


CASES = [
    (path, method, mode)
    for path, methods in document("any")["paths"].items()
    for method in methods
    for mode in GenerationMode
    if method == "post" or mode is GenerationMode.POSITIVE  # a GET takes nothing that could be wrong
]


@pytest.mark.parametrize(("path", "method", "mode"), CASES, ids=[f"{m.value} {path}" for path, _, m in CASES])
def test_fuzz(api: BaseSchema, served: Served, path: str, method: str, mode: GenerationMode) -> None:
    """Bodies that follow the document, and bodies that break it."""
    operation = api[path][method]

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        try:
            response = case.call(timeout=60)
        finally:
            if path == "/slow_down":
                post(served, path, {"forward_sleep_time": None})
            if path == "/start_profile":
                post(served, "/stop_profile", {})
        assert response.status_code < 500, response.text
        case.validate_response(response, excluded_checks=EXCLUDED)

    run()


def test_nothing_is_left_of_it(served: Served) -> None:
    """After the above, in this file's order: all places are free, and the server answers as before."""
    wait_idle(served)
    assert gauge(served, "wideep:num_open_reqs") == 0
    assert gauge(served, "wideep:kv_used_tokens") == 0
    assert requests.get(f"{served.url}/health", timeout=30).json() == {"state": "ready"}
    assert complete(served, "as before", ignore_eos=True)["usage"]["completion_tokens"] == 8
    answered = requests.get(f"{served.url}/metrics", timeout=30).text
    assert 'wideep:http_requests_total{code="200",route="/v1/completions"}' in answered
