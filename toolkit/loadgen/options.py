"""What can be asked of ``python -m toolkit.loadgen``: ``key=value`` words -> ``Options``, checked.

The keys of ``LoadConfig`` mean the same here and in an experiment's ``load.*``. Knows no HTTP.
Read next: ``sweep.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from toolkit.config.load import LoadConfig
from toolkit.config.mapping import from_mapping
from toolkit.config.options import opt
from toolkit.loadgen.datasets import DATASETS, FILE_DATASETS, TIMED_DATASETS
from toolkit.loadgen.openai_api import OWN_FIELDS

HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
OWN_HEADERS = (
    "host", "content-length", "content-type", "transfer-encoding", "accept", "accept-encoding", "authorization",
    "connection", "x-request-id", "x-session-id",
)  # fmt: skip
SECTIONS = {  # heading of the keys from this one on
    "url": "Where", "concurrency": "Load", "dataset": "Requests", "max_failed_share": "When a load point counts",
    "slo_ttft_ms": "Objectives", "workers": "The load generator itself", "scrape": "Around the load points",
    "record_text": "What is kept",
}  # fmt: skip

Need = Callable[[bool, str, str], None]
"""(what must hold, field, the rule and the way out)"""

USAGE = """\
Loads an OpenAI-compatible server with a sweep over concurrency or request rate and measures every request.

  python -m toolkit.loadgen url=http://HOST:PORT model=NAME out=FOLDER concurrency=[1,2,4,8]
  python -m toolkit.loadgen join HOST:PORT  the part of another node; --help after it tells more
  python -m toolkit.loadgen selfcheck       how much this machine can measure, and how far off it is; needs no server

  key=value    values are YAML or JSON: concurrency=[1,8]  temperature=0.7  ignore_eos=false

Examples
  python -m toolkit.loadgen url=http://127.0.0.1:8000 concurrency=[1,4] osl=64        only the table, nothing kept
  python -m toolkit.loadgen url=http://node7:30000 out=results/try dataset=random isl=1024 osl=256 num_gpus=16
  python -m toolkit.loadgen url=http://node7:30000 dataset_path=my.jsonl api_key_env=MY_KEY temperature=0.7
  python -m toolkit.loadgen url=... request_rate=[1,4,16] arrival=gamma burstiness=0.5 max_concurrency=256
  python -m toolkit.loadgen url=... dataset=mooncake dataset_path=trace.jsonl arrival=trace speedup=2 num_requests=500
  python -m toolkit.loadgen url=... concurrency=[1,512] search=true slo_ttft_ms=500 slo_tpot_ms=30

Result in `out`: requests.parquet (a row a request, failed ones too), sweep.csv (a row a load point), status.json (with
the verdict on the client's own part in the figures: ok, degraded or client_limited), server_metrics.parquet, and
points/, a file a load point, from which the first two are made.
A sweep that was cut off: the same words with resume=true run only the points that are not done.
Exit status: 0 done, 1 a load point failed or is invalid, 2 an option is wrong, 3 strict=true and a verdict is not ok,
4 the server is gone, 130 interrupted (what was measured is kept)."""


@dataclass(frozen=True)
class Options(LoadConfig):
    """The sweep's keys and, beside them, where the server is and where the results go."""

    url: str = opt("http://127.0.0.1:8000", "the server, without /v1")
    model: str = opt("", "model name to ask for; empty: the first one that /v1/models lists")
    tokenizer: str = opt("", "folder with tokenizer.json, or `bytes`: length of dataset=random; empty: count words")
    out: str = opt("", "folder for the results; empty: only the table is printed")
    api_key_env: str = opt("", "environment variable that holds the API key; empty: none is sent")
    num_gpus: int = opt(1, "GPUs of the deployment (ranks on CPU), for the figures per GPU")
    resume: bool = opt(False, "go on with the sweep in `out`: run only the load points that are not done there")
    deployment: str = opt("", "what is loaded, as far as a resumed sweep must be the same; empty: the model's name")
    attempt: int = opt(1, "how many times this run has been started, for the record")
    listen: str = opt("", "HOST:PORT of the first node, where the others join it; needed with nodes above 1")
    progress: str = opt("", "file that is kept up to date with the progress as JSON; empty: show it here")


def parse(words: Sequence[str]) -> Options:
    """Command-line words -> checked options.

    Raises:
        ValueError: what is wrong, one line for each problem.
    """
    hints = typing.get_type_hints(Options)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals:
            raise ValueError(f"{word} is not of the form key=value; --help lists the keys")
        if key in values:
            raise ValueError(f"{key} is given twice; give it once")
        values[key] = _value(text, hints.get(key))
    for key in ("out", "progress"):
        if values.get(key):
            values[key] = str(Path(values[key]).expanduser())
    try:
        options = from_mapping(values, Options)
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(hints.get(str(error).partition('=')[0]))}") from None
    problems = [*check_load(options), *_check_own(options)]
    if problems:
        raise ValueError("\n".join(problems))
    return options


def check_load(load: LoadConfig) -> list[str]:
    """Everything that is wrong with a sweep's options, without a server; empty: nothing."""
    problems: list[str] = []

    def need(holds: bool, field: str, rule: str) -> None:
        if not holds:
            problems.append(f"{field}={getattr(load, field)} {rule}")

    _check_arrivals(load, need)
    _check_lengths(load, need)
    need(load.repeat >= 1, "repeat", "must be at least 1")
    need(0 <= load.max_failed_share <= 1, "max_failed_share", "must be from 0 to 1")
    need(0 <= load.max_wrong_length_share <= 1, "max_wrong_length_share", "must be from 0 to 1")
    need(load.gone_s >= 0, "gone_s", "is negative; use 0 to end the sweep at the first sign")
    need(load.repeat == 1 or not load.search, "repeat", "and search=true do not go together; use one of them")
    need(load.temperature >= 0, "temperature", "must be 0 (greedy) or more")
    for name in sorted(OWN_FIELDS.keys() & load.extra_body.keys()):
        say = f"say {OWN_FIELDS[name]}= instead" if OWN_FIELDS[name] else "answers are always streamed: leave it out"
        problems.append(f"extra_body has {name}, which the load generator sets: {say}")
    for name, value in load.headers.items():
        if not (HEADER.fullmatch(name) and value.isascii() and value.isprintable()):
            problems.append(f"headers has {name!r}: a header is a name and one line of ASCII; write it so")
        elif name.lower() in OWN_HEADERS:
            problems.append(f"headers has {name}, which the load generator sets: leave it out")
    need(load.timeout_s > 0, "timeout_s", "must be more than 0 seconds")
    need(load.workers >= 0, "workers", "must be 0 (choose) or more")
    need(load.nodes >= 1, "nodes", "must be at least 1")
    need(load.scrape_interval_s >= 0.05, "scrape_interval_s", "must be at least 0.05 seconds")
    need(
        all(value >= 0 for value in (load.slo_ttft_ms, load.slo_tpot_ms, load.slo_e2e_ms)), "slo_ttft_ms", "is negative"
    )
    need(0 < load.slo_share <= 1, "slo_share", "must be above 0 and at most 1")
    if load.search and not (load.slo_ttft_ms or load.slo_tpot_ms or load.slo_e2e_ms):
        problems.append("search=true needs an objective: give slo_ttft_ms, slo_tpot_ms or slo_e2e_ms")
    if load.search and load.arrival == "trace":
        problems.append("search=true has nothing to vary with arrival=trace; give concurrency or request_rate")
    if load.dataset not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        problems.append(f"dataset={load.dataset} is not known; use one of: {known}")
    elif load.dataset in FILE_DATASETS and not load.dataset_path:
        problems.append(f"dataset={load.dataset} needs a file; give dataset_path")
    if load.arrival == "trace" and load.dataset not in TIMED_DATASETS:
        timed = ", ".join(TIMED_DATASETS)
        problems.append(f"arrival=trace needs a dataset that says when; dataset={load.dataset} does not, use {timed}")
    if load.dataset_path and not Path(load.dataset_path).expanduser().is_file():
        problems.append(f"dataset_path={load.dataset_path} is not a file; give one, or leave it empty")
    return problems


def _check_arrivals(load: LoadConfig, need: Need) -> None:
    need(bool(load.concurrency), "concurrency", "names no load point; use a list such as [1,2,4]")
    need(all(c >= 1 for c in load.concurrency), "concurrency", "has a value below 1; use values of at least 1")
    rates_are_fine = all(0 < rate < math.inf for rate in load.request_rate)
    need(rates_are_fine, "request_rate", "has a value that is not above 0; use requests a second such as [0.5,2,8]")
    need(load.burstiness > 0, "burstiness", "must be above 0; 1 is poisson")
    need(load.max_concurrency >= 0, "max_concurrency", "is negative; use 0 for no cap")
    need(load.ramp_s >= 0, "ramp_s", "is negative; use 0 for none")
    need(load.speedup > 0, "speedup", "must be above 0; 1 is as recorded")
    need(load.duration_s > 0, "duration_s", "must be more than 0 seconds")
    need(load.num_requests >= 0, "num_requests", "is negative; use 0 to derive it from concurrency, or a number")
    need(load.min_requests >= 1, "min_requests", "must be at least 1")
    need(load.requests_per_slot >= 0, "requests_per_slot", "is negative; use 0 for min_requests at every point")
    need(load.warmup_requests >= -1, "warmup_requests", "must be 0 or more, or -1 for as many as concurrency")
    need(0 <= load.cancel_fraction <= 1, "cancel_fraction", "must be from 0 to 1")
    need(load.cancel_after_s > 0, "cancel_after_s", "must be more than 0 seconds")
    need(load.think_s >= 0, "think_s", "is negative; use 0 for none")


def _check_lengths(load: LoadConfig, need: Need) -> None:
    need(load.isl >= 1, "isl", "must be at least 1 token")
    need(load.osl >= 1, "osl", "must be at least 1 token")
    need(load.isl_stddev >= 0, "isl_stddev", "is negative; use 0 for a fixed length")
    need(load.osl_stddev >= 0, "osl_stddev", "is negative; use 0 for a fixed length")
    need(0 <= load.range_ratio < 1, "range_ratio", "must be from 0 to below 1")
    spread = load.range_ratio and (load.isl_stddev or load.osl_stddev)
    need(not spread, "range_ratio", "and isl_stddev or osl_stddev are two ways to say how lengths vary; use one")
    need(0 <= load.prefix_len < load.isl or load.prefix_len == 0, "prefix_len", f"must be below isl={load.isl}")
    need(load.num_prefixes >= 1, "num_prefixes", "must be at least 1")
    need(load.turns >= 1, "turns", "must be at least 1")
    chat = load.endpoint == "chat"
    need(load.turns == 1 or chat, "turns", "are messages of a conversation; use endpoint=chat, or turns=1")
    need(not load.image or chat, "image", "is part of a chat message; use endpoint=chat")
    need(not load.image or Path(load.image).expanduser().is_file(), "image", "is not a file")


def help_text() -> str:
    """Usage, and every key with its default and help."""
    lines = [USAGE]
    of_sweep = {field.name for field in dataclasses.fields(LoadConfig)}
    for field in sorted(dataclasses.fields(Options), key=lambda field: field.name in of_sweep):
        if field.name in SECTIONS:
            lines += ["", SECTIONS[field.name]]
        default = json.dumps(getattr(Options(), field.name), separators=(",", ":"))
        lines.append(f"  {field.name}={default}".ljust(38) + f"  {field.metadata['help']}")
    return "\n".join(lines)


def _check_own(options: Options) -> list[str]:
    from toolkit.loadgen.links import parse_address  # brings numpy, which a launcher's --help must not wait for

    problems = []
    url = urlsplit(options.url)
    if url.scheme not in ("http", "https") or not url.hostname:
        problems.append(f"url={options.url} is not an HTTP address; use for example http://127.0.0.1:8000")
    if options.num_gpus < 1:
        problems.append(f"num_gpus={options.num_gpus} must be at least 1")
    if options.api_key_env and not os.environ.get(options.api_key_env):
        problems.append(
            f"api_key_env={options.api_key_env} is not set in the environment; export it, or leave it empty"
        )
    if options.nodes > 1 and not options.listen:
        problems.append(f"nodes={options.nodes} needs an address where the other nodes join; give listen=HOST:PORT")
    if options.listen:
        try:
            parse_address(options.listen, "listen")
        except ValueError as error:
            problems.append(str(error))
    if options.out and Path(options.out).exists() and not Path(options.out).is_dir():
        problems.append(f"out={options.out} is a file; give a folder")
    if options.progress and not Path(options.progress).parent.is_dir():
        problems.append(f"progress={options.progress}: its folder does not exist; make it first")
    return problems


def _value(text: str, hint: Any) -> Any:
    """A word's value: JSON where it is JSON (1e3 is a number there), else YAML; text for a key that holds text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
    if hint is str or typing.get_origin(hint) is Literal:
        return value if isinstance(value, str) else text  # model=123 and model=null are names
    if hint in (list[int], list[float]) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    if hint == list[str] and isinstance(value, str):
        return [value]
    return value


def _way_out(hint: Any) -> str:
    """What to write instead, for a value of a wrong type."""
    if typing.get_origin(hint) is Literal:
        return f"; use one of: {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) is dict:
        return "; use a mapping such as '{name: value}'"
    examples = {int: "a whole number", float: "a number", bool: "true or false", list[int]: "a list such as [1,2,4]"}
    examples |= {list[float]: "a list such as [0.5,2]", list[str]: "a list such as [http://node7:8000/metrics]"}
    return f"; use {examples[hint]}" if hint in examples else ""
