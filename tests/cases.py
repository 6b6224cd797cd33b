"""The one table of strategies and meshes that every test goes through: a new mesh is tested by being listed here."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from conf.documents import packed
from conf.keys import (
    AttentionConfig,
    Config,
    DocumentsConfig,
    LossConfig,
    MeshConfig,
    MlpConfig,
    ModelConfig,
    RingConfig,
    StrategyConfig,
    UlyssesConfig,
    keys,
)
from conf.mask import PLAIN, Mask

LAYOUTS, KV = keys()["ring.layout"].choices, keys()["ring.kv"].choices
DOCUMENTS = str(Path(__file__).parent / "documents.txt")  # of 1 token, a rank's part, more than that, a whole sequence


@dataclass(frozen=True)
class Case:
    """A strategy on a mesh."""

    strategy: str
    dp: int = 1
    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    layout: str = "zigzag"
    zero_stage: int = 3
    packed: bool = False
    head_chunks: int = 1
    stages: int | None = None
    kv: str = "rotate"
    backward: str = "kv"
    inner: int | None = None
    placement: str = "ulysses_inner"
    recompute: str = "none"
    offload: str = "none"
    micro_batches: int = 1
    mlp_chunks: int = 1
    loss_chunks: int = 1
    documents: bool = False
    window: int | None = None

    def mask(self, batch_size: int, seq_len: int) -> Mask:
        """Which tokens see each other, in sequences of a multiple of 32 tokens."""
        if self.documents:
            return packed("lengths", DOCUMENTS, batch_size, seq_len, 0, self.window)
        return PLAIN if self.window is None else Mask(window=self.window)

    @property
    def options(self) -> dict:
        """The strategy's options that differ from case to case."""
        return {
            "ring": RingConfig(self.layout, self.kv, self.backward, self.inner),
            "ulysses": UlyssesConfig(self.packed, self.head_chunks, self.stages),
            "zero_stage": self.zero_stage,
        }

    @property
    def model(self) -> dict:
        """How the model runs, as Training is told."""
        return {
            "recompute": self.recompute,
            "offload": self.offload,
            "mlp_chunks": self.mlp_chunks,
            "loss_chunks": self.loss_chunks,
        }

    @property
    def degrees(self) -> dict[str, int]:
        return {"dp": self.dp, "tp": self.tp, "ulysses": self.ulysses, "ring": self.ring}

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.ulysses * self.ring

    def fits(self, n_kv_heads: int) -> bool:
        """Has a rank as many of 8 heads, and of these kv heads, as make equal chunks?"""
        ranks = self.tp * self.ulysses
        return not any(max(1, n // ranks) % self.head_chunks for n in (8, n_kv_heads))

    def __str__(self) -> str:
        axes = " ".join(f"{axis}{size}" for axis, size in self.degrees.items() if size > 1)
        layout = self.layout if self.ring > 1 else ""
        stage = f"stage{self.zero_stage}" if self.zero_stage < 3 else ""
        chunks = f"chunks {self.mlp_chunks},{self.loss_chunks}" if max(self.mlp_chunks, self.loss_chunks) > 1 else ""
        heads = f"head chunks {self.head_chunks}" if self.head_chunks > 1 else ""
        heads = f"stages {self.stages}" if self.stages else heads
        variant = ("packed" if self.packed else "", heads, self.kv.removeprefix("rotate"))
        variant = (*variant, "queries travel" if self.backward == "q" else "", f"inner{self.inner}" * bool(self.inner))
        micro = f"micro batches {self.micro_batches}" if self.micro_batches > 1 else ""
        variant = (*variant, micro, self.recompute.removeprefix("none"), chunks)
        variant = (*variant, "offload" if self.offload != "none" else "")
        window = f"window {self.window}" if self.window is not None else ""
        variant = (*variant, "documents" if self.documents else "", window)
        inner = self.placement.removeprefix("ulysses_inner")
        return " ".join(part for part in (self.strategy, axes, layout, stage, *variant, inner) if part)


def cases(world_size: int) -> list[Case]:
    """Every strategy x mesh factorisation x layout of world_size ranks."""
    n = world_size
    found = [Case("zero", dp=n)]
    found += [Case(name, tp=n) for name in ("tp", "tp_sp", "odysseus")]
    found += [Case("ulysses", ulysses=n), Case("upipe", ulysses=n)]
    found += [Case("ring", ring=n, layout=layout) for layout in LAYOUTS]
    found += [Case("tsp", ring=n, kv="all_gather")]
    for ulysses, layout in itertools.product((u for u in range(1, n + 1) if n % u == 0), LAYOUTS):
        if ulysses < n or layout == "zigzag":
            found.append(Case("usp", ulysses=ulysses, ring=n // ulysses, layout=layout))
    found += [Case("mesh_attention", ring=n, inner=c, kv="all_gather") for c in (1, 2, 4, 8) if n % c == 0]
    if n == 4:
        found += [
            Case("mesh_attention", ring=4, inner=2, kv="all_gather", layout=layout)
            for layout in LAYOUTS
            if layout != "zigzag"
        ]
        found += [Case("mesh_attention", dp=2, ring=2, inner=2, kv="all_gather", zero_stage=1)]
        found += [Case("mesh_attention", ring=4, inner=2, kv="all_gather", recompute="block", mlp_chunks=2)]
        found += [Case("ring", ring=4, layout=layout, backward="q") for layout in LAYOUTS]
        found += [Case("ring", ring=4, layout=layout, inner=2) for layout in LAYOUTS]
        found += [Case("ring", ring=4, inner=c, backward="q") for c in (1, 4)]
        found += [Case("usp", ulysses=2, ring=2, backward="q", head_chunks=2)]
        found += [Case(name, dp=2, tp=2) for name in ("tp", "tp_sp", "odysseus")]
        found += [Case("ulysses", dp=2, ulysses=2), Case("ring", dp=2, ring=2)]
        found += [Case("tp_usp", tp=4), Case("tp_usp", ulysses=4), Case("tp_usp", tp=2, ulysses=2)]
        found += [Case(name, tp=2, ring=2, layout=layout) for name in ("tp_usp", "odysseus") for layout in LAYOUTS]
        found += [Case("odysseus", ring=4)]
        found += [Case("ulysses", ulysses=4, packed=True), Case("tp_usp", tp=2, ulysses=2, packed=True)]
        found += [Case("ulysses", dp=2, ulysses=2, head_chunks=2), Case("tp_usp", ulysses=2, ring=2, head_chunks=2)]
        found += [Case("usp", ulysses=2, ring=2, packed=True, head_chunks=2, recompute="block")]
        found += [Case("upipe", dp=2, ulysses=2), *(Case("upipe", dp=2, ulysses=2, stages=n) for n in (1, 2))]
        found += [Case("ring", ring=4, layout=layout, kv="all_gather") for layout in LAYOUTS]
        found += [Case("usp", ulysses=2, ring=2, packed=True, kv="all_gather", placement="ring_inner")]
        found += [Case("tsp", ring=4, kv="all_gather", recompute="block", layout=layout) for layout in LAYOUTS]
        found += [Case("tsp", dp=2, ring=2, kv="all_gather", zero_stage=stage) for stage in (0, 1, 2, 3)]
        found += [Case("tsp", ring=4, kv="all_gather", zero_stage=1), Case("tsp", dp=4, kv="all_gather")]
        found += [Case("tsp", ring=4, kv="all_gather", recompute="selective", loss_chunks=3)]
        found += [Case(name, tp=2, ring=2, placement="tp_outer") for name in ("tp_usp", "odysseus")]
        for stage in (0, 1, 2):
            found += [Case("zero", dp=4, zero_stage=stage), Case("usp", ulysses=2, ring=2, zero_stage=stage)]
            found += [Case(name, dp=2, tp=2, zero_stage=stage) for name in ("tp_sp", "odysseus")]
            found += [Case("upipe", ulysses=4, zero_stage=stage)]
        chunks = {"mlp_chunks": 2, "loss_chunks": 3}
        found += [
            Case("zero", dp=4, **chunks),
            Case("ulysses", ulysses=4, **chunks),
            Case("upipe", ulysses=4, **chunks),
        ]
        found += [Case(name, tp=4, **chunks) for name in ("tp", "tp_sp", "odysseus")]
        found += [Case("tp_sp", tp=4, recompute="block"), Case("ring", ring=4, recompute="block")]
        chunks = {"recompute": "block", "mlp_chunks": 3, "loss_chunks": 2}
        found += [Case(name, tp=4, **chunks) for name in ("tp", "tp_sp", "odysseus")]
        found += [Case("usp", ulysses=2, ring=2, **chunks), Case("tp_usp", tp=2, ulysses=2, **chunks)]
        found += [Case("upipe", dp=2, ulysses=2, **chunks)]
        found += [Case("zero", dp=4, recompute="selective"), Case("ulysses", ulysses=4, recompute="selective")]
        found += [Case("upipe", ulysses=4, recompute="selective")]
        found += [Case(name, dp=2, tp=2, recompute="selective") for name in ("tp", "tp_sp", "odysseus")]
        found += [Case("tp_usp", tp=2, ring=2, recompute="selective", mlp_chunks=2)]
        away = {"recompute": "block", "offload": "activations"}
        found += [Case("zero", dp=4, **away), Case("usp", ulysses=2, ring=2, mlp_chunks=2, loss_chunks=2, **away)]
        found += [Case("tsp", dp=2, ring=2, kv="all_gather", **away)]
        found += [Case("upipe", ulysses=4, **away)]
        found += [Case("tp", tp=4, **away), Case("tp_sp", dp=2, tp=2, **away), Case("odysseus", tp=2, ring=2, **away)]
    if n == 8:
        found += [Case("ring", ring=8, inner=c, backward=way) for c in (2, 4) for way in ("kv", "q")]
        found += [Case("usp", ulysses=2, ring=4, inner=2, placement="ring_inner")]
        found += [Case("tp_usp", tp=2, ring=4, inner=2), Case("odysseus", tp=2, ring=4, inner=2, backward="q")]
        found += [Case("tp_usp", tp=2, ulysses=2, ring=2, layout=layout) for layout in LAYOUTS]
        found += [Case("usp", dp=2, ulysses=2, ring=2), Case("odysseus", dp=2, tp=2, ring=2)]
        found += [Case("tp_usp", dp=2, tp=2, ring=2)]
        found += [Case("tp_sp", dp=2, tp=4, zero_stage=1, placement="tp_outer")]
    return found


MICRO = [  # a batch in parts, one after the other
    *(Case("zero", dp=4, zero_stage=stage, micro_batches=2) for stage in (0, 1, 2, 3)),
    Case("ulysses", ulysses=4, micro_batches=4),
    Case("upipe", ulysses=4, micro_batches=2),
    Case("tp_sp", dp=2, tp=2, micro_batches=2),
    Case("tp_usp", tp=2, ring=2, micro_batches=2, mlp_chunks=2, loss_chunks=2),
    Case("odysseus", tp=2, ring=2, micro_batches=2, recompute="block"),
    Case("ring", ring=4, micro_batches=2, recompute="block", offload="activations"),
    *(Case("tsp", dp=2, ring=2, kv="all_gather", micro_batches=2, zero_stage=stage) for stage in (0, 3)),
]

NEEDED = [  # around a ring, or in every sequence, nothing but what a mask lets through
    *(Case("ring", ring=n, layout=layout, kv="needed") for n in (2, 4, 8) for layout in LAYOUTS),
    *(Case("usp", ulysses=2, ring=n, layout="balanced", kv="needed") for n in (2, 4)),
    Case("odysseus", tp=2, ring=2, kv="needed", recompute="block"),
    Case("tp_usp", tp=2, ring=2, kv="needed", head_chunks=2),
    Case("ring", dp=2, ring=2, layout="contiguous", kv="needed", zero_stage=1),
]
MASKS = [{"documents": True}, {"documents": True, "window": 5}, {"window": 1}, {"window": 40}]
MASKED = [  # the same with documents and windows
    *(replace(case, documents=True) for case in NEEDED if case.world_size == 4),
    *(Case("ring", ring=4, layout=layout, kv=kv, documents=True, window=7) for layout in LAYOUTS for kv in KV),
    *(Case("ring", ring=4, layout=layout, kv="needed", window=21) for layout in LAYOUTS),
    *(
        Case("mesh_attention", ring=4, inner=2, kv="all_gather", layout=layout, documents=True, window=7)
        for layout in LAYOUTS
    ),
    Case("ring", ring=4, backward="q", documents=True),
    Case("ring", ring=4, inner=2, layout="balanced", documents=True),
    Case("zero", dp=4, documents=True),
    Case("tp", tp=4, documents=True),
    Case("tp_sp", dp=2, tp=2, documents=True, window=9),
    Case("ulysses", dp=2, ulysses=2, documents=True, head_chunks=2, packed=True),
    Case("upipe", dp=2, ulysses=2, documents=True, window=9, recompute="selective"),
    Case("usp", ulysses=2, ring=2, documents=True, recompute="selective", zero_stage=2),
    Case("ring", dp=2, ring=2, layout="balanced", documents=True, micro_batches=2),
    Case("ring", ring=4, layout="contiguous", kv="needed", documents=True, micro_batches=2, recompute="block"),
]

CASES = [Case("single"), *cases(2), *cases(4), *cases(8)]
HEADS = {"mha": 8, "gqa": 4, "few_kv": 2}  # n_kv_heads of 8 heads; few_kv: fewer than most degrees


def sized(**sizes) -> ModelConfig:
    """A model of these sizes, its head_dim dim / n_heads unless said."""
    plain = {"head_dim": sizes["dim"] // sizes["n_heads"], "tie_embeddings": False, "norm_eps": 1e-5}
    return ModelConfig(**{**plain, "rope_theta": 10000.0, **sizes})


def config_of(
    case: Case,
    sizes: dict,
    batch_size: int,
    seq_len: int,
    precision: str = "fp32",
    ring_grad_dtype: str = "fp32",
    full_depth: bool = False,
    grad_dtype: str = "fp32",
) -> Config:
    """A case as a resolved configuration, to simulate or to ask the account for."""
    return Config(
        strategy=StrategyConfig(case.strategy),
        mesh=MeshConfig(**case.degrees),
        world_size=case.world_size,
        ring=RingConfig(case.layout, case.kv, case.backward, case.inner, ring_grad_dtype),
        ulysses=UlyssesConfig(case.packed, case.head_chunks, case.stages),
        model=sized(**sizes),
        mlp=MlpConfig(case.mlp_chunks),
        loss=LossConfig(case.loss_chunks),
        documents=DocumentsConfig("lengths", path=DOCUMENTS) if case.documents else DocumentsConfig(),
        attention=AttentionConfig(window=case.window),
        mode="simulate",
        full_depth=full_depth,
        placement=case.placement,
        seq_len=seq_len,
        batch_size=batch_size,
        micro_batches=case.micro_batches,
        precision=precision,
        grad_dtype=grad_dtype if precision == "bf16_mixed" else None,
        recompute=case.recompute,
        offload=case.offload,
        zero_stage=case.zero_stage,
    )
