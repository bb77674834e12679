"""Datasets: where requests come from. The protocol, and the table of known ones.

A dataset is an endless sequence of samples whose order depends on the seed only. It knows nothing of HTTP or of when
its samples are sent. To add one: a module here, and an entry in ``DATASETS`` that imports it when it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from toolkit.config.load import LoadConfig
from toolkit.registry import Registry


@dataclass(frozen=True)
class Sample:
    """One conversation or one text to continue; exactly one of ``messages`` and ``prompt`` is given.

    Attributes:
        id: names it in requests.parquet (``prompt_id``).
        messages: OpenAI chat messages, each with ``role`` and ``content``.
        prompt: plain text.
        output_tokens: length of the answer to ask for; 0: as the sweep's ``osl`` says.
        at_s: when a trace sent it, seconds after its begin; -1: no trace.
        session: names the conversation it is a turn of; its ``messages`` are only what this turn adds.
        more_turns: the next sample continues this conversation.
        think_s: pause before this turn.
    """

    id: str
    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    output_tokens: int = 0
    at_s: float = -1.0
    session: str = ""
    more_turns: bool = False
    think_s: float = 0.0

    def as_messages(self) -> list[dict[str, Any]]:
        """For the chat endpoint: a plain text becomes one message of the user."""
        return list(self.messages) or [{"role": "user", "content": self.prompt}]

    def as_prompt(self) -> str:
        """For the completions endpoint: the messages' texts, separated by empty lines, without any template."""
        return self.prompt or "\n\n".join(str(message["content"]) for message in self.messages)


class Dataset(Protocol):
    """Samples without end. Raises ``ValueError`` when it is made, not later, if its file is not usable."""

    def __iter__(self) -> Iterator[Sample]: ...


DatasetFactory = Callable[[LoadConfig, str], Dataset]
"""(the sweep's options, tokenizer: a folder, ``bytes`` or empty) -> dataset."""

DATASETS: Registry[DatasetFactory] = Registry("dataset")
TIMED_DATASETS = ("mooncake", "azure", "burstgpt", "trace")
"""Those that say when a request was sent: ``arrival=trace`` replays them; other arrivals repeat them without end."""
FILE_DATASETS = ("sharegpt", *TIMED_DATASETS)
"""Those that need ``dataset_path``."""


@DATASETS.register("prompts")
def _prompts(load: LoadConfig, tokenizer: str) -> Dataset:
    from toolkit.loadgen.datasets.prompts import BUNDLED, Prompts

    return Prompts(load.dataset_path or BUNDLED, load.seed)


@DATASETS.register("random")
def _random(load: LoadConfig, tokenizer: str) -> Dataset:
    from toolkit.loadgen.datasets.random import RandomText

    return RandomText(load, tokenizer)


@DATASETS.register("sharegpt")
def _sharegpt(load: LoadConfig, tokenizer: str) -> Dataset:
    from toolkit.loadgen.datasets.sharegpt import ShareGPT

    return ShareGPT(load, tokenizer)


def _trace(load: LoadConfig, tokenizer: str) -> Dataset:
    from toolkit.loadgen.datasets.traces import Trace

    return Trace(load, tokenizer)


for _name in TIMED_DATASETS:
    DATASETS.register(_name)(_trace)
