"""Every setting of a run, typed, with its default and its meaning. Plain dataclasses: importing this needs no Hydra.

Hydra composes `conf/` onto these classes (see `horizon.config.compose`), so an unknown key or a wrong
type fails naming the key. The library takes the same objects: `MemoryConfig` is public as `horizon.MemoryConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


# Hydra matches enums by member *name*, so names equal values.
class DataFormat(StrEnum):
    auto = "auto"  # told by the names of the files and the fields of the first record
    python_stdlib = "python_stdlib"  # the running interpreter's own library sources
    text = "text"  # every file is one text
    text_field = "text_field"  # records with a text each
    instruction = "instruction"  # records with an instruction, perhaps an input, and an output
    messages = "messages"  # records with a conversation: [{"role", "content"}, ...]
    sharegpt = "sharegpt"  # the same as [{"from", "value"}, ...]
    tokens = "tokens"  # token ids in .npy or .bin files
    mixture = "mixture"  # data.sources, each with a format of its own


class TooLong(StrEnum):
    split = "split"  # type: ignore[assignment]  # a document of more than seq_len tokens goes on in further rows
    truncate = "truncate"  # its first seq_len tokens
    drop = "drop"


class TrainOn(StrEnum):
    assistant = "assistant"  # every turn of the assistant
    last = "last"  # its last turn
    all = "all"  # the whole conversation


class OnBadData(StrEnum):
    stop = "stop"  # raise, naming file, line, field and reason
    skip = "skip"  # leave the record out, count it, go on


class LrSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class ComputeDtype(StrEnum):
    auto = "auto"  # bfloat16 on a GPU, float32 on CPU
    bfloat16 = "bfloat16"  # compute from the high halves of the masters
    float32 = "float32"  # compute from the exact fp32 masters


class Kernels(StrEnum):
    auto = "auto"  # Liger's fused kernels where they are installed and the device is a GPU, else torch's
    liger = "liger"
    torch = "torch"


class Recompute(StrEnum):
    auto = "auto"  # as little as the device budget allows
    full = "full"  # backward runs every layer again
    selective = "selective"  # again, but with the outputs of its linear layers kept
    none = "none"  # backward runs nothing again


class Policy(StrEnum):
    auto = "auto"  # on a GPU what makes the step fastest, as far as it is announced; nvme for what dram does not hold
    dram = "dram"  # the states of all blocks in host memory
    hbm_first = "hbm_first"  # of as many blocks as fit in device memory, before recomputation is bought back
    nvme_optimizer = "nvme_optimizer"  # moments and residual on nvme, weights in dram
    nvme_all = "nvme_all"  # all states on nvme, gradients that wait and activations that leave the device, too
    cxl_aware = "cxl_aware"  # what the update touches most stays in dram, what finds no room there goes to cxl
    interleave = "interleave"  # every state over all dram and cxl nodes, page by page: the naive baseline


class Tier(StrEnum):
    hbm = "hbm"  # device memory: all states of a block or none
    dram = "dram"  # host memory
    cxl = "cxl"  # host memory on other NUMA nodes
    nvme = "nvme"  # files in memory.nvme_dir


class NvmeEngine(StrEnum):
    auto = "auto"  # direct where the folder's file system allows it, else tensorstore where it is installed
    direct = "direct"  # one file past the page cache; through it, with a warning, where O_DIRECT is refused
    tensorstore = "tensorstore"  # zarr3 arrays, written by the tensorstore package


class Clip(StrEnum):
    exact = "exact"  # every update waits for the step's gradient norm
    speculative = "speculative"  # updates begin inside the backward; where the norm says otherwise, they are taken back
    lagged = "lagged"  # updates inside the backward, scaled by the norm of the step before: not exact


class MasterFormat(StrEnum):
    split = "split"  # type: ignore[assignment]  # fp32 in two halves of 2 bytes; the upper one is what streams to the device
    bf16_stochastic = "bf16_stochastic"  # 2 bytes: the fp32 update is rounded stochastically to bf16


class Moments(StrEnum):
    float32 = "float32"  # 8 bytes a parameter
    bfloat16 = "bfloat16"  # 4, rounded stochastically
    int8 = "int8"  # 2.1: codes of 8 bits, scales for each 64; rounded stochastically


class Master(StrEnum):
    fp32 = "fp32"  # 4 bytes a parameter: a bf16 weight and 16 more bits
    bf16 = "bf16"  # 2 bytes; updates are rounded stochastically
    fp16 = "fp16"  # 2 bytes; updates are rounded stochastically


class TrackerName(StrEnum):
    tensorboard = "tensorboard"
    wandb = "wandb"  # offline unless its own settings say otherwise
    mlflow = "mlflow"  # into a database in the run's folder unless its own settings say otherwise


class OnNonFinite(StrEnum):
    stop = "stop"  # raise, naming step and block; weights stay as before the step
    skip = "skip"  # drop the step's gradients, count it, go on


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """An adapter that is trained instead of the model: beside each linear layer W, W + (alpha / rank) B A."""

    rank: int | None = None  # rows of A and columns of B; null: no adapter, the model itself is trained
    alpha: float | None = None  # null: twice the rank
    targets: list[str] = field(default_factory=list)  # names of linear layers (`q_proj`); none: all but the head
    dropout: float = 0.0  # of what goes into A


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str | None = None  # folder, hub id, or a folder holding only a config.json (random weights)
    config: dict[str, Any] = field(default_factory=dict)  # without a path: a transformers config, `model_type` included
    revision: str | None = None  # of a hub id
    trust_remote_code: bool = False
    self_check: bool = True  # stream a tiny model of the architecture against plain autograd first
    freeze: list[str] = field(default_factory=list)  # name patterns (`model.embed_tokens.*`) that are not trained
    lora: LoraConfig = field(default_factory=LoraConfig)  # needs peft


@dataclass(kw_only=True, slots=True)
class FieldNames:
    """What the fields of records are called."""

    text: str = "text"
    instruction: str = "instruction"
    input: str = "input"  # may be missing
    output: str = "output"
    messages: str = "messages"
    role: str = "role"  # of a message
    content: str = "content"
    conversations: str = "conversations"  # of sharegpt
    sender: str = "from"  # of its messages
    value: str = "value"
    tools: str = "tools"  # beside a conversation: the functions that the assistant may call; may be missing


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of a mixture."""

    path: str  # file, folder, or hub id of a dataset
    name: str | None = None  # in reports; null: that of the path
    format: DataFormat = DataFormat.auto
    weight: float | None = None  # its share of the tokens trained on, beside the others'; null for all: as they are
    subset: str | None = None  # of a hub dataset
    revision: str | None = None  # of a hub dataset: branch, tag or commit; null: the newest
    split: str = "train"  # of a dataset of the `datasets` library
    fields: FieldNames = field(default_factory=FieldNames)
    token_dtype: str = "uint16"  # of .bin files


@dataclass(kw_only=True, slots=True)
class DataConfig:
    format: DataFormat = DataFormat.python_stdlib
    path: str | None = None  # file, folder, or hub id of a dataset; not used by python_stdlib and mixture
    sources: list[SourceConfig] = field(default_factory=list)  # of format=mixture
    fields: FieldNames = field(default_factory=FieldNames)
    subset: str | None = None  # of a hub dataset
    revision: str | None = None  # of a hub dataset: branch, tag or commit; null: the newest
    split: str = "train"  # of a dataset of the `datasets` library
    streaming: bool = False  # read the first max_bytes of text of a hub dataset, and do not download the rest
    token_dtype: str = "uint16"  # of .bin files
    validation_path: str | None = None  # else validation_fraction of the documents is held out
    validation_fraction: float = 0.05
    max_bytes: int | None = None  # read at most so much of each source (files, or records, in seeded order)
    on_error: OnBadData = OnBadData.stop  # at a record that cannot be read
    tokenizer: str = "auto"  # auto: the model folder's, else one trained on the text | train | bytes | a folder
    vocab_size: int = 4096  # of a trained tokenizer
    chat_template: str | None = None  # a file of Jinja; null: the tokenizer's own
    train_on: TrainOn = TrainOn.assistant  # of conversations
    too_long: TooLong = TooLong.split  # what becomes of documents that no row holds
    packing: bool = True  # several documents to a row, attention kept inside each
    shuffle: bool = True
    cache: str | None = "auto"  # folder of tokenized text; auto: horizon in the user's cache folder; null: none


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: str = "adamw"
    lr: float | None = None  # null: 1e-5 for weights that were trained before, 2e-3 for random ones
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # not applied to norms and biases
    master: MasterFormat = MasterFormat.split  # how the values of the parameters are kept between steps
    moments: Moments = Moments.float32  # how the two moments of each parameter are kept
    max_grad_norm: float | None = 1.0  # null: no clipping
    clip: Clip = Clip.exact  # when the update begins: exact | speculative | lagged
    schedule: LrSchedule = LrSchedule.cosine
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1  # the schedule ends at lr * min_lr_ratio


@dataclass(kw_only=True, slots=True)
class ZeroConfig:
    """Of optim=mezo."""

    eps: float = 1e-3  # how far weights are perturbed, absolutely
    queries: int = 1  # noise vectors a step; each costs two forward passes
    momentum: float = 0.0  # weight of the estimate of the step before, its square of the one before that, ...
    momentum_steps: int = 1  # over so many steps, this one included
    master: Master = Master.fp32  # how the host keeps weights
    writeback_every: int = 1  # steps between two times that weights go back to the host


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    steps: int = 400
    batch_size: int = 4  # rows per optimizer step
    tokens_per_step: int | None = None  # instead of batch_size: as many packed rows as hold so many tokens
    seq_len: int = 256  # tokens per row
    micro_batch: int | None = None  # rows that go through a block at once; null: the most that fits
    sample_tokens: int = 48  # length of the sample generated before and after, with its prompt at most seq_len; 0: none
    sample_prompt: str | None = None  # null: the beginning of a validation row
    on_nonfinite: OnNonFinite = OnNonFinite.stop
    save: bool = True  # write the trained model as a Hugging Face folder


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    rows: int = 64  # held-out rows that are scored, the first so many; 0: none
    every: str | None = None  # steps (`100`), a time (`10min`) or tokens (`1e9tokens`); null: before and after training
    patience: int | None = None  # end the run after so many in a row that were not better than the best; null: never
    min_delta: float = 0.0  # how much lower than the best a loss must be to count as better


@dataclass(kw_only=True, slots=True)
class TierRule:
    """Which tier holds some states of some blocks."""

    state: str = "*"  # name pattern: weights, residual, exp_avg*, ...; grads, activations
    blocks: str = "*"  # numbers, ranges (1-12) and name patterns (layers.*), separated by commas
    tier: Tier = Tier.dram


@dataclass(kw_only=True, slots=True)
class SimulatedCxl:
    """A stand-in for the cxl tier in ordinary memory, slowed down; every output calls it simulated."""

    size: str | None = None  # such as 64GiB; null: no stand-in
    gb_per_s: float = 20.0  # 1e9 bytes a second that updates read and write there; copies are not slowed


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """What Horizon may use. Budgets are `auto` or a size such as `24GiB`."""

    host_budget: str = "auto"  # DRAM of the whole process; auto: what is available; cgroup: what the cgroup allows
    host_reserve: str | None = None  # that states leave for activations and checkpoints where the rest goes to nvme
    device_budget: str = "auto"  # device memory, framework included (on CPU: for the slots); auto: what is free
    recompute: Recompute = Recompute.auto  # what backward runs again instead of keeping it; on CPU auto is full
    policy: Policy = Policy.auto  # which tier holds which states; blocks in device memory are updated there
    rules: list[TierRule] = field(default_factory=list)  # the first that fits comes before the policy
    nvme_dir: str | None = None  # folder on a local disk for states on nvme; auto uses it only where dram is too small
    nvme_budget: str = "auto"  # bytes of the files there; auto: what the file system has free, less 1 GiB
    nvme_engine: NvmeEngine = NvmeEngine.auto  # what moves states between disk and memory
    cxl_nodes: Any = "auto"  # NUMA nodes of the cxl tier, such as [2,3]; auto: those that have memory and no CPUs
    cxl_budget: str = "auto"  # bytes on the cxl tier; auto: what is free on its nodes
    cxl_simulated: SimulatedCxl = field(default_factory=SimulatedCxl)
    hbm_blocks: int | None = None  # so many blocks in device memory; null: the policy decides
    weight_slots: int | None = None  # device buffers that blocks stream through; null: 2, or 3 where steps gain by it
    turn_layers: int | None = None  # the last so many, passed micro-batch by micro-batch; null: where steps gain by it
    update_threads: int | None = None  # host threads of the optimizer; null: as measured, else all cores but one


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    save_every: str | None = None  # steps (`100`), a time (`10min`) or tokens (`1e9tokens`); null: no checkpoints
    keep: int | None = 2  # the last so many, another is on disk while it is written; null: all
    keep_best: bool = False  # evaluate at every save, and keep the one with the lowest validation loss too
    staging: str = "auto"  # host memory in which states wait for the disk, such as 8GiB; auto: half of what is left


@dataclass(kw_only=True, slots=True)
class HorizonConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    zo: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: str | None = None  # go on from the folder of a checkpoint or run; auto: from the last of this run's folder
    resume_weights_only: bool = False  # take its weights and begin at step 0
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    compute_dtype: ComputeDtype = ComputeDtype.auto
    kernels: Kernels = Kernels.auto
    seed: int = 0
    trackers: list[TrackerName] = field(default_factory=list)  # that get the metrics beside the files of the run
    trace: bool = False  # write a timeline of a few steps, trace.json and trace.png
