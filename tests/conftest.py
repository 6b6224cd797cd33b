import pytest
from hypothesis import settings

from tests.cases import HEADS
from tests.ranks import pools
from tests.reference import make_checkpoint

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


def pytest_collection_modifyitems(items) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def close_pools():
    yield
    for pool in pools.values():
        pool.close()
