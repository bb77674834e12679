"""Workers are killed and frozen under load, and clients leave at any moment: no request is lost, no block is either."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.processes import Processes, processes
from tests.e2e.serving import tiny_model
from tests.e2e.test_disagg import ENGINE, MIXTRAL

PROMPTS = [[(5 * i + 3 * j) % 250 for j in range(6 + 17 * i)] for i in range(8)]
TOKENS = 12
CLIENTS, LEAVERS = 5, 2
DEPLOY: dict[str, Any] = {
    "mode": "disagg", "prefill": {"workers": 2}, "decode": {"workers": 2}, "migration_limit": 12,
    "worker_timeout_s": 3.0, "transfer_timeout_s": 2.0, "api_servers": 2,
}  # fmt: skip


def body(prompt: list[int], model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0} | more


class Load:
    """Clients that ask for known texts until they are told to stop, and others that leave on the way."""

    def __init__(self, deployment: Processes) -> None:
        self._url, self._model = f"{deployment.url}/v1/completions", deployment.cfg.model.name
        self.expected = self.ask_all()
        self._stop = threading.Event()
        self.wrong: list[str] = []
        self.done = self.left = 0
        self._threads = [threading.Thread(target=self._stay, args=(i,)) for i in range(CLIENTS)]
        self._threads += [threading.Thread(target=self._leave, args=(i,)) for i in range(LEAVERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def ask_all(self) -> list[str]:
        return [self._ask(prompt) for prompt in PROMPTS]

    def _ask(self, prompt: list[int]) -> str:
        got = requests.post(self._url, json=body(prompt, self._model), timeout=120)
        return str(got.json()["choices"][0]["text"]) if got.status_code == 200 else got.text

    def _stay(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            i = rng.randrange(len(PROMPTS))
            try:
                text = self._ask(PROMPTS[i])
            except requests.RequestException as error:
                text = repr(error)
            if text != self.expected[i]:
                self.wrong.append(f"prompt {i}: {text!r} in place of {self.expected[i]!r}")
            self.done += 1

    def _leave(self, seed: int) -> None:
        """In every phase: queued, prefilling, transferring, decoding."""
        rng = random.Random(100 + seed)
        while not self._stop.is_set():
            request = body(rng.choice(PROMPTS), self._model, max_tokens=200, stream=True)
            try:
                requests.post(self._url, json=request, stream=True, timeout=rng.uniform(0.01, 0.3)).close()
            except requests.RequestException:
                self.left += 1

    def go_on(self, requests_more: int = 8) -> None:
        """Until so many more were answered: what was broken is used, or done without."""
        wanted, deadline = self.done + requests_more, time.monotonic() + 90
        while self.done < wanted:
            assert time.monotonic() < deadline, "requests hang"
            time.sleep(0.05)


def worker(info: dict[str, Any], name: str) -> dict[str, Any]:
    return next(w for w in info["workers"] if w["name"] == name)


def audited(info: dict[str, Any]) -> bool:
    """No request and no block in use anywhere."""
    ranks = info["dp_ranks"]
    return len(ranks) == 4 and not any(r["running"] or r["waiting"] or r["kv_used_tokens"] for r in ranks)


@pytest.mark.parametrize("backend", ["local", "nixl"])
def test_nothing_is_lost(backend: str, tmp_path: Path) -> None:
    """One deployment goes through it all: the start of a worker is what takes time here."""
    if backend == "nixl":
        pytest.importorskip("nixl_cu13")
    model = tiny_model() | {"hf_config": MIXTRAL}
    deploy = DEPLOY | {"disaggregation_transfer_backend": backend}
    with processes(tmp_path / "run", model=model, engine=ENGINE, deploy=deploy) as d:
        requests.post(f"{d.url}/slow_down", json={"forward_sleep_time": 0.005}, timeout=10)
        with Load(d) as load:
            load.go_on()
            killed(d, load)
            frozen(d, load)
        assert not load.wrong, f"{len(load.wrong)} of {load.done}: {load.wrong[:3]}"
        assert load.left > 10
        d.wait_until(audited, "all blocks are free", 30)
        for name in ("prefill0", "prefill1"):
            d.kill(f"{name}-0")
        d.wait_until(lambda info: all(worker(info, f"prefill{i}")["down"] for i in (0, 1)), "prefill is gone")
        assert load.ask_all() == load.expected, "decode workers compute prompts as well"
    log = (tmp_path / "run" / "logs" / "frontend-0.log").read_text()
    assert log.count("no prefill worker lives: decode workers compute prompts") == 1


def killed(d: Processes, load: Load) -> None:
    """A worker of each side is killed, done without, started anew and used again."""
    for name in ("prefill0", "decode0"):
        d.kill(f"{name}-0")
        d.wait_until(lambda info, n=name: worker(info, n)["down"], f"{name} is seen to be dead")
        load.go_on()
    for name in ("prefill0", "decode0"):
        d.start(f"{name}-0")
    for name in ("prefill0", "decode0"):
        d.wait_until(lambda info, n=name: not worker(info, n)["down"], f"{name} is back")
        d.wait_until(lambda info, n=name: worker(info, n)["num_open"] > 0, f"{name} is used again")
    load.go_on()


def frozen(d: Processes, load: Load) -> None:
    """A worker of each side stands still, is done without, and is used again when it goes on."""
    names = ("prefill1", "decode1")
    for name in names:
        d.freeze(f"{name}-0")
    d.wait_until(lambda info: all(worker(info, name)["down"] for name in names), "both are seen to be silent")
    load.go_on()
    for name in names:
        d.thaw(f"{name}-0")
    d.wait_until(lambda info: not any(worker(info, name)["down"] for name in names), "they speak again")
    load.go_on()
