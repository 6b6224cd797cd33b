"""A campaign of faults into whole sweeps, from outside: python -m tests.faults.campaign --help."""
