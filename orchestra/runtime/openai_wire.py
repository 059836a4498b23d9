"""OpenAI's completions and chat APIs on the wire: what answers, whole or streamed, add to their samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestra.runtime.engine import Delta
from orchestra.runtime.http import Fault, raise_error
from orchestra.runtime.remote import Sample

_INTEGER = frozenset({int})  # a bool is none
_THINK, _SOLVE = "<think>\n", "\n</think>\n\n"


class Reading:
    """One try of a call: where each of its samples is.

    Where the server tells no token ids, a chunk counts as one token until its `usage` says how many there were.

    Args:
        samples: in the order of the server's `index`.
        stops: stop strings to look for here, for servers that would neither leave them in the text nor say which it
            was.
    """

    def __init__(self, samples: Sequence[Sample], stops: Sequence[str] = ()) -> None:
        self._samples = list(samples)
        self._stops = stops
        self._before = max(map(len, stops), default=1) - 1
        self._began = [sample.count for sample in samples]
        self._thinking = [False] * len(samples)
        self._ends: dict[int, Delta] = {}
        self._usage: Mapping[str, Any] = {}

    def read(self, event: Any) -> Iterator[tuple[Sample, Delta]]:
        """What an answer, or an event of its stream, adds.

        Raises:
            Fault: it is damaged, or the server ended a generation for reasons of its own.
            Refused: the server does not want the request.
        """
        if isinstance(event, dict) and event.get("error"):
            raise_error(event["error"])
        try:
            self._usage = event.get("usage") or self._usage
            choices = event["choices"]
            for choice in choices:
                index = choice["index"]
                if not 0 <= index < len(self._samples):
                    raise IndexError
                sample = self._samples[index]
                if sample.ended or index in self._ends:
                    continue
                delta = self._delta(index, sample, choice)
                if self._stops and self._stopped(sample, delta):
                    yield sample, delta
                    continue
                reason = choice.get("finish_reason")
                if reason is None:
                    yield sample, delta
                    continue
                if reason == "abort":
                    yield sample, delta
                    if not sample.cancelled:
                        raise_error({"code": 503, "message": "aborted by the server"})
                    reason = "cancelled"
                    delta = Delta()
                matched = choice.get("matched_stop", choice.get("stop_reason"))
                self._end(sample, delta, reason, matched)
                if reason == "cancelled":
                    yield sample, delta
                else:
                    self._ends[index] = delta  # what it cost is told after it
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise Fault(f"it sent an answer of another shape: {str(event)[:80]}") from error

    def ends(self) -> Iterator[tuple[Sample, Delta]]:
        """The ends of samples that have been told; to be asked for when no more will come."""
        ends, self._ends = self._ends, {}
        total, cached = self._told("completion_tokens"), self._told("prompt_tokens_details", "cached_tokens")
        for index, delta in ends.items():
            sample = self._samples[index]
            if total is not None and len(self._samples) == 1 and not (delta.tokens or sample.tokens):
                # A text is at least one token, whatever the server counts.
                delta.count = max(int(bool(delta.text)), total - (sample.count - self._began[index]))
            if index == 0 and not self._began[0]:
                delta.cached_tokens = cached or 0
            yield sample, delta

    def _told(self, *path: str) -> int | None:
        """A number in the usage."""
        found: Any = self._usage
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, int) else None

    def _delta(self, index: int, sample: Sample, choice: Mapping[str, Any]) -> Delta:
        said = choice.get("message") or choice.get("delta")
        text = choice.get("text") or "" if said is None else self._channels(index, said)
        ids = choice.get("token_ids") or []
        delta = Delta(list(ids), len(ids) or int(bool(text)), text)
        if not isinstance(text, str):
            raise TypeError
        if not _INTEGER.issuperset(map(type, ids)):
            raise ValueError
        logprobs = choice.get("logprobs")
        if logprobs and sample.request.sampling.logprobs:
            delta.logprobs = [float(value) for value in logprobs["token_logprobs"]]
            if len(delta.logprobs) != delta.count:
                raise ValueError
        return delta

    def _stopped(self, sample: Sample, delta: Delta) -> bool:
        """End a delta at the first stop string that it completes."""
        tail = sample.text[-self._before :] if self._before else ""
        text = tail + delta.text
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not ends:
            return False
        end, _, delta.matched = min(ends)
        delta.text = text[len(tail) : end]
        delta.finish_reason = "stop"
        return True

    def _channels(self, index: int, said: Mapping[str, Any]) -> str:
        """Reasoning and solution as one text, in the tags that the rest of the program knows."""
        thinking = said.get("reasoning_content") or said.get("reasoning") or ""
        content = said.get("content") or ""
        text = ""
        if thinking:
            text += ("" if self._thinking[index] else _THINK) + thinking
            self._thinking[index] = True
        if content and self._thinking[index]:
            text += _SOLVE
            self._thinking[index] = False
        return text + content

    @staticmethod
    def _end(sample: Sample, delta: Delta, reason: str, matched: object) -> None:
        sampling = sample.request.sampling
        delta.finish_reason = reason if reason in ("length", "cancelled") else "stop"
        if delta.finish_reason != "stop":
            return
        if isinstance(matched, str) or (isinstance(matched, int) and matched in sampling.stop_ids):
            delta.matched = matched
        else:
            delta.eos = bool(delta.tokens or sample.tokens)  # else nobody knows whether it was counted
