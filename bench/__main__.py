"""python -m bench [-m] key=value ...   (python -m bench --help lists the keys)"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE / "plugins"))

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bench.config import Job, register


@hydra.main(version_base="1.3", config_path=str(HERE.parent / "conf"), config_name="config")
def main(composed: DictConfig) -> None:
    from bench.app import run_one

    row = run_one(Job.of(composed, HydraConfig.get().overrides.task))
    if row["status"] != "ok":
        sys.exit(1)


if __name__ == "__main__":
    register()
    main()
