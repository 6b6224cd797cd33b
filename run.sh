#!/usr/bin/env bash
# ./run.sh        set up, run the sweep `quickstart`, write its report: runs/quickstart/report/index.html
# ./run.sh test   set up, check style and types, run the tests; ./run.sh test quick: those that take 90 seconds in all
#                 ./run.sh test faults: 200 faults into sweeps and 50 kills of them, about an hour, not part of the tests
# ./run.sh peers  set up, install the libraries that ours are raced against, race them, write the report: runs/peers/report/
# ./run.sh gpu    with the Python and torch that are already here: the CUDA tests and the sweeps that time one GPU
set -euo pipefail
cd "$(dirname "$0")"

set_up() {
    local python=${PYTHON:-python3} stamp
    stamp=$(cat pyproject.toml <("$python" --version) | cksum)
    if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
        "$python" -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: set PYTHON") if sys.version_info < (3, 11) else None'
        echo "installing into .venv (once) ..."
        "$python" -m venv .venv
        # torch first and by its exact version, so that a wheel already on the machine is taken and nothing pulls another.
        .venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
        .venv/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
        echo "$stamp" > .venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

# The report's pages are tested in a real browser: Debian's chromium, or the one that CHROMIUM names.
find_browser() {
    if [ -z "${CHROMIUM:-}" ] && ! command -v chromium > /dev/null; then
        echo "no chromium here: the tests of the report's pages will be skipped (apt-get install chromium)" >&2
    fi
}

case "${1:-quickstart}" in
    quickstart)
        set_up
        python -m bench -m sweep=quickstart rerun=all
        python -m analysis report runs/quickstart
        ;;
    peers)
        set_up
        # DeepSpeed without the CUDA kernels that it would otherwise build.
        DS_BUILD_OPS=0 pip install --quiet --disable-pip-version-check --editable '.[peers]'
        python -m bench -m sweep=peers
        python -m bench -m sweep=peers_step
        python -m bench -m sweep=peers_ddp
        python -m analysis report runs/peers
        python -m analysis report runs/peers_step
        ;;
    test)
        set_up
        shift
        if [ "${1:-}" = faults ]; then
            shift
            exec python -m tests.faults.campaign "$@"
        fi
        find_browser
        ruff check .
        ruff format --check .
        mypy
        if [ "${1:-}" = quick ]; then
            shift
            set -- --quick "$@"  # no array: macOS' bash takes an empty one for an unset name
        fi
        python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
        ;;
    gpu)
        failed=0
        python3 -m pytest -q -m cuda tests || failed=1
        for sweep in gpu gpu_attention gpu_block; do
            python3 -m bench -m sweep=$sweep rerun=all || failed=1
        done
        exit $failed
        ;;
    *)
        echo "run.sh knows: (nothing), test, peers, gpu; not '$1'" >&2
        exit 2
        ;;
esac
