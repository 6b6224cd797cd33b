"""python -m bench [-m] key=value ...   (python -m bench --help lists the keys)"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """The command line, of `python -m bench` and of the installed command `bench`."""
    if {"--help", "-h"} & set(sys.argv[1:]):  # before Hydra, which takes longer to import than to read this
        from bench.app.help import help

        print(help())
        return
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever a path or an error holds
    sys.path.append(str(HERE / "app" / "plugins"))
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's errors are ours to say, in one sentence
    from bench.app.command import run

    run()


if __name__ == "__main__":
    main()
