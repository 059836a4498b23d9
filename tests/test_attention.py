from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.runtime.attention import cuda
from orchestra.runtime.attention.cost import COPY_BYTES, MERGE_TOKENS, in_place
from orchestra.runtime.attention.kernels import KERNELS, attend
from orchestra.runtime.attention.plan import Chunk, Plan, Shared, Tails
from orchestra.testing import ATTENTION_TOLERANCE, check_losslessness


def dense(query, key, value, scale, mask=None):
    """From the definition, in float64."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeat, 1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_kernel_gives_softmax_attention_and_its_normaliser(kernel, heads, key_heads, queries):
    torch.manual_seed(queries)
    query = torch.randn(2, queries, heads, 16).transpose(1, 2)  # as a model lays it out: heads not contiguous
    key, value = (torch.randn(2, key_heads, 60, 16)[:, :, 3:53] for _ in range(2))  # a stretch of an arena
    mask = torch.zeros(2, 1, 1, 50).masked_fill(torch.arange(50) >= torch.tensor([[[[50]]], [[[7]]]]), -torch.inf)
    for chosen in (None, mask):
        out, lse = attend(query, key, value, 0.3, mask=chosen, kernel=kernel)
        right, normaliser = dense(query, key, value, 0.3, chosen)
        assert (out - right).abs().max() < ATTENTION_TOLERANCE
        assert (lse - normaliser).abs().max() < ATTENTION_TOLERANCE
        assert lse.dtype == torch.float32


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_causal_means_that_query_i_sees_keys_to_i(kernel, tokens):
    query, key, value = (torch.randn(1, 4, tokens, 8) for _ in range(3))
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)
    out, _ = attend(query, key, value, 0.5, causal=True, kernel=kernel)
    assert (out - dense(query, key, value, 0.5, mask)[0]).abs().max() < ATTENTION_TOLERANCE


def merged(parts):
    """Attention over the union of disjoint sets of keys, by the formula of the module."""
    outs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
    return (outs * lses.softmax(0).unsqueeze(-1)).sum(0), lses.logsumexp(0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_keys_are_a_part_of_weight_zero(kernel):
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    nothing = attend(query, key[:, :, :0], value[:, :, :0], 1.0, kernel=kernel)
    something = attend(query, key, value, 1.0, kernel=kernel)
    out, lse = merged([nothing, something])
    assert torch.equal(out, something[0])
    assert torch.allclose(lse, something[1])


@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.floats(0.1, 30.0), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_merged_parts_are_attention_over_the_whole(lengths, spread, seed):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, 3, 8, generator=draw) * spread
    key, value = (torch.randn(1, 2, sum(lengths), 8, generator=draw) for _ in range(2))
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    out, lse = merged([attend(query, k, v, 0.35) for k, v in zip(keys, values, strict=True)])
    right, normaliser = dense(query, key, value, 0.35)
    assert (out - right).abs().max() < ATTENTION_TOLERANCE
    assert ((lse - normaliser) / normaliser.abs().clamp_min(1)).abs().max() < ATTENTION_TOLERANCE


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_losslessness(kernel, grouping):
    for seed in range(30):
        check_losslessness(seed, kernel=kernel, grouping=grouping, key_heads=(1, 2, 4)[seed % 3])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("window", "softcap"), [(1, None), (5, None), (30, None), (1000, None), (None, 2.0), (12, 0.7)]
)
def test_losslessness_of_windows_and_soft_capping(kernel, window, softcap):
    for seed in range(12):
        check_losslessness(seed, kernel=kernel, window=window, softcap=softcap, key_heads=(1, 2, 4)[seed % 3])


@pytest.mark.slow
@given(
    st.integers(0, 2**31),
    st.sampled_from(KERNELS),
    st.booleans(),
    st.sampled_from([(4, 4), (8, 2), (3, 1)]),
    st.sampled_from([None, 1, 3, 20, 90]),
    st.sampled_from([None, 0.5, 30.0]),
)
@settings(max_examples=1000, deadline=None)
def test_losslessness_at_depth(seed, kernel, grouping, heads, window, softcap):
    options = {"heads": heads[0], "key_heads": heads[1], "softcap": softcap}
    check_losslessness(seed, kernel=kernel, grouping=grouping, window=window if grouping else None, **options)


def test_bfloat16_is_at_most_twice_as_far_off_as_sdpa():
    torch.manual_seed(0)
    heads, key_heads, dim, slots, common = 4, 2, 32, 6, 200
    lengths = torch.tensor([5, 60, 33, 1, 48, 64])
    shared = [torch.randn(1, key_heads, common, dim).bfloat16() for _ in range(2)]
    arena = [torch.randn(1, slots, key_heads, 64, dim).bfloat16() for _ in range(2)]
    query, key, value = (torch.randn(slots, n, dim).bfloat16() for n in (heads, key_heads, key_heads))
    plan = Plan(slots)
    plan.tails.append(Tails.over(0, *arena, lengths, 64))
    plan.shared.append(Shared(torch.arange(slots), *shared))
    ours = plan.run(0, query, key, value, dim**-0.5)
    assert ours.dtype == torch.bfloat16
    worst_ours, worst_sdpa = [], []
    for i, n in enumerate(lengths.tolist()):
        keys, values = (torch.cat([shared[j][0], arena[j][0, i, :, :n]], 1).unsqueeze(0) for j in range(2))
        right, _ = dense(query[i][None, :, None].float(), keys.float(), values.float(), dim**-0.5)
        sdpa = torch.nn.functional.scaled_dot_product_attention(query[i][None, :, None], keys, values, enable_gqa=True)
        worst_sdpa.append((sdpa.double() - right).abs().max())
        worst_ours.append((ours[i][None, :, None].double() - right).abs().max())
    assert max(worst_ours) <= 2 * max(worst_sdpa)


def test_shared_keys_are_read_once_for_all_readers(monkeypatch):
    calls = []
    from orchestra.runtime.attention import reads as module

    def counted(query, key, *rest, **options):
        calls.append(key.shape)
        return attend(query, key, *rest, **options)

    monkeypatch.setattr(module, "attend", counted)
    plan = Plan(8)
    plan.shared.append(Shared(torch.arange(8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)))
    plan.run(0, torch.randn(8, 4, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8), 0.3)
    assert calls == [(1, 2, 50, 8)]


def test_chunk_after_earlier_tokens_sees_them_all():
    chunk = Chunk.over(0, 3, torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))
    assert chunk.mask is not None
    assert (chunk.mask == 0).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_single_query_of_a_half_type_is_attention_like_any_other():
    query, key, value = torch.randn(3, 4, 1, 16), torch.randn(3, 2, 30, 16), torch.randn(3, 2, 30, 16)
    mask = torch.zeros(3, 1, 1, 30).masked_fill_(
        torch.arange(30) >= torch.tensor([[[[30]]], [[[1]]], [[[9]]]]), -torch.inf
    )
    halves = [x.bfloat16() for x in (query, key, value)]
    out, lse = attend(*halves, 0.3, mask=mask)
    right, normaliser = dense(*(x.float() for x in halves), 0.3, mask)
    assert out.shape == query.shape
    assert lse.shape == query.shape[:3]
    assert (out - right).abs().max() < 0.02
    assert (lse - normaliser).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "causal", "masked"), [(2, False, False), (2, False, True), (8, True, False)])
def test_cuda_kernels_are_called_as_their_signatures_say(dtype, heads, causal, masked):
    keys = 13
    query = torch.empty(3, heads, keys, 64, dtype=dtype, device="meta")
    key, value = (torch.empty(3, 2, 32, 64, dtype=dtype, device="meta")[:, :, :keys] for _ in range(2))
    mask = torch.empty(3, 1, 1, keys, device="meta") if masked else None
    out, lse = cuda.fused(query, key, value, 0.3, mask, causal)
    assert out.shape == query.shape
    assert out.dtype == dtype
    assert lse.shape == query.shape[:3]
    assert lse.dtype == torch.float32


def test_where_the_cuda_kernels_do_not_run_the_reference_does_and_says_so():
    query, key, value = (torch.randn(1, 2, 3, 16) for _ in range(3))
    cuda.trusted.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference"):
        out, lse = cuda.attend(query, key, value, 0.3)  # they do not run on a CPU
    right, normaliser = dense(query, key, value, 0.3)
    assert (out - right).abs().max() < ATTENTION_TOLERANCE
    assert (lse - normaliser).abs().max() < ATTENTION_TOLERANCE
    cuda.trusted.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_kernels_give_the_numbers_of_the_reference(dtype):
    assert cuda.deviation(torch.device("cuda"), dtype) <= cuda.TOLERANCE[dtype]


@given(st.integers(1, 100_000), st.integers(1, 512), st.integers(1, 65_536), st.integers(0, 2**24))
def test_more_tokens_readers_or_bytes_never_speak_against_reading_in_place(tokens, readers, token_bytes, copy_bytes):
    if in_place(tokens, readers, token_bytes, copy_bytes):
        assert in_place(2 * tokens, readers, token_bytes, copy_bytes)
        assert in_place(tokens, 2 * readers, token_bytes, copy_bytes)
        assert in_place(tokens, readers, 2 * token_bytes, copy_bytes)
        assert in_place(tokens, readers, token_bytes, copy_bytes // 2)
    assert in_place(tokens, readers, token_bytes, 0)


def test_copies_of_a_segment_take_little_more_than_the_limit_together():
    for readers, token_bytes in ((1, 256), (3, 1024), (128, 8192)):
        longest = max((n for n in range(20_000) if not in_place(n, readers, token_bytes)), default=0)
        beyond = longest - MERGE_TOKENS
        assert beyond * readers * token_bytes <= COPY_BYTES < (beyond + 1) * readers * token_bytes
    assert in_place(4096, 64, 8192)
