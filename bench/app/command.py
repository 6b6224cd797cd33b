"""Hydra's side of the command line: it composes configurations, and what it refuses is said in one sentence."""

import multiprocessing as mp
import shlex
import sys
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from bench.app.interrupts import heed, leave
from bench.app.job import Job
from bench.app.launchers import dismiss, submit
from bench.ranks.task import HostLost
from conf import compose
from conf.files import FileFault
from conf.words import Invalid, did_you_mean

HYDRA: dict[str, Any] = {
    "defaults": ["ours", "keys", "_self_"],
    "hydra": {
        "output_subdir": None,
        "run": {"dir": "."},
        "sweep": {"dir": "runs/${name}", "subdir": "."},  # Hydra's own multirun.yaml goes there too
        "callbacks": {"searches": {"_target_": "hydra_plugins.ranks.Searches"}},
    },
}
OURS = {  # a file of its own, so that a sweep's can choose otherwise: Hydra reads from the end
    "defaults": [
        {"override hydra/launcher": "ranks"},
        {"override hydra/sweeper": "product"},
        {"override hydra/job_logging": "none"},
        {"override hydra/hydra_logging": "none"},
    ],
}
SWEEP = ("-m", "--multirun")
ASK = (
    "-c",
    "--cfg",
    "--resolve",
    "-p",
    "--package",
    "-i",
    "--info",
    "-sc",
    "--shell-completion",
    "--hydra-help",
    "--version",
)


def run() -> None:
    """Run what the command line says. Ends the process with 1 where nothing ended well; all hosts' alike."""
    code = 1
    try:
        run_words()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        dismiss(code)


def run_words() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    flags = [word for word in sys.argv[1:] if word.startswith("-")]
    try:
        heed()
        compose.register()
        ConfigStore.instance().store(name="bench", node=HYDRA)
        ConfigStore.instance().store(name="ours", node=OURS, package="_global_")
        if unknown := [flag for flag in flags if flag.partition("=")[0] not in (*SWEEP, *ASK)]:
            raise Invalid(f"there is no option {unknown[0]}{did_you_mean(unknown[0], (*SWEEP, *ASK))}")
        if set(flags) <= {*SWEEP}:  # else Hydra is asked about itself
            compose.check_overrides(words, multirun=bool(flags))
            sys.argv[1:] = [*flags, *words]  # Hydra's parser takes no flag between words
        elif both := [flag for flag in flags if flag in SWEEP]:
            without = shlex.join(word for word in sys.argv[1:] if word not in SWEEP)
            raise Invalid(
                f"{both[0]} runs a sweep, and the other options run nothing; python -m bench {without} would do"
            )
        main()
    except compose.REFUSED as error:
        sys.exit(f"bench: {compose.sentence(error)}")
    except HostLost as lost:
        sys.exit(f"bench: {lost}")
    except KeyboardInterrupt as error:  # a sweep says more
        print("interrupted", file=sys.stderr)
        leave(error)


@hydra.main(version_base="1.3", config_path=str(compose.HERE), config_name="bench")
def main(composed: DictConfig) -> float | None:
    """One configuration: a single run, or one of a sweep whose launcher is not ours."""
    from bench.app import sweepers
    from bench.app.sweep import run_one, run_part

    hydra = HydraConfig.get()
    try:
        job = Job.of(composed, hydra.overrides.task)
        if hydra.mode == RunMode.MULTIRUN:
            mp.set_start_method("forkserver", force=True)  # joblib's own is unknown to the ranks
            (row,) = run_part([job])
            return sweepers.told(row, job.config.objective, hydra)
        if job.config.launch.name == "slurm":
            submit(job.config)
    except compose.REFUSED as error:  # here: Hydra would say first that a job has failed
        if hydra.mode == RunMode.MULTIRUN:
            raise  # its launcher tells it to the process that was asked
        sys.exit(f"bench: {compose.sentence(error)}")
    try:
        row = run_one(job)
    except (FileFault, Invalid) as fault:
        sys.exit(f"bench: {fault}")
    if row["status"] != "ok":
        sys.exit(1)
    return None
