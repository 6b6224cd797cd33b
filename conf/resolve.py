"""From what the user wrote to what will run: every null filled and every rule checked, before any rank starts.

What depends on the machine (are the data, the GPUs, a peer's package here?) is asked by bench/app/here.py.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from conf import hub, meshes
from conf.files import FileFault
from conf.groups import written
from conf.huggingface import read_config, read_end
from conf.keys import MISSING, OF_A_MACHINE, Config, ModelConfig, beyond, keys, multiples
from conf.words import Invalid, around, divisors, one_of

MOST_DRAWN = 8  # ranks, a colour each
UNDIVIDED = 4, 6  # ranks all of whose links to each other are no disjoint rings


@dataclass
class Resolved:
    """A configuration that can stand, and notes of what a reader of its row should know."""

    config: Config
    notes: list[str] = field(default_factory=list)


def resolve(written: Config) -> Resolved:
    """The configuration with every null filled. Raises Invalid."""
    resolved = Resolved(copy.deepcopy(written))
    config = resolved.config
    if config.model.name == "hf":
        fill_from_checkpoint(resolved)
    check_values(config)
    check_data(config)
    check_mode(config)
    if config.workload in OF_A_MACHINE:
        check_machine(config)
    if (peer := meshes.PEERS.get(config.strategy.name)) is not None:
        check_peer(resolved, peer)
    resolved.notes += meshes.fix(config)
    fill_model(config.model)
    fill_grad_dtype(config)
    check_offload(config)
    check_documents(resolved)
    check_ring(config)
    check_stages(config)
    meshes.fill(config)
    check_cycles(config)
    fill_rows(config)
    check_batch(resolved)
    return resolved


def check_values(config: Config) -> None:
    """Each key by itself: its choices and its bounds."""
    if config.strategy.name not in meshes.names():
        raise Invalid(one_of("strategy", config.strategy.name, meshes.names()))
    for path, key in keys().items():
        value, rules = key.of(config), key.declared.metadata
        if value == MISSING:
            raise Invalid(f"{path} is missing, and model={config.model.name} does not say it")
        if value is not None:
            check_value(path, rules, value)

    betas, rope = config.optim.betas, config.model.rope_scaling
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise Invalid(f"optim.betas={betas} must be two numbers from 0 up to 1; [0.9, 0.95] would do")
    if rope is not None:
        for each in fields(rope):
            check_value(f"model.rope_scaling.{each.name}", each.metadata, getattr(rope, each.name))
        if not rope.low_freq_factor < rope.high_freq_factor:
            raise Invalid(
                f"model.rope_scaling.low_freq_factor={rope.low_freq_factor} must be less than high_freq_factor = "
                f"{rope.high_freq_factor}; {rope.high_freq_factor / 4} would do"
            )


def check_value(path: str, rules: Mapping, value: Any) -> None:
    if rules["choices"] and value not in rules["choices"]:
        raise Invalid(one_of(written(path), value, rules["choices"]))
    if (fault := beyond(rules, value)) is not None:
        raise Invalid(f"{path}={value} {fault}")


def check_mode(config: Config) -> None:
    """What a mode cannot do."""
    mode = config.mode
    if mode == "simulate" and config.rounds > 1:
        raise Invalid(
            f"rounds={config.rounds}: mode=simulate measures no time, so there is nothing to repeat; 1 would do"
        )
    if mode == "simulate" and config.profile and (config.cluster is None or config.cluster.clock is None):
        raise Invalid("profile=true: mode=simulate draws what a cluster's clock tells; cluster=h100 would do")
    if mode == "simulate" and config.compile:
        raise Invalid("compile=true: mode=simulate computes nothing, and knows no fused kernels; mode=emulate would do")
    if mode == "simulate" and config.attention.kernel.startswith("flash_attn"):
        name = config.attention.kernel
        raise Invalid(
            f"attention.kernel={name} has no implementation on fake tensors; sdpa, which keeps as much, would do"
        )
    if mode != "real" and config.save_path is not None:
        raise Invalid(
            f"save_path={config.save_path}: mode={mode} trains nothing worth saving; null or mode=real would do"
        )
    if config.save_path is not None and config.workload != "step":
        raise Invalid(f"save_path={config.save_path}: workload={config.workload} trains nothing; null would do")
    if mode != "real" and config.exposed_comm:
        raise Invalid(f"exposed_comm=true needs real collectives to compare with, and mode={mode}; mode=real would do")
    if config.exchanges and not (
        mode == "real"
        and config.device == "cpu"
        and config.workload == "step"
        and 1 < config.world_size <= MOST_DRAWN
        and config.strategy.name not in meshes.PEERS
    ):
        raise Invalid(
            "exchanges=true looks on while 2 to 8 ranks of this machine's CPU run a step of one of our strategies: "
            "mode=real device=cpu workload=step world_size=4 would do"
        )
    if mode != "simulate" and (config.search != "none" or config.full_depth):
        key = "full_depth=true" if config.search == "none" else f"search={config.search}"
        raise Invalid(f"{key} is for mode=simulate, and mode={mode}")
    if config.search != "none" and config.cluster is None:
        raise Invalid(f"search={config.search} needs to know how much memory there is; cluster=h100 would do")


def check_machine(config: Config) -> None:
    """What cannot be asked of a workload that measures a machine."""
    workload, peer = config.workload, meshes.PEERS.get(config.strategy.name)
    if config.mode != "real":
        raise Invalid(f"workload={workload} measures this machine, and mode={config.mode}; mode=real would do")
    if config.rounds > 1:
        raise Invalid(f"rounds={config.rounds}: workload={workload} is measured steps={config.steps} times; 1 would do")
    for key, asked in (("exposed_comm", config.exposed_comm), ("profile", config.profile), ("compile", config.compile)):
        if asked:
            raise Invalid(f"{key}=true: workload={workload} runs no step; false or workload=step would do")
    if peer is not None:
        raise Invalid(f"workload={workload} runs nothing of {config.strategy.name}'s; strategy={peer.ours} would do")
    if workload == "collectives" and config.world_size == 1:
        raise Invalid("world_size=1: workload=collectives needs ranks that talk to each other; 2 would do")


def check_peer(resolved: Resolved, peer: meshes.Peer) -> None:
    """Is there anything to measure of a peer but time?"""
    config, notes = resolved.config, resolved.notes
    name, mode = config.strategy.name, config.mode
    if peer.causal:
        check_causal(config)
    if mode != "real":
        raise Invalid(f"strategy={name} is raced, and mode={mode} has no race; mode=real or {peer.ours} would do")
    if config.workload == "attention" and not peer.attention:
        raise Invalid(f"workload=attention: {name} has no attention of its own; workload=step would do")
    if peer.adapted and config.device == "cpu":
        notes.append(f"{name}'s schedule on this project's kernel")


def check_causal(config: Config) -> None:
    """Of a peer that knows no other mask, and sends all keys."""
    for key, asked in (
        ("documents", config.documents.name != "none" and config.documents.name),
        ("attention.window", config.attention.window),
        ("ring.layout", config.ring.layout == "balanced" and "balanced"),
        ("ring.kv", config.ring.kv == "needed" and "needed"),
    ):
        if asked:
            default = keys()[f"{key}.name" if key == "documents" else key].default
            would_do = "null" if default is None else default
            raise Invalid(
                f"{key}={asked}: {config.strategy.name} knows no mask but the causal one; {would_do} would do"
            )


def check_documents(resolved: Resolved) -> None:
    """Does the configuration say where they end?"""
    config = resolved.config
    documents, name = config.documents, f"documents={config.documents.name}"
    if documents.name == "eos":
        if documents.eos is None:
            raise Invalid("documents.eos is missing: documents=eos ends a document after each such token; 0 would do")
        if documents.eos >= config.model.vocab_size:
            most = config.model.vocab_size - 1
            raise Invalid(f"documents.eos={documents.eos} is no token of the model; {most} is the last that would do")
        if config.workload == "attention":
            raise Invalid(f"{name}: workload=attention has no tokens; lengths or histogram would do")
    if documents.name == "lengths" and documents.path is None:
        raise Invalid("documents.path is missing: documents=lengths reads the lengths of documents there")
    if documents.name in ("none", "eos") and documents.path is not None:
        resolved.notes.append(f"documents.path={documents.path} is not read, for {name}")


def check_ring(config: Config) -> None:
    """Is there a ring for what was asked of it, and does something go around it?"""
    name, ring = config.strategy.name, config.ring
    asked = {
        "ring.kv": ring.kv if ring.kv == "needed" else None,
        "ring.backward": ring.backward if ring.backward == "q" else None,
        "ring.inner": ring.inner,
        "ring.cycles": ring.cycles if ring.cycles == "all" else None,
    }
    for path, value in asked.items():
        default = keys()[path].default or "null"
        if value and "ring" not in meshes.footing_of(name).axes:
            raise Invalid(f"{path}={value}: strategy {name} has no ring axis; {default} would do")
        if value and path != "ring.kv" and ring.kv != "rotate" and not meshes.footing_of(name).grid:
            raise Invalid(f"{path}={value}: with ring.kv={ring.kv} nothing goes around the ring; {default} would do")


def check_cycles(config: Config) -> None:
    """Is there a price for hops in parts, and are there as many rings without a common link?"""
    ring = config.mesh.ring or 1
    if config.ring.cycles == "one":
        return
    if config.mode != "simulate":
        raise Invalid(
            f"ring.cycles=all is a placement of hops that is simulated alone, and mode={config.mode}; one would do"
        )
    if config.ring.inner is not None:
        raise Invalid(f"ring.cycles=all takes all links, and ring.inner={config.ring.inner} some; null would do")
    if ring in UNDIVIDED:
        raise Invalid(
            f"mesh.ring={ring}: its links make no rings that share none (Tillson 1980); {ring - 1} or {ring + 1} would "
            "do"
        )


def fill_rows(config: Config) -> None:
    """Of a grid."""
    if meshes.footing_of(config.strategy.name).grid and config.ring.inner is None:
        config.ring.inner = meshes.best_row(config.mesh.ring or 1, config.model)


def fill_from_checkpoint(resolved: Resolved) -> None:
    """Of model=hf: sizes that the user did not override, from config.json; of documents=eos what ends one."""
    model, data, documents = resolved.config.model, resolved.config.data, resolved.config.documents
    if not model.path:
        raise Invalid("model.path is missing: model=hf reads a Hugging Face Llama directory, or ORG/NAME on its hub")
    try:
        folder = hub.folder(model.path)
        for name, value in read_config(folder).items():
            if getattr(model, name) in (None, MISSING):
                setattr(model, name, value)
        if data.name == "hf" and documents.name == "eos" and documents.eos is None:
            documents.eos = read_end(folder)
    except FileFault as error:
        raise Invalid(f"model.path: {error}") from None
    if folder != model.path:
        resolved.notes.append(f"{model.path} is its commit {hub.commit(folder)}")


def check_data(config: Config) -> None:
    """Of data=hf: is there something to read, and to read it with?"""
    if config.data.name == "hf" and not config.data.path:
        raise Invalid("data.path is missing: data=hf reads a data set, ORG/NAME on the Hugging Face hub or a folder")
    if config.data.name == "hf" and config.model.name != "hf":
        raise Invalid(
            f"data=hf is read with the model's tokenizer, and model={config.model.name} has none; model=hf would do"
        )


def fill_model(model: ModelConfig) -> None:
    """head_dim, and what must fit together among the sizes."""
    if model.head_dim is None:
        if model.dim % model.n_heads:
            near = around(model.dim, multiples("model.dim", model.n_heads))
            raise Invalid(
                f"model.dim={model.dim} is no multiple of model.n_heads={model.n_heads} and model.head_dim "
                f"is null; {near} would do"
            )
        model.head_dim = model.dim // model.n_heads
    if model.head_dim % 2:
        raise Invalid(
            f"model.head_dim={model.head_dim} must be even: rotary embedding pairs dims; "
            f"{around(model.head_dim, multiples('model.head_dim', 2))} would do"
        )
    if model.n_heads % model.n_kv_heads:
        near = around(model.n_kv_heads, divisors(model.n_heads))
        raise Invalid(f"model.n_kv_heads={model.n_kv_heads} must divide model.n_heads={model.n_heads}; {near} would do")


def fill_grad_dtype(config: Config) -> None:
    """fp32 where there are masters; elsewhere gradients are as the weights."""
    if config.precision == "bf16_mixed":
        config.grad_dtype = config.grad_dtype or "fp32"
    elif config.grad_dtype is not None:
        raise Invalid(
            f"grad_dtype={config.grad_dtype} is for precision=bf16_mixed, and precision={config.precision}, in which "
            "gradients are as the weights; null would do"
        )


def check_offload(config: Config) -> None:
    """Is there something that can wait elsewhere?"""
    if config.offload != "none" and config.recompute != "block":
        raise Invalid(
            f"offload={config.offload} moves the inputs of blocks, which are kept with recompute=block alone, and "
            f"recompute={config.recompute}; recompute=block would do"
        )


def check_stages(config: Config) -> None:
    """Does the strategy have heads in stages?"""
    name, stages = config.strategy.name, config.ulysses.stages
    if name != "upipe" and stages is not None:
        raise Invalid(
            f"ulysses.stages={stages}: strategy {name} has all of its heads at once; null or strategy=upipe would do"
        )


def check_batch(resolved: Resolved) -> None:
    """Is every micro-batch as large, and has every dp rank a sequence of each?"""
    config = resolved.config
    dp, parts, batch_size = config.mesh.dp or 1, config.micro_batches, config.batch_size
    if config.workload != "step" and parts > 1:
        raise Invalid(f"micro_batches={parts}: workload={config.workload} adds no gradients up; 1 would do")
    if batch_size % parts:
        near = around(parts, divisors(batch_size))
        raise Invalid(f"micro_batches={parts} must divide batch_size={batch_size}; {near} would do")
    has = config.micro_batch_size
    if config.workload in OF_A_MACHINE:
        return
    if has < dp and config.workload == "attention":
        raise Invalid(f"batch_size={batch_size} must be at least mesh.dp = {dp} for workload=attention; {dp} would do")
    if has < dp:
        size = f"batch_size={batch_size}" + (f" in micro_batches={parts}" if parts > 1 else "")
        resolved.notes.append(f"{size} leaves {dp - has} of mesh.dp={dp} without a sequence")
