"""What a rank runs to be measured: one step of a small random model, with every instrument on."""

import torch

import strategies
from bench.instruments.exchanges import Exchanges, watched
from bench.instruments.memory import MemoryLog
from bench.instruments.observe import Observed, observe
from bench.instruments.step import run_step
from bench.workloads.build import initial
from bench.workloads.training import PRECISIONS, Training
from conf.keys import OptimConfig
from conf.measurement import Entry, Peak
from strategies.base import Options
from strategies.ops.kernels import pick_kernel
from tests.cases import Case, sized


def build(case: Case, sizes: dict, batch: int, seq_len: int, dtype: str = "fp32", **options) -> tuple[Training, object]:
    """A Training of a small random model, and a batch."""
    config = sized(**sizes)
    dtypes = PRECISIONS[dtype]
    kernel = pick_kernel("auto", "cpu", dtypes[1], config.head_dim)
    chosen = Options(kernel, dtypes[1], **{**case.options, **options})
    training = Training(
        config,
        strategies.build(case.strategy, case.degrees, chosen, placement=case.placement),
        OptimConfig(),
        dtypes=dtypes,
        **case.model,
    ).load(lambda name, shape: initial(name, shape, 0, "cpu"))
    tokens = torch.randint(0, config.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    mask = case.mask(batch, seq_len)
    return training, training.micro_batches(tokens[:, :-1], tokens[:, 1:], case.micro_batches, mask)


def train(*args, **options) -> tuple[Training, object]:
    """The same after a first step: gradients and optimizer state are there."""
    training, batches = build(*args, **options)
    run_step(training, batches)
    return training, batches


def observed(training: Training, batches) -> Observed:
    """One more step of it, with every instrument on."""
    return observe(training, batches, MemoryLog("cpu", training.state()))


def ledger(*args, **options) -> list[Entry]:
    """The lines of comm.csv of one step, on this rank."""
    training, batches = build(*args, **options)
    training.warm()
    return observed(training, batches).comm


def flops(rank: int, *args) -> int:
    """The FLOPs of one step, on this rank."""
    return observed(*train(*args)).flops


def peak(rank: int, *args) -> Peak:
    """The memory log's peak of one step, on this rank."""
    return observed(*train(*args)).peak


def exchanges(case: Case, sizes: dict, seq_len: int) -> Exchanges:
    """What one forward exchanges, as this rank sees it."""
    training, batches = build(case, sizes, case.dp * case.micro_batches, seq_len)
    return watched(training, next(iter(batches)), seq_len)
