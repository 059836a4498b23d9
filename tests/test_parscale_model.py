"""ParScale in transformers: against brute force, with a cache, under padding, in beam search, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from parscale_checkpoints import KINDS, close, expected, plain, shard, streams, write  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.nn import functional  # noqa: E402

from orchestra.errors import UsageError  # noqa: E402
from orchestra.parscale.layout import backbone_config, is_parscale, read_config, read_streams  # noqa: E402
from orchestra.parscale.model import ParScale  # noqa: E402

IDS = [7, 31, 8, 44, 2, 19, 19, 53, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("published"))


@pytest.fixture
def model(folder: Path) -> Any:
    return ParScale.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_published_checkpoint_computes_what_brute_force_does(kind: str, tmp_path: Path) -> None:
    loaded = ParScale.from_pretrained(write(tmp_path, kind)).eval()
    assert close(loaded(torch.tensor([IDS])).logits[0], expected(kind, 3, 5, IDS))


def test_no_code_of_the_checkpoint_is_asked_for(folder: Path) -> None:
    config = read_config(folder)
    assert "auto_map" in config
    assert is_parscale(config)
    plain_one = backbone_config(folder)
    assert (plain_one.model_type, plain_one.rope_parameters["rope_theta"]) == ("qwen2", 500.0)
    assert not hasattr(plain_one, "auto_map")


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3], [5, 4]])
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(model: Any, chunks: list[int]) -> None:
    ids = torch.tensor([IDS, IDS[::-1]])
    whole, cache, found = model(ids).logits, None, []
    for chunk in torch.split(ids, chunks, 1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
        assert cache.get_seq_length() == sum(part.shape[1] for part in found)  # the prefix does not count
    assert close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_and_batch_order_change_nothing(model: Any, side: str) -> None:
    rows = [IDS, IDS[:4], IDS[3:]]
    ids, mask = padded(rows, side)
    order = [2, 0, 1]
    found, shuffled = model(ids, attention_mask=mask).logits, model(ids[order], attention_mask=mask[order]).logits
    assert close(shuffled, found[order])
    for row, logits, seen in zip(rows, found, mask.bool(), strict=True):
        assert close(logits[seen], model(torch.tensor([row])).logits[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generating_in_a_padded_batch_equals_generating_alone(model: Any, cache: str) -> None:
    rows = [IDS, IDS[:4], IDS[3:]]
    ids, mask = padded(rows, "left")
    options = {"cache_implementation": cache, "disable_compile": True, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    for row, tokens in zip(rows, found, strict=True):
        text = list(row)
        for _ in range(8):  # without generate, without a cache
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert tokens[ids.shape[1] :].tolist() == text[len(row) :]


@torch.no_grad()
def test_beam_search_equals_beam_search_by_recomputing(model: Any) -> None:
    prompts, width, length = [IDS, IDS[:4]], 3, 6
    ids, mask = padded(prompts, "left")
    options = {"num_beams": width, "num_return_sequences": width, "max_new_tokens": length, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, pad_token_id=0, eos_token_id=None, **options)
    found = found[:, ids.shape[1] :].view(len(prompts), width, length)
    reordered = False
    for prompt, sequences in zip(prompts, found.tolist(), strict=True):
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(length):
            longer = []
            for score, text in beams:
                logs = model(torch.tensor([[*prompt, *text]])).logits[0, -1].log_softmax(-1)
                longer += [(score + float(log), [*text, token]) for token, log in enumerate(logs)]
            best = sorted(longer, reverse=True)[:width]
            reordered |= [text[:-1] for _, text in best] != [text for _, text in beams]
            beams = best
        assert sequences == [text for _, text in beams]
    assert reordered  # or the cache was never permuted


@torch.no_grad()
def test_sampling_draws_from_the_streams_mixture(model: Any) -> None:
    torch.manual_seed(0)
    prompt = torch.tensor([IDS])
    drawn = model.generate(prompt, max_new_tokens=1, do_sample=True, num_return_sequences=4000, top_k=0)
    shares = torch.bincount(drawn[:, -1], minlength=61) / 4000
    wanted = expected("qwen2", 3, 5, IDS)[-1].softmax(-1)
    assert float((shares - wanted).abs().sum() / 2) < 0.06


@torch.no_grad()
def test_one_stream_is_the_plain_model(tmp_path: Path) -> None:
    wanted = plain()(torch.tensor([IDS])).logits
    loaded = ParScale.from_pretrained(write(tmp_path, count=1)).eval()
    assert loaded.streams is None
    assert torch.equal(loaded(torch.tensor([IDS])).logits, wanted)
    assert torch.equal(ParScale.recycle(plain(), 1)(torch.tensor([IDS])).logits, wanted)


@torch.no_grad()
def test_several_sets_take_turns_on_one_backbone(model: Any, folder: Path, tmp_path: Path) -> None:
    write(tmp_path, count=2, prefix=4)
    ids = torch.tensor([IDS])
    for place, count, prefix in ((tmp_path, 2, 4), (folder, 3, 5), (tmp_path, 2, 4)):
        model.load_streams(place)
        assert close(model(ids).logits[0], expected("qwen2", count, prefix, IDS))
    model.set_streams(None)
    assert torch.equal(model(ids).logits, plain()(ids).logits)


@torch.no_grad()
def test_what_is_saved_is_the_published_layout(folder: Path, tmp_path: Path) -> None:
    ParScale.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ParScaleForCausalLM"]
    kept = ("model_type", "parscale_n", "parscale_n_tokens", "parscale_attn_smooth", "rope_theta", "hidden_size")
    assert all(config[field] == read_config(folder)[field] for field in kept)
    assert config["rope_scaling"] is None
    assert "auto_map" not in config
    again = ParScale.from_pretrained(tmp_path).eval()
    assert close(again(torch.tensor([IDS])).logits[0], expected("qwen2", 3, 5, IDS))


@torch.no_grad()
@pytest.mark.parametrize(("said", "wanted"), [(0.25, 0.25), (0.0, 0.0), (None, 0.01)])
def test_the_smoothing_is_what_the_file_says(said: float | None, wanted: float, tmp_path: Path) -> None:
    write(tmp_path, parscale_attn_smooth=said)
    assert read_streams(tmp_path).smoothing == wanted
    loaded = ParScale.from_pretrained(tmp_path).eval()
    assert close(loaded(torch.tensor([IDS])).logits[0], expected("qwen2", 3, 5, IDS, wanted))


@torch.no_grad()
def test_a_checkpoint_may_be_in_shards(tmp_path: Path) -> None:
    shard(write(tmp_path))
    read, wanted = read_streams(tmp_path), streams("qwen2", 3, 5)
    assert torch.equal(read.keys[1], wanted["model.layers.1.self_attn.prefix_k"])
    assert torch.equal(read.outer[1], wanted["model.aggregate_layer.2.bias"])
    assert close(ParScale.from_pretrained(tmp_path).eval()(torch.tensor([IDS])).logits[0], expected("qwen2", 3, 5, IDS))


def test_the_loss_and_its_gradients_are_those_of_the_mixture(folder: Path) -> None:
    model = ParScale.from_pretrained(folder).train()
    ids = torch.tensor([IDS])
    loss = model(ids, labels=ids).loss
    wanted = functional.cross_entropy(expected("qwen2", 3, 5, IDS)[:-1], ids[0, 1:])
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    model.freeze_backbone()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == set(streams("qwen2", 3, 5))
    assert all(float(parameter.grad.norm()) > 0 for parameter in model.stream_parameters())
    plain_gradients = [parameter.grad.clone() for parameter in model.stream_parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for parameter, gradient in zip(model.stream_parameters(), plain_gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


@torch.no_grad()
def test_fresh_streams_are_a_matter_of_their_seed() -> None:
    ids, logits = torch.tensor([IDS]), {}
    for seed in (0, 1):
        grown = ParScale.recycle(plain(), 4, prefix_tokens=6, seed=seed)
        logits[seed] = grown(ids).logits
        assert grown.streams.keys.shape == (3, 4, 2, 6, 8)
    again = ParScale.recycle(plain(), 4, prefix_tokens=6, seed=0)(ids).logits
    assert torch.equal(again, logits[0])
    assert not torch.equal(logits[0], logits[1])


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.prefix_v", "model.aggregate_layer.2.bias"])
def test_a_missing_stream_tensor_is_named(name: str, tmp_path: Path) -> None:
    drop(write(tmp_path), name)
    with pytest.raises(UsageError, match=f"lacks the tensor {name}"):
        ParScale.from_pretrained(tmp_path)


def test_a_missing_tensor_of_the_backbone_is_named(tmp_path: Path) -> None:
    drop(write(tmp_path), "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UsageError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        ParScale.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parscale_n_tokens": 6},
            r"prefix_k of .* has the shape \[3, 2, 5, 8\]; its config.json asks for \[3, 2, 6, 8\]",
        ),
        ({"parscale_n": 4}, r"asks for \[4, 2, 5, 8\]"),
        ({"parscale_n": None}, "has no parscale_n"),
        ({"parscale_n": "many"}, "must be a positive number of streams, not 'many'"),
        ({"parscale_n": 1}, "it is the plain model and has no streams to read"),
        ({"model_type": "abacus_parscale"}, "'abacus', which transformers does not know"),
    ],
)
def test_a_configuration_that_does_not_fit_gets_a_clear_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, **changes)
    with pytest.raises(UsageError, match=message):
        read_streams(tmp_path)


def test_streams_of_another_backbone_are_refused(model: Any, tmp_path: Path) -> None:
    write(tmp_path, "qwen3")
    with pytest.raises(UsageError, match=r"have .*\[3, 2, 16, 32\]; the model \[3, 2, 8, 32\]"):
        model.load_streams(tmp_path)
    assert model.streams.streams == 3  # and those that it has stay


def test_models_whose_attention_is_not_replaced_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="gpt2 model cannot have streams"):
        ParScale.recycle(gpt, 2)


def padded(rows: list[list[int]], side: str) -> tuple[Any, Any]:
    width = max(map(len, rows))
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask
