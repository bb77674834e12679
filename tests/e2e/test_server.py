"""The real engine behind the real frontend: answers, refusals, cancellation, sharing, and recovery."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.e2e.serving import Served, serve

PARALLEL = {"tp_size": 4, "dp_size": 2, "ep_size": 4, "enable_dp_attention": True}
ENGINE = {"max_total_tokens": 512, "max_running_requests": 8, "chunked_prefill_size": 64}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two attention DP groups of two ranks each, experts over all four."""
    with serve(tmp_path_factory.mktemp("served") / "run", parallel=PARALLEL, engine=ENGINE) as server:
        yield server


def post(served: Served, path: str, body: dict[str, Any] | str, **options: Any) -> requests.Response:
    data = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    return requests.post(served.url + path, data=data, headers=headers, timeout=60, **options)


def complete(served: Served, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": served.cfg.model.name, "prompt": prompt, "max_tokens": 8, "temperature": 0} | fields
    answer = post(served, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def gauge(served: Served, name: str) -> float:
    text = requests.get(f"{served.url}/metrics", timeout=30).text
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([-+0-9.e]+)$", text, re.MULTILINE)
    assert values, f"{name} is not in /metrics"
    return sum(map(float, values))


def wait_for(condition: Callable[[], bool], otherwise: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def wait_idle(served: Served) -> None:
    names = ("wideep:num_running_reqs", "wideep:num_queue_reqs")
    wait_for(lambda: not any(gauge(served, name) for name in names), "requests are still running")


def test_both_dp_ranks_give_the_same_answer(served: Served) -> None:
    ids = [5, 9, 200, 31, 7]
    answers, ranks = [], set()
    for _ in range(4):
        body = {"model": served.cfg.model.name, "prompt": ids, "max_tokens": 10, "temperature": 0, "ignore_eos": True}
        answer = post(served, "/v1/completions", body)
        ranks.add(answer.headers["x-dp-rank"])
        answers.append(answer.json()["choices"][0]["text"])
        assert answer.json()["usage"]["completion_tokens"] == 10
    assert ranks == {"0", "1"} and len(set(answers)) == 1


def test_a_seed_gives_the_same_text_on_any_rank(served: Served) -> None:
    def text(seed: int) -> str:
        return str(complete(served, "seeded", temperature=1.0, seed=seed, max_tokens=12)["choices"][0]["text"])

    assert text(7) == text(7) == text(7)
    assert len({text(seed) for seed in range(6)}) > 1


def test_streaming_says_the_same_as_not(served: Served) -> None:
    whole = complete(served, "stream me", max_tokens=9)["choices"][0]["text"]
    body = {"model": served.cfg.model.name, "prompt": "stream me", "max_tokens": 9, "temperature": 0, "stream": True}
    parts = []
    for line in post(served, "/v1/completions", body, stream=True).iter_lines():
        if line.startswith(b"data: {"):
            parts += [c["text"] for c in json.loads(line[6:])["choices"]]
    assert "".join(parts) == whole


def test_many_at_once_equal_each_alone(served: Served) -> None:
    """Chunked prefill, mixed batches, prefix reuse and preemption (the cache holds a few of them only)."""
    prompts = [[i + 1] * 10 + list(range(i, i + 70)) for i in range(12)]
    alone = [complete(served, p, max_tokens=24, ignore_eos=True)["choices"][0]["text"] for p in prompts]
    post(served, "/flush_cache", {})
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: complete(served, p, max_tokens=24, ignore_eos=True), prompts))
    assert [t["choices"][0]["text"] for t in together] == alone
    wait_idle(served)


def test_a_repeated_prompt_is_cached_until_flushed(served: Served) -> None:
    prompt = [3] * 40

    def cached() -> int:
        return int(complete(served, prompt)["usage"]["prompt_tokens_details"]["cached_tokens"])

    for _ in range(2):
        cached()  # both DP ranks have seen it
    assert cached() == 32
    assert post(served, "/flush_cache", {}).status_code == 200
    assert cached() == 0


BAD = [
    ("{not json", 400, "JSON"),
    ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": "x" * 5000}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": "x", "temperature": -2}, 400, "temperature"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p"),
    ({"prompt": [1, 99999]}, 400, "prompt"),
    ({"prompt": "x", "model": "gpt-9"}, 404, "gpt-9"),
]


@pytest.mark.parametrize(("body", "status", "word"), BAD, ids=[str(b)[:30] for b, _, _ in BAD])
def test_bad_input_is_refused_and_the_server_goes_on(served: Served, body: Any, status: int, word: str) -> None:
    if isinstance(body, dict):
        body = {"model": served.cfg.model.name, "max_tokens": 4} | body
    answer = post(served, "/v1/completions", body)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]
    assert complete(served, "still there?")["choices"][0]["text"] is not None


def test_a_client_that_leaves_frees_its_place(served: Served) -> None:
    body = {
        "model": served.cfg.model.name,
        "prompt": "gone soon",
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
    }
    raw = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        client.sendall(head + raw)
        assert b"200 OK" in client.recv(4096)
        wait_for(lambda: gauge(served, "wideep:num_running_reqs") == 1, "the request is not running")
    wait_idle(served)
    time.sleep(1)
    steps = gauge(served, "wideep:engine_steps_total")
    time.sleep(1)
    assert gauge(served, "wideep:engine_steps_total") == steps, "ranks sleep when there is nothing to do"


def test_experts_are_written_on_demand(served: Served) -> None:
    complete(served, "count me")
    assert post(served, "/dump_expert_distribution_record", {}).status_code == 200
    assert list(served.run_dir.glob("experts.npz"))


def test_info_and_health(served: Served) -> None:
    assert requests.get(f"{served.url}/health", timeout=30).json()["state"] == "ready"
    assert requests.get(f"{served.url}/live", timeout=30).status_code == 200
    models = requests.get(f"{served.url}/v1/models", timeout=30).json()
    assert models["data"][0]["id"] == served.cfg.model.name
    info = requests.get(f"{served.url}/get_server_info", timeout=30).json()
    assert "tp4-dp2-ep4" in json.dumps(info)
