"""The host that a rank runs on: what a reader of its times must know, as far as the host tells.

What does not change is looked up once, in the server from which ranks are forked (bench/ranks/worker.py).
"""

import os
import platform
import re
import shutil
import socket
import subprocess
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path

import psutil
import torch

from bench.instruments import capacity
from conf.measurement import Host

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CPUINFO = Path("/proc/cpuinfo")
PATIENCE_S = 20  # with the driver of a GPU


def load() -> float:
    """How many processes wanted a core, in the last minute."""
    return round(os.getloadavg()[0], 2)


def facts(interface: str, device: str, load_before: float) -> Host:
    """This host now, after a measurement that talked over this network interface."""
    card = psutil.net_if_stats().get(interface)
    return replace(
        this_host(),
        interface=interface,
        interface_mbit=card.speed or None if card else None,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else None,
        load_before=load_before,
        load_after=load(),
    )


@cache
def this_host() -> Host:
    """What does not change while it runs."""
    listed = asked("--query-gpu=name,power.limit,driver_version", "--format=csv,noheader,nounits")
    gpus = re.findall(r"^(.+), (.+), (.+)$", listed, re.MULTILINE)
    return Host(
        name=socket.gethostname(),
        cpu=cpu_name(),
        cores=capacity.cores(),
        memory_bytes=capacity.memory_bytes(),
        kernel=platform.release(),
        governor=GOVERNOR.read_text().strip() if GOVERNOR.exists() else None,
        gpus=[name for name, _, _ in gpus],
        power_limits_w=[float(watt) for _, watt, _ in gpus if re.fullmatch(r"[\d.]+", watt)],
        driver=gpus[0][2] if gpus else None,
        links=links_in(asked("topo", "-m")) if gpus else {},
    )


def asked(*arguments: str) -> str:
    """What nvidia-smi says; nothing where there is none, or it fails."""
    if (command := shutil.which("nvidia-smi")) is None:
        return ""
    try:
        result = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def links_in(topology: str) -> dict[str, dict[str, str]]:
    """Of `nvidia-smi topo -m`: how each GPU is linked to the others and to the network cards (NV18, PIX, SYS, ..)."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).split("\t") for line in topology.splitlines()]
    heads, *rows = [[word.strip() for word in line] for line in lines] or [[]]
    devices = list(takewhile(lambda head: head != "CPU Affinity", heads[1:]))
    return {
        name: {to: link for to, link in zip(devices, links, strict=False) if to != name}
        for name, *links in rows
        if re.fullmatch(r"GPU\d+", name)
    }


def cpu_name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "CPU",
    )
