"""Masks and attention without looks at values. A kernel for documents is stood in for by a loop over them."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from horizon.models import attention
from horizon.models.attention import LazyMask
from horizon.models.blocks import BlockModel
from horizon.models.documents import find_documents
from horizon.models.skeleton import skeleton_from_instance
from tests.parity.reference import FAMILIES, assert_close_tensors, build, packed, padded, plain

CPU, META = torch.device("cpu"), torch.device("meta")
UNSEEN = torch.zeros(2, 12, dtype=torch.bool)
INPUTS = ("input_ids", "attention_mask", "position_ids")
BATCHES = {
    "plain": plain(0),
    "packed": packed(0, [[5, 3, 4], [2, 9, 1]]),
    "left": padded(0, [12, 5], "left"),
    "right": padded(0, [12, 5], "right"),
}
ASKS_ALWAYS = "opt"  # makes a mask of its own where none is given; what is in it only the device knows


class Sums(dict):
    """Gradients of linear weights by name."""

    def add_product(self, name, grad, x):
        self[name] = self.get(name, 0) + grad.t() @ x


def block_model(family, **changes):
    source = build(family, **changes)
    model = BlockModel(skeleton_from_instance(source))
    values, params = dict(source.named_parameters()), []
    for layout in model.layouts:
        own = {p.spec.local_name: values[p.name] for p in layout.params}
        params.append({name: value.detach().clone().requires_grad_() for name, value in own.items()})
    return model, params


def inputs_of(kind, observed=UNSEEN, device=CPU):
    inputs = {key: value for key, value in BATCHES[kind].items() if key in INPUTS}
    return {k: v.to(device) for k, v in inputs.items()}, find_documents(inputs, device, observed)


def masks_of(calls):
    return [mask for call in calls for mask in (*call.args, *call.kwargs.values()) if isinstance(mask, LazyMask)]


# ---- the prologue asks nothing


@pytest.mark.parametrize("observed", [UNSEEN, None], ids=["lazily", "exactly"])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_to_embed_no_value_is_looked_at(family, kind, observed):
    """Tensors on the meta device have none: whoever asks for one fails."""
    if (family, kind) == (ASKS_ALWAYS, "plain") or (family == "bloom" and kind == "packed"):
        pytest.skip("asks, or takes no position ids")
    model, params = block_model(family)
    model.to(META)
    params = {name: value.detach().to(META) for name, value in params[0].items()}
    hidden, calls = model.embed(params, *inputs_of(kind, observed, META))
    assert hidden.device.type == "meta" and len(calls) == 2


@pytest.mark.parametrize(("kind", "num"), [("plain", 0), ("packed", 2), ("left", 2), ("right", 2)])
def test_masks_over_all_pairs_are_not_built_until_somebody_reads_them(kind, num):
    model, params = block_model("llama")
    inputs, documents = inputs_of(kind)
    hidden, calls = model.embed(params[0], inputs, documents)
    masks = masks_of(calls)
    assert len(masks) == num and len(set(map(id, masks))) <= 1  # all layers share one
    assert all(mask._built is None and mask.shape == (2, 1, 12, 12) for mask in masks)
    for block in (1, 2):
        model.layer(block, params[block], hidden, calls[block - 1])
    assert all(mask._built is not None for mask in masks)  # on the CPU attention reads them


def test_a_sliding_window_is_told_with_the_mask():
    model, params = block_model("gemma3_text")  # windows of 5 in the first layer, none in the second
    for kind, windows in [("plain", [5]), ("packed", [5, None]), ("right", [5, None])]:
        _, calls = model.embed(params[0], *inputs_of(kind))
        assert [mask.window for mask in masks_of(calls)] == windows


@pytest.mark.parametrize("window", [5, 12, 13, None])
def test_whole_rows_with_a_window_divide_into_rows(window):
    model, params = block_model("mistral", sliding_window=window)
    _, calls = model.embed(params[0], *inputs_of("plain"))
    masks = masks_of(calls)
    assert bool(masks) == (window in (5, 12))  # else nothing is out of sight
    for mask in masks:
        assert (mask.window, mask.documents.longest, mask.ends.tolist()) == (window, 12, [0, 12, 24])
        assert not mask.is_causal


def test_where_masked_tokens_are_observed_the_mask_is_built():
    model, params = block_model("llama")
    _, calls = model.embed(params[0], *inputs_of("left", observed=None))
    assert masks_of(calls) == [] and calls[0].kwargs["attention_mask"].shape == (2, 1, 12, 12)


def test_masks_that_are_more_than_causal_are_built():
    config, hidden = build("llama").config, torch.zeros(2, 12, 8)
    inputs, documents = inputs_of("packed")
    asked = {"config": config, "inputs_embeds": hidden, "attention_mask": None, "past_key_values": None}
    attention.adopt(nn.Module())
    with attention.masks_from(documents, inputs, "sdpa"):
        for extra in (
            {"allow_is_causal_skip": False},
            {"and_mask_function": lambda b, h, q, k: k != 3},
            {"or_mask_function": lambda b, h, q, k: k < 2},
            {"block_sequence_ids": torch.full((2, 12), -1)},
        ):
            mask = masking_utils.create_causal_mask(**asked, **extra)
            assert type(mask) is torch.Tensor
            assert not mask[0, 0, 11, 4]  # and documents are kept apart in it
        assert isinstance(masking_utils.create_causal_mask(**asked), LazyMask)
        config.attention_chunk_size = config.sliding_window = 4
        chunked = masking_utils.create_chunked_causal_mask(**asked)
    assert type(chunked) is torch.Tensor
    assert chunked[0, 0, 11].nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_a_mask_of_the_models_own_making_says_what_it_says():
    """Some models mask what nobody asked them to, or do not mask what they were asked to."""
    config, hidden, own = build("llama").config, torch.zeros(2, 12, 8), torch.ones(2, 12)
    own[:, 9] = 0
    attention.adopt(nn.Module())
    for kind in ("plain", "packed"):
        inputs, documents = inputs_of(kind)
        with attention.masks_from(documents, inputs, "sdpa"):
            mask = masking_utils.create_causal_mask(config, hidden, own, None)
        assert mask[0, 0, 11].tolist() == [kind == "plain" or k >= 8 for k in range(9)] + [False, True, True]
    inputs, documents = inputs_of("left")
    with attention.masks_from(documents, inputs, "sdpa"):
        assert masking_utils.create_causal_mask(config, hidden, None, None) is None


# ---- a mask without storage


def lazy(rows=2, tokens=12, window=None):
    built = []

    def build():
        built.append(torch.ones(rows, 1, tokens, tokens, dtype=torch.bool).tril())
        return built[-1]

    documents = find_documents({"input_ids": torch.zeros(rows, tokens)}, CPU)
    return LazyMask(documents, window, (rows, 1, tokens, tokens), CPU, build), built


def test_whatever_reads_a_mask_has_it_built_once():
    for read in (
        lambda mask: mask[:, 0, :, :],
        lambda mask: mask & mask,
        lambda mask: torch.where(mask, 0.0, -1.0),
        lambda mask: torch.zeros(2, 1, 12, 12).masked_fill(mask, 1.0),
        lambda mask: torch.cat([mask, mask], dim=-1),
        lambda mask: mask.to(torch.float32),
        lambda mask: F.scaled_dot_product_attention(*[torch.ones(2, 1, 12, 4)] * 3, attn_mask=mask),
    ):
        mask, built = lazy()
        expected = read(torch.ones(2, 1, 12, 12, dtype=torch.bool).tril())
        assert type(read(mask)) is torch.Tensor
        assert torch.equal(read(mask), expected)
        assert len(built) == 1


def test_what_a_mask_is_can_be_asked_without_building_it():
    mask, built = lazy(rows=1, tokens=1 << 20)
    assert isinstance(mask, torch.Tensor)
    assert (mask.shape, mask.ndim, mask.dtype, mask.device) == ((1, 1, 1 << 20, 1 << 20), 4, torch.bool, CPU)
    assert repr(mask) == f"LazyMask({(1, 1, 1 << 20, 1 << 20)}, window=None)"
    assert built == []


# ---- the kernel's way, with a loop for a kernel


def by_documents(query, key, value, ends, longest, window, scale):
    """What the kernel computes, document by document: [tokens, heads, D]."""
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for first, last in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        assert last - first <= longest
        q, k, v = (x[first:last].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        sees = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        if window is not None:
            sees &= ~sees.tril(-window)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def kernel(monkeypatch):
    """Pretends that the CPU is a GPU with a kernel; gives what that was called with."""
    calls = []

    def record(*args):
        calls.append(args[3:6])
        return by_documents(*args)

    monkeypatch.setattr(attention, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(attention, "_kernel_takes", lambda *args: True)
    monkeypatch.setattr(attention, "_kernel", record)
    return calls


def gradients(model, params, kind, recomputes):
    """Of all layers' parameters and what enters them, by name; what comes in is zero at masked tokens."""
    inputs, documents = inputs_of(kind)
    hidden, calls = model.embed(params[0], inputs, documents)
    hidden = hidden.detach()
    coming = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    coming *= inputs.get("attention_mask", torch.ones(2, 12))[..., None]
    found = {}
    for block in (1, 2):
        entering = hidden.detach().requires_grad_()
        hidden = model.layer(block, params[block], entering, calls[block - 1])
        wanted, output, sums = {"entering": entering, **params[block]}, hidden, Sums()
        for _ in range(recomputes):
            output = model.recompute(block, params[block], entering, calls[block - 1], sums)
        values = torch.autograd.grad(output, list(wanted.values()), coming, allow_unused=True)
        found |= {f"{block} {name}": sums.get(name, value) for name, value in zip(wanted, values, strict=True)}
    return found


@pytest.mark.parametrize("recomputes", [0, 1, 2])
@pytest.mark.parametrize("kind", ["packed", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "granite", "deepseek_v3", "stablelm"])
def test_documents_one_by_one_give_the_gradients_of_the_mask(family, kind, recomputes, request):
    model, params = block_model(family)
    expected = gradients(model, params, kind, 0)
    calls = request.getfixturevalue("kernel")
    found = gradients(model, params, kind, recomputes)
    assert_close_tensors(found, expected, 2e-5)
    windows = {"mistral": {5}, "gemma3_text": {5, None}}.get(family, {None})
    used = {(tuple(ends.tolist()), longest, window) for ends, longest, window in calls}
    ends = {"packed": ((0, 5, 8, 12, 14, 23, 24), 9), "left": ((0, 12, 19, 24), 12), "right": ((0, 12, 24), 12)}[kind]
    if kind == "right":
        windows = windows - {None}  # there the causal kernel for whole rows does
    assert used == {(*ends, window) for window in windows}


def test_whole_rows_with_a_window_go_by_documents_too(kernel):
    model, params = block_model("mistral")
    gradients(model, params, "plain", 0)
    assert {(tuple(ends.tolist()), window) for ends, _, window in kernel} == {((0, 12, 24), 5)}


@pytest.mark.parametrize(
    "options", [{"is_causal": False}, {"position_bias": torch.zeros(2, 2, 12, 12)}, {"dropout": 0.5}]
)
def test_what_the_kernel_cannot_do_reads_the_mask(kernel, options):
    query = torch.randn(2, 2, 12, 4, generator=torch.Generator().manual_seed(0))
    mask, built = lazy(window=5)
    torch.manual_seed(0)
    found = ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Identity(), query, query, query, mask, **options)[0]
    assert len(built) == 1 and kernel == []
    torch.manual_seed(0)
    expected = ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__(nn.Identity(), query, query, query, built[0], **options)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("dim", "value_dim"), [(6, 6), (12, 8), (8, 8)])
def test_heads_the_kernel_has_no_size_for_are_widened_by_zeros(kernel, monkeypatch, dim, value_dim):
    sizes = []

    def record(query, key, value, *rest):
        sizes.append({x.shape[-1] for x in (query, key, value)})
        return by_documents(query, key, value, *rest)

    monkeypatch.setattr(attention, "_kernel", record)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 12, size, generator=generator) for heads, size in ((4, dim), (2, dim), (2, value_dim))
    )
    mask, _ = lazy(window=5)
    found = attention.attend_inside_documents(query, key, value, mask, None)
    sees = torch.ones(12, 12, dtype=torch.bool).tril() & ~torch.ones(12, 12, dtype=torch.bool).tril(-5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True).transpose(1, 2)
    assert found.shape == (2, 12, 4, value_dim)
    torch.testing.assert_close(found, expected)
    assert sizes == [{-(-dim // 8) * 8}]


# ---- everybody else


def test_outside_of_embedding_transformers_is_as_it_was():
    block_model("llama")
    positions = BATCHES["packed"]["position_ids"]
    assert masking_utils.find_packed_sequence_indices(positions).tolist()[0] == [0] * 5 + [1] * 3 + [2] * 4
    mask = masking_utils.create_causal_mask(build("llama").config, torch.zeros(2, 12, 8), None, None, positions)
    assert type(mask) is torch.Tensor and not mask[0, 0, 11, 4]


def test_another_thread_sees_nothing_of_an_embedding_model():
    block_model("llama")
    positions, found = BATCHES["packed"]["position_ids"], []
    inputs, documents = inputs_of("plain")
    with attention.masks_from(documents, inputs, "sdpa"):
        assert masking_utils.find_packed_sequence_indices(positions) is None
        thread = threading.Thread(target=lambda: found.append(masking_utils.find_packed_sequence_indices(positions)))
        thread.start()
        thread.join()
    assert found[0] is not None
    assert masking_utils.find_packed_sequence_indices(positions) is not None


def test_an_implementation_that_is_not_known_keeps_its_own_way(monkeypatch):
    block_model("llama")
    inputs, documents = inputs_of("packed")
    for implementation in ("flex_attention", "flash_attention_2", "unheard of"):
        with attention.masks_from(documents, inputs, implementation):
            assert masking_utils.find_packed_sequence_indices(inputs["position_ids"]) is not None
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", masking_utils.sdpa_mask)
    with attention.masks_from(documents, inputs, "sdpa"):  # somebody has put another function there since
        assert masking_utils.find_packed_sequence_indices(inputs["position_ids"]) is not None


def test_the_preferred_backends_are_for_horizons_models_alone(kernel, monkeypatch):
    allowed = []
    query, ours, others = torch.randn(1, 2, 4, 8), nn.Linear(1, 1), nn.Linear(1, 1)
    sdpa = F.scaled_dot_product_attention

    def record(*args, **kwargs):
        allowed.append(torch.backends.cuda.flash_sdp_enabled())
        return sdpa(*args, **kwargs)

    attention.adopt(ours)
    monkeypatch.setattr(attention, "WHOLE_ROWS", (SDPBackend.MATH,))
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    for module, mask in ((ours, None), (others, None), (ours, torch.ones(4, 4, dtype=torch.bool))):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, query, query, mask)
    assert allowed == [False, True, True]
    assert torch.backends.cuda.flash_sdp_enabled()
