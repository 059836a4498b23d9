"""What the fake server of `latency_server.py` answers: SGLang's and OpenAI's JSON, encoded in advance.

Every generation is the same 100 tokens: 99 pieces of text that end in `\\boxed{42}`, then end-of-sequence. All texts
and id lists that an answer can need, of 0 to 100 tokens, are encoded once here; an answer is a join of a dozen byte
strings. Key by key they are the answers of SGLang 0.5.20; of its facts about model and server these are a selection.
The tokenizer is as fake as the rest: a token a byte.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = "0.5.20"
MODEL = "fake"
CONTEXT = 32_768
CAPACITY = 2**24
MODEL_INFO = {
    "model_path": MODEL,
    "served_model_name": MODEL,
    "tokenizer_path": MODEL,
    "is_generation": True,
    "preferred_sampling_params": None,
    "weight_version": "default",
    "load_format": "auto",
    "reasoning_parser": None,
    "tool_call_parser": None,
    "has_image_understanding": False,
    "has_audio_understanding": False,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}
SERVER_INFO = {
    "model_path": MODEL,
    "served_model_name": MODEL,
    "tokenizer_path": MODEL,
    "version": VERSION,
    "context_length": None,
    "max_req_input_len": CONTEXT,
    "max_total_num_tokens": CAPACITY,
    "dtype": "float32",
    "device": "cpu",
    "tp_size": 1,
    "dp_size": 1,
    "stream_interval": 1,
    "skip_tokenizer_init": False,
    "enable_custom_logit_processor": False,
}
BOS, EOS = 1, 2
FIRST_BYTE = 50_000  # digits as in the ids of today's vocabularies: they are most of the bytes on the wire
FIRST_PIECE = 100_000
_WORDS = [" so", " we", " add", " 7", " and", " 12", ",", " then", " check", " that", " it", " holds", "."]
PIECES = [*itertools.islice(itertools.cycle(_WORDS), 96), " \\boxed{", "42", "}"]
IDS = [*range(FIRST_PIECE, FIRST_PIECE + len(PIECES)), EOS]
TOKENS = len(IDS)
LOGPROB = -0.25


def _escaped(text: str) -> bytes:
    return json.dumps(text).encode()[1:-1]


_PIECE = [*(_escaped(piece) for piece in PIECES), b""]
_TEXT = [_escaped("".join(PIECES[:k])) for k in range(TOKENS + 1)]
_OUTPUT_IDS = [",".join(map(str, IDS[:k])).encode() for k in range(TOKENS + 1)]
_HEAD = [b'{"text":"%b","output_ids":[%b],"meta_info":{"id":' % pair for pair in zip(_TEXT, _OUTPUT_IDS, strict=True)]
_LOGPROBS = [
    b'"input_token_logprobs":[],"output_token_logprobs":[%b],"output_token_logprobs_length":%d,'
    % (b",".join(b"[%r,%d,null]" % (LOGPROB, token) for token in IDS[:k]), k)
    for k in range(TOKENS + 1)
]
_ABORTED = b'{"type":"abort","message":"Aborted","status_code":null,"err_type":null}'

_ids = itertools.count(1)


def new_id() -> str:
    """An id as the server makes them, where the client chose none."""
    return f"{next(_ids):032x}"


@dataclass(slots=True, eq=False)
class Sample:
    """One running generation.

    Attributes:
        rid: its id, and `id_json` the same as JSON.
        index: its place in the answer; None where an answer holds one generation and no list.
        prompt_tokens: length of its prompt.
        limit: tokens after which it ends.
        model: the name that an OpenAI client asked for, as JSON.
        logprobs: whether log-probabilities were asked for.
        stopped: tokens it had when it was aborted.
        sent: tokens that were streamed.
    """

    rid: str
    index: int | None
    prompt_tokens: int
    limit: int = TOKENS
    model: bytes = b'"fake"'
    logprobs: bool = False
    stopped: int | None = None
    sent: int = 0
    id_json: bytes = b""

    def __post_init__(self) -> None:
        self.id_json = json.dumps(self.rid).encode()

    @property
    def end(self) -> int:
        """Tokens it will have had, or has had, when it ends."""
        return self.limit if self.stopped is None else self.stopped

    def following(self, interval: int) -> int:
        """Tokens at its next event."""
        return min(self.sent + interval if self.sent else 1, self.end)

    def reason(self, k: int) -> str | None:
        """Why it ended with `k` tokens; None where it has not."""
        if k < self.end:
            return None
        if self.stopped is not None:
            return "abort"
        return "stop" if k == TOKENS else "length"


def _weights(k: int) -> bytes:
    return b'{"version":"default","start":0,"end":%d}' % k


def native(sample: Sample, k: int, streaming: bool = False) -> bytes:
    """SGLang's answer, or the cumulative chunk of a stream, with `k` tokens."""
    reason = sample.reason(k)
    if reason is None:
        finish = b"null"
    elif reason == "stop":
        finish = b'{"type":"stop","matched":2}'
    elif reason == "length":
        finish = b'{"type":"length","length":%d}' % k
    else:
        finish = _ABORTED
    parts = [
        _HEAD[k],
        sample.id_json,
        b',"finish_reason":',
        finish,
        b',"prompt_tokens":%d,"weight_version":"default","num_retractions":0,' % sample.prompt_tokens,
        _LOGPROBS[k] if sample.logprobs else b"",
        b'"reasoning_tokens":0,"completion_tokens":%d,"cached_tokens":%d,' % (k, sample.prompt_tokens - 1),
    ]
    if reason is not None:
        parts.append(b'"weight_versions":[%b],' % _weights(k))
    parts.append(b'"cached_tokens_details":{"device":%d,"host":0},"dp_rank":null' % (sample.prompt_tokens - 1))
    if reason is not None:
        parts.append(b',"e2e_latency":0.205')
    if not (streaming and sample.sent):
        parts.append(b',"response_sent_to_client_ts":%.6f' % time.time())
    parts.append(b"}}" if sample.index is None or not streaming else b'},"index":%d}' % sample.index)
    return b"".join(parts)


def native_chunk(sample: Sample, k: int) -> bytes:
    """A stream's event."""
    return b"data: %b\n\n" % native(sample, k, streaming=True)


def _ending(reason: str | None) -> bytes:
    name = b"null" if reason is None else b'"%b"' % reason.encode()
    return b'"finish_reason":%b,"matched_stop":%b' % (name, b"2" if reason == "stop" else b"null")


def _opening(sample: Sample, kind: bytes) -> bytes:
    return b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
        sample.id_json,
        kind,
        time.time(),
        sample.model,
    )


def _usage(samples: Sequence[Sample], prompts: int, details: bytes = b"") -> bytes:
    prompt, completion = sum(s.prompt_tokens for s in samples[:prompts]), sum(s.end for s in samples)
    return b'"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,%b"reasoning_tokens":0}' % (
        prompt,
        prompt + completion,
        completion,
        details,
    )


@dataclass(frozen=True, slots=True)
class OpenAI:
    """The answers of one of OpenAI's two routes."""

    kind: bytes
    chunk_kind: bytes
    message: bytes
    delta: bytes
    role: bytes = b""
    last: bytes = b""

    def answer(self, samples: Sequence[Sample], prompts: int) -> bytes:
        """The whole answer."""
        choices = [
            b'{"index":%d,%b,"logprobs":null,%b}'
            % (s.index or 0, self.message % _TEXT[s.end], _ending(s.reason(s.end)))
            for s in samples
        ]
        usage = _usage(samples, prompts, b'"prompt_tokens_details":null,')
        return b'%b%b],%b,"metadata":{"weight_version":"default","weight_versions":[%b]}}' % (
            _opening(samples[0], self.kind),
            b",".join(choices),
            usage,
            _weights(samples[0].end),
        )

    def chunk(self, sample: Sample, k: int) -> bytes:
        """A stream's events from `sample.sent` to `k` tokens: a chat opens with its role and closes with its reason."""
        reason, text = sample.reason(k), b"".join(_PIECE[sample.sent : k])
        events = [(self.role, None)] if self.role and not sample.sent else []
        events.append((self.delta % text, None if self.last else reason))
        if self.last and reason is not None:
            events.append((self.last, reason))
        opening, index = _opening(sample, self.chunk_kind), sample.index or 0
        tail = b"" if self.last else b',"usage":null'
        return b"".join(
            b'data: %b{"index":%d,%b,"logprobs":null,%b}]%b}\n\n' % (opening, index, delta, _ending(why), tail)
            for delta, why in events
        )

    def usage_chunk(self, samples: Sequence[Sample], prompts: int) -> bytes:
        """The event that `stream_options.include_usage` asks for."""
        return b"data: %b],%b}\n\n" % (_opening(samples[0], self.chunk_kind), _usage(samples, prompts))


COMPLETIONS = OpenAI(b"text_completion", b"text_completion", b'"text":"%b"', b'"text":"%b"')
CHAT = OpenAI(
    b"chat.completion",
    b"chat.completion.chunk",
    b'"message":{"role":"assistant","content":"%b","reasoning_content":null,"tool_calls":null}',
    b'"delta":{"reasoning_content":null,"content":"%b"}',
    b'"delta":{"reasoning_content":null,"role":"assistant","content":""}',
    b'"delta":{"reasoning_content":null}',
)


def encode(text: str, special: bool = True) -> list[int]:
    """The fake tokenizer: a token a byte, after a beginning-of-sequence."""
    return [BOS] * special + [FIRST_BYTE + byte for byte in text.encode()]


def decode(ids: Sequence[int]) -> str:
    """The text of `ids`; special tokens have none."""
    pieces = {FIRST_PIECE + i: piece.encode() for i, piece in enumerate(PIECES)}
    byte = {FIRST_BYTE + value: bytes([value]) for value in range(256)}
    return b"".join(pieces.get(i) or byte.get(i, b"") for i in ids).decode(errors="replace")


def render(messages: Sequence[Mapping[str, Any]]) -> str:
    """The chat template."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"
