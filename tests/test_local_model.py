from __future__ import annotations

import asyncio
import json

import pytest
import torch
from conftest import byte_tokenizer, save_model
from engines import opened

from orchestra.errors import EngineError, PromptError, UsageError
from orchestra.runtime.local.engine import LocalEngine
from orchestra.runtime.local.refusal import refusal


def test_prompts(tiny, tmp_path):
    async def main():
        async with opened(tiny) as engine:
            assert (await engine.encode_prompt("abc")).tokens[0] == 1
            one = await engine.encode_prompt([{"role": "user", "content": "abc"}])
            assert one == await engine.encode_prompt("abc")
            assert (await engine.encode("")).count == 0
            assert (await engine.encode(" x")).origin == "forced"
            assert (await engine.encode(" x")).tokens[0] != 1
            for empty in ("", "  \n ", [], [{"role": "user", "content": " "}]):
                with pytest.raises(PromptError, match="empty"):
                    await engine.encode_prompt(empty)
            talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "abc"}]
            with pytest.raises(PromptError, match=r"no chat template.*system, user"):
                await engine.encode_prompt(talk)
            engine._open()[0].tokenizer.chat_template = (
                "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}{% endfor %}"
                "{% if add_generation_prompt %}>{% endif %}{% if brief %}!{% endif %}"
            )
            span = await engine.encode_prompt(talk, brief=True)
            assert span.text == "<bos>system:be brief<bos>user:abc>!"
            assert span.tokens.count(1) == 2

    asyncio.run(main())


def test_words_outside_the_vocabulary_are_named(tmp_path):
    from orchestra.training import tokenizer

    save_model(tmp_path)
    tokenizer.save(tmp_path)

    async def main():
        async with opened(str(tmp_path), hint="it speaks Countdown only") as engine:
            assert (await engine.encode_prompt("numbers: 3 7 8 12 target: 54")).count == 8
            with pytest.raises(PromptError, match=r"'poem', 'about'.*Countdown only.*local:.*sglang://.*openai://"):
                await engine.encode_prompt("a poem about 3")

    asyncio.run(main())


def test_models_that_are_not_there_are_one_clear_line(tmp_path, tiny):
    def message(source, **options):
        with pytest.raises(UsageError) as caught:
            asyncio.run(LocalEngine(source, **options).open())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model folder" in message(str(tmp_path / "nowhere"))
    assert "no model folder" in message("nowhere")
    assert "no config.json" in message(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "cannot load" in message(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "cannot load" in message(str(tmp_path))
    assert "is a file" in message(str(tmp_path / "config.json"))
    assert "unknown dtype 'float8'" in message(tiny, dtype="float8")
    assert "not available" in message(tiny, device="nosuchdevice")
    with pytest.raises(UsageError, match="unknown kernel"):
        LocalEngine(tiny, kernel="fast")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("GptOssConfig", {}, "sinks"),
        ("DeepseekV3Config", {}, "latent attention"),
        ("BloomConfig", {}, "ALiBi"),
        ("MambaConfig", {}, "recurrent"),
        ("T5Config", {}, "encoder-decoder"),
        ("Qwen3NextConfig", {}, "layers of type linear_attention"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "change with the length",
        ),
        (
            "Phi3Config",
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
            },
            "longrope",
        ),
        ("Gemma3nTextConfig", {}, "share keys and values"),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "both directions"),
        ("LlamaConfig", {}, None),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, None),
        ("Qwen2Config", {"sliding_window": 16, "use_sliding_window": False}, None),
        ("Qwen3Config", {}, None),
        ("MistralConfig", {"sliding_window": None}, None),
        ("MistralConfig", {"sliding_window": 128}, None),
        ("Gemma2Config", {}, None),
        ("Phi3Config", {"sliding_window": None}, None),
    ],
)
def test_refusals_name_what_the_plan_cannot_do(name, options, reason):
    import transformers

    found = refusal(getattr(transformers, name)(**options))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_models_without_rotary_positions_are_refused(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=267, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"gpt2.*rotary"):
        asyncio.run(LocalEngine(str(tmp_path)).open())


def test_attention_that_brings_something_unknown_is_refused_by_name():
    from types import SimpleNamespace

    from orchestra.runtime.attention.plan import Plan
    from orchestra.runtime.local.interface import running, segment_attention

    row = torch.zeros(1, 1, 1, 8)
    for options, name in (
        ({"s_aux": torch.zeros(1)}, "s_aux"),
        ({"indexer": torch.zeros(1)}, "indexer"),
    ):
        with running(Plan(1)), pytest.raises(EngineError, match=name):
            segment_attention(SimpleNamespace(layer_idx=0), row, row, row, None, **options)


def test_facts(tiny):
    async def main():
        async with opened(tiny) as engine:
            return engine.facts()

    facts = asyncio.run(main())
    assert facts["architecture"] == "llama"
    assert facts["parameters"] > 10_000
    assert {"dtype", "kernel", "torch", "transformers", "context_length"} <= set(facts)
