"""The judges: Hugging Face's Llama, and what a rank runs to be compared with it."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

import strategies
from bench.workloads.training import PRECISIONS, Batch, Training
from conf.huggingface import read_config
from conf.keys import OptimConfig
from conf.mask import PLAIN, Mask
from models.checkpoint import Checkpoint, their_name
from strategies import base, tp, tp_sp
from strategies.base import Options
from strategies.ops.kernels import pick_kernel
from strategies.ops.mesh import Axis, Mesh
from strategies.ops.weights import gradient, in_whole, owned
from tests.cases import Case, sized

SEQ_LEN = 32  # two tokens a zigzag chunk on 8 ranks


def make_checkpoint(folder: str, seed: int = 0, **changes) -> str:
    """A random Llama in transformers' own words, large enough weights for attention to be far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 100,  # divided by no degree
        "vocab_size": 67,  # nor this
        "initializer_range": 0.15,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def make_batch(batch_size: int, vocab_size: int, silent: Tensor | None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, SEQ_LEN]; the labels at the positions `silent` are -100."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(0, vocab_size, (batch_size, SEQ_LEN + 1), generator=generator)
    labels = sample[:, 1:].clone()
    if silent is not None:
        labels[:, silent] = -100
    return sample[:, :-1], labels


def positions_of_first_rank(case: Case) -> Tensor:
    """The tokens that rank 0 owns: silencing them leaves one shard without a valid label."""
    axes = {axis: Axis(axis, size) for axis, size in case.degrees.items()}
    strategy = strategies.load(case.strategy)(Mesh(**axes, zero=Axis("zero")), Options(None, **case.options))
    positions = strategy.split(torch.arange(SEQ_LEN)[None])[0]
    return positions if len(positions) < SEQ_LEN else positions[: SEQ_LEN // 4]


@dataclass
class Result:
    """What is compared: logits [B, S, V], the loss, and every gradient by our names."""

    loss: float
    logits: Tensor | None
    grads: dict[str, Tensor] = field(default_factory=dict)


def hugging_face(folder: str, tokens: Tensor, labels: Tensor, dtype=torch.float32, mask: Mask = PLAIN) -> Result:
    """Loss = sum of token losses / valid tokens, on transformers' model."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    logits = model(tokens, **in_their_words(mask, *tokens.shape, dtype)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss / (labels != -100).sum()
    loss.backward()
    ours = {their_name(name): name for name in names(folder)}
    grads = {ours[name]: p.grad for name, p in model.named_parameters() if name in ours}
    return Result(loss.item(), logits.detach(), grads)


def in_their_words(mask: Mask, batch_size: int, seq_len: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """position_ids [B, S] that restart and an additive attention_mask [B, 1, S, S], block-diagonal and banded."""
    if mask.plain:
        return {}
    tokens = torch.arange(seq_len)
    begin = torch.from_numpy(mask.begin(tokens.numpy())).expand(batch_size, -1)
    far = seq_len if mask.window is None else mask.window
    query, key = tokens[:, None], tokens[None]
    sees = (key <= query) & (key > query - far) & (begin[:, :, None] == begin[:, None, :])
    hidden = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return {"position_ids": tokens - begin, "attention_mask": hidden[:, None]}


def names(folder: str) -> list[str]:
    from models.checkpoint import parameter_shapes

    return list(parameter_shapes(sized(**read_config(folder))))


def build(
    case: Case, folder: str, dtypes=PRECISIONS["fp32"], kernel: str = "auto", compiled: bool = False, **options
) -> Training:
    """A rank's Training of a case, from a checkpoint."""
    config = sized(**read_config(folder))
    checkpoint = Checkpoint(folder)
    chosen = Options(pick_kernel(kernel, "cpu", dtypes[1], config.head_dim), dtypes[1], **{**case.options, **options})
    return Training(
        config,
        strategies.build(case.strategy, case.degrees, chosen, placement=case.placement),
        OptimConfig(lr=1e-3, grad_clip=0.5),
        dtypes=dtypes,
        **case.model,
        compiled=compiled,
    ).load(lambda name, _: checkpoint.tensor(name))


def run_case(training: Training, tokens: Tensor, labels: Tensor, mask: Mask = PLAIN) -> Result | None:
    """Forward and backward on this rank; rank 0 returns the whole result."""
    batch = training.place(tokens, labels, mask=mask)
    with recorded_logits() as recorded:
        loss = training.forward(batch)
    training.backward(loss)
    (total,) = training.global_loss(loss.detach()[None])
    parts = gradients(training)
    is_peer = type(training.strategy).__module__.startswith("strategies.peers.")
    if recorded or not is_peer:  # a peer may have a loss of its own, ours never
        parts["logits"] = whole_logits(training, batch, recorded, tokens.shape)
    grads = together(parts)
    return Result(total, grads.pop("logits", None), grads) if rank() == 0 else None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class recorded_logits:
    """Keeps the logits that the strategies hand to their losses."""

    def __enter__(self) -> list[Tensor]:
        self.kept, seen = [], []
        for module in (base, tp, tp_sp):
            for name in ("token_loss_sum", "vocab_loss_sum"):
                if (loss := getattr(module, name, None)) is not None:
                    self.kept.append((module, name, loss))
                    setattr(
                        module, name, lambda logits, *rest, loss=loss: (seen.append(logits), loss(logits, *rest))[1]
                    )
        return seen

    def __exit__(self, *exc) -> None:
        for module, name, loss in self.kept:
            setattr(module, name, loss)


def together(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put together what ranks filled in, the rest being -inf, in one message."""
    flat = torch.cat([part.flatten() for part in parts.values()])
    if dist.is_initialized():
        dist.all_reduce(flat, dist.ReduceOp.MAX)
    pieces = flat.split([part.numel() for part in parts.values()])
    return {name: piece.view_as(part) for (name, part), piece in zip(parts.items(), pieces, strict=True)}


def gradients(training: Training) -> dict[str, Tensor]:
    """Every whole gradient as far as this rank has it, -inf elsewhere."""
    for replicas in training.model.replicas:
        if replicas.stage == 1:  # only what this rank trains was reduced
            mine = replicas.trained()[1].clone()
            replicas.grads.fill_(float("-inf"))
            replicas.trained()[1].copy_(mine)
    grads = {}
    for name, parameter, share in owned(training.model):
        grads[name] = torch.full(training.shapes[name], float("-inf"), dtype=gradient(parameter).dtype)
        in_whole(grads[name], parameter, share).copy_(gradient(parameter))
    return grads


def whole_logits(training: Training, batch: Batch, recorded: list[Tensor], shape: torch.Size) -> Tensor:
    """[B, S, V], of which this rank has rows (dp), tokens (positions) and a part of the vocabulary (tp).

    recorded: a chunk of tokens each; where they were gathered over tp, each rank's part of the chunk.
    """
    gathered = training.mesh.tp.size if isinstance(training.strategy, tp_sp.TPSP) else 1
    mine = torch.cat([part.detach().unflatten(1, (gathered, -1)) for part in recorded], dim=2).flatten(1, 2)
    vocab_size = training.model.config.vocab_size
    whole = torch.full((*shape, vocab_size), float("-inf"), dtype=mine.dtype)
    rows = slice(*training.mesh.dp.span(shape[0]))
    columns = slice(*training.mesh.tp.span(vocab_size))
    if rows.start < rows.stop:
        positions = training.strategy.split(torch.arange(shape[1])[None])[0]
        whole[rows, positions, columns] = mine
    return whole


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|"""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)).item()


def worst_distance(ours: Result, theirs: Result) -> dict[str, float]:
    """The relative distance of the loss, the logits and each gradient."""
    assert ours.grads.keys() == theirs.grads.keys()
    distances = {name: distance(grad, theirs.grads[name]) for name, grad in ours.grads.items()}
    loss = abs(ours.loss - theirs.loss) / abs(theirs.loss)
    if ours.logits is not None:
        distances["logits"] = distance(ours.logits, theirs.logits)
    return {"loss": loss, **distances}


def assert_equal(ours: Result, theirs: Result, within: float, what: str) -> None:
    for name, far in worst_distance(ours, theirs).items():
        assert far < within, f"{what}: {name} is {far:.1e} away"
