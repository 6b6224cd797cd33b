"""The configuration: one dataclass per section, in Hydra's ConfigStore, so that a wrong key or type is refused by name.

Values live in conf/; what must fit together is in bench/check.py. No torch here: `--help` must be quick.
"""

import difflib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from models.config import RopeScaling


@dataclass
class StrategySection:
    """One of the files in strategies/."""

    name: str = "ulysses"


@dataclass
class ModelSection:
    """A preset, or `hf`: a Hugging Face Llama directory at `path`. Every field can be overridden."""

    name: str = "tiny"
    path: str | None = None
    dim: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    norm_eps: float | None = None
    tie_embeddings: bool | None = None


@dataclass
class DataSection:
    """`text` (bytes of files), `tokens` (a 1-D integer .npy) or `random`."""

    name: str = "text"
    path: str | None = None


@dataclass
class MeshSection:
    """Degrees; null = the strategy decides from world_size."""

    dp: int | None = None
    tp: int | None = None
    ulysses: int | None = None
    ring: int | None = None


@dataclass
class RingSection:
    layout: str = "zigzag"  # contiguous | zigzag | striped
    kv: str = "rotate"  # rotate | all_gather
    grad_dtype: str = "fp32"  # fp32 | same: how dK and dV travel


@dataclass
class UlyssesSection:
    packed: bool = False  # q, k and v in one exchange
    chunks: int = 1  # pieces of a rank's heads


@dataclass
class AttentionSection:
    kernel: str = "auto"  # auto | flash_attn | sdpa | math


@dataclass
class ChunksSection:
    chunks: int = 1  # pieces of a rank's tokens, one after the other


@dataclass
class ClusterSection:
    """The hardware that a simulated rank stands for: one of conf/cluster/. Speeds are a GPU's, in one direction."""

    name: str
    device_names: list[str]
    bf16_dense_tflops: float
    mem_gb: float
    hbm_gbps: float
    intra_kind: str
    intra_uni_gbps_per_gpu: float
    gpus_per_node: int
    nic_uni_gbps_per_gpu: float | None


@dataclass
class OptimSection:
    """AdamW (Loshchilov and Hutter 2019) on every parameter; grad_clip null = off."""

    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0


@dataclass
class Config:
    """Everything that one configuration is. See conf/config.yaml for what each key means."""

    strategy: StrategySection = field(default_factory=StrategySection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    ring: RingSection = field(default_factory=RingSection)
    ulysses: UlyssesSection = field(default_factory=UlyssesSection)
    attention: AttentionSection = field(default_factory=AttentionSection)
    mlp: ChunksSection = field(default_factory=ChunksSection)
    loss: ChunksSection = field(default_factory=ChunksSection)
    optim: OptimSection = field(default_factory=OptimSection)
    cluster: ClusterSection | None = None
    world_size: int = 4
    placement: str = "ulysses_inner"
    seq_len: int = 512
    batch_size: int = 1
    zero_stage: int = 3
    precision: str = "fp32"
    recompute: str = "none"
    compile: bool = False
    steps: int = 5
    warmup: int = 2
    seed: int = 0
    device: str = "cpu"
    mode: str = "real"
    exposed_comm: bool = False
    profile: bool = False
    full_depth: bool = False
    search: str = "none"
    workload: str = "step"
    direction: str = "forward_backward"
    rounds: int = 1
    timeout_s: float = 600.0
    save_path: str | None = None
    name: str = "default"
    rerun: str = "none"


@dataclass
class Job:
    """One configuration to run: its values, and the overrides that say it in short."""

    config: dict
    overrides: list[str]

    @classmethod
    def of(cls, composed: DictConfig, overrides: Sequence[str]) -> "Job":
        """A composed configuration as plain values, without Hydra's own section."""
        keys = [key for key in composed if key != "hydra"]
        return cls(OmegaConf.to_container(OmegaConf.masked_copy(composed, keys), resolve=True), list(overrides))

    @property
    def command(self) -> str:
        """The command line that reproduces it."""
        return shlex.join(["python", "-m", "bench", *self.overrides])


def register() -> None:
    """Make the dataclasses known to Hydra as the schema that conf/config.yaml fills."""
    ConfigStore.instance().store(name="schema", node=Config)


def sentence(error: Exception) -> str:
    """What Hydra refused, in one sentence: the key, what is wrong with it, and the nearest that would do."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice} is not one of {', '.join(error.options)}{did_you_mean(choice, error.options)}"
    cause = error.__cause__ or error
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        key = str(cause.full_key or cause.key)
        return f"there is no key {key}{did_you_mean(key, list(all_keys(OmegaConf.structured(Config))))}"
    first_lines = [str(error).splitlines()[0], str(cause).splitlines()[0]]
    return ": ".join(dict.fromkeys(line.rstrip(".") for line in first_lines))


def did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def all_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, as written on the command line."""
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from all_keys(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
