import os
import shutil

import pytest
import torch
from hypothesis import settings

from tests.cases import HEADS, Case
from tests.ranks import pools
from tests.reference import make_checkpoint

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # A core for each worker and all its ranks: what they lose by sharing it is less than what waking each other across
    # cores costs, so two workers do more than one on both.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)  # it has counted all of them

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """A checkpoint for every number of kv heads, one of them with tied embeddings and Llama 3's rope."""
    folders = {}
    for name, n_kv_heads in HEADS.items():
        changes = {"num_key_value_heads": n_kv_heads}
        if name == "gqa":
            rope = {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
            changes |= {"tie_word_embeddings": True, "rope_parameters": rope}
        folders[name] = make_checkpoint(str(tmp_path_factory.mktemp(name)), **changes)
    return folders


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, or the one that CHROMIUM names."""
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium on this machine: apt-get install chromium, or set CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def pytest_addoption(parser) -> None:
    parser.addoption("--quick", action="store_true", help="what is right, in 90 seconds: no more than 2 ranks a case")


def is_slow(item) -> bool:
    """Is it left out of ./run.sh test quick?"""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return bool(item.get_closest_marker("slow")) or any(isinstance(v, Case) and v.world_size > 2 for v in values)


def pytest_collection_modifyitems(config, items) -> None:
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=[item for item in items if is_slow(item)])
        items[:] = [item for item in items if not is_slow(item)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def close_pools():
    yield
    for pool in pools.values():
        pool.close()
