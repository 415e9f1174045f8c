"""Files that data sets come in, as tensors. Nothing that a file holds is executed, and what is large is mapped, not read."""

from __future__ import annotations

import io
import math
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..attacks.draws import Draws

MAPPED = 2**26  # bytes from which on an array of a .npz file is mapped


# ---------------------------------------------------------------------------------------------------------------------- npz


def npz(path: Path) -> dict[str, Tensor]:
    """Its arrays of numbers. Large uncompressed ones (``numpy.savez``) are mapped: taking an image reads its bytes."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            arrays = {info.filename.removesuffix(".npy"): _array(path, archive, file, info) for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"{path} is not a .npz file of numbers: {error}") from None
    return {name: tensor(array) for name, array in arrays.items() if array.dtype.kind in "biuf"}


def _array(path: Path, archive: zipfile.ZipFile, file: IO[bytes], info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    if info.file_size >= MAPPED and info.compress_type == zipfile.ZIP_STORED:
        file.seek(info.header_offset + 26)  # a local header of 30 bytes ends with the lengths of a name and of extra fields
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
        if np.lib.format.read_magic(file) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    with archive.open(info) as member:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(member, allow_pickle=False)
    return array


def tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Sharing memory. Torch warns of memory that cannot be written to; nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


# ------------------------------------------------------------------------------------------------------------------- pickle


def unpickled(data: bytes, source: str) -> dict[str, Any]:
    """A pickled dict of arrays, numbers, text, lists and dicts; a pickle that names anything else is refused.

    Not even numpy's own functions are called: on a forged pickle they build arrays of pointers to anywhere.
    """
    try:
        held = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a forged or a broken file may raise anything
        raise ValueError(f"{source} is not a pickle of arrays, numbers and lists: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{source} must hold a dict; it holds {type(held).__name__}")
    names = (name.decode("latin1") if isinstance(name, bytes) else str(name) for name in held)
    return {
        name: tensor(value.array) if isinstance(value, _Array) else value
        for name, value in zip(names, held.values(), strict=True)
    }


class _Dtype:
    """Stands for ``numpy.dtype``: of plain numbers only."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if code not in ("b1", *(kind + size for kind in "iuf" for size in "1248")):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in (">", b">"):  # the byte order
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands for ``numpy.ndarray``: its numbers are read from bytes of the right length, and from nothing else."""

    array: np.ndarray[Any, Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        self.array = array.astype(array.dtype.newbyteorder("="), copy=False)


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: Sequence[int] | None = None) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    if order == "K" and axes is not None:
        array.array = array.array.transpose(axes)
    return array


_STAND_INS = {
    "numpy.ndarray": None,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype.dtype)[0].item(),
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes in protocol 2
    "__builtin__.bytes": lambda: b"",
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        stands_for = wanted.replace("numpy._core.", "numpy.core.", 1)
        if stands_for not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {wanted}")
        return _STAND_INS[stands_for]


# ---------------------------------------------------------------------------------------------------------- folders and tars


def members(root: Path, folder: str, archive: str, names: Sequence[str]) -> list[bytes] | None:
    """The files of these names in ``root/folder``, in ``root`` itself, in ``root/archive`` or in the archive ``root``."""
    for place in (root / folder, root):
        if all((place / name).is_file() for name in names):
            return [(place / name).read_bytes() for name in names]
    packed = root if root.is_file() else root / archive
    if not packed.is_file():
        return None
    found = {}
    try:
        with tarfile.open(packed) as tar:
            for member in tar:
                if member.isfile() and (name := Path(member.name).name) in names:
                    found[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{packed} is not a whole tar archive: {error}") from None
    return [found[name] for name in names] if len(found) == len(names) else None


# ------------------------------------------------------------------------------------------------------------- image folders


class Files:
    """Photographs in files, decoded by threads when they are asked for.

    Args:
        paths: of N files that Pillow reads.
        size: images are [3, size, size]. resize: the shorter side before the centre is cut out, 8/7 of ``size`` by default.
        workers: threads.
    """

    def __init__(self, paths: Sequence[Path], size: int = 224, resize: int | None = None, workers: int = 8) -> None:
        self.paths, self.size, self.resize = list(paths), size, resize or round(size * 8 / 7)
        self.workers, self._pool = workers, ThreadPoolExecutor(workers)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), 3, self.size, self.size

    def rows(self, chosen: Tensor) -> Files:
        return Files([self.paths[i] for i in chosen.tolist()], self.size, self.resize, self.workers)

    def decode(self, chosen: Tensor, draws: Draws | None = None) -> Tensor:
        """uint8 [n, 3, size, size]: random crops, resized, if there are draws; else the centres."""
        paths = [self.paths[i] for i in chosen.tolist()]
        tries = [None] * len(paths) if draws is None else draws.uniform(0, 10, 4).tolist()
        decoded = list(self._pool.map(self._decoded, paths, tries))
        return torch.stack(decoded) if decoded else torch.empty(0, *self.shape[1:], dtype=torch.uint8)

    def _decoded(self, path: Path, tries: list[list[float]] | None) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError) as error:  # what Pillow raises on files that are none
            raise ValueError(f"{path} cannot be decoded: {error}") from None
        side = (self.size, self.size)
        if tries is not None:
            image = image.crop(random_box(image.width, image.height, tries)).resize(side, Image.Resampling.BILINEAR)
        else:
            scale = self.resize / min(image.size)
            width, height = (max(self.resize, int(length * scale)) for length in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)
            image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_box(width: int, height: int, tries: Sequence[Sequence[float]]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop of 8% to 100% of the area and of ratio 3/4 to 4/3 (Szegedy et al., 2015).

    The first of the ``tries``, four numbers in [0, 1) each, that fits; else the largest such crop in the middle.
    """
    for area, ratio, x, y in tries:
        pixels, aspect = width * height * (0.08 + 0.92 * area), (3 / 4) * (16 / 9) ** ratio
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
