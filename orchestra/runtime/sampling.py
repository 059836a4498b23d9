"""What a generation may ask for: how to draw tokens, when to stop, and which capabilities of an engine that takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orchestra.errors import UsageError

_BOTH = "a generation follows a json_schema or a regex, not both"


class Capability(StrEnum):
    """What an engine can do beyond generating text from a prompt."""

    CONTINUE = "continue"  # go on after any text the orchestrator wrote
    LOGPROBS = "logprobs"  # raw log-probabilities of sampled tokens
    TOP_LOGPROBS = "top_logprobs"  # and of the most likely alternatives
    SCORE = "score"  # log-probabilities of given text
    TEMPERED = "tempered"  # log-probabilities of sampled tokens under the law that they were drawn from
    LOCK_STEP = "lock_step"  # generations that advance together, seen and stopped between two steps; powers
    SEED = "seed"  # sampling is a function of (seed, fork path, position)
    CUT = "cut"  # a thread may leave a node in the middle
    REUSE_JOIN = "reuse_join"  # branches become context of one node, nothing is recomputed
    CONCURRENT_CACHE = "concurrent_cache"  # generations in lock-step read each other while they grow
    PENALTIES = "penalties"  # frequency_penalty, presence_penalty, repetition_penalty
    LOGIT_BIAS = "logit_bias"  # make tokens likelier, less likely or impossible
    GRAMMAR = "grammar"  # json_schema, regex


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw the tokens of one generation, and when to stop.

    The logits are changed in this order: frequency and presence penalty, repetition penalty, bias, grammar,
    temperature, truncation. Reported log-probabilities are always those of the model itself.

    All three penalties count the tokens that this generation has sampled so far: not the prompt, not forced text, not
    earlier generations of the thread. So does OpenAI for the first two (and vLLM), SGLang for all of them; for the
    third, transformers and vLLM count the prompt too (a vLLM server does it here as well). A generation with a penalty
    is therefore the same on a server that gets the thread's path as its prompt.

    Attributes:
        temperature: 0 is greedy (ties to the lowest id).
        top_k, top_p, min_p: truncations, in this order; 0, 1 and 0 are off.
        max_tokens: most tokens to sample; None: as many as the context has room for.
        stop: strings that end the generation. They are looked for with special tokens shown, whether the text shows
            them or not, and stay in the text, which ends with them even if their last token goes on.
        stop_ids: token ids that do the same.
        ignore_eos: go on after the model's end-of-sequence token.
        logprobs: report log-probabilities; engines for which they cost nothing always do.
        top_logprobs: how many alternatives to report per token.
        tempered: report, beside the log-probabilities, those under the law that the tokens were drawn from: after
            temperature and truncation. (SGLang leaves truncation out.)
        powers: in place of a temperature, exponents of the successive tokens: token i is drawn from
            softmax(powers[i] * log p), and the last exponent goes on.
        skip_special_tokens: leave special tokens out of the text. Models whose tags are special tokens need False. The
            text of an end-of-sequence token is left out in either case.
        frequency_penalty: subtracted from a token's logit once for each time it was sampled.
        presence_penalty: subtracted once if it was sampled at all.
        repetition_penalty: divides a positive logit, and multiplies a negative one, of a token that was sampled
            (Keskar et al. 2019); 1 is off.
        logit_bias: `(token id, bias)` pairs, sorted; a bias is added to the logit, minus infinity bans the token.
        json_schema: a JSON schema as text, which the generation is to satisfy.
        regex: a regular expression, which the whole generation is to match. A generation with a schema or a regular
            expression may sample any token after which it can still be satisfied, the end of sequence once it is, and
            ends (`stop`) when nothing more may follow. A limit or a stop string may end it before.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    tempered: bool = False
    powers: tuple[float, ...] = ()
    skip_special_tokens: bool = True
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None
    regex: str | None = None

    @property
    def needs(self) -> frozenset[Capability]:
        """What an engine must be able to do to draw as asked, beyond temperature and truncation."""
        asked = {
            Capability.PENALTIES: self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1,
            Capability.LOGIT_BIAS: self.logit_bias,
            Capability.GRAMMAR: self.json_schema is not None or self.regex is not None,
            Capability.LOCK_STEP: self.powers,
        }
        return frozenset(capability for capability, given in asked.items() if given)

    @property
    def steers(self) -> bool:
        """Whether the logits are changed, beyond temperature, powers and truncation."""
        return bool(self.needs - {Capability.LOCK_STEP})

    @property
    def remembers(self) -> bool:
        """Whether what may come next depends on what the generation has sampled, beyond what the model sees of it."""
        return not self.needs <= {Capability.LOGIT_BIAS}

    def power(self, index: int) -> float:
        """The exponent of token `index` of the generation: the inverse temperature; infinite if it is greedy."""
        if self.powers:
            return self.powers[min(index, len(self.powers) - 1)]
        return 1 / self.temperature if self.temperature else math.inf


def settled(values: Mapping[str, Any]) -> Sampling:
    """Settings as callers write them; see `normal`.

    Raises:
        UsageError: an unknown name, or a value that cannot be meant.
    """
    unknown = values.keys() - Sampling.__dataclass_fields__.keys()
    if unknown:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise UsageError(f"unknown sampling setting {', '.join(sorted(unknown))} (known: {known})")
    if values.get("json_schema") is not None and values.get("regex") is not None:
        raise UsageError(_BOTH)
    return Sampling(**normal(values))


def normal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as `Sampling` holds them: of single stop strings, mappings of biases, schemas as dict, model or text."""
    values = dict(values)
    for key in ("stop", "stop_ids", "powers"):
        if key in values:
            values[key] = (values[key],) if isinstance(values[key], str | int | float) else tuple(values[key])
    if "logit_bias" in values:
        values["logit_bias"] = _bias(values["logit_bias"])
    if "json_schema" in values:
        values["json_schema"] = _schema_text(values["json_schema"])
    return values


def _bias(given: Any) -> tuple[tuple[int, float], ...]:
    pairs: Iterable[Any] = given.items() if isinstance(given, Mapping) else given
    try:
        return tuple(sorted((int(token), float(bias)) for token, bias in pairs))
    except (TypeError, ValueError):
        raise UsageError(f"logit_bias maps token ids to numbers, as in {{13: -2.5}}, not {given!r:.80}") from None


def _schema_text(given: Any) -> str:
    """A JSON schema as text, from a dict, a pydantic model class, or text."""
    if hasattr(given, "model_json_schema"):
        given = given.model_json_schema()
    elif isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UsageError(f"json_schema is not JSON: {error}") from None
    if not isinstance(given, dict | bool):
        raise UsageError(f"json_schema is a dict, a pydantic model class or JSON text of an object, not {given!r:.80}")
    try:
        return json.dumps(given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"json_schema cannot be written as JSON: {error}") from None


def check(sampling: Sampling) -> str | None:
    """What is wrong with the parameters, or None."""
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        return f"max_tokens must be at least 1, got {sampling.max_tokens}"
    if not 0 <= sampling.temperature < math.inf:
        return f"temperature must be 0 or more, got {sampling.temperature}"
    if sampling.top_k < 0:
        return f"top_k must be 0 (off) or more, got {sampling.top_k}"
    if not 0 < sampling.top_p <= 1:
        return f"top_p must be above 0 and at most 1, got {sampling.top_p}"
    if not 0 <= sampling.min_p <= 1:
        return f"min_p must be between 0 and 1, got {sampling.min_p}"
    if sampling.top_logprobs < 0:
        return f"top_logprobs must be 0 or more, got {sampling.top_logprobs}"
    if any(not 0 < power < math.inf for power in sampling.powers):
        return f"powers must be above 0, got {min(sampling.powers)}"
    if any(not stop for stop in sampling.stop):
        return "an empty stop string would end every generation at once"
    for name in ("frequency_penalty", "presence_penalty"):
        if not math.isfinite(value := getattr(sampling, name)):
            return f"{name} must be a finite number, got {value}"
    if not 0 < sampling.repetition_penalty < math.inf:
        return f"repetition_penalty must be above 0 (1 is off), got {sampling.repetition_penalty}"
    for token, bias in sampling.logit_bias:
        if not bias < math.inf:
            return f"logit_bias must be a number or minus infinity, got {bias} for token {token}"
    if sampling.json_schema is not None and sampling.regex is not None:
        return _BOTH
    if sampling.regex == "":
        return "an empty regex would leave nothing to sample"
    return None
