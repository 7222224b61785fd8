"""Attention that never asks the device and, where a kernel can do without, needs no mask over all pairs of tokens.

transformers makes masks with one registry of functions and attends with another, by the implementation's name. For
"sdpa" and "eager", functions of Horizon's stand in them. To everybody else they are transformers' own; while a model
embeds a micro-batch, they go by its `Documents`, which the host knows, instead of looking into its tensors. A causal
mask over documents is then a `LazyMask`: attention kernels for rows of various lengths do without its values, and
whatever else reads them has them built, once for all layers. A model that uses neither registry keeps its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from horizon.models.documents import Documents

# What attends over whole rows on a GPU: the only backends allowed, the best first; empty: torch chooses. Measured by
# profiling/attention.py.
WHOLE_ROWS: tuple[SDPBackend, ...] = ()

_MASKS = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
_MAX_HEAD_DIM = 256  # of the kernel for documents

MaskFunction = Callable[..., Tensor | None]


@dataclass(frozen=True, slots=True)
class _Known:
    """What the host knows of the micro-batch that a model embeds."""

    documents: Documents
    position_ids: Tensor | None  # [B, T], on the device

    def exactly(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The asked mask's arguments, such that making it takes no look at the values of any tensor."""
        if self.documents.packed:
            apart = masking_utils.packed_sequence_mask_function(self._numbers())
            within = masking_utils.and_masks(asked["mask_function"], apart)
            return {**asked, "mask_function": within, "allow_is_causal_skip": False}
        is_masked = self.documents.padded and asked.get("attention_mask") is not None
        return {**asked, "allow_is_causal_skip": False} if is_masked else asked

    def _numbers(self) -> Tensor:
        """The number of each token's document within its row, [B, T]."""
        assert self.position_ids is not None
        restarts = self.position_ids[:, 1:] != self.position_ids[:, :-1] + 1
        return F.pad(restarts.cumsum(-1), (1, 0))


_embedded: ContextVar[_Known | None] = ContextVar("the micro-batch that a model embeds", default=None)
_adopted: WeakSet[nn.Module] = WeakSet()
_installing = threading.Lock()


def adopt(skeleton: nn.Module) -> None:
    """Send this model's masks and attention through here."""
    with _installing:
        _install()
    _adopted.update(skeleton.modules())
    for module in skeleton.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # looks into the tokens, on the device
            module.__dict__["warn_if_padding_and_no_attention_mask"] = lambda *args: None


@cache
def _install() -> None:
    for name in ("sdpa", "eager"):
        _MASKS[name] = _mask_function(_MASKS[name], may_be_lazy=name == "sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_function(ALL_ATTENTION_FUNCTIONS["sdpa"])
    find = masking_utils.find_packed_sequence_indices  # waits for the device to say whether position ids restart

    @wraps(find)
    def find_unless_known(position_ids: Tensor) -> Tensor | None:
        return find(position_ids) if _embedded.get() is None else None

    masking_utils.find_packed_sequence_indices = find_unless_known


def masks_from(documents: Documents, inputs: Mapping[str, Tensor], implementation: str) -> AbstractContextManager[None]:
    """While open, masks of this attention implementation are made from what is known of the micro-batch."""
    is_ours = implementation in _MASKS and hasattr(_MASKS[implementation], "goes_by_documents")
    return _knowing(_Known(documents, inputs.get("position_ids"))) if is_ours else nullcontext()


@contextmanager
def _knowing(known: _Known) -> Iterator[None]:
    token = _embedded.set(known)
    try:
        yield
    finally:
        _embedded.reset(token)


# ---- masks


class LazyMask(Tensor):
    """A mask [B, 1, T, T] (true: may look) of documents, without storage: built when anything reads its values."""

    documents: Documents
    window: int | None  # how many tokens a token sees at most, itself included
    _build: Callable[[], Tensor]
    _built: Tensor | None
    _ends: Tensor | None

    @staticmethod
    def __new__(
        cls,
        documents: Documents,
        window: int | None,
        shape: tuple[int, ...],
        device: torch.device,
        build: Callable[[], Tensor],
    ) -> LazyMask:
        """A mask of this shape, which `build` makes when it comes to that."""
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.documents, mask.window, mask._build = documents, window, build
        mask._built, mask._ends = None, documents.ends
        return mask

    @property
    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""
        if self._built is None:
            self._built = self._build()
        return self._built

    @property
    def is_causal(self) -> bool:
        """Whether tokens that are not masked see all earlier ones of their row."""
        return self.window is None and self._ends is None

    @property
    def ends(self) -> Tensor:
        """Where documents end in the rows laid end to end, int32 [documents + 1], from 0."""
        if self._ends is None:
            rows, _, _, tokens = self.shape
            self._ends = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=self.device)
        return self._ends

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation reads the values."""
        args, kwargs = tree_map(lambda x: x.dense if isinstance(x, LazyMask) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without the values, which may not exist."""
        return f"LazyMask({tuple(self.shape)}, window={self.window})"


def _mask_function(original: MaskFunction, may_be_lazy: bool) -> MaskFunction:
    """One of transformers' mask functions; while a model embeds, it goes by what is known of the micro-batch."""

    @wraps(original)
    def make(*args: Any, **asked: Any) -> Tensor | None:
        known = _embedded.get()
        if known is None or args:
            return original(*args, **asked)
        documents, window = known.documents, _window(asked)
        if not (documents.packed or documents.padded or window):
            return original(**asked)
        # A mask of tokens where none is masked is of the model's own making: only the device knows what it says.
        understood = documents.padded == (asked.get("attention_mask") is not None)
        if not (may_be_lazy and understood and documents.divisible and _is_causal(asked)):
            return original(**known.exactly(asked))
        shape = (asked["batch_size"], 1, asked["q_length"], asked["kv_length"])
        return LazyMask(
            documents, window, shape, torch.device(asked["device"]), partial(_build, original, known, asked)
        )

    make.goes_by_documents = True  # type: ignore[attr-defined]
    return make


def _build(original: MaskFunction, known: _Known, asked: dict[str, Any]) -> Tensor:
    mask = original(**{**known.exactly(asked), "allow_is_causal_skip": False})
    assert mask is not None
    return mask


def _window(asked: Mapping[str, Any]) -> int | None:
    """How many tokens a token sees at most, where that is fewer than there are."""
    size: int | None = asked.get("local_size")
    return size if size is not None and asked["kv_length"] >= size else None


def _is_causal(asked: Mapping[str, Any]) -> bool:
    """Whether the asked mask is causal, maybe with a sliding window, and nothing else."""
    if asked.get("use_vmap") or not asked.get("allow_is_causal_skip", True) or asked.get("allow_is_bidirectional_skip"):
        return False
    if asked.get("q_offset") or asked.get("kv_offset") or asked.get("q_length") != asked["kv_length"]:
        return False
    if asked.get("local_size") is None:
        return asked["mask_function"] is masking_utils.causal_mask_function
    config = asked.get("config")
    in_chunks = getattr(config, "attention_chunk_size", None) is not None
    return not in_chunks and getattr(config, "sliding_window", None) == asked["local_size"]


# ---- attention


def _attention_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' sdpa attention, which learns to do without the values of a `LazyMask`."""

    @wraps(original)
    def attend(
        module: nn.Module,
        query: Tensor,  # [B, heads, T, D]
        key: Tensor,  # [B, key heads, T, D]
        value: Tensor,  # [B, key heads, T, value D]
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> Any:  # [B, T, heads, value D], None
        if isinstance(attention_mask, LazyMask):
            mask, looks_back = attention_mask, is_causal is not False and getattr(module, "is_causal", True)
            if not _on_gpu(query) or not looks_back or options.get("position_bias") is not None:
                attention_mask = mask.dense  # on the CPU bit for bit what transformers computes
            elif mask.is_causal:
                attention_mask = None
            elif dropout == 0 and _kernel_takes(query, key, value):
                return attend_inside_documents(query, key, value, mask, scaling), None
            else:
                attention_mask = mask.dense
        chosen = WHOLE_ROWS and attention_mask is None and _on_gpu(query) and module in _adopted
        with sdpa_kernel(list(WHOLE_ROWS), set_priority=True) if chosen else nullcontext():
            return original(
                module, query, key, value, attention_mask,
                dropout=dropout, scaling=scaling, is_causal=is_causal, **options,
            )  # fmt: skip

    return attend


def attend_inside_documents(query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scaling: float | None) -> Tensor:
    """Causal attention inside each document, without the mask's values.

    Args:
        query, key, value: as transformers hands them over, [B, heads, T, D]; the heads of keys and values divide those
            of queries.

    Returns:
        [B, T, heads, value D].
    """
    rows, _, tokens, dim = query.shape
    width = -(-max(dim, value.shape[3]) // 8) * 8  # the kernel's heads are all of one size, in steps of 8
    q, k, v = (_widened(x, width).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = dim**-0.5 if scaling is None else scaling
    output = _kernel(q, k, v, mask.ends, mask.documents.longest, mask.window, scale)
    return output.view(rows, tokens, *output.shape[1:])[..., : value.shape[3]]


def _widened(heads: Tensor, width: int) -> Tensor:
    missing = width - heads.shape[3]
    return F.pad(heads, (0, missing)) if missing else heads


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    """torch's flash attention for rows of various lengths, laid end to end: [tokens, heads, D] each."""
    behind = -1 if window is None else window - 1  # how far a token looks back; -1: all the way
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=behind, window_size_right=0,
    )[0]  # fmt: skip
    return output


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[2] == key.shape[2]
        and max(query.shape[3], value.shape[3]) <= _MAX_HEAD_DIM
        and _has_kernel(query.device.index)
    )


@cache
def _has_kernel(device: int) -> bool:
    has_flash = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return has_flash and torch.cuda.get_device_capability(device)[0] >= 8


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
