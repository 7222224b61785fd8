"""On a GPU attention waits for nothing, builds no mask where a kernel does without, and computes what the mask says."""

import pytest
import torch

from horizon.models import attention
from horizon.models.blocks import BlockModel
from horizon.models.skeleton import skeleton_from_instance
from horizon.stream.batch import IGNORED, to_micro_batches
from horizon.units import MIB
from tests.gpu.models import BASE, DEVICE, FAMILIES, VOCAB, assert_close, build, engine, gradients

pytestmark = pytest.mark.gpu

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    **FAMILIES,
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": KINDS},
    "gpt_neox": {"num_attention_heads": 4, "rotary_pct": 0.5},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    "deepseek_v3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
        "num_key_value_heads": 4, "first_k_dense_replace": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    },
}  # fmt: skip
ROUTED = ("mixtral",)  # which expert a token goes to decides shapes: its layers wait for that
OWN_MASK = ("opt",)  # makes one where none is given: nobody else knows what it says
TOKENS = 48
LENGTHS = ([20, 3, 1, 24], [9, 30, 2, 7])


class Sums(dict):
    """Gradients of linear weights by name."""

    def add_product(self, name, grad, x):
        self[name] = self.get(name, 0) + grad.t() @ x


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr("tests.gpu.models.FAMILIES", MODELS)


@pytest.fixture
def kernel(monkeypatch):
    """Counts the calls of the kernel for documents."""
    calls, original = [], attention._kernel
    monkeypatch.setattr(attention, "_kernel", lambda *args: (calls.append(args[4:6]), original(*args))[1])
    return calls


def rows(kind, seed=0, tokens=TOKENS, lengths=LENGTHS):
    """A batch of two rows; no token is observed that a mask hides."""
    ids = torch.randint(3, VOCAB, (len(lengths), tokens), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind == "packed":
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        batch["labels"][batch["position_ids"] == 0] = IGNORED
    if kind in ("left", "right"):
        real, steps = torch.tensor([[tokens], [tokens // 3]]), torch.arange(tokens)
        mask = steps >= tokens - real if kind == "left" else steps < real
        batch["attention_mask"] = mask.long()
        batch["labels"][~mask] = IGNORED
        if kind == "left":
            batch["labels"][1, tokens - tokens // 3] = IGNORED  # its target would stand at a masked token
    return batch


def blocks(family, dtype):
    """The blocks of a model on the GPU, and each one's parameters as leaves."""
    source = build(family)
    model = BlockModel(skeleton_from_instance(source))
    model.to(torch.device(DEVICE))
    values, params = dict(source.named_parameters()), []
    for layout in model.layouts:
        own = {p.spec.local_name: values[p.name] for p in layout.params}
        params.append({name: v.detach().to(DEVICE, dtype).requires_grad_() for name, v in own.items()})
    return model, params


def one_layer(model, params, batch, coming, recomputes=2, block=1):
    """Output at observed tokens, and gradients by name, of an embedding and a layer run again for its backward."""
    (micro_batch,) = to_micro_batches(batch, torch.device(DEVICE), VOCAB)
    dtype = next(iter(params[block].values())).dtype
    with torch.no_grad():
        hidden, calls = model.embed(params[0], micro_batch.inputs, micro_batch.documents)
        output = model.layer(block, params[block], hidden, calls[block - 1])
    entering = hidden.detach().requires_grad_()
    wanted, sums = {"entering": entering, **params[block]}, Sums()
    for _ in range(recomputes):  # from the second one on the last product is left out
        again = model.recompute(block, params[block], entering, calls[block - 1], sums)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None].to(DEVICE, dtype)
    grads = torch.autograd.grad(again, list(wanted.values()), coming.to(DEVICE, dtype) * real, allow_unused=True)
    found = {"output": output * real, **dict(zip(wanted, grads, strict=True)), **sums}
    return {name: value.detach().float().cpu() for name, value in found.items() if value is not None}


def noise(tokens=TOKENS):
    return torch.randn(2, tokens, BASE["hidden_size"], generator=torch.Generator().manual_seed(5))


# ---- waiting


@pytest.mark.parametrize("kind", ["plain", "packed", "left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_neither_embedding_nor_a_layer_waits_for_the_device(family, kind):
    if family in OWN_MASK and kind == "plain":
        pytest.skip("asks what its own mask says")
    model, params = blocks(family, torch.bfloat16)
    coming = torch.randn(2, TOKENS, BASE["hidden_size"], device=DEVICE, dtype=torch.bfloat16)
    (micro_batch,) = to_micro_batches(rows(kind), torch.device(DEVICE), VOCAB)
    for debug in (None, "error"):  # the first time libraries may wait for what they load
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(debug or "default")
        try:
            hidden, calls = model.embed(params[0], micro_batch.inputs, micro_batch.documents)
            if family not in ROUTED:
                entering = hidden.detach().requires_grad_()
                model.layer(1, params[1], entering, calls[0])
                again = model.recompute(1, params[1], entering, calls[0], Sums())
                torch.autograd.grad(again, [entering, *params[1].values()], coming, allow_unused=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- values


@pytest.mark.parametrize("kind", ["packed", "left", "right", "plain"])
@pytest.mark.parametrize("family", [name for name in MODELS if name not in ROUTED])
def test_a_layer_is_as_near_to_fp32_as_with_a_mask_over_all_pairs(family, kind, kernel, monkeypatch):
    batch, coming = rows(kind), noise()
    exact = one_layer(*blocks(family, torch.float32), batch, coming)
    assert kernel == []  # fp32 has no kernel: reads masks
    by_kernel = one_layer(*blocks(family, torch.bfloat16), batch, coming)
    windows = {"mistral": 8, "gemma2": 8, "gemma3_text": 8}
    longest = {"packed": 30, "left": TOKENS, "right": TOKENS, "plain": TOKENS}[kind]
    goes_by_documents = kind in (["left"] if family in OWN_MASK else ["packed", "left"]) or family in windows
    assert set(kernel) == ({(longest, windows.get(family))} if goes_by_documents else set())
    monkeypatch.setattr(attention, "_kernel_takes", lambda *args: False)
    by_mask = one_layer(*blocks(family, torch.bfloat16), batch, coming)
    assert by_kernel.keys() == by_mask.keys() == exact.keys()
    for name, value in exact.items():
        limit = 2 * float((by_mask[name] - value).abs().max()) + 1e-2 * float(value.abs().max())
        assert float((by_kernel[name] - value).abs().max()) <= limit, name


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "deepseek_v3"])
def test_documents_in_a_row_do_not_see_each_other(family, kernel):
    """Outputs of a document stay, bit for bit, when all others change."""
    model, params = blocks(family, torch.bfloat16)
    outputs = []
    for seed in (0, 1):
        batch = rows("packed", seed)
        batch["input_ids"][1, 9:39] = rows("packed", 0)["input_ids"][1, 9:39]
        (micro_batch,) = to_micro_batches(batch, torch.device(DEVICE), VOCAB)
        with torch.no_grad():
            hidden, calls = model.embed(params[0], micro_batch.inputs, micro_batch.documents)
            outputs.append(model.layer(1, params[1], hidden, calls[0]))
    assert torch.equal(outputs[0][1, 9:39], outputs[1][1, 9:39])
    assert not torch.equal(outputs[0][1, :9], outputs[1][1, :9])
    assert kernel


@pytest.mark.parametrize("kind", ["packed", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_an_engine_computes_what_it_would_with_masks_over_all_pairs(family, kind, kernel, monkeypatch):
    model, step, found = build(family), [rows(kind), rows(kind, seed=1)], []
    for takes in (attention._kernel_takes, lambda *args: False):
        monkeypatch.setattr(attention, "_kernel_takes", takes)
        with engine(model, compute_dtype="bfloat16") as streamed:
            found.append(gradients(streamed, step))
    assert_close(found[0], found[1], 5e-2)
    assert bool(kernel) == (kind != "right" or family in ("mistral", "gemma2"))


@pytest.mark.parametrize(
    "backends", [["FLASH_ATTENTION", "MATH"], ["CUDNN_ATTENTION", "FLASH_ATTENTION", "MATH"], ["MATH"]]
)
def test_whole_rows_may_use_any_backend(backends, monkeypatch):
    model, step, found = build("llama"), [rows("plain")], []
    for chosen in ((), tuple(getattr(torch.nn.attention.SDPBackend, name) for name in backends)):
        monkeypatch.setattr(attention, "WHOLE_ROWS", chosen)
        with engine(model, compute_dtype="bfloat16") as streamed:
            found.append(gradients(streamed, step))
    assert_close(found[1], found[0], 5e-2)


# ---- memory


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "plain"), ("llama", "packed"), ("mistral", "plain"), ("mistral", "packed")]
)
def test_long_rows_take_memory_for_tokens_not_for_pairs_of_tokens(family, kind):
    """A mask over all pairs of 32768 tokens would take a GiB."""
    tokens = 32768
    model, params = blocks(family, torch.bfloat16)
    batch = rows(kind, tokens=tokens, lengths=([4096, 28000, 672],))
    coming = torch.randn(1, tokens, BASE["hidden_size"])
    one_layer(model, params, rows(kind), noise())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_layer(model, params, batch, coming)
    assert torch.cuda.max_memory_allocated() - before < 256 * MIB
