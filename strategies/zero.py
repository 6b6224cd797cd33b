"""zero: data parallelism with ZeRO-3, the baseline that splits no sequence. It is `single` plus sharded weights.

paper           Rajbhandari et al. 2020, ZeRO; Zhao et al. 2023, PyTorch FSDP (FSDP2 here)
tokens          whole sequences, batch / N of them
weights         1/N of everything, gathered a block at a time
attention       local
mlp             local
embedding, head local, their weights gathered like a block's
communication   forward: AG(P); backward: AG(P) + RS(P)
needs           nothing of heads or seq_len; a batch smaller than N leaves ranks without work
"""

from torch import nn

from strategies.single import Single


class Zero(Single):
    def shard(self, model: nn.Module) -> None:
        self.zero_model(model)
