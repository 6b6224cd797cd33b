"""Every key of a configuration, once: its type, its default, what it may be, and what it means in a line.

Hydra's schema, `--help`, the checks, run_id, the columns of a row and the labels of a sweep are derived from these
dataclasses. A new key is a field here and a line where it is used. Presets (models, clusters, sweeps) are the yaml
files beside this one.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from math import isfinite
from reprlib import repr as short
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from conf.words import Invalid

MISSING: Any = "???"  # as OmegaConf writes it: a preset or a checkpoint has the value
OF_A_MACHINE = ("collectives", "kernels")  # workloads that measure what a step consists of, and run none
MOST = 2**30  # of what no one has so many of
MOST_RANKS = 2**20
HUGE = 10**300  # what is larger becomes no float, in OmegaConf and in JSON's readers
CHUNKS = 8  # of a rank, in ring.layout=balanced
INITIAL_STD = 0.02  # of a random initial matrix
PLACEMENTS = {  # the axes along which ranks are laid out, those whose neighbours are farthest apart first
    "ulysses_inner": ("dp", "ring", "ulysses", "tp"),
    "ring_inner": ("dp", "ulysses", "ring", "tp"),
    "tp_outer": ("tp", "dp", "ring", "ulysses"),
}


def key(
    default: Any,
    says: str,
    *,
    choices: tuple = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    column: str | None = None,
    identity: bool = True,
) -> Any:
    """A field of a section.

    says: its meaning in a line. choices, least, above, most: what it may be. column: its name in results.csv, where
    that is not the section's and its own. identity: is a configuration with another value another configuration?
    """
    bounds = {"choices": choices, "least": least, "above": above, "most": most}
    known = {"says": says, **bounds, "column": column, "identity": identity}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=known)
    return field(default=default, metadata=known)


def section(of: type, says: str, columns: str = "prefixed") -> Any:
    """A field that holds keys of its own. columns: `prefixed` with its name, or `plain`."""
    return field(default_factory=of, metadata={"says": says, "columns": columns})


@dataclass
class StrategyConfig:
    name: str = key("ulysses", "one of the files in strategies/, or of the peers that are raced", column="strategy")


@dataclass
class RopeScaling:
    """Llama 3.1's frequency scaling (Llama 3 herd paper, section 3.2): long waves are slowed by `factor`."""

    factor: float = key(8.0, "how much slower the longest waves are", above=0, most=MOST)
    low_freq_factor: float = key(
        1.0, "turns within the original context below which a wave is long", above=0, most=MOST
    )
    high_freq_factor: float = key(4.0, "and above which it is short", above=0, most=MOST)
    original_max_position: int = key(8192, "the original context, tokens", least=1, most=MOST)


@dataclass
class ModelConfig:
    """A Llama model's sizes. B batch, S tokens, D=dim, H=n_heads, G=n_kv_heads, K=head_dim, F=ffn_dim, V=vocab_size."""

    name: str = key("tiny", "a preset of conf/model/, or hf: a Hugging Face Llama", column="model")
    path: str | None = key(
        None,
        "of model=hf: a directory with config.json and safetensors, or ORG/NAME on the Hugging Face hub",
        column="model_path",
    )
    dim: int = key(MISSING, "hidden size", least=1, most=2**20)
    n_layers: int = key(MISSING, "blocks", least=1, most=10**4)
    n_heads: int = key(MISSING, "query heads", least=1, most=2**16)
    n_kv_heads: int = key(MISSING, "key and value heads; fewer than n_heads is GQA", least=1, most=2**16)
    head_dim: int | None = key(None, "of a head; null = dim / n_heads", least=1, most=2**16)
    ffn_dim: int = key(MISSING, "width of the gated MLP", least=1, most=2**24)
    vocab_size: int = key(MISSING, "tokens that there are", least=1, most=2**24)
    rope_theta: float = key(MISSING, "base of the rotary frequencies", above=0, most=10**12)
    rope_scaling: RopeScaling | None = key(None, "Llama 3.1's slower long waves; null = none")
    norm_eps: float = key(MISSING, "added to a norm's mean square", least=0, most=1)
    tie_embeddings: bool = key(MISSING, "the head's weight is the embedding's")

    @property
    def dim_of_head(self) -> int:
        return self.head_dim or self.dim // self.n_heads


@dataclass
class DataConfig:
    name: str = key(
        "text",
        "text: bytes of files, the standard library's by default | tokens: a 1-D integer .npy | random | hf: a data "
        "set, with the model's tokenizer",
        choices=("text", "tokens", "random", "hf"),
        column="data",
    )
    path: str | None = key(
        None,
        "the file or folder of data=text, the file of data=tokens | of data=hf: ORG/NAME on the Hugging Face hub, or a "
        "folder",
    )
    subset: str | None = key(None, "of data=hf: which, where the data set has several")
    split: str = key("train", "of data=hf")
    column: str = key("text", "of data=hf: what holds the text")


@dataclass
class DocumentsConfig:
    """Where documents end that are packed into a sequence. A token sees its own document alone."""

    name: str = key(
        "none",
        "none: a sequence is one | eos: after each documents.eos | lengths: as documents.path lists them, in turn | "
        "histogram: drawn from one of lengths, in every step the same",
        choices=("none", "eos", "lengths", "histogram"),
        column="documents",
    )
    eos: int | None = key(None, "of documents=eos: the token that ends a document", least=0, most=2**24)
    path: str | None = key(
        None, "of documents=lengths: a text of numbers | of histogram: a CSV like conf/lengths/*.csv; null = that one"
    )


@dataclass
class MeshConfig:
    dp: int | None = key(None, "ranks that share out the batch", least=1, most=MOST_RANKS)
    tp: int | None = key(None, "ranks that share out heads and columns", least=1, most=MOST_RANKS)
    ulysses: int | None = key(None, "ranks that trade tokens for heads", least=1, most=MOST_RANKS)
    ring: int | None = key(None, "ranks around which keys and values travel", least=1, most=MOST_RANKS)


@dataclass
class UlyssesConfig:
    packed: bool = key(False, "q, k and v in one exchange")
    chunks: int = key(1, "pieces of a rank's heads: one is computed while the next is exchanged", least=1, most=2**16)
    stages: int | None = key(
        None,
        "of upipe: pieces of a rank's heads, one there at a time; null = as many as a rank has heads",
        least=1,
        most=2**16,
    )

    def stages_of(self, n_heads: int) -> int:
        """In how many a rank's heads go through upipe's attention."""
        return self.stages or n_heads


@dataclass
class RingConfig:
    layout: str = key(
        "zigzag",
        "who owns which tokens; balanced: chunks dealt out so that all have as much to compute",
        choices=("contiguous", "zigzag", "striped", "balanced"),
    )
    kv: str = key(
        "rotate",
        "rotate: hops around the ring | all_gather: all keys and values at once (Llama 3) | needed: those alone that a "
        "rank's queries see",
        choices=("rotate", "all_gather", "needed"),
    )
    backward: str = key(
        "kv",
        "of ring.kv=rotate, what travels in backward: kv: keys, values and their gradients | q: queries, what their "
        "gradients need, and these (BurstAttention)",
        choices=("kv", "q"),
    )
    inner: int | None = key(
        None,
        "of ring.kv=rotate: ranks of the rings inside an outer one (LoongTrain); null = one ring | of mesh_attention: "
        "ranks of a row; null = as many as send least",
        least=1,
        most=MOST_RANKS,
    )
    cycles: str = key(
        "one",
        "of ring.kv=rotate, to be simulated: one: a hop goes to the next rank | all: in parts, around as many rings as "
        "there are that share no link, over all links at once (TASP)",
        choices=("one", "all"),
    )
    grad_dtype: str = key("fp32", "in which dK and dV, or dQ, travel", choices=("fp32", "same"))
    chunk: int | None = key(
        None, "of ring.layout=balanced: tokens of a chunk; null = 1 / (8 ring) of the sequence", least=1, most=MOST
    )

    def chunk_of(self, seq_len: int, ring: int) -> int:
        """Tokens of a chunk of ring.layout=balanced."""
        return self.chunk or max(1, seq_len // (CHUNKS * ring))


@dataclass
class AttentionConfig:
    window: int | None = key(
        None, "keys that a token sees, itself and those just before it; null = all before it", least=1, most=MOST
    )
    kernel: str = key(
        "auto",
        "what computes a tile of attention",
        choices=("auto", "flash_attn_3", "flash_attn_4", "flash_attn", "sdpa", "math"),
    )


@dataclass
class MlpConfig:
    chunks: int = key(1, "pieces of a rank's tokens, each run again in backward (ALST)", least=1, most=MOST)


@dataclass
class LossConfig:
    chunks: int = key(1, "likewise the head and the loss: logits never exist whole", least=1, most=MOST)


@dataclass
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) on every parameter."""

    lr: float = key(3e-4, "learning rate", least=0, most=10**6)
    betas: list[float] = key([0.9, 0.95], "decay of the two moments")
    eps: float = key(1e-8, "added to the root of the second moment", least=0, most=10**6)
    weight_decay: float = key(0.1, "decoupled", least=0, most=10**6)
    grad_clip: float | None = key(1.0, "longest gradient, in its 2-norm; null = off", above=0, most=1e30)


@dataclass
class ClusterConfig:
    """A GPU and its links, one of conf/cluster/. Speeds are a GPU's, in one direction."""

    name: str = key(
        MISSING, "the hardware that simulated ranks stand for: of conf/cluster/, or a file", column="cluster"
    )
    device_names: list[str] = key(MISSING, "as the driver calls it, in part")
    bf16_dense_tflops: float = key(MISSING, "dense 16-bit peak, TFLOP/s", above=0, most=10**6)
    mem_gb: float = key(MISSING, "memory, GiB", above=0, most=10**6)
    context_gb: float = key(MISSING, "of it, GiB that a process holds before it begins", least=0, most=10**6)
    hbm_gbps: float = key(MISSING, "memory bandwidth, GB/s", above=0, most=10**6)
    intra_kind: str = key(MISSING, "links inside a node")
    intra_uni_gbps_per_gpu: float = key(MISSING, "their bandwidth, GB/s", above=0, most=10**6)
    gpus_per_node: int = key(MISSING, "GPUs that these links join", least=1, most=MOST_RANKS)
    nic_uni_gbps_per_gpu: float | None = key(
        MISSING, "bandwidth between nodes, GB/s; null = unknown", above=0, most=10**6
    )
    clock: dict[str, Any] | None = key(None, "how fast it is (conf/clock.py); null = unknown, no times")

    @property
    def capacity_bytes(self) -> int:
        return int(self.mem_gb * 2**30)

    @property
    def context_bytes(self) -> int:
        return int(self.context_gb * 2**30)


@dataclass
class LaunchConfig:
    """Where ranks run: on this machine, or on every host that runs the same command."""

    name: str = key(
        "local",
        "local: on this machine | torchrun: on every host on which torchrun runs the same command | slurm: as its job",
        choices=("local", "torchrun", "slurm"),
        column="launch",
        identity=False,
    )
    ranks_per_host: int | None = key(
        None,
        "ranks that share a host, in their order; null = all, and under torchrun an equal share",
        least=1,
        most=MOST_RANKS,
    )
    interface: str | None = key(
        None, "network interface of ranks on several hosts; null = the one that leads to the first", identity=False
    )
    executor: str | None = key(
        None,
        "of launch=slurm: slurm, or to try it out local: on this machine",
        choices=("slurm", "local"),
        identity=False,
    )
    nodes: int | None = key(None, "of launch=slurm: hosts", least=1, most=MOST_RANKS, identity=False)
    gpus_per_node: int | None = key(
        None, "of launch=slurm: GPUs of each host", least=1, most=MOST_RANKS, identity=False
    )
    partition: str | None = key(None, "of launch=slurm: where; null = the cluster's default", identity=False)
    time: int | None = key(
        None,
        "of launch=slurm: minutes, after which it is submitted again and goes on",
        least=1,
        most=MOST,
        identity=False,
    )


@dataclass
class Config:
    """Everything that one configuration is."""

    strategy: StrategyConfig = section(StrategyConfig, "which strategy")
    model: ModelConfig = section(ModelConfig, "what is trained", "plain")
    data: DataConfig = section(DataConfig, "on which tokens")
    documents: DocumentsConfig = section(DocumentsConfig, "packed into a sequence")
    world_size: int = key(4, "ranks", least=1, most=MOST_RANKS)
    mesh: MeshConfig = section(MeshConfig, "degrees; their product is world_size; null = the strategy decides", "plain")
    seq_len: int = key(512, "tokens per sequence, over all ranks", least=1, most=MOST)
    batch_size: int = key(1, "sequences per step, over all ranks", least=1, most=MOST)
    micro_batches: int = key(
        1, "parts of the batch, one after the other, whose gradients add up until the step's end", least=1, most=MOST
    )
    placement: str = key(
        "ulysses_inner",
        "whose neighbours are the nearest ranks: tp's, then ulysses' | tp's, then the ring's | all others', then tp's",
        choices=tuple(PLACEMENTS),
    )
    ulysses: UlyssesConfig = section(UlyssesConfig, "how heads are exchanged")
    ring: RingConfig = section(RingConfig, "how keys and values travel")
    zero_stage: int = key(
        3,
        "0 replicas | 1 optimizer state sharded | 2 gradients, weights too | 3 gathered twice",
        choices=(0, 1, 2, 3),
    )
    precision: str = key(
        "fp32",
        "of weights and activations; bf16_mixed has fp32 masters, where its optimizer updates them",
        choices=("fp32", "bf16", "bf16_mixed"),
    )
    grad_dtype: str | None = key(
        None,
        "of bf16_mixed: in which gradients are kept and reduced: fp32, as in Megatron, or same, as in DeepSpeed",
        choices=("fp32", "same"),
    )
    attention: AttentionConfig = section(AttentionConfig, "on one block")
    recompute: str = key(
        "none",
        "what backward makes again: none | selective: norms and the MLP's product | block: all of a block",
        choices=("none", "selective", "block"),
    )
    offload: str = key(
        "none",
        "of recompute=block: activations: the inputs of blocks wait in the host's memory (ALST)",
        choices=("none", "activations"),
    )
    compile: bool = key(False, "torch.compile of the norms, the rotation and the MLP's activation")
    mlp: MlpConfig = section(MlpConfig, "the MLPs in pieces")
    loss: LossConfig = section(LossConfig, "the loss in pieces")
    optim: OptimConfig = section(OptimConfig, "AdamW", "plain")
    steps: int = key(
        5, "timed steps; of workload=collectives and kernels, how often in each of 3 passes", least=1, most=MOST
    )
    warmup: int = key(2, "steps before them", least=0, most=MOST)
    seed: int = key(0, "of weights, of random tokens, and of attention's random q, k and v", least=0, most=2**63 - 1)
    device: str = key("cpu", "cpu (gloo) | cuda, or gpu (NCCL)", choices=("cpu", "cuda"))
    mode: str = key(
        "real",
        "real: every rank | emulate: one at a time, messages made up | simulate: shapes alone, of any size",
        choices=("real", "emulate", "simulate"),
    )
    exposed_comm: bool = key(False, "of mode=real: times the step also with collectives that return at once")
    profile: bool = key(
        False, "one more step of each rank as a trace for Perfetto, in the row's folder", identity=False
    )
    exchanges: bool = key(
        False,
        "of mode=real on the CPU: who sends what to whom in a block, drawn by python -m analysis sources",
        identity=False,
    )
    full_depth: bool = key(False, "of mode=simulate: runs all layers and hops instead of counting those that are alike")
    search: str = key(
        "none",
        "of mode=simulate: the longest sequence that fits into the cluster's memory",
        choices=("none", "max_seq_len"),
    )
    cluster: ClusterConfig | None = field(
        default=None, metadata={"says": "the hardware that simulated ranks stand for", "columns": "prefixed"}
    )
    workload: str = key(
        "step",
        "step: a training step | attention: the strategy's attention alone, without a model | collectives: along each "
        "axis, by size | kernels: what a rank computes, by size",
        choices=("step", "attention", *OF_A_MACHINE),
    )
    direction: str = key("forward_backward", "of workload=attention", choices=("forward", "forward_backward"))
    rounds: int = key(
        1, "a sweep measures all its configurations so many times in turn: pairs", least=1, most=10**4, identity=False
    )
    timeout_s: float = key(600.0, "for the whole configuration", above=0, most=7 * 24 * 3600)
    launch: LaunchConfig = section(LaunchConfig, "where ranks run")
    save_path: str | None = key(None, "a folder for the trained weights, in Hugging Face's format")
    log: str = key(
        "none",
        "each row as a run of tensorboard, wandb (offline) or mlflow too, in its sweep's folder",
        choices=("none", "tensorboard", "wandb", "mlflow"),
        identity=False,
    )
    name: str = key("default", "results go to runs/<name>/", identity=False)
    rerun: str = key(
        "none",
        "which rows a sweep measures again (a single run always does)",
        choices=("none", "failed", "all"),
        identity=False,
    )
    objective: str | None = key(
        None, "of hydra/sweeper=optuna: the column whose best value it looks for, as peak_bytes", identity=False
    )

    @property
    def micro_batch_size(self) -> int:
        """Sequences over all ranks, one forward and backward."""
        return self.batch_size // self.micro_batches

    @classmethod
    def of(cls, values: Mapping) -> "Config":
        """From plain values: a composed configuration, or a record's. Keys that it does not name are as by default.

        Raises Invalid for a value of another type than its key's; whether it is within its bounds is asked later.
        """
        return made(cls, values)


@dataclass(frozen=True)
class Key:
    """A key as it is written on the command line, its column in results.csv, and the field that declares it."""

    path: str
    column: str
    declared: Field
    hint: Any

    @property
    def says(self) -> str:
        return self.declared.metadata["says"]

    @property
    def choices(self) -> tuple:
        return self.declared.metadata["choices"]

    @property
    def of_any_names(self) -> bool:
        """Does it hold an object that no schema knows? It is for record.json, then, and no cell of results.csv."""
        return get_origin(not_none(self.hint)) is dict

    @property
    def default(self) -> Any:
        made = self.declared.default_factory
        return self.declared.default if not callable(made) else made()

    def of(self, config: Config) -> Any:
        """Its value in a configuration; None where its whole section is."""
        value: Any = config
        for name in self.path.split("."):
            value = getattr(value, name) if value is not None else None
        return value

    def put(self, config: Config, value: Any) -> None:
        """Change its value in a configuration, in place."""
        *sections, name = self.path.split(".")
        holder: Any = config
        for each in sections:
            holder = getattr(holder, each)
        setattr(holder, name, value)


@cache
def keys() -> dict[str, Key]:
    """Every key, by its path, in the order in which they are declared."""
    return {found.path: found for found in keys_of(Config)}


def multiples(path: str, of: int) -> range:
    """Those of a number that a key can be."""
    return range(of, keys()[path].declared.metadata["most"] + 1, of)


def keys_of(cls: type, path: str = "", prefix: str = "") -> Iterator[Key]:
    hints = get_type_hints(cls)
    for declared in fields(cls):
        inner = section_in(hints[declared.name])
        if "columns" in declared.metadata and inner is not None:
            plain = declared.metadata["columns"] == "plain"
            yield from keys_of(inner, f"{path}{declared.name}.", "" if plain else f"{declared.name}_")
        else:
            column = declared.metadata["column"] or f"{prefix}{declared.name}"
            yield Key(f"{path}{declared.name}", column, declared, hints[declared.name])


def optional(hint: Any) -> bool:
    return isinstance(hint, UnionType)


def not_none(hint: Any) -> Any:
    """`int` of `int | None`: the type of a value that is not None."""
    return get_args(hint)[0] if optional(hint) else hint


def section_in(hint: Any) -> type | None:
    """The dataclass in an annotation, as in `ClusterConfig | None`."""
    options = get_args(hint) if optional(hint) else (hint,)
    return next((option for option in options if is_dataclass(option)), None)  # type: ignore[return-value]


def made(cls: type, values: Any, path: str = "") -> Any:
    """A dataclass from plain values; what it does not know is left out, what is not given is as by default."""
    if not isinstance(values, Mapping):
        raise Invalid(f"{path.rstrip('.') or 'config'}={short(values)} is no section with keys of its own")
    hints = get_type_hints(cls)
    given = {}
    for declared in fields(cls):
        if declared.name not in values:
            continue
        value, hint, inside = values[declared.name], hints[declared.name], f"{path}{declared.name}"
        inner = section_in(hint)
        if inner is not None and not (value is None and optional(hint)):
            value = made(inner, value, f"{inside}.")
        elif not (value == MISSING == declared.default) and (fault := not_of(hint, value)):
            raise Invalid(f"{inside}={short(value)} {fault}")
        given[declared.name] = value
    return cls(**given)


KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {  # what a value may be, and what it is not otherwise
    bool: (bool, "is neither true nor false"),
    int: (int, "is no whole number"),
    float: ((int, float), "is no number"),
    str: (str, "is no text"),
    list: (list, "is no list"),
    dict: (dict, "is no object"),
}


def not_of(hint: Any, value: Any) -> str | None:
    """What a value is not, that its type says; None if it is that."""
    if optional(hint):
        return None if value is None else not_of(not_none(hint), value)
    kind, fault = KINDS[get_origin(hint) or hint]
    fits = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
    if not fits:
        return fault
    faults = (not_of(get_args(hint)[0], item) for item in value) if kind is list else ()
    return next((f"holds what {fault}" for fault in faults if fault), None)


def beyond(rules: Mapping, value: Any) -> str | None:
    """What a value must be, that its choices and bounds say; None if it is that."""
    least, above, most = rules["least"], rules["above"], rules["most"]
    if value is None:
        return None
    if isinstance(value, float) and not isfinite(value):
        return "is not finite"
    if least is not None and value < least:
        return f"must be at least {least}"
    if above is not None and not value > above:
        return f"must be more than {above}"
    if most is not None and value > most:
        return f"must be at most {most}"
    return None


def plain(value: Any) -> Any:
    """A value as it is written in JSON."""
    return {f.name: plain(getattr(value, f.name)) for f in fields(value)} if is_dataclass(value) else value


def run_id(config: Config) -> str:
    """A hash of what of a configuration is not as by default: a new key leaves the ids of old rows as they are."""
    differs = {}
    for path, found in keys().items():
        value = plain(found.of(config))
        as_by_default = value == found.default or (found.default == MISSING and value is None)
        if found.declared.metadata["identity"] and not as_by_default:
            differs[path] = value
    return hashlib.sha256(json.dumps(differs, sort_keys=True).encode()).hexdigest()[:12]
