"""28 x 28 images, binarised: MNIST from the folder that FLOWPATH_DATA names, any other set by path, or blobs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MISSING = (
    "skipped: no images. Fetch MNIST as one file, images/mnist_full.npz with x_train (60000, 28, 28) and x_test "
    "(10000, 28, 28) in uint8, into a folder and set FLOWPATH_DATA to that folder; or pass data=PATH of an .npz or "
    ".npy file of 28 x 28 images; --smoke runs without"
)


def images(path: Path, rows: int, test_rows: int) -> tuple[str, Tensor, Tensor] | None:
    """Name, training rows `(rows, 784)` and test rows `(test_rows, 784)` of zeros and ones; None where there are none.

    A grey level g becomes 1 with probability g, once, by a fixed seed. The first rows of each part are taken.
    """
    if path == Path():
        path = Path(os.environ.get("FLOWPATH_DATA", "")) / "images" / "mnist_full.npz"
    if not path.is_file():
        return None
    train, test = _read(path)
    generator = torch.Generator().manual_seed(0)
    return path.stem, _binary(train[:rows], generator), _binary(test[:test_rows], generator)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images; a file without that split gives its last seventh to the test."""
    found = np.load(path)
    if not isinstance(found, np.ndarray):
        arrays = dict(found)
        if "x_train" in arrays and "x_test" in arrays:
            return arrays["x_train"], arrays["x_test"]
        found = next((a for a in arrays.values() if a.ndim > 1 and a[0].size == 784), np.empty(0))
    if found.ndim < 2 or found[0].size != 784:
        raise SystemExit(f"{path.name} holds no 28 x 28 images: expected an array (N, 28, 28) or (N, 784)")
    split = len(found) - len(found) // 7
    return found[:split], found[split:]


def _binary(x: np.ndarray, generator: torch.Generator) -> Tensor:
    grey = torch.from_numpy(np.asarray(x, dtype=np.float32)).flatten(1)
    grey = grey / 255.0 if float(grey.max()) > 1.0 else grey
    return torch.bernoulli(grey, generator=generator)


def blobs(rows: int, test_rows: int) -> tuple[str, Tensor, Tensor]:
    """Round spots of random place and width."""
    generator = torch.Generator().manual_seed(0)
    place = 6.0 + 16.0 * torch.rand(rows + test_rows, 2, 1, generator=generator)
    width = 2.0 + 3.0 * torch.rand(rows + test_rows, 1, 1, generator=generator)
    side = torch.arange(28.0)
    near = (-0.5 * ((side - place) / width).square()).exp()
    x = torch.bernoulli((near[:, 0, :, None] * near[:, 1, None, :]).flatten(1), generator=generator)
    return "blobs", x[:rows], x[rows:]
