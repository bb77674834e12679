"""Sampling: logits to tokens and logprobs, for all requests of a step at once.

Order, as in transformers: penalties, bias, minimum length; then temperature, top-k, top-p, min-p; then one draw. All
randomness is a function of the request's seed, the token's position and the token's id, so that a seed gives the same
text in any batch, on any rank, under any mapping. Knows requests, but neither scheduler nor model.

N: requests that sample in this step, P: those with penalties, M: those that draw, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor

from toolkit.engine.core import Request, SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5  # a temperature below it is 0: logits divided by it may not be finite


@dataclass(frozen=True)
class Sampled:
    """What a step chose: a token for each request, and logprobs by request id where they were asked for."""

    tokens: list[int]
    logprobs: dict[str, TokenLogprobs]


class Chosen:
    """Tokens [N] on the device, and what is asked about them.

    ``report`` gives the result once the tokens are on the host.
    """

    def __init__(self, tokens_N: Tensor, logits_NV: Tensor, requests: Sequence[Request]) -> None:
        self.tokens_N = tokens_N
        self._asking = [
            (i, r.rid, r.sampling.logprobs) for i, r in enumerate(requests) if r.sampling.logprobs is not None
        ]
        self._logits = logits_NV[[i for i, _, _ in self._asking]] if self._asking else None

    def report(self, tokens: list[int]) -> Sampled:
        if self._logits is None:
            return Sampled(tokens, {})
        chosen, tops = [tokens[i] for i, _, _ in self._asking], [top for _, _, top in self._asking]
        entries = token_logprobs(self._logits, chosen, tops)
        return Sampled(tokens, {rid: entry for (_, rid, _), entry in zip(self._asking, entries)})


class Sampler:
    """One rank's sampler. What it remembers of a request (for penalties) goes when the request goes."""

    def __init__(self) -> None:
        self._histories: WeakKeyDictionary[Request, _History] = WeakKeyDictionary()

    def __call__(self, logits_NV: Tensor, requests: Sequence[Request]) -> Sampled:
        chosen = self.choose(logits_NV, requests)
        return chosen.report(chosen.tokens_N.tolist())

    def choose(self, logits_NV: Tensor, requests: Sequence[Request], greedy_N: Tensor | None = None) -> Chosen:
        """A token for each request, without waiting for the device.

        Args:
            logits_NV: in any type; converted to float32 only where somebody needs more than the most likely token.
            greedy_N: the most likely tokens, where they are known already.
        """
        if greedy_N is not None and not any(_looks_at_logits(r.sampling) for r in requests):
            return Chosen(greedy_N, logits_NV, requests)
        logits_NV = logits_NV.float()
        scores = self.scores(logits_NV, requests)
        drawing = [i for i, r in enumerate(requests) if r.sampling.temperature >= GREEDY_BELOW]
        tokens = greedy_N if greedy_N is not None and scores is logits_NV else scores.argmax(-1)
        if drawing:
            drawn = [requests[i] for i in drawing]
            rows = _index(drawing, scores.device)
            kept = warp(scores[rows], [r.sampling for r in drawn])
            noise = gumbel([(r.sampling.seed, r.num_output) for r in drawn], kept.shape[1], kept.device)
            tokens = tokens.index_copy(0, rows, (kept + noise).argmax(-1).to(tokens.dtype))
        return Chosen(tokens, logits_NV, requests)

    def scores(self, logits_NV: Tensor, requests: Sequence[Request]) -> Tensor:
        """Logits after penalties, bias and minimum length [N, V]; the argument itself where nobody asked for any."""
        params = [r.sampling for r in requests]
        penalised = [i for i, p in enumerate(params) if _has_penalties(p)]
        biases = [(i, token, bias) for i, p in enumerate(params) for token, bias in p.logit_bias.items()]
        barred = [
            (i, token) for i, r in enumerate(requests) if r.num_output < r.sampling.min_tokens
            for token in r.sampling.stop_token_ids
        ]  # fmt: skip
        if not (penalised or biases or barred):
            return logits_NV
        scores, device = logits_NV.clone(), logits_NV.device
        if penalised:
            scores[penalised] = self._penalise(scores[penalised], [requests[i] for i in penalised])
        if biases:
            rows, tokens, values = zip(*biases)
            index = (_index(rows, device), _index(tokens, device))
            scores.index_put_(index, _moved(values, scores.dtype, device), accumulate=True)
        if barred:
            rows, tokens = zip(*barred)
            scores.index_put_((_index(rows, device), _index(tokens, device)), scores.new_full((), -torch.inf))
        return scores

    def _penalise(self, scores_PV: Tensor, requests: Sequence[Request]) -> Tensor:
        """Repetition: Keskar et al. 2019 (arXiv 1909.05858). Presence and frequency: OpenAI's API reference."""
        histories = [self._history(r, scores_PV) for r in requests]
        counts = torch.stack([h.output_counts_V for h in histories])
        present = counts > 0
        seen = present | torch.stack([h.in_prompt_V for h in histories])
        params = [r.sampling for r in requests]
        repetition = _column([p.repetition_penalty for p in params], scores_PV)
        divided = torch.where(scores_PV > 0, scores_PV / repetition, scores_PV * repetition)
        scores_PV = torch.where(seen, divided, scores_PV)
        scores_PV = scores_PV - _column([p.frequency_penalty for p in params], scores_PV) * counts
        return scores_PV - _column([p.presence_penalty for p in params], scores_PV) * present

    def _history(self, request: Request, like: Tensor) -> _History:
        """The request's token counts, brought up to date: a step costs its new tokens only."""
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = _History.of_prompt(request, like.shape[1], like.device)
        history.take(request)
        return history


@dataclass
class _History:
    """Which tokens the prompt holds, and how often the output holds each."""

    in_prompt_V: Tensor
    output_counts_V: Tensor
    taken: int  # tokens of the request that are counted

    @classmethod
    def of_prompt(cls, request: Request, vocab_size: int, device: torch.device) -> _History:
        in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        in_prompt[torch.tensor(request.tokens[: request.prompt_len], device=device)] = True
        return cls(in_prompt, torch.zeros(vocab_size, dtype=torch.int32, device=device), request.prompt_len)

    def take(self, request: Request) -> None:
        new = torch.tensor(request.tokens[self.taken :], dtype=torch.long, device=self.in_prompt_V.device)
        self.output_counts_V.index_add_(0, new, torch.ones_like(new, dtype=torch.int32))
        self.taken = len(request.tokens)


def warp(scores_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores over temperature [M, V] float64; -inf where top-k, top-p or min-p rule a token out. One token stays."""
    scaled = scores_MV.double() / _column([p.temperature for p in params], scores_MV)
    limited = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p > 0]
    if limited:
        rows = _index(limited, scaled.device)
        scaled = scaled.index_copy(0, rows, _truncate(scaled[rows], [params[i] for i in limited]))
    return scaled


def _truncate(scaled_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    vocab = scaled_MV.shape[1]
    ordered, ids = scaled_MV.sort(descending=True, stable=True)
    top_k = _column([p.top_k or vocab for p in params], ordered)
    # top_p=1 keeps every token, also those that rounding puts beyond a mass of 1
    top_p = _column([p.top_p if p.top_p < 1 else torch.inf for p in params], ordered)
    keep = torch.arange(vocab, device=ordered.device) < top_k
    probs = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    keep &= probs.cumsum(-1) - probs < top_p  # the smallest set of best tokens whose mass reaches top_p
    keep &= probs >= _column([p.min_p for p in params], ordered) * probs[:, :1]
    keep[:, 0] = True
    return scaled_MV.masked_fill(~torch.zeros_like(keep).scatter(1, ids, keep), -torch.inf)


def gumbel(keys: Sequence[tuple[int, int]], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [M, V], a function of (seed, position) and token id alone.

    The largest of log-probability + noise is a draw from the distribution (Gumbel-max). Against drawing from the
    cumulative distribution it needs no order of the tokens, so that rounding, which differs between batches and
    mappings, changes a draw only where two tokens nearly tie. The noise is a counter through SplitMix64 (Steele,
    Lea and Flood 2014): integer arithmetic, equal on every device.
    """
    digests = [xxhash.xxh3_64_digest(f"{seed}/{position}".encode()) for seed, position in keys]
    key = _moved([int.from_bytes(d, "big", signed=True) for d in digests], torch.int64, device)[:, None]
    x = key + torch.arange(vocab_size, device=device) * _signed(0x9E3779B97F4A7C15)
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    x.bitwise_xor_(_shift(x, 31))
    uniform = _shift(x, 12).double().add_(0.5).div_(2**52)  # inside (0, 1), exactly
    return uniform.log_().neg_().log_().neg_()


def token_logprobs(logits_NV: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probability of each row's token, and the row's ``tops[n]`` most likely tokens, best first."""
    logprobs = logits_NV.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    best, ids = logprobs.topk(min(max(tops), logprobs.shape[1]), dim=-1)
    rows = zip(chosen, ids.tolist(), best.tolist(), tops)
    return [TokenLogprobs(logprob, top_ids[:top], top_logprobs[:top]) for logprob, top_ids, top_logprobs, top in rows]


def _looks_at_logits(p: SamplingParams) -> bool:
    """Whether more is asked for than the most likely token."""
    return (
        p.temperature >= GREEDY_BELOW
        or _has_penalties(p)
        or bool(p.logit_bias)
        or p.min_tokens > 0
        or p.logprobs is not None
    )


def _has_penalties(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value a request, to be broadcast over the vocabulary."""
    return _moved(values, like.dtype, like.device)[:, None]


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    return _moved(rows, torch.int64, device)


def _moved(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n] on the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant
