"""Self-check of an architecture: a tiny random model of the same class, streamed against plain autograd.

The config is shrunk (few layers of every type, small widths), everything else of it is kept, so what the
architecture does between blocks is exercised before a large model trusts it.
"""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig, ModelConfig
from horizon.errors import ConfigError, HorizonError, UnsupportedModelError
from horizon.models.hf_config import load_config
from horizon.models.skeleton import build_skeleton, init_parameters, skeleton_from_instance
from horizon.models.sources import resolve_model
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import Clipping
from horizon.runtime import Runtime, build_runtime
from horizon.stream.batch import to_micro_batches

ROWS, TOKENS = 2, 24
TOLERANCE = 1e-5  # of the largest gradient: fp32 summation order; what is wrong is wrong by far more

_passed: dict[str, CheckReport] = {}


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What the self-check compared."""

    architecture: str
    num_layers: int
    num_parameters: int  # names compared
    loss_difference: float
    worst_gradient: str
    worst_difference: float  # relative to the gradient's largest element
    packs: bool  # position ids that restart keep the documents of a row apart

    def __str__(self) -> str:
        return (
            f"{self.architecture}: ok, {self.num_layers} layers streamed against plain autograd; {self.num_parameters} "
            f"gradients by name, worst {self.worst_gradient} off by {self.worst_difference:.1e} of its largest; "
            f"{'keeps packed documents apart' if self.packs else 'cannot pack documents: set data.packing=false'}"
        )


def check_model(model: ModelConfig) -> CheckReport:
    """Check the architecture that the settings name (`horizon check`).

    Raises:
        UnsupportedModelError: it cannot be streamed; says why.
    """
    if model.path is None and not model.config:
        raise UnsupportedModelError("no model to check: set model.path to a folder or hub id, or choose model=...")
    if model.path is not None:
        source = resolve_model(model.path, model.revision, model.trust_remote_code)
        config = load_config(source.folder, model.trust_remote_code)
    else:
        config = load_config({"vocab_size": 256, **model.config}, model.trust_remote_code)
    return ensure_supported(config, model.trust_remote_code)


def ensure_supported(config: Any, trust_remote_code: bool = False) -> CheckReport:
    """The check of an architecture, run once per process.

    Raises:
        UnsupportedModelError: it cannot be streamed; says why.
    """
    key = json.dumps(shrunk(config).to_dict(), sort_keys=True, default=str)
    if key not in _passed:
        _passed[key] = run_check(config, trust_remote_code)
    return _passed[key]


def run_check(config: Any, trust_remote_code: bool = False) -> CheckReport:
    """Stream a shrunk model of `config` and compare loss and every gradient with plain autograd.

    Raises:
        UnsupportedModelError: naming the parameter that differs, or why the model cannot be cut into blocks.
    """
    small = shrunk(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, small.get_text_config().vocab_size, (ROWS, TOKENS), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    try:
        reference = materialised(build_skeleton(small, trust_remote_code))
        loss, expected = plain_gradients(reference, batch)
    except HorizonError:
        raise
    except Exception as error:  # third-party model code, given sizes nobody trains with
        raise UnsupportedModelError(
            f"{config.model_type!r} cannot be checked: its shrunk model does not run ({error!r}); "
            "self_check=False (model.self_check=false) trains it unchecked"
        ) from error
    streamed_loss, found, packs = _streamed(reference, batch)
    name, worst = _worst(expected, found)
    report = CheckReport(
        type(reference).__name__, small.num_hidden_layers, len(expected), abs(loss - streamed_loss), name, worst,
        packs,
    )  # fmt: skip
    if worst > TOLERANCE or report.loss_difference > TOLERANCE * max(1.0, abs(loss)):
        raise UnsupportedModelError(
            f"{report.architecture} does not compute the same in blocks: loss {streamed_loss:.6f} against {loss:.6f}, "
            f"gradient of {name} off by {worst:.1e} of its largest element; this architecture cannot be streamed"
        )
    return report


def plain_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name of an ordinary forward and backward, dropout off."""
    model.eval()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def materialised(skeleton: Any, seed: int = 0) -> Any:
    """An ordinary CPU model with the random weights that `skeleton` would get; the skeleton is left as it was."""
    values = dict(init_parameters(skeleton, seed=seed))
    model = copy.deepcopy(skeleton)
    owners: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if id(parameter) not in owners:
            owners[id(parameter)] = nn.Parameter(_spread(values[name]), requires_grad=parameter.requires_grad)
        model.get_submodule(path)._parameters[leaf] = owners[id(parameter)]
    return model


def _spread(value: Tensor) -> Tensor:
    """Break the symmetry of constant initial values (norms, biases), so that a swapped parameter shows."""
    ramp = torch.linspace(-0.1, 0.1, value.numel()).view(value.shape)
    return value + ramp if bool((value == value.flatten()[0]).all()) else value.clone()


def _streamed(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], bool]:
    """The same model, run block by block on the CPU: loss, gradients by name, whether it keeps documents apart."""
    try:
        runtime = build_runtime(
            skeleton_from_instance(model), model, optimizer=AdamW(), memory=MemoryConfig(), device="cpu",
            compute_dtype=ComputeDtype.float32, seed=0, freeze=(), keeps_gradients=True, kernels=Kernels.torch,
            clipping=Clipping(),
        )  # fmt: skip
        try:
            batches = to_micro_batches(batch, runtime.device, runtime.model.vocab_size)
            loss = float(runtime.accumulate(batches, seed=0, old_share=0.0, loss_fn=None))
            return loss, dict(runtime.read_gradients()), _keeps_documents_apart(runtime, batch["input_ids"])
        finally:
            runtime.close()
    except HorizonError:
        raise
    except Exception as error:  # third-party model code may raise anything when called in an unusual way
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be streamed: running it block by block fails with {error!r}"
        ) from error


def _keeps_documents_apart(runtime: Runtime, tokens: Tensor) -> bool:
    """Whether a document's logits are the same alone and packed behind another one, told apart by position ids only."""
    half = tokens.shape[1] // 2
    positions = torch.arange(half).repeat(2).expand(tokens.shape[0], -1)
    packed = {"input_ids": tokens[:, : 2 * half], "position_ids": positions}
    alone = {"input_ids": tokens[:, half : 2 * half]}
    try:
        runtime.model.check_inputs(list(packed))
    except ConfigError:  # the model takes no position ids
        return False
    batches = to_micro_batches([packed, alone], runtime.device, runtime.model.vocab_size, need_labels=False)
    behind, by_itself = runtime.executor.last_logits(batches, runtime.version)
    return torch.allclose(behind, by_itself, atol=1e-4)


def _worst(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[str, float]:
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())[0]
        return odd, float("inf")
    differences = {
        name: float((found[name] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for name, g in expected.items()
    }
    name = max(differences, key=lambda n: differences[n])
    return name, differences[name]


def shrunk(config: Any) -> Any:
    """A copy of a transformers config with the same layer types and switches, small enough to run in a second."""
    small, settings = copy.deepcopy(config), config.to_dict()
    heads, kv_heads = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    sizes = {
        "hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96,
        "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "word_embed_proj_dim": 64,
        "num_attention_heads": 4, "n_head": 4, "head_dim": 16,
        "num_key_value_heads": max(1, 4 * kv_heads // heads) if heads and kv_heads else 4,
        "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 256, "sliding_window": 8, "max_position_embeddings": 128, "n_positions": 128,
        "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if "qk_rope_head_dim" in settings:
        del sizes["head_dim"]  # there it follows from the parts of a head
    random = {key for key in settings if "drop" in key or "jitter" in key}
    sizes |= {key: 0 for key in random if isinstance(settings[key], float)}
    for key, value in sizes.items():
        if isinstance(settings.get(key), int | float) and not isinstance(settings[key], bool):
            with contextlib.suppress(AttributeError):  # a property that follows from other settings
                setattr(small, key, type(settings[key])(value))
    _keep_layer_types(settings, small)
    return small


def _keep_layer_types(settings: dict[str, Any], small: Any) -> None:
    """As many layers as it takes to see every kind, at least two."""
    types, depth = list(settings.get("layer_types") or []), small.num_hidden_layers
    shallow = min(depth, max([2, *(types.index(kind) + 1 for kind in set(types))]))
    if types:
        with contextlib.suppress(AttributeError):
            small.layer_types = types[:shallow]
    small.num_hidden_layers = shallow
