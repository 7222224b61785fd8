"""The Hugging Face model as a skeleton: every parameter on the meta device, every buffer real on the CPU.

The host store owns the values of parameters; the skeleton owns everything else the model's code needs: modules,
configs, buffers, tied names, `requires_grad`. Its parameters are fp32 in name, as the masters are, and hold no
memory outside `init_parameters`, which borrows one unit at a time.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from horizon.errors import CheckpointError, UnsupportedModelError, one_line
from horizon.models.adapters import Adapted, adapter_of, attach, check_adapters, lora_settings, unwrapped
from horizon.models.hf_config import load_config, read_json, refuse_unsupported
from horizon.models.lora import Lora
from horizon.models.source import ADAPTER_CONFIG, resolve_model

_MASTER = torch.float32


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model (whatever `open_model` takes) whose weights will come from elsewhere: they are neither read nor drawn."""

    source: Any
    adapter: dict[str, Any] | None = None  # peft's settings of one that the model is given unless it has one

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """None that are there already."""
        return iter(())


def open_model(
    model: Any, revision: str | None = None, trust_remote_code: bool = False, lora: Lora | None = None
) -> tuple[PreTrainedModel, Path | PreTrainedModel | Unloaded | Adapted | None]:
    """The skeleton of whatever names a model (a folder, a hub id, a mapping, a live model), and where its weights are.

    Args:
        lora: of an adapter that it is given, or all that peft calls its settings; None: none.

    Returns:
        the skeleton, and the folder or live model that has the weights, or None where they are to be drawn at random.

    Raises:
        HorizonError: as `resolve_model`, `build_skeleton`, `skeleton_from_instance` and `attach`.
    """
    if isinstance(model, Unloaded):
        skeleton = open_model(model.source, revision, trust_remote_code, lora)[0]
        if model.adapter is not None and lora is None and adapter_of(skeleton) is None:
            attach(skeleton, model.adapter)
        return skeleton, model
    if lora is not None:
        base, weights = open_model(model, revision, trust_remote_code)
        return _adapted(base, weights, lora_settings(lora, base), None)
    if isinstance(model, str | Path):
        source = resolve_model(str(model), revision, trust_remote_code)
        base, weights = build_skeleton(source.folder, trust_remote_code), source.folder if source.has_weights else None
        if source.adapter is None:
            return base, weights
        return _adapted(base, weights, read_json(source.adapter / ADAPTER_CONFIG), source.adapter)
    if isinstance(model, Mapping):
        return build_skeleton(model, trust_remote_code), None
    model = unwrapped(model)
    return skeleton_from_instance(model), model


def _adapted(
    base: PreTrainedModel, weights: Any, settings: Mapping[str, Any], folder: Path | None
) -> tuple[PreTrainedModel, Adapted]:
    """A skeleton with an adapter, and where its values are; see `Adapted`."""
    skeleton = copy.deepcopy(base, {id(buffer): buffer for buffer in base.buffers()})  # files may hold buffers, too
    return skeleton, Adapted(base, weights, attach(skeleton, settings), folder)


def build_skeleton(
    source: str | Path | Mapping[str, Any] | PreTrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The skeleton of the causal LM that a folder, a mapping with `model_type` or a config describes.

    Attention is sdpa where the class supports it, else (or when the config asks for it) eager. `config.dtype` stays
    what the source says, so it still tells the dtype on disk.

    Raises:
        CheckpointError: the folder's config.json or generation_config.json cannot be read.
        ConfigError: a key of the mapping is none of the architecture's settings.
        UnsupportedModelError: the architecture is unknown, not a plain causal LM, or cannot be built.
    """
    config = load_config(source, trust_remote_code)
    refuse_unsupported(config)
    if config._attn_implementation != "eager":
        config._attn_implementation = None  # the class picks sdpa if it can
    dtype_on_disk = config.dtype
    try:
        with _parameters_on_meta(), torch.device("cpu"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=_MASTER, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # model classes are third-party code and raise what they like
        raise UnsupportedModelError(f"the {config.model_type!r} model cannot be built: {one_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    _refuse_bidirectional(model)
    model.config.dtype = dtype_on_disk
    if isinstance(source, str | Path) and (Path(source) / "generation_config.json").is_file():
        model.generation_config = _generation_config(Path(source))
    return model


def _refuse_bidirectional(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{type(model).__name__} attends in both directions ({name}); only causal language models are supported"
            )


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'generation_config.json'} cannot be read: {one_line(error)}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep their parameters on meta, while buffers are computed for real.

    A parameter is replaced the moment its module registers it, before anything is written to it, so its memory is
    never touched and the model's own initialisation runs on buffers only: on meta it would do nothing, slowly.
    """

    def replace(_module: nn.Module, _name: str, param: nn.Parameter) -> Any:
        on_meta = _as_meta(param)
        on_meta._is_hf_initialized = True  # type: ignore[attr-defined]
        return on_meta

    handle = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _as_meta(param: nn.Parameter) -> nn.Parameter:
    if param.is_meta:
        return param  # keeps tied parameters one object
    dtype = _MASTER if param.is_floating_point() else param.dtype
    return nn.Parameter(torch.empty(param.shape, dtype=dtype, device="meta"), requires_grad=param.requires_grad)


def skeleton_from_instance(model: PreTrainedModel) -> PreTrainedModel:
    """The skeleton of a live model: same class, attributes, buffers and `requires_grad`, without its weights.

    The model is copied with its parameters replaced on the way, so weights are never held twice, and what the user
    changed on the instance is kept. The model itself is left as it is.

    Raises:
        UnsupportedModelError: not a plain causal LM, its weights are not its own (device_map), or its adapters are not
            plain LoRA.
    """
    _refuse_instance(model)
    memo: dict[int, Any] = {id(param): _as_meta(param) for param in model.parameters()}
    memo |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    try:
        skeleton = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied: {one_line(error)}") from error
    if skeleton.is_gradient_checkpointing:
        skeleton.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]  # recomputation is the executor's
    return skeleton


def _refuse_instance(model: PreTrainedModel) -> None:
    what = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{what} is not a transformers model; expected a causal LM or a folder")
    refuse_unsupported(model.config)
    _refuse_bidirectional(model)
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(f"{what} has no language-model head; expected a causal LM")
    check_adapters(model)
    for name, param in model.named_parameters():
        if param.is_meta:
            raise UnsupportedModelError(f"{what} has no values for {name} (meta device); load it without offloading")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(f"{what} was spread over devices by device_map; load it without device_map")
    _refuse_hooks(model)


def _refuse_hooks(model: PreTrainedModel) -> None:
    """Modules run twice a step and the outermost ones in parts, parameters are others: a user's hook would mislead."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    places = {f"module {n or 'of the model itself'}": [getattr(m, k) for k in kinds] for n, m in model.named_modules()}
    places |= {n: [p._backward_hooks, p._post_accumulate_grad_hooks] for n, p in model.named_parameters()}
    for place, tables in places.items():
        for hook in (hook for table in tables for hook in (table or {}).values()):
            if not (getattr(hook, "__module__", None) or "").startswith("transformers."):  # its own do nothing unasked
                raise UnsupportedModelError(f"{type(model).__name__} has a hook on {place}; remove it, or use loss_fn")


def tied_aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter -> the name `named_parameters` gives it."""
    owner = {id(param): name for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: owner[id(param)] for name, param in every if owner[id(param)] != name}


def init_parameters(
    skeleton: PreTrainedModel,
    names: str | Iterable[str] = "",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Random initial values as the model's own `_init_weights` draws them: (name, fp32 tensor on `device`).

    `names` is a module prefix (`model.layers.3`; empty: all) or a collection of parameter names. One unit (a layer, the
    embedding, ...) is in memory at a time. A unit's values depend on the seed, its name and the kind of device only:
    not on which other units are drawn, and the global generators are left alone. Not for two threads at once.

    Raises:
        UnsupportedModelError: the model's code leaves a parameter without a value.
    """
    wanted = _select(skeleton, names)
    units: dict[str, list[str]] = {}
    for name, _ in skeleton.named_parameters():
        units.setdefault(_unit_of(name), []).append(name)
    for unit, members in units.items():
        if wanted.isdisjoint(members):
            continue
        values = _draw_unit(skeleton, members, torch.device(device), f"{seed}:{unit}")
        for name in members:
            value = values.pop(name)
            if name in wanted:
                yield name, value


def _select(skeleton: PreTrainedModel, names: str | Iterable[str]) -> set[str]:
    every = {name for name, _ in skeleton.named_parameters()}
    if isinstance(names, str):
        return {name for name in every if f"{name}.".startswith(f"{names}." if names else "")}
    wanted = set(names)
    if not wanted <= every:
        raise KeyError(f"{type(skeleton).__name__} has no parameter {min(wanted - every)!r}")
    return wanted


def _unit_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.3`; `model.norm.weight` -> `model.norm`."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else name.rpartition(".")[0]


def _draw_unit(skeleton: PreTrainedModel, names: list[str], device: torch.device, key: str) -> dict[str, Tensor]:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    cuda = [device] if device.type == "cuda" else []
    with _materialised(skeleton, names, device) as params, torch.random.fork_rng(cuda), torch.device(device):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        skeleton.initialize_weights()  # type: ignore[no-untyped-call]
    values = {name: param.detach() for name, param in params.items()}
    for name, value in values.items():
        if torch.isnan(value.sum()):
            raise UnsupportedModelError(
                f"{type(skeleton).__name__} does not say how {name} is initialised; start from a folder with weights"
            )
    return values


@contextmanager
def _materialised(
    skeleton: PreTrainedModel, names: list[str], device: torch.device
) -> Iterator[dict[str, nn.Parameter]]:
    """Gives the named parameters storage (NaN: not drawn yet) and marks all else as initialised, then undoes both."""
    homes = {name: name.rpartition(".")[::2] for name in names}
    kept = {name: skeleton.get_parameter(name) for name in names}
    settled = [*skeleton.parameters(), *skeleton.buffers()]
    params: dict[str, nn.Parameter] = {}
    open_modules = {""} | {path[:end] for path, _ in homes.values() for end in _prefix_ends(path)}
    try:
        for tensor in settled:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        for path, module in skeleton.named_modules():
            module._is_hf_initialized = path not in open_modules
        for name, (path, attribute) in homes.items():
            blank = torch.full(kept[name].shape, torch.nan, dtype=_MASTER, device=device)
            params[name] = nn.Parameter(blank, requires_grad=False)
            skeleton.get_submodule(path)._parameters[attribute] = params[name]
        yield params
    finally:
        for name, (path, attribute) in homes.items():
            skeleton.get_submodule(path)._parameters[attribute] = kept[name]
        for tensor in settled:
            del tensor._is_hf_initialized  # type: ignore[attr-defined]


def _prefix_ends(path: str) -> list[int]:
    return [match.end() for match in re.finditer(r"[^.]+", path)]
