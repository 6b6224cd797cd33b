"""What a row says of the hosts that it ran on."""

import os
import socket
from dataclasses import replace

import pytest

from bench.instruments import machine
from bench.instruments.capacity import cores
from conf.columns import measured
from conf.keys import LaunchConfig
from conf.measurement import Host, Measured, Peak, Rank, Round
from tests.cases import Case, config_of

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47,96-143\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tNODE\t0-47,96-143\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t48-95,144-191\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)

NIC Legend:

  NIC0: mlx5_0
"""
LINKS = {
    "GPU0": {"GPU1": "NV18", "GPU2": "SYS", "NIC0": "PIX"},
    "GPU1": {"GPU0": "NV18", "GPU2": "SYS", "NIC0": "NODE"},
    "GPU2": {"GPU0": "SYS", "GPU1": "SYS", "NIC0": "SYS"},
}


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A command of that name, which is this shell script."""

    def written(script: str) -> None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\n{script}")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return written


def test_a_host_tells_its_gpus_and_how_they_are_linked(nvidia_smi):
    line = "NVIDIA H100 80GB HBM3, 650.00, 570.86.15"
    nvidia_smi(
        f"case $1 in topo) cat <<'end'\n{TOPOLOGY}end\n;; *) echo '{line}'; echo 'A100, [N/A], 570.86.15';; esac"
    )
    host = machine.this_host.__wrapped__()
    assert host.gpus == ["NVIDIA H100 80GB HBM3", "A100"]
    assert (host.power_limits_w, host.driver, host.links) == ([650.0], "570.86.15", LINKS)


@pytest.mark.parametrize("script", ["exit 9", "echo", "echo 'No devices were found'"])
def test_a_host_whose_driver_fails_has_no_gpus(nvidia_smi, script):
    nvidia_smi(script)
    host = machine.this_host.__wrapped__()
    assert (host.gpus, host.driver, host.links) == ([], None, {})
    assert (host.name, host.cores) == (socket.gethostname(), cores())


def test_facts_of_a_moment_are_of_that_moment():
    host = machine.facts("lo", "cpu", load_before=1.5)
    assert (host.interface, host.interface_mbit, host.nccl, host.load_before) == ("lo", None, None, 1.5)
    assert host.load_after >= 0


def test_a_row_tells_what_differs_between_its_hosts():
    one = Host("hosta", "EPYC", 8, 2**36, "6.8", "performance", links=LINKS, interface="eth0", interface_mbit=10000)
    one = replace(one, power_limits_w=[650.0, 700.0], driver="570.86.15", load_before=0.1, load_after=4.0)
    other = replace(one, name="hostb", governor="powersave", load_before=0.3, load_after=3.0)
    ranks = [Rank([], 0, Peak(), 0, None, "gloo", "", rank, host=(one, other)[rank // 2]) for rank in range(4)]
    config = config_of(Case("ring", ring=4), {"dim": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1}, 1, 8)
    config.launch = LaunchConfig(ranks_per_host=2)
    row = measured(Measured(config, [Round(ranks)]))
    assert (row["hosts"], row["ranks_per_host"], row["host_names"]) == (2, 2, "hosta; hostb")
    assert (row["governor"], row["power_limit"], row["kernel"]) == ("performance; powersave", "700.0", "6.8")
    assert (row["nic"], row["gpu_links"], row["driver_version"]) == ("eth0 10000 Mbit/s", "NV18, SYS", "570.86.15")
    assert (row["load_before"], row["load_after"], row["nccl_version"]) == (0.3, 4.0, None)
    assert [host["name"] for host in row["machines"]] == ["hosta", "hostb"]


def test_a_simulated_row_ran_on_no_host():
    config = config_of(Case("ring", ring=4), {"dim": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1}, 1, 8)
    row = measured(Measured(config, [Round([Rank([], 0, Peak(), 0, None, "fake", "", 3)])]))
    assert (row["hosts"], row["machines"], row["host_names"], row["load_before"]) == (1, [], None, None)
