"""A machine is measured, a clock is fitted to it, and both are what they say."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis import UserError, calibrate, curves, reading, report
from bench.app import judge
from bench.app.row import resolved_here
from bench.app.sweep import run_all
from bench.instruments.flops import CountedKernel, FlopCounter
from bench.instruments.ledger import KINDS
from bench.workloads import kernels
from bench.workloads.build import build_strategy
from conf import recorded, series
from conf.clock import COLLECTIVES, KERNELS, Clock, Rate, computed
from conf.compose import configuration
from conf.groups import HERE
from conf.keys import run_id
from conf.measurement import Measured, Peak, Rank, Round, Timed, Work
from conf.words import Invalid
from tests.jobs import job

SMALL = ["strategy=zero", "seq_len=64", "steps=1", "warmup=0", "name=calibrate"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder in which both workloads were run on two ranks, and what the terminal said."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = run_all([job(*SMALL, f"workload={workload}") for workload in ("kernels", "collectives")])
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    return folder / "runs" / "calibrate"


@pytest.fixture
def folder(measured, tmp_path):
    return Path(shutil.copytree(measured, tmp_path / "calibrate"))


def file_of(folder: Path, workload: str) -> Path:
    (file,) = folder.glob(f"*/{workload}.csv")
    return file


# What is measured.


def test_every_kind_is_timed_at_every_size(measured):
    lines = series.read(file_of(measured, "collectives"))
    sizes = [2**n for n in range(10, 27)]
    assert [(line["kind"], line["bytes"]) for line in lines] == [(kind, size) for kind in COLLECTIVES for size in sizes]
    for line in lines:
        assert (line["axis"], line["ranks"], line["hosts"], line["dtype"]) == ("dp", 2, 1, "float32")
        assert line["algbw_gbps"] == pytest.approx(line["bytes"] / line["time_us"] / 1000, rel=1e-2, abs=1e-5)
        assert line["busbw_gbps"] == pytest.approx(line["sent_bytes"] / line["time_us"] / 1000, rel=1e-2, abs=1e-5)
        assert line["time_us_p10"] <= line["time_us"], "a mean, which may be above the 90th percentile"


def test_every_kernel_of_a_clock_is_timed_at_every_length(measured):
    lines = series.read(file_of(measured, "kernels"))
    timed = {name: {line["tokens"] for line in lines if line["kind"] == name} for name in KERNELS}
    assert all(timed[name] == {2, 4, 8, 16, 32, 64} for name in KERNELS if name != "optimizer")
    kinds = dict.fromkeys(line["kind"] for line in lines)
    assert set(kinds) == {"products", "attention_forward", "attention_backward", *KERNELS, "call", "group"}
    assert all(line["repeated"] == 2 * 3 for line in lines), "two ranks, three passes"


def test_a_row_of_a_machine_says_nothing_of_steps(measured):
    for file in measured.glob("*/record.json"):
        record, _ = recorded.read(file)
        assert record["machines"][0]["cores"] >= 1
        assert not {"step_ms_median", "peak_bytes", "comm_bytes", "flops_per_rank", "losses"} & record.keys()
        assert not (file.parent / "comm.csv").exists()


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_bytes_sent_are_the_ledgers(kind):
    (of_ledger, *_) = (each for each in KINDS.values() if each.name == kind)
    assert all(series.sent(kind, 4096, ranks) == of_ledger.sent(4096, ranks) for ranks in (2, 3, 8))


def test_flops_are_those_that_are_counted():
    config = resolved_here(job("strategy=single", "world_size=1", "workload=kernels").config).config
    strategy, counter = build_strategy(config), FlopCounter()
    strategy.options.kernel = CountedKernel(strategy.options.kernel, counter)
    timed = 0
    for work, run in kernels.kernels(config, strategy, tokens=32):
        if work.kind == "products":
            with FlopCounterMode(display=False) as products:
                run()
            assert products.get_total_flops() == work.flops
        elif work.flops:
            before = counter.total
            run()
            assert counter.total - before == work.flops
        timed += 1
    assert timed == 5 * 3 + 4 + 9 + 1


def test_a_tp_rank_has_its_part_of_the_columns():
    model = kernels.of_a_rank(configuration(["model=llama3_8b"]).model, 4)
    assert (model.n_heads, model.n_kv_heads, model.ffn_dim, model.dim) == (8, 2, 3584, 4096)


def test_what_cannot_be_is_no_measurement():
    config = replace(configuration(["workload=kernels"]), world_size=2)

    def found(us: float, *works: Work) -> list[Rank]:
        timed = [Timed(work, [us, us]) for work in works]
        return [Rank([], 0, Peak(), 0, "EPYC", "gloo", "2", rank=rank, series=timed) for rank in range(2)]

    product = Work("products", "float32", 8, "1 x 1 x 1", 1, flops=10**7)
    ranks = found(100.0, product)
    assert judge.broken(config, False, ranks) is None
    assert list(judge.faults(Measured(config, [Round(ranks)]))) == []
    assert "the clock of rank 0 stood" in judge.broken(config, False, found(0.0, product))
    assert "others" in judge.broken(config, False, [*found(1.0, product)[:1], *found(1.0)[1:]])
    (fault,) = judge.faults(Measured(config, [Round(found(1e-3, product))]))
    assert "products (1 x 1 x 1)" in fault
    assert "more than the device can do" in fault


def test_a_difference_that_is_all_noise_is_a_time(monkeypatch):
    config = resolved_here(job("strategy=single", "world_size=1", "workload=kernels").config).config
    strategy = build_strategy(config)
    times = iter(([100.0] * 3, [90.0, 100.0, 400.0]))  # of a model's operations, and of these with FSDP2's own Python
    calls = SimpleNamespace(n=50, messages=5)
    monkeypatch.setattr(kernels, "host_us", lambda *_: (next(times), calls))
    monkeypatch.setattr(kernels, "made_up", lambda device: strategy.mesh.zero)
    _, group = kernels.times_of_the_host(replace(config, world_size=2), strategy)
    assert group.us[-1] == (400 - 100) / 5
    assert min(group.us) > 0


def test_less_work_never_takes_longer():
    work = np.geomspace(1, 1e9, 200)
    for power in (0.5, 1.0, 1.5):
        us = Rate(10, half=1e5, power=power).us(work, np.maximum)
        assert (np.diff(us) >= -1e-9).all(), power
        assert us[0] == pytest.approx(Rate(10, half=1e5, power=power).us(1.0))


WRONG = {
    "workload=kernels mode=simulate": "workload=kernels measures this machine, and mode=simulate; mode=real would do",
    "workload=collectives strategy=single world_size=1": "world_size=1: workload=collectives needs ranks that talk",
    "workload=kernels rounds=2": "rounds=2: workload=kernels is measured steps=2 times; 1 would do",
    "workload=kernels compile=true": "compile=true: workload=kernels runs no step",
    "workload=kernels batch_size=2 micro_batches=2": "micro_batches=2: workload=kernels adds no gradients up",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_a_machine_cannot_be_asked_is_a_sentence(words):
    with pytest.raises(Invalid, match="^" + WRONG[words]):
        resolved_here(job(*words.split()).config)


# What is fitted.

TRUE = {
    "start-up and a constant rate": Rate(90.0, 4e5),
    "a rate that grows slowly": Rate(400.0, 3e6, 0.6),
    "a floor": Rate(12.0, 2e4, 1.0, 300.0),
}


@pytest.mark.parametrize("name", TRUE)
def test_a_rate_is_found_again(name):
    noise = np.random.default_rng(0).normal(0, 0.03, 34)
    work = np.repeat(2.0 ** np.arange(10, 27), 2)
    us = TRUE[name].us(work, np.maximum)
    found = curves.fit(curves.Points(work, us * np.exp(noise), "B"))
    assert np.abs(found.rate.us(work, np.maximum) / us - 1).max() < 0.06
    assert found.rate.rate == pytest.approx(TRUE[name].rate, rel=0.05)
    assert np.median(found.errors) < 0.04
    assert found.rate.floor_us == pytest.approx(TRUE[name].floor_us, rel=0.05)


def test_a_causal_block_computes_whole_tiles():
    pairs = [(i, j) for i in range(700) for j in range(700)]
    for tile in (1, 64, 512):
        ends = [min(700, (i // tile + 1) * tile) for i in range(700)]
        assert computed(700, tile) == sum(ends) == sum(j < ends[i] for i, j in pairs)


def test_the_tile_is_found_again(folder):
    for tile in (1, 32):
        as_if_in_tiles(folder, tile)
        assert calibrate.calibrated(reading.load(folder)).tile == tile


def as_if_in_tiles(folder: Path, tile: int) -> None:
    """Give attention the times that a kernel would take that computes causal blocks in such tiles."""
    file = file_of(folder, "kernels")
    lines = series.read(file)
    for line in lines:
        if line["kind"].startswith("attention"):
            share = computed(line["tokens"], tile) / computed(line["tokens"], 1) if line["causal"] else 1
            line["time_us"] = line["flops"] * share / 50_000 + 5
    text = [",".join(lines[0])] + [",".join(f'"{value}"' for value in line.values()) for line in lines]
    file.write_text("\n".join(text) + "\n")


# The file.


def test_a_file_is_a_cluster_that_can_be_used(folder, monkeypatch):
    said = calibrate.printed(folder, None)
    assert "median error" in said
    assert f"cluster={folder / 'cluster.yaml'} takes it" in said
    assert sorted(file.name for file in (folder / "calibration").glob("*.svg")) == [
        "bandwidth_over_size.svg",
        "bytes_over_size.svg",
        "flops_over_size.svg",
    ]
    for path in (str(folder / "cluster.yaml"), "here.yaml"):
        monkeypatch.chdir(folder)
        shutil.copy(folder / "cluster.yaml", folder / "here.yaml")
        config = configuration([f"cluster={path}", "mode=simulate"])
        clock = Clock.of(config.cluster.clock, config.cluster.name)
        assert set(clock.kernels) == set(KERNELS)
        assert set(clock.intra) == set(COLLECTIVES)
        assert "workload=kernels" in clock.sources
        assert clock.call_us > 0
        again = type(config).of(json.loads(json.dumps(asdict(config))))
        assert run_id(again) == run_id(config)
    measured = calibrate.calibrated(reading.load(folder))
    assert clock.products == measured.kernels["products"].rate
    assert clock.curve("intra", "p2p", 2, "x") == measured.links["intra", "p2p", 2].rate


FIELDS = (HERE / "cluster" / "b200.yaml").read_text()  # of which no clock is known
BAD = {  # what a file holds -> what the one sentence says
    "name: [": "cluster: {file}: not valid YAML (",
    "- a": "cluster: {file}: holds a list, and names with their values are needed",
    "3": "cluster: {file}: not valid YAML (",
    "name: x": "cluster={file}: device_names, bf16_dense_tflops, mem_gb, context_gb, hbm_gbps, intra_kind, ",
    FIELDS.replace("mem_gb: 180", ""): "cluster={file}: mem_gb is missing",
    FIELDS.replace("mem_gb: 180", "mem_gb: much"): "cluster={file}: mem_gb=",
    FIELDS.replace("hbm_gbps", "hbm_gpbs"): "cluster={file}=hbm_gpbs is not one of ",
    FIELDS + "clock: {sources: x}": "cluster={file}: clock.products is missing",
    FIELDS + "clock: {tile: 0, sources: x}": "cluster={file}: clock.products is missing",
}


@pytest.mark.parametrize("text", BAD)
def test_a_file_that_is_no_cluster_is_a_sentence(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(Invalid) as fault:
        configuration([f"cluster={file}"])
    assert str(fault.value).startswith(BAD[text].format(file=file))


def test_a_file_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(Invalid, match=r"^cluster: /nowhere/x.yaml: No such file or directory$"):
        configuration(["cluster=/nowhere/x.yaml"])
    with pytest.raises(Invalid, match=rf"^cluster: {tmp_path}: a folder, and a file is needed$"):
        configuration([f"cluster={tmp_path}/"])


# What is half done.


def lost(folder: Path, workload: str) -> None:
    shutil.rmtree(file_of(folder, workload).parent)


def emptied(folder: Path, workload: str) -> None:
    file_of(folder, workload).write_text("kind,axis\n")


def failed(folder: Path, workload: str) -> None:
    file = file_of(folder, workload).with_name("record.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "error", "reason": "it fell"}))


HALF = [
    (lost, "kernels", "no row is of workload=kernels; python -m bench -m sweep=calibrate measures it"),
    (lost, "collectives", "no row is of workload=collectives; "),
    (lambda folder, workload: file_of(folder, workload).unlink(), "collectives", "No such file or directory"),
    (emptied, "kernels", "kernels.csv: has no line"),
    (failed, "kernels", "its row of workload=kernels ended as error: it fell"),
]


@pytest.mark.parametrize(("damage", "workload", "says"), HALF)
def test_a_folder_that_is_half_done_is_a_sentence(damage, workload, says, folder):
    damage(folder, workload)
    with pytest.raises(UserError) as fault:
        calibrate.printed(folder, None)
    assert says in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not (folder / "cluster.yaml").exists()


def test_a_folder_of_steps_is_a_sentence():
    with pytest.raises(UserError, match="no row is of workload=kernels or collectives; python -m bench"):
        calibrate.printed(Path("runs/reference/quickstart"), None)


# What is shown.


def test_the_report_shows_the_machine(folder):
    assert report.write(folder) == []
    page = (folder / "report" / "index.html").read_text()
    assert '<h2 id="machine">' in page
    assert "<td>64 MiB</td>" in page
    assert "attention_backward" in page
    assert {"flops_over_size", "bytes_over_size", "bandwidth_over_size"} == {
        file.stem for file in (folder / "report" / "plots").glob("*.png")
    }
    assert "Not drawn" not in page


def test_the_terminal_shows_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "runs").mkdir()
    folder.rename(folder.parent / "runs" / "calibrate")
    rows = run_all([job(*SMALL, f"workload={workload}") for workload in ("kernels", "collectives")])
    assert all(row["kept"] for row in rows)
    said = capsys.readouterr().out
    assert "64 MiB" in said
    assert "GFLOP/s at" in said
    assert "collectives.csv has it all" in said


def test_a_tensor_of_every_dtype_has_equal_parts():
    from bench.workloads.collectives import sizes
    from strategies.ops.mesh import Axis

    assert all(size % (3 * 2) == 0 for size in sizes(Axis("dp", 3), torch.bfloat16))
