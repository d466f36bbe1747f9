"""Decompositions on disk, by content: the seeds, methods, alphas and rates of one comparison share them.

    <folder>/<key>.safetensors     A (r, in), B (out, r), before any scaling, and the SHA-256 of the two

The key is a hash of the weight's bytes and what they mean, the rank, and how it is decomposed. A file is written whole
or not at all and verified when it is read; several processes may use the folder at once, and one that cannot be used
costs time, not the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dude_cli.adapter.decompose import PrincipalFactors, decompose_layer, is_exact
from dude_cli.adapter.weight import content_sha256, stored_weight, weight_shape
from dude_cli.config import AdapterConfig, SvdConfig
from dude_cli.system import cache_dir, files

# Raise it when the same weight and settings get other factors.
ALGORITHM_VERSION = 1


class DecompositionCache:
    """Decompositions in `folder`; `say` is told of a damaged file and of a folder that cannot be used.

    `hits` counts those that were there.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self._say = say
        self.hits = 0
        self._is_usable = True

    def decompose(self, name: str, layer: nn.Module, config: AdapterConfig) -> PrincipalFactors:
        """The principal factors of a layer's weight, on its device: those of the folder, or made and kept there."""
        path = self.folder / f"{decomposition_key(layer, config.rank, config.svd)}.safetensors"
        found = self._read(path)
        if found is None:
            found = decompose_layer(name, layer, config)
            self._write(path, found)
        return found.to(stored_weight(layer).device)

    def prune(self) -> None:
        """Delete what was used least recently where there is too much."""
        try:
            cache_dir.prune(self.folder)
        except FileNotFoundError:
            return  # nothing was written
        except OSError as error:
            self._give_up(error)

    def _read(self, path: Path) -> PrincipalFactors | None:
        try:
            tensors = files.load_tensors(path)
            found = PrincipalFactors(tensors["A"], tensors["B"])
            is_whole = torch.equal(tensors["sha256"], _digest(found))
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError):
            is_whole = False
        except OSError as error:
            self._give_up(error)
            return None
        if not is_whole:
            self._say(f"{path} is damaged and is made anew")
            return None
        self._touch(path)
        self.hits += 1
        return found

    def _write(self, path: Path, found: PrincipalFactors) -> None:
        try:
            with files.new_file(path) as partial:
                files.save_tensors(found.to(torch.device("cpu"))._asdict() | {"sha256": _digest(found)}, partial)
        except OSError as error:
            self._give_up(error)

    def _touch(self, path: Path) -> None:
        try:
            os.utime(path)  # the time of the last use, for `prune`
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Say once what is wrong with the folder; each layer is tried again."""
        if self._is_usable:
            self._say(f"{self.folder} cannot be used, decompositions are not kept for later runs: {error.strerror}")
        self._is_usable = False


def decomposition_key(layer: nn.Module, rank: int, svd: SvdConfig) -> str:
    """What a layer's principal factors depend on, as a hash. Not in it: names, seeds, method and alpha."""
    how = ["exact"] if is_exact(weight_shape(layer), rank, svd) else ["randomized", svd.iterations]
    parts = [ALGORITHM_VERSION, content_sha256(layer), rank, how]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(found: PrincipalFactors) -> Tensor:
    """SHA-256 of the factors: shapes and bytes; (32,) uint8."""
    total = hashlib.sha256()
    for factor in found:
        total.update(f"{tuple(factor.shape)}:{factor.dtype};".encode())
        total.update(factor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(total.digest()), dtype=torch.uint8)
