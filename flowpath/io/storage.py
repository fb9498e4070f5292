"""Tensors and a JSON text in one safetensors file: written whole or not at all, read with suspicion."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor], key: str, config: Mapping[str, Any]) -> None:
    """Write tensors, and config as JSON under `key` of the file's metadata; what was there stays until all is written.

    The file is written beside its place, flushed to the disk and renamed.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing that was there is lost.
    """
    text = json.dumps(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # what the user's files have; safetensors makes its own private
        try:
            save_file(_apart(tensors), beside, {key: text})
            beside.chmod(mode)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path, key: str, who: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the config that `write` put there.

    Raises:
        FileNotFoundError: no such file; names like it are listed.
        ValueError: no safetensors file, one cut short, or one that carries no `key`.
    """
    check_exists(path, who)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if key not in metadata:
                raise ValueError(f"{who}: {path} is a safetensors file, but {_foreign(metadata, key)}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who}: {path} is no safetensors file, or was cut short ({error})") from None
    return tensors, _parsed(metadata[key], path, who)


def read_config(path: Path, key: str) -> dict[str, Any] | None:
    """The config alone, or None where the file is none of ours."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(key)
        return None if text is None else _parsed(text, path, "")
    except (SafetensorError, ValueError):
        return None


def check_format(config: Mapping[str, Any], newest: int, path: Path, who: str) -> None:
    """The format is one this version reads, or an error that says who wrote the file."""
    found = config.get("format")
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"{who}: {path} states no format version; it is damaged")
    if found > newest:
        writer = config.get("versions", {}).get("flowpath", "a newer version")
        raise ValueError(
            f"{who}: {path} was written by flowpath {writer} in format {found}, this version reads up to {newest}; "
            "upgrade with pip install --upgrade flowpath"
        )


def check_exists(path: Path, who: str) -> None:
    """There is a file at path, or an error that lists names like it."""
    if path.is_file():
        return
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{who}: there is no folder {folder}")
    names = sorted(p.name for p in folder.iterdir())
    near = get_close_matches(path.name, names, 3, 0.6) or [n for n in names if n.endswith(".safetensors")][:3]
    hint = f"; there is {', '.join(near)}" if near else ""
    raise FileNotFoundError(f"{who}: there is no file {path.name} in {folder}{hint}")


def _foreign(metadata: Mapping[str, str], key: str) -> str:
    if "flowpath-checkpoint" in metadata:
        return "a checkpoint of a fit: go on with fp.fit(..., resume=path), which ends with a flow to save"
    if "flowpath" in metadata:
        return "holds a saved flow, not a checkpoint: read it with fp.load(path)"
    return f"not one that flowpath wrote (no {key!r} in its metadata)"


def _parsed(text: str, path: Path, who: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{who}: the description in {path} is damaged ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{who}: the description in {path} is damaged (no JSON object)")
    return config


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two sharing memory, as the format asks."""
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().to("cpu").contiguous()
        pointer = t.untyped_storage().data_ptr()
        if pointer in seen or t.untyped_storage().nbytes() != t.nbytes:
            t = t.clone(memory_format=torch.contiguous_format)
        seen.add(t.untyped_storage().data_ptr())
        held[name] = t
    return held


def _flush(path: Path) -> None:
    """Push a file or a folder's entries to the disk; folders cannot be opened on every system."""
    with contextlib.suppress(PermissionError) if path.is_dir() else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
