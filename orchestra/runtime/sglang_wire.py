"""SGLang's native API on the wire: what a request says, and what a stream of answers adds to its samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from orchestra.runtime.engine import Delta, Sampling
from orchestra.runtime.http import Fault, Refused, decode, raise_error
from orchestra.runtime.remote import Sample, steering

_INTEGER = frozenset({int})  # a bool is none
_ERROR = b'{"error":'
_UNFINISHED = b'"finish_reason":null'


LEAST_BIAS = -1e9  # bans a token: JSON has no minus infinity, and the server adds what it is sent to its logits


@lru_cache(maxsize=64)
def settings(sampling: Sampling) -> str:
    """The part of a body that is equal for all samples drawn alike; it ends inside `sampling_params`."""
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "ignore_eos": sampling.ignore_eos,
        "no_stop_trim": True,
        "skip_special_tokens": sampling.skip_special_tokens,
    }
    if sampling.top_k:
        params["top_k"] = sampling.top_k
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.stop_ids:
        params["stop_token_ids"] = list(sampling.stop_ids)
    if sampling.needs:
        params |= steering(sampling, least=LEAST_BIAS)
    asked = ""
    if _tells_logprobs(sampling):
        asked = '"return_logprob":true,'
        asked += f'"top_logprobs_num":{sampling.top_logprobs},' if sampling.top_logprobs else ""
    return f'{asked}"sampling_params":{json.dumps(params)[:-1]},'


class Reading:
    """One try of a call: where each of its samples is.

    Args:
        samples: in the order of the server's `index`.
        incremental: whether events hold what is new, or all so far.
    """

    __slots__ = ("_incremental", "_quiet", "_samples", "_seen", "_shown", "_unread")

    def __init__(self, samples: Sequence[Sample], incremental: bool) -> None:
        self._samples = list(samples)
        self._incremental = incremental
        self._quiet = samples[0].request.chunk == 0
        self._seen = [0] * len(samples)  # tokens
        self._shown = [0] * len(samples)  # characters
        self._unread: dict[int, bytes] = {}  # per sample, the last event that nobody has looked at

    def read(self, batch: list[bytes]) -> Iterator[tuple[Sample, Delta]]:
        """What a batch of events adds, sample by sample.

        Raises:
            Fault: it is damaged, or the server ended a generation for reasons of its own.
            Refused: the server does not want the request.
        """
        for index, event in self._worth_reading(batch):
            if not 0 <= index < len(self._samples):
                raise Fault(f"it sent sample {index} of {len(self._samples)}")
            if not self._samples[index].ended:
                yield from self._one(index, decode(event))

    def read_whole(self, answer: Any) -> Iterator[tuple[Sample, Delta]]:
        """What an answer says that was asked for whole. See `read`."""
        answers = answer if isinstance(answer, list) else [answer]
        if len(answers) != len(self._samples):
            raise Fault(f"it sent {len(answers)} samples, not {len(self._samples)}")
        for index, event in enumerate(answers):
            yield from self._one(index, event)

    def _one(self, index: int, event: Any) -> Iterator[tuple[Sample, Delta]]:
        sample = self._samples[index]
        delta, aborted = self._delta(index, event)
        self._unread.pop(index, None)
        yield sample, delta
        if aborted is not None and not sample.cancelled:
            why = f"aborted: {aborted.get('message')}"
            raise_error({"code": aborted.get("status_code") or 503, "message": why})

    def _worth_reading(self, batch: list[bytes]) -> Iterator[tuple[int, bytes]]:
        several = len(self._samples) > 1
        if self._incremental:
            for event in batch:
                yield _index(event) if several else 0, event
            return
        # Of what is cumulative only the last event counts; and if nobody watches, only the end.
        latest: dict[int, bytes] = {}
        for event in batch:
            if event.startswith(_ERROR):  # after what came before it
                yield from latest.items()
                raise_error(decode(event)["error"])
            index = _index(event) if several else 0
            if self._quiet and _UNFINISHED in event:
                self._unread[index] = event
            else:
                latest[index] = event
        yield from latest.items()

    def rest(self, sample: Sample) -> Delta | None:
        """What came of a sample and was not looked at; its end is not in it."""
        index = self._samples.index(sample)
        event = self._unread.pop(index, None)
        if event is None:
            return None
        try:
            delta, _ = self._delta(index, decode(event))
        except (Fault, Refused):
            return None
        return None if delta.finish_reason else delta

    def _delta(self, index: int, event: Any) -> tuple[Delta, Mapping[str, Any] | None]:
        """What an event adds to what this try has brought before; and the server's reason, if it aborted."""
        if isinstance(event, dict) and event.get("error"):
            raise_error(event["error"])
        sample = self._samples[index]
        try:
            meta, ids, text = event["meta_info"], event["output_ids"], event["text"]
            reason, count = meta["finish_reason"], meta["completion_tokens"]
            seen, shown = self._seen[index], self._shown[index]
            cumulative = len(ids) == count
            delta = Delta(ids[seen:] if cumulative else ids, count - seen, text[shown:] if cumulative else text)
            if not isinstance(ids, list) or not _INTEGER.issuperset((type(count), *map(type, delta.tokens))):
                raise TypeError
            if len(delta.tokens) != delta.count or not isinstance(delta.text, str):
                raise ValueError
            self._seen[index] = count
            self._shown[index] = len(text) if cumulative else shown + len(text)
            sampling = sample.request.sampling
            if delta.count and (_tells_logprobs(sampling) or "output_token_logprobs" in meta):
                _add_logprobs(delta, meta, sampling)
            if delta.count and not sample.count and not seen:  # told with every event
                delta.cached_tokens = int(meta.get("cached_tokens") or 0)
            if reason is None:
                return delta, None
            kind, matched = reason["type"], reason.get("matched")
            if kind == "abort":
                delta.finish_reason = "cancelled" if sample.cancelled else None
                return delta, reason
            delta.finish_reason = {"stop": "stop", "length": "length"}[kind]
            if isinstance(matched, int) and matched not in sample.request.sampling.stop_ids:
                delta.eos = True
            elif kind == "stop":
                delta.matched = matched
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise Fault(f"it sent an answer of another shape: {str(event)[:80]}") from error
        return delta, None


def _tells_logprobs(sampling: Sampling) -> bool:
    """Whether the server is asked for log-probabilities with the tokens.

    Not if it changes the logits: what it told would not be the model's own, and a grammar that it refuses in a request
    that asks for them ends the server (0.5.20).
    """
    return (sampling.logprobs or sampling.top_logprobs > 0) and not sampling.needs


def _add_logprobs(delta: Delta, meta: Mapping[str, Any], sampling: Sampling) -> None:
    """Log-probabilities of the new tokens, as the server reports them."""
    entries = meta["output_token_logprobs"]
    if len(entries) < delta.count:
        raise ValueError
    delta.logprobs = [number(entry[0]) for entry in entries[len(entries) - delta.count :]]
    if sampling.temperature:
        delta.tempered = list(delta.logprobs)
    if sampling.top_logprobs:
        tops = meta["output_top_logprobs"]
        if len(tops) < delta.count:
            raise ValueError
        delta.top = [alternatives(top) for top in tops[len(tops) - delta.count :]]


def alternatives(entries: Iterable[Sequence[Any]]) -> Mapping[int, float]:
    """One position's `[logprob, id, text]` triples as `{id: logprob}`."""
    return {entry[1]: number(entry[0]) for entry in entries}


def number(logprob: float | None) -> float:
    """A log-probability; minus infinity is null in JSON."""
    return -math.inf if logprob is None else float(logprob)


def _index(event: bytes) -> int:
    """Which sample an event is about: `"index":7}` ends it, on all servers seen; else it is looked for properly."""
    tail = event[event.rfind(b":") + 1 : -1]
    if tail.isdigit() and event.endswith(b'"index":' + tail + b"}"):
        return int(tail)
    found = decode(event)
    if isinstance(found, dict) and found.get("error"):
        raise_error(found["error"])
    try:
        return int(found["index"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Fault("it sent a sample without its index") from error
