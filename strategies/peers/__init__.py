"""Peers: what people would pick instead of these strategies, on the same tokens, weights, mesh and instruments.

Each file puts a library's own code where the strategy of ours that it answers to has its own, and leaves the rest;
which that is, and what the library needs, stands in conf/meshes.py. A library is imported when its strategy is built,
never before. Those that are `adapted` call flash-attn, which is CUDA's alone: on a CPU they get its functions over our
kernel, so that a row measures their schedule, and says so.
"""
