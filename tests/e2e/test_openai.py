"""OpenAI's own client against the real engine: answers, streams, options, errors as its exceptions, cancellation."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.serving import Served, serve
from tests.e2e.test_server import gauge, post, wait_for, wait_idle

PARALLEL = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}
ENGINE = {"max_total_tokens": 1024, "max_running_requests": 16, "chunked_prefill_size": 48}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("openai") / "run", parallel=PARALLEL, engine=ENGINE) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: OpenAI) -> str:
    (only,) = client.models.list().data
    return only.id


def text(client: OpenAI, model: str, prompt: str | list[int], **options: object) -> str:
    fields: dict[str, object] = {"max_tokens": 10, "temperature": 0} | options
    return str(client.completions.create(model=model, prompt=prompt, **fields).choices[0].text)  # type: ignore[call-overload]


def test_chat_whole_and_streamed_say_the_same(client: OpenAI, model: str) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(
        client.chat.completions.create(
            model=model, messages=messages, max_completion_tokens=12, temperature=0, stream=True,  # type: ignore[arg-type]
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_choices_share_the_prompt_and_each_has_a_seed(client: OpenAI, model: str, served: Served) -> None:
    post(served, "/flush_cache", {})
    prompt = "a prompt of forty-eight characters, three blocks!"
    computed, cached = gauge(served, "wideep:prompt_tokens_total"), gauge(served, "wideep:cached_tokens_total")
    options = {"max_tokens": 8, "temperature": 1.0, "seed": 11, "extra_body": {"ignore_eos": True}}
    many = client.completions.create(model=model, prompt=prompt, n=4, **options)  # type: ignore[call-overload]
    wait_idle(served)
    assert gauge(served, "wideep:prompt_tokens_total") - computed == 4 * len(prompt)
    assert gauge(served, "wideep:cached_tokens_total") - cached == 3 * 48
    texts = [choice.text for choice in many.choices]
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3] and len(set(texts)) == 4
    assert many.usage.completion_tokens == 32 and many.usage.prompt_tokens == len(prompt)
    for i, expected in enumerate(texts):
        assert text(client, model, prompt, **{**options, "seed": 11 + i}) == expected
    streamed = [""] * 4
    for chunk in client.completions.create(model=model, prompt=prompt, n=4, stream=True, **options):  # type: ignore[call-overload]
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_logprobs_of_a_chat(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 6
    for entry in logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob < 0  # greedy: the most likely of all
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
        assert sum(math.exp(t.logprob) for t in entry.top_logprobs) <= 1


def test_echo_scores_a_prompt_as_generation_scored_it(client: OpenAI, model: str, served: Served) -> None:
    """Tokens of an answer, sent back as a prompt: chunked prefill gives the logprobs that decoding gave."""
    prompt = [(7 * i) % 120 for i in range(90)]
    options = {"temperature": 0.8, "seed": 3, "logprobs": 2, "extra_body": {"logit_bias": {"0": -100}}}
    first = client.completions.create(model=model, prompt=prompt, max_tokens=20, echo=True, **options)  # type: ignore[call-overload]
    scores = first.choices[0].logprobs
    assert scores.token_logprobs[0] is None and len(scores.token_logprobs) == 110
    assert all(logprob < 0 for logprob in scores.token_logprobs[1:])
    plain = client.completions.create(model=model, prompt=prompt, max_tokens=20, **options)  # type: ignore[call-overload]
    assert plain.choices[0].logprobs.token_logprobs == pytest.approx(scores.token_logprobs[90:], abs=1e-4)
    assert first.choices[0].text.endswith(plain.choices[0].text)
    # The byte tokens of one line of text, so that it can be sent back.
    line = "what was said, and then what was said after it " * 3
    for max_tokens in (0, 1):
        again = client.completions.create(model=model, prompt=line, max_tokens=max_tokens, echo=True, logprobs=1)
        got = again.choices[0].logprobs
        assert got is not None and got.token_logprobs is not None and got.tokens is not None
        assert "".join(got.tokens[: len(line)]) == line and len(got.tokens) == len(line) + max_tokens
    alone = [
        client.completions.create(model=model, prompt=line[:end], max_tokens=1, temperature=0, logprobs=0,
                                  logit_bias={str(ord(line[end])): 100}).choices[0].logprobs
        for end in (1, 47, 48, 49, 100)
    ]  # fmt: skip
    assert got.token_logprobs is not None
    for end, forced in zip((1, 47, 48, 49, 100), alone):
        assert forced is not None and forced.token_logprobs is not None
        assert forced.token_logprobs[0] == pytest.approx(got.token_logprobs[end], abs=1e-4)


def test_stop_strings_stop_tokens_and_min_tokens(client: OpenAI, model: str) -> None:
    free = text(client, model, "count", max_tokens=30, temperature=1.0, seed=5)
    cut = free[6:9]
    answer = client.completions.create(model=model, prompt="count", max_tokens=30, temperature=1.0, seed=5, stop=cut)
    assert answer.choices[0].text == free[: free.index(cut)] and answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="stop_token_ids holds token id 512"):
        client.completions.create(model=model, prompt="x", extra_body={"stop_token_ids": [512]})
    probable = range(64, 128)

    def count(min_tokens: int) -> int:
        """Tokens of an answer that would end with its first token, if it may."""
        bias = {str(token): 50 for token in probable}
        body = {"stop_token_ids": list(probable), "min_tokens": min_tokens}
        usage = client.completions.create(
            model=model, prompt="x", max_tokens=9, temperature=0, logit_bias=bias, extra_body=body
        ).usage
        assert usage is not None
        return usage.completion_tokens

    assert [count(0), count(1), count(4)] == [1, 2, 5]


def test_penalties_keep_tokens_from_coming_back(client: OpenAI, model: str) -> None:
    body = {"ignore_eos": True}
    biased = {str(token): 5 for token in range(97, 123)}

    def letters(**options: object) -> str:
        return text(client, model, "aa", max_tokens=20, logit_bias=biased, extra_body=body, **options)

    assert len(set(letters(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(letters()))


def test_a_seed_means_the_same_on_both_ranks_and_among_others(client: OpenAI, model: str) -> None:
    options = {"temperature": 1.0, "seed": 17, "max_tokens": 12, "extra_body": {"top_k": 40, "min_p": 0.001}}
    texts = {text(client, model, "seeded", **options) for _ in range(4)}  # round robin: both DP ranks
    others = [text(client, model, f"other {i}", **options) for i in range(2)]
    batch = client.completions.create(model=model, prompt="seeded", n=6, **options)  # type: ignore[call-overload]
    assert texts == {batch.choices[0].text} and not texts & set(others)


def test_a_seed_means_the_same_under_another_mapping(
    client: OpenAI, model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Attention DP with all-to-all there, here tensor parallel attention, and another batch and chunking."""
    mapping = {"tp_size": 2, "ep_size": 2}
    engine = {
        "moe_a2a_backend": "allgather",
        "chunked_prefill_size": 16,
        "max_running_requests": 16,
        "max_total_tokens": 1024,
    }
    options = {"temperature": 0.9, "max_tokens": 16, "n": 4, "extra_body": {"top_k": 100, "repetition_penalty": 1.1}}
    with (
        serve(tmp_path_factory.mktemp("other") / "run", parallel=mapping, engine=engine) as served,
        OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as other,
    ):
        for seed in (1, 100, 2**40):
            answers = [
                made.completions.create(model=model, prompt="the same text " * 3, seed=seed, **options)  # type: ignore[call-overload]
                for made in (client, other)
            ]
            first, second = ([choice.text for choice in answer.choices] for answer in answers)
            assert first == second and len(set(first)) == 4


def test_refusals_are_the_clients_exceptions(client: OpenAI, model: str, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=model, prompt="x", temperature=7)
    assert bad.value.param == "temperature" and bad.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="x")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=model, prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="is not served here"):
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}
        )
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model=model, prompt="x", max_tokens=900, extra_body={"ignore_eos": True}
        )
    wait_idle(served)
    assert text(client, model, "still there") is not None


def test_closing_a_stream_and_cancelling_a_task_free_their_places(client: OpenAI, model: str, served: Served) -> None:
    long = {"max_tokens": 900, "extra_body": {"ignore_eos": True}, "n": 3}
    with client.completions.create(model=model, prompt="x", stream=True, **long) as stream:  # type: ignore[call-overload]
        assert next(iter(stream)).choices
        wait_for(lambda: gauge(served, "wideep:num_running_reqs") == 3, "the choices are not running")
    wait_idle(served)

    async def cancelled() -> None:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as other:
            task = asyncio.create_task(other.completions.create(model=model, prompt="x", **long))  # type: ignore[call-overload]
            running = lambda: gauge(served, "wideep:num_running_reqs") == 3  # noqa: E731
            await asyncio.to_thread(wait_for, running, "the choices are not running")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    wait_idle(served)
    assert gauge(served, "wideep:num_open_reqs") == 0 and gauge(served, "wideep:kv_used_tokens") == 0
