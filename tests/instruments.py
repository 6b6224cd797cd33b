"""What a rank runs to be measured: the ledger and the memory log of one step of a small random model."""

from dataclasses import asdict

import torch

from bench.config import OptimSection
from bench.memory import Peak
from bench.training import PRECISIONS, Training
from bench.worker import count, initial, log_memory
from models.config import ModelConfig
from strategies.base import Options
from strategies.ops.kernels import pick_kernel
from tests.cases import Case


def build(case: Case, sizes: dict, batch: int, seq_len: int, dtype: str = "fp32", **options) -> tuple[Training, object]:
    """A Training of a small random model, and a batch."""
    config = ModelConfig(**sizes)
    dtypes = PRECISIONS[dtype]
    training = Training(
        config,
        case.strategy,
        case.degrees,
        Options(pick_kernel("auto", "cpu", dtypes[1], config.head_dim), dtypes[1], **{**case.options, **options}),
        OptimSection(),
        lambda name, shape: initial(name, shape, 0, "cpu"),
        dtypes=dtypes,
        **case.model,
    )
    tokens = torch.randint(0, config.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    return training, training.place(tokens[:, :-1], tokens[:, 1:])


def train(*args) -> tuple[Training, object]:
    """The same after a first step: gradients and optimizer state are there."""
    training, placed = build(*args)
    training.backward(training.forward(placed))
    training.update()
    return training, placed


def ledger(case: Case, sizes: dict, batch: int, seq_len: int, dtype: str = "fp32", **options) -> list[dict]:
    """The lines of comm.csv of one step, on this rank."""
    book, _ = count(*build(case, sizes, batch, seq_len, dtype, **options))
    return [asdict(entry) for entry in book.entries.values()]


def peak(rank: int, case: Case, sizes: dict, batch: int, seq_len: int, dtype: str = "fp32") -> Peak:
    """The memory log's peak of one step, on this rank."""
    training, placed = train(case, sizes, batch, seq_len, dtype)
    return Peak(**log_memory(training, placed, "cpu"))
