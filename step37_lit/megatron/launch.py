"""Before process groups are made: all ranks are there and run the same code on the same recipe.

torch's own rendezvous says how many ranks are missing, not which, and ranks with different layouts would wait for each
other in their first collective. So every rank first puts its fingerprint into a store on the master; rank 0 compares
them, and all ranks end with its verdict.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from step37_lit import __version__
from step37_lit.errors import UserError
from step37_lit.megatron.rank_verdict import ranks_text

PROJECT_PACKAGES = ["step37_lit", "datamodules", "callbacks"]
LIBRARIES = ("torch", "lightning", "megatron-core")
PROBE_SECONDS = 5.0  # of one attempt to reach the master; of patience behind a time-out, until others have read of it
POLL_SECONDS = 0.2


class LaunchError(UserError):
    """Ranks are missing, cannot reach each other, or differ: one line that names them."""


def fingerprint(**parts: Any) -> dict[str, str]:
    """What must be the same on all ranks, by field: the parts that are given, sources and versions of libraries.

    Args:
        parts: Mappings, sequences and values; each leaf becomes a field such as `recipe.model.lr`.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    code = {"version": __version__, "sources": source_digest(), **versions}
    return dict(_leaves("", {**parts, "code": code}))


def source_digest() -> str:
    """SHA-256 of the project's Python files by name and content, 16 hex digits; the same for a clone and a wheel."""
    digest = hashlib.sha256()
    for package in PROJECT_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(spec.submodule_search_locations[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(root).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def agree(
    address: str, port: int, rank: int, world_size: int, fingerprint: Mapping[str, str], timeout: float
) -> dist.Store:
    """Waits until all ranks are there with the same fingerprint.

    Args:
        address: Of the master, on which rank 0 (or torchrun's agent) has the store.
        port: Of the store.
        rank: Of this process.
        world_size: Processes.
        fingerprint: See `fingerprint`.
        timeout: Seconds.

    Returns:
        The store; rank 0 must keep it until the process group is made at the same address.

    Raises:
        LaunchError: on all ranks that are there.
    """
    deadline = time.monotonic() + timeout
    store = _connect(address, port, rank, world_size, timeout)
    store.set(f"rank/{rank}", json.dumps([socket.gethostname(), fingerprint]))
    if rank == 0:
        present = _present(store, world_size, deadline)
        verdict = _verdict(present, world_size, timeout)
        store.set("verdict", verdict)
        if verdict:  # the store ends with this process: not before the others have read
            _wait(store, [f"read/{other}" for other in present if other != rank], PROBE_SECONDS)
    else:
        if not _wait(store, ["verdict"], deadline - time.monotonic() + PROBE_SECONDS):
            raise LaunchError(f"launch: rank 0 ({address}:{port}) has not answered rank {rank} within {timeout:g} s")
        verdict = store.get("verdict").decode()
        store.set(f"read/{rank}", "")
    if verdict:
        raise LaunchError(f"launch: {verdict}")
    return store


def _connect(address: str, port: int, rank: int, world_size: int, timeout: float) -> dist.Store:
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun may have it already
    if not hosts:
        _reach(address, port, rank, timeout)
    try:
        # One server for the whole process: torch's rendezvous for the process group takes the same.
        store = dist.TCPStore(
            address, port, world_size, hosts, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
        raise LaunchError(f"launch: rank {rank} has no store at {where}: {reason}") from None
    return dist.PrefixStore(f"step37_lit/launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _reach(address: str, port: int, rank: int, timeout: float) -> None:
    """Connects to the master once; torch's own attempts give no reason before their time-out."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=PROBE_SECONDS).close()
            return
        except OSError as error:  # also a name that cannot be resolved: it may come up with its node
            if time.monotonic() > deadline:
                where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
                host = socket.gethostname()
                raise LaunchError(
                    f"launch: rank {rank} on {host} cannot reach rank 0 at {where} within {timeout:g} s: {error}"
                ) from None
        time.sleep(POLL_SECONDS)


def _present(store: dist.Store, world_size: int, deadline: float) -> dict[int, tuple[str, dict[str, str]]]:
    """Host and fingerprint of each rank that is there by the deadline."""
    keys = [f"rank/{rank}" for rank in range(world_size)]
    complete = _wait(store, keys, deadline - time.monotonic())
    there = [rank for rank, key in enumerate(keys) if complete or store.check([key])]
    return {rank: tuple(json.loads(store.get(keys[rank]))) for rank in there}


def _wait(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are there in time. Asks: `Store.wait` prints warnings of C++ where time runs out."""
    deadline = time.monotonic() + seconds
    try:
        while not store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
    except RuntimeError:  # the store's process has ended
        return False
    return True


def _verdict(present: Mapping[int, tuple[str, Mapping[str, str]]], world_size: int, timeout: float) -> str:
    """Empty, or what is wrong with which ranks. What most ranks have counts as right; rank 0's where it is a tie."""
    missing = [rank for rank in range(world_size) if rank not in present]
    if missing:
        return f"expected all {world_size} ranks within {timeout:g} s, nothing from {ranks_text(missing)}"
    marks = {rank: json.dumps(fields, sort_keys=True) for rank, (_, fields) in present.items()}
    usual = Counter(marks.values()).most_common(1)[0][0]  # of equal counts the first one: rank 0 was put in first
    others = [rank for rank, mark in marks.items() if mark != usual]
    if not others:
        return ""
    right = json.loads(usual)
    first, rest = others[0], others[1:]
    host, fields = present[first]
    names = [name for name in sorted(right.keys() | fields.keys()) if right.get(name) != fields.get(name)]
    differences = [f"{name} {fields.get(name, 'absent')} (others {right.get(name, 'absent')})" for name in names]
    shown = ", ".join(differences[:3]) + (f" and {len(names) - 3} fields more" if len(names) > 3 else "")
    more = f"; {ranks_text(rest)} differ, too" if rest else ""
    expected = f"expected the same recipe and code on all {world_size} ranks"
    return f"{expected}, rank {first} on {host} has {shown}{more}"


def _leaves(name: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, json.dumps(value, default=str)
