"""python -m bench [-m] key=value ...   (python -m bench --help lists the keys)"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE / "plugins"))
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's errors are ours to say, in one sentence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bench.config import Job, register, sentence


@hydra.main(version_base="1.3", config_path=str(HERE.parent / "conf"), config_name="config")
def main(composed: DictConfig) -> None:
    from bench.app import run_one

    row = run_one(Job.of(composed, HydraConfig.get().overrides.task))
    if row["status"] != "ok":
        sys.exit(1)


if __name__ == "__main__":
    register()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"bench: {sentence(error)}")
    except KeyboardInterrupt:  # before the first configuration runs; later ones have their own answer
        sys.exit(130)
