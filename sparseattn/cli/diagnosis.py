"""`doctor`: what was found on this machine, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import typer

from . import output
from .output import JsonPath, say, table

# What a version is needed for, where its absence is no fault.
_PACKAGES = {
    "sparseattn": "",
    "torch": "",
    "numpy": "",
    "pluggy": "",
    "safetensors": "",
    "triton": "only GPU kernels need it",
    "flash-attn": 'only impl="flash_attn" needs it',
    "flash-linear-attention": 'only impl="fla" needs it',
    "pillow": "only `show --save` needs it",
}


def _row(kind: str, name: str, status: str, reason: str = "", **more: Any) -> dict[str, Any]:
    row = {"kind": kind, "name": name, "status": status, "reason": reason}
    return row | {"distribution": "", "version": ""} | more


def _plugins() -> list[dict[str, Any]]:
    from .. import registry

    return [
        _row(
            "plugin",
            r.name,
            r.status,
            r.reason,
            distribution=r.distribution,
            version=r.version,
            mechanisms=r.mechanisms,
            implementations=r.implementations,
            inputs=r.inputs,
            metrics=r.metrics,
        )
        for r in registry.diagnose()
    ]


def _devices() -> list[dict[str, Any]]:
    import torch

    threads = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    rows = [_row("device", "cpu", "ok", threads)]
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds no GPU" if built else "this torch is built without CUDA"
        return [*rows, _row("device", "cuda", "absent", why)]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        what = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
        rows.append(_row("device", f"cuda:{index}", "ok", what))
    return rows


def _compilers() -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys([os.environ.get("CXX") or "g++", "g++", "clang++"]):
        path = shutil.which(name)
        if path is None:
            rows.append(_row("compiler", name, "absent", "not found on PATH"))
            continue
        try:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=20, check=True
            )
            first = (done.stdout.splitlines() or [""])[0]
            rows.append(_row("compiler", name, "ok", path, version=first))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            rows.append(_row("compiler", name, "failed", f"{path}: {error}"))
    return rows


def _native() -> list[dict[str, Any]]:
    """The C++ kernels of the CPU; built now if they were not yet, to know whether they can be."""
    from ..engines.native import cpu, library

    reasons = library.missing()
    if reasons:
        return [_row("native", cpu.asked(), "absent", reasons[0])]
    loaded = library.load()
    return [_row("native", cpu.asked(), "ok", str(loaded.path), version=loaded.recipe.version)]


def _versions() -> list[dict[str, Any]]:
    rows = [_row("version", "python", "ok", version=platform.python_version())]
    for name, purpose in _PACKAGES.items():
        try:
            # Asked of the installed metadata: importing triton would be slow, and can fail.
            rows.append(_row("version", name, "ok", version=metadata.version(name)))
        except metadata.PackageNotFoundError:
            why = f"not installed; {purpose}" if purpose else "its metadata is missing"
            rows.append(_row("version", name, "absent", why))
    return rows


def doctor(json: JsonPath = None) -> None:
    """Every plugin found, loaded, blocked or broken, with the reason; devices, compilers, versions;
    where the C++ kernels are, or why there are none.

    Exits with 1 if a plugin is broken.
    """
    output.check_json(json)
    plugins = _plugins()
    rows = [*plugins, *_devices(), *_compilers(), *_native(), *_versions()]
    output.write_json(json, rows)
    if json != output.STDOUT:
        table(
            ["plugin", "distribution", "version", "status", "reason"],
            [
                [p["name"], p["distribution"], p["version"], p["status"], p["reason"]]
                for p in plugins
            ],
        )
        say()
        table(
            ["what", "name", "version", "status", "reason"],
            [
                [r["kind"], r["name"], r["version"], r["status"], r["reason"]]
                for r in rows
                if r["kind"] != "plugin"
            ],
        )
    if any(p["status"] == "broken" for p in plugins):
        raise typer.Exit(1)
