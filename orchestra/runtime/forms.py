"""The forms of engine URLs, as `orchestra engines` explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineForm:
    """One form of engine URL, as `orchestra engines` explains it.

    Attributes:
        url: its form.
        about: what it is.
        can: what strategies may ask of it.
        parameters: its query parameters and what they mean.
        limited: whether the parameters of `Limits` are its own too.
    """

    url: str
    about: str
    can: str
    parameters: Mapping[str, str]
    limited: bool = False


_SAMPLES = "most samples of one request (256); `off` sends each by itself"
_PROCESS = {
    "max_batch": "most generations decoded at once",
    "prefill": "most prompt tokens computed in one step",
    "memory": "most bytes of keys and values; generations wait, or give way, before there are more",
    "prefix_cache": "bytes of keys and values that ended runs may leave for prompts that begin like theirs (0)",
    "kernel": "auto, or reference (slow, the oracle)",
    "forward": "auto, or transformers (the model's own, where a faster one is known to give the same)",
    "dtype": "float32, bfloat16 or float16",
    "device": "cpu, cuda, cuda:1, ...",
}
_WITH_KEY = "a file with the API key; else it is taken from the environment:"
_TOKENS = "continue, cut, logprobs, score"
_STEER = "penalties, logit_bias, grammar"
_ALL = f"{_TOKENS}, top_logprobs, {_STEER}, seed, reuse_join, concurrent_cache, lock_step, tempered, streams"
ENGINES: tuple[EngineForm, ...] = (
    EngineForm(
        "demo",
        "The embedded model, in process: no download, no GPU. It speaks Countdown and little else.",
        _ALL,
        {},
    ),
    EngineForm(
        "local:PATH_OR_ID?dtype=bfloat16&device=cuda",
        "In-process PyTorch on a Hugging Face causal model; shared prefixes are stored and read once.",
        _ALL,
        {
            "adapter": "folder of a PEFT adapter to merge into the model; PATH may also be an adapter itself",
            "streams": "folders of ParScale checkpoints on this model, as in DIR,DIR: further numbers of streams",
            **_PROCESS,
        },
    ),
    EngineForm(
        "sglang://HOST:PORT",
        "A running SGLang server, or several behind its router. Token ids in and out.",
        f"{_TOKENS}, top_logprobs, {_STEER}",
        {
            "model": "what it must serve, as a check",
            "n": _SAMPLES,
            "interval": "tokens between two chunks of a watched stream (1 where streams are incremental)",
            "tokenizer": "folder or id of a tokenizer to use here, with its chat template; else the server encodes",
            "key_file": f"{_WITH_KEY} SGLANG_API_KEY",
        },
        limited=True,
    ),
    EngineForm(
        "sglang:PATH_OR_ID?tp=2",
        "Starts an SGLang server here and ends it with the connection; sglang:demo serves the embedded model.",
        f"{_TOKENS}, top_logprobs, {_STEER}",
        {
            "tp, dp, pp, ep": "tensor, data, pipeline and expert parallelism",
            "dtype, quantization, context_length, ...": "flags of the server, with underscores",
            "n, interval, tokenizer": "as above",
        },
        limited=True,
    ),
    EngineForm(
        "openai://HOST:PORT/v1?model=NAME",
        "Any OpenAI-compatible server; openais:// for TLS. Chat for messages, completions for text.",
        f"{_STEER}; SGLang and vLLM: {_TOKENS}; others: continue, for text prompts where there are completions",
        {
            "model": "which of its models; may be left away when there is one",
            "api": "auto, chat or completions",
            "n": _SAMPLES + "; only where token ids are told",
            "continue": "on: its chat API knows continue_final_message",
            "key_file": f"{_WITH_KEY} OPENAI_API_KEY",
        },
        limited=True,
    ),
    EngineForm(
        "replay:FILE.jsonl?rate=50",
        "Recorded samples (samples.jsonl of `orchestra eval`) on a simulated clock: strategies judged without a model.",
        "independent whole samples, nothing else",
        {"rate": "tokens a second of each generation"},
    ),
)
