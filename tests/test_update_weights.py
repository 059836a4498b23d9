"""New weights for an engine: it is then the engine of those weights, and nothing of the old ones is left."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fake_sglang import FakeSGLang, connected  # noqa: E402

import orchestra  # noqa: E402
from orchestra.errors import CapabilityError, EngineError, UsageError  # noqa: E402
from orchestra.runtime.local.engine import LocalEngine  # noqa: E402
from orchestra.runtime.local.model import load_plain  # noqa: E402
from orchestra.testing.scripted import ScriptedEngine  # noqa: E402
from orchestra.training.policy_weights import plain_weights  # noqa: E402

PROMPT = "the cat and the other cat"


def changed(folder: str, seed: int = 5, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """The weights of a folder, each moved at random."""
    chance = torch.Generator().manual_seed(seed)
    weights = plain_weights(load_plain(folder))
    return {
        name: value + scale * value.std() * torch.randn(value.shape, generator=chance)
        for name, value in weights.items()
    }


def saved(folder: str, weights: dict[str, torch.Tensor], at: Path) -> str:
    """A folder with a model of these weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(at)
    AutoTokenizer.from_pretrained(folder).save_pretrained(at)
    return str(at)


async def said(engine: LocalEngine) -> tuple[list[int], list[float]]:
    async with orchestra.connect(engine) as connection:
        outcome = await connection.run("sample", PROMPT, max_tokens=12, ignore_eos=True)
    span = outcome.graph.nodes[-1].spans[-1]
    return span.tokens, span.logprobs


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen3", {}),
        ("gemma", {}),
        ("phi3", {}),
    ],
)
def test_an_engine_with_new_weights_says_what_an_engine_loaded_with_them_says(make_model, tmp_path, kind, options):
    folder = make_model(kind, **options)
    weights = changed(folder)
    if options.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    async def main() -> None:
        engine = LocalEngine(folder, prefix_cache=1 << 20)
        before = await said(engine)
        await engine.update_weights(weights)
        after = await said(engine)
        assert after[0] != before[0]
        other = LocalEngine(saved(folder, weights, tmp_path / "new"))
        tokens, logprobs = await said(other)
        assert after[0] == tokens
        assert after[1] == pytest.approx(logprobs, abs=1e-5)
        assert engine.facts()["fingerprint"] == other.facts()["fingerprint"]
        await engine.update_weights(plain_weights(load_plain(folder)))
        assert (await said(engine))[1] == pytest.approx(before[1], abs=1e-6)
        await engine.close()
        await other.close()

    asyncio.run(main())


def test_the_caller_may_go_on_changing_the_weights_that_it_gave(tiny):
    async def main() -> None:
        engine, weights = LocalEngine(tiny), changed(tiny)
        await engine.update_weights(weights)
        before = await said(engine)
        for value in weights.values():
            value.zero_()
        assert await said(engine) == before
        await engine.close()

    asyncio.run(main())


def test_kept_keys_and_values_of_the_old_weights_are_dropped(tiny):
    async def main() -> None:
        engine = LocalEngine(tiny, prefix_cache=1 << 24, debug=True)
        await said(engine)
        assert engine.load().kept_tokens > 0
        await engine.update_weights(changed(tiny))
        fresh = LocalEngine(tiny)
        await fresh.update_weights(changed(tiny))
        assert await said(engine) == await said(fresh)
        await engine.check_integrity()
        await engine.close()
        await fresh.close()

    asyncio.run(main())


def test_weights_are_not_changed_under_a_run(tiny):
    async def main() -> None:
        engine = LocalEngine(tiny)
        async with orchestra.connect(engine) as connection:
            events = connection.stream("sample", PROMPT, max_tokens=400, ignore_eos=True)
            assert "token" in [(await anext(events)).kind for _ in range(2)]
            with pytest.raises(EngineError, match="between runs"):
                await engine.update_weights(changed(tiny))
            await events.aclose()  # type: ignore[attr-defined]  # a generator, as typed: any iterator
        await engine.update_weights(changed(tiny))
        await engine.close()

    asyncio.run(main())


def test_weights_of_another_model_are_refused_and_change_nothing(tiny):
    async def main() -> None:
        engine = LocalEngine(tiny)
        before = await said(engine)
        weights = changed(tiny)
        first = next(iter(weights))
        for wrong, reason in (
            ({name: value for name, value in weights.items() if name != first}, f"without {first}"),
            (weights | {"other.weight": weights[first]}, r"does not have other\.weight"),
            (weights | {first: weights[first][:-1]}, "another shape"),
        ):
            with pytest.raises(UsageError, match=reason):
                await engine.update_weights(wrong)
        assert await said(engine) == before
        await engine.close()

    asyncio.run(main())


def test_who_cannot_be_given_weights_says_who_can():
    with pytest.raises(CapabilityError, match="scripted cannot be given new weights; local:PATH"):
        asyncio.run(ScriptedEngine(lambda *_: "a").update_weights({}))


def test_adapters_are_merged_and_the_model_is_left_as_it_was(tiny):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        expected = model(ids).logits
        weights = plain_weights(model)
        plain = load_plain(tiny)
        plain.load_state_dict(weights)
        assert (plain(ids).logits - expected).abs().max() < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- servers -----------------------------------------------------------------------------------------------------------


def test_a_server_is_given_weights_once_and_found_out_when_it_has_begun_anew():
    weights = {"a.weight": torch.arange(6.0).view(2, 3).t(), "b.bias": torch.ones(2)}
    weights["tied.weight"] = weights["b.bias"]

    async def main() -> None:
        fake = FakeSGLang()
        async with connected(fake) as (_, connection):
            engine = connection.engine
            assert await engine.weights_kept()  # nobody has given it any
            await engine.update_weights(weights)
            await engine.update_weights(weights)  # it has them already: of two processes one is first
            [(_, files)] = fake.weights
            assert torch.equal(files["a.weight"], weights["a.weight"])
            assert set(files) == {"a.weight", "b.bias"}  # a tied head is loaded with what it is tied to
            assert await engine.weights_kept()
            weights["b.bias"][0] = 2.0
            await engine.update_weights(weights)
            assert len(fake.weights) == 2
            fake.weights.clear()  # a new process, as it was started
            assert not await engine.weights_kept()
            weights["b.bias"][0] = float("nan")
            with pytest.raises(EngineError, match="refuses the weights: not a number"):
                await engine.update_weights(weights)

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_server_that_is_killed_and_comes_back_plays_all_rollouts_by_the_new_weights(tmp_path):
    """What it sampled is what a plain forward of the new weights says, to 1e-4: nothing is left of the old ones."""
    from conftest import started

    from orchestra.evaluation.countdown import generate
    from orchestra.evaluation.tasks import Item
    from orchestra.runtime.connect import EMBEDDED
    from orchestra.runtime.sglang_server import SGLangServer
    from orchestra.spec import parse_strategy
    from orchestra.training.rollouts import Play, Player

    weights = changed(str(EMBEDDED), scale=0.05)
    plain = load_plain(str(EMBEDDED))
    plain.load_state_dict(weights)
    strategy = parse_strategy("spawn_join(rounds=2)")
    plays = [Play(Item(one.id, one.prompt, {}), strategy, i) for i, one in enumerate(generate("hard", "train", 24))]

    def worst(rollouts) -> float:
        far, count = 0.0, 0
        for rollout in rollouts:
            graph = rollout.outcome.graph
            for node in graph.nodes:
                if sampled := node.count("sampled"):
                    ids = torch.tensor([graph.path_tokens(node.id)])
                    with torch.no_grad():
                        said = plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                    own = torch.tensor([p for span in node.spans for p in span.logprobs])
                    far, count = max(far, float((said[-sampled:] - own).abs().max())), count + sampled
        assert count > 1000
        return far

    with started(SGLangServer, EMBEDDED, tmp_path / "first.log") as server:
        player = Player(f"sglang://127.0.0.1:{server.port}?patience=2", max_tokens=120, patience=600)
        player.update(weights)
        assert worst(player.play(plays)) < 1e-4
        box: list = []
        thread = threading.Thread(target=lambda: box.append(player.play(plays)))
        thread.start()
        time.sleep(1.0)
        server.stop()
        with started(SGLangServer, EMBEDDED, tmp_path / "second.log", port=server.port):
            thread.join(600)
            assert box, "no rollouts came back"
            assert all(rollout.outcome is not None for rollout in box[0])
            assert worst(box[0]) < 1e-4
            player.close()
