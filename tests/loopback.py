"""Run in a network namespace of its own: for each strategy, bytes on the loopback device beside bytes in the ledger."""

import fcntl
import json
import socket
import struct

from bench.instruments.step import run_step
from tests import instruments
from tests.cases import Case
from tests.ranks import on_ranks

CASES = [
    Case("zero", dp=4),
    *(Case(name, tp=4) for name in ("tp", "tp_sp", "odysseus")),
    Case("ulysses", ulysses=4),
    Case("ring", ring=4),
    Case("usp", ulysses=2, ring=2),
    Case("ring", ring=4, inner=2, backward="q"),
    Case("mesh_attention", ring=4, inner=2, kv="all_gather"),
    Case("tsp", ring=4, kv="all_gather"),
    Case("upipe", ulysses=4),
]
SIZES = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 512, "vocab_size": 256}
STEPS = 2


def bring_up(device: str) -> None:
    """`ip link set DEVICE up`, without needing ip."""
    get_flags, set_flags, is_up = 0x8913, 0x8914, 1
    with socket.socket() as any_socket:
        request = fcntl.ioctl(any_socket, get_flags, struct.pack("16sH14s", device.encode(), 0, b""))
        flags = struct.unpack("16sH14s", request)[1]
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14s", device.encode(), flags | is_up, b""))


def sent_by_kernel() -> int:
    with open("/proc/net/dev") as counters:
        fields = next(line for line in counters if line.strip().startswith("lo:")).partition(":")[2].split()
    return int(fields[8])


trained = {}


def prepare(rank: int, case: Case) -> float:
    """Train one step, count another, keep the state for more -> bytes in this rank's ledger."""
    trained[case] = instruments.train(case, SIZES, 2, 256)
    return sum(entry.sent_bytes for entry in instruments.observed(*trained[case]).comm)


def steps(rank: int, case: Case) -> None:
    for _ in range(STEPS):
        run_step(*trained[case])


if __name__ == "__main__":
    bring_up("lo")
    lines = []
    for case in CASES:
        in_ledger = sum(on_ranks(4, prepare, case))
        before = sent_by_kernel()
        on_ranks(4, steps, case)
        on_wire = (sent_by_kernel() - before) / STEPS
        lines.append({"case": str(case), "in_the_ledger": in_ledger, "on_the_wire": on_wire})
    print(json.dumps(lines))
