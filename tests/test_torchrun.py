"""One sweep on several hosts: in step, written by the first alone, ended on all by what ends on one."""

import csv
import socket
from pathlib import Path

import pytest

from bench.app import here
from bench.ranks.hosts import interface_to, of_torchrun, ranks_per_host
from conf.resolve import resolve
from conf.words import Invalid
from tests.jobs import job
from tests.two_hosts import Pair

LONG = "steps=5,100000,6"  # the second configuration runs until something happens to it


@pytest.fixture
def pair(tmp_path):
    pairs = []

    def started(*overrides: str, restarts: int = 0) -> Pair:
        pairs.append(Pair(tmp_path, *overrides, restarts=restarts))
        return pairs[0]

    yield started
    for each in pairs:
        each.end()


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "runs" / "two" / "results.csv", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["started_at"])


def strike(hosts: Pair) -> tuple[str, str]:
    """Wait until the second configuration runs on both hosts -> the one that leads, the one that follows."""
    hosts.until(lambda: hosts.leader() and "[2/3" in hosts.log(hosts.leader()))
    leader = hosts.leader()
    follower = "b" if leader == "a" else "a"
    hosts.until(lambda: len(hosts.ranks(follower)) == 2 and len(hosts.ranks(leader)) == 2)
    return leader, follower


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_dies_on_one_host_ends_its_configuration_on_all(pair, tmp_path):
    hosts = pair("-m", "name=two", "strategy=usp", "seq_len=64", "world_size=4", LONG)
    leader, follower = strike(hosts)
    hosts.ranks(follower)[1].kill()
    assert hosts.wait() == [0, 0]
    before, hit, after = rows_of(tmp_path / leader)
    assert [before["status"], hit["status"], after["status"]] == ["ok", "error", "ok"]
    assert hit["reason"].startswith(f"host {socket.gethostname()}: rank ")
    assert hit["reason"].endswith(": the process was killed by SIGKILL")
    assert before["launch_ranks_per_host"] == "2"
    assert before["loss_first"] == after["loss_first"]
    assert list((tmp_path / follower).iterdir()) == [tmp_path / follower / "log"]  # it writes nothing


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_host_that_is_gone_is_named_and_the_sweep_goes_on_when_it_is_back(pair, tmp_path):
    hosts = pair("-m", "name=two", "strategy=ring", "seq_len=64", "world_size=4", LONG, restarts=1)
    leader, follower = strike(hosts)
    hosts.kill(follower)
    hosts.until(lambda: "it no longer answers" in hosts.log(leader))
    hosts.start(follower)
    hosts.wait()
    before, hit, after = rows_of(tmp_path / leader)
    assert [before["status"], hit["status"], after["status"]] == ["ok", "error", "ok"]
    assert hit["reason"] == f"host {socket.gethostname()}: it no longer answers"
    assert "1 of 3 rows" in hosts.log(leader) or "2 of 3 rows" in hosts.log(leader)


@pytest.mark.parametrize(
    ("ranks", "asked", "hosts", "each"), [(4, None, 2, 2), (3, None, 2, 2), (1, None, 2, 1), (4, 4, 2, 4)]
)
def test_ranks_are_shared_out(ranks, asked, hosts, each):
    config = job(f"world_size={ranks}", f"launch.ranks_per_host={asked or 'null'}").config
    assert ranks_per_host(config, hosts) == each


def test_each_host_has_gpus_for_its_own_ranks(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(here, "count_gpus", lambda: 2)
    here.check(resolve(job("launch=torchrun", "device=cuda", "strategy=tp", "world_size=4").config))
    with pytest.raises(Invalid, match=r"^device=cuda: world_size=8 needs 4 GPUs and there are 2; "):
        here.check(resolve(job("launch=torchrun", "device=cuda", "strategy=tp", "world_size=8").config))


def test_what_cannot_be_launched_is_a_sentence(monkeypatch):
    config = job("world_size=5", "launch.ranks_per_host=2").config
    with pytest.raises(
        Invalid, match=r"^launch.ranks_per_host=2: 2 hosts have room for 4 of world_size=5 .* 3 would do$"
    ):
        ranks_per_host(config, 2)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(Invalid, match=r"^launch=torchrun: this process was not started by torchrun; "):
        of_torchrun()
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Invalid, match=r"--nproc-per-node=4: one process starts"):
        of_torchrun()
    with pytest.raises(Invalid, match=r"^launch.interface: 127.0.0.1 is on this host's loopback alone; one of "):
        interface_to("127.0.0.1")
