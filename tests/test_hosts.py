"""Two hosts of network namespaces: what is said to leave a host is what the kernel counts on the cable between them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.hosts import ROOT, NotAllowed, TwoHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE_S = 300  # a busy machine takes long to import torch four times


@pytest.fixture
def two_hosts():
    with ExitStack() as stack:
        try:
            yield stack.enter_context(TwoHosts())
        except NotAllowed as why:
            pytest.skip(str(why))


def run(two: TwoHosts, folder: Path, *arguments: str) -> str:
    """Run it by torchrun on both hosts -> what the first said."""
    logs = [folder / "hosta.log", folder / "hostb.log"]
    with ExitStack() as stack:
        outputs = [stack.enter_context(open(log, "w")) for log in logs]
        agents = two.torchrun(list(arguments), outputs, folder=str(folder))
        deadline = time.monotonic() + PATIENCE_S
        codes = [agent.wait(max(1, deadline - time.monotonic())) for agent in agents]
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(said)
    return said[0]


def test_what_is_said_to_leave_a_host_is_on_the_cable(two_hosts, tmp_path):
    """Of each collective; and of a step with each axis inside a host and across."""
    lines = json.loads(run(two_hosts, tmp_path, "--nproc-per-node=2", "-m", "tests.cable").splitlines()[-1])
    assert len(lines) == 10
    for line in lines:
        assert line["counted"] == pytest.approx(line["said"], rel=0.03), line["what"]


def test_rows_of_two_hosts_say_what_went_between_them(two_hosts, tmp_path):
    """usp with ulysses inside a host and the ring across, and the reverse, in one sweep."""
    asked = ["strategy=usp", "model.n_kv_heads=8", "seq_len=1024", "steps=3", "warmup=1", "name=two"]
    asked += ["placement=ulysses_inner,ring_inner"]
    run(two_hosts, tmp_path, "--nproc-per-node=1", "-m", "bench", "-m", *asked, "launch=torchrun")
    with open(tmp_path / "runs" / "two" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "ok"]
    for row in rows:
        assert (row["hosts"], row["ranks_per_host"], row["host_names"]) == ("2", "2", "hosta; hostb")
        assert row["nic"].startswith("veth0")
        assert int(row["comm_bytes_intra"]) + int(row["comm_bytes_inter"]) == int(row["comm_bytes"])
    ring_across, ulysses_across = (int(row["comm_bytes_inter"]) for row in rows)
    assert ring_across > ulysses_across  # as many kv heads as heads
    said = 2 * 5 * (ring_across + ulysses_across)  # two ranks a host, a step to warm up, three timed, one observed
    for host in two_hosts.hosts:
        assert host.sent() == pytest.approx(said, rel=0.03)


def test_hosts_go_with_whoever_made_them(two_hosts):
    """Even where that was killed. (two_hosts: or there can be none.)"""
    code = "import time; from tests.hosts import TwoHosts\nwith TwoHosts() as two:\n"
    code += "    print(*(host.pid for host in two.hosts), flush=True); time.sleep(600)"
    maker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    hosts = [psutil.Process(int(pid)) for pid in maker.stdout.readline().split()]
    assert len(hosts) == 2
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate()
    _, left = psutil.wait_procs(hosts, timeout=60)
    assert not left
