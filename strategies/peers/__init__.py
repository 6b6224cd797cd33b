"""Peers: what people would pick instead of these strategies, on the same tokens, weights, mesh and instruments.

Each file puts a library's own code where the strategy of ours that it answers to (`ours`) has its own, and leaves the
rest. A library is imported when its strategy is built, never before. Those with `adapted` call flash-attn, which is
CUDA's alone: on a CPU they get its functions over our kernel, so that a row measures their schedule, and says so. What
they do in one way only is `fixed`, key by key.
"""

from strategies.peers.ddp import DDP
from strategies.peers.deepspeed_ulysses import DeepspeedUlysses
from strategies.peers.fsdp2 import FSDP2
from strategies.peers.torch_cp import TorchCP
from strategies.peers.torch_tp import TorchTP
from strategies.peers.yunchang import Yunchang

PEERS = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    "torch_tp": TorchTP,
    "deepspeed_ulysses": DeepspeedUlysses,
    "torch_cp": TorchCP,
    "yunchang": Yunchang,
}
