"""Training data: every format that it comes in, what augmentation does to an image, and which images a batch holds."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import tarfile
import threading
from collections import Counter
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.stats
import torch
from models import one_thread  # noqa: F401
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv import demo
from fastadv.attacks.draws import Draws
from fastadv.training import batches as batches_module
from fastadv.training import formats
from fastadv.training.augment import AUGMENTATIONS, beta, compose, cutmix, cutout, mixing, mixup
from fastadv.training.batches import Batches, ahead
from fastadv.training.data import Images, fractions, load, load_extra, permutation, split


def random_images(
    n: int, classes: int = 10, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(256, size=(n, *shape), dtype=np.uint8), generator.integers(classes, size=n)


def same(images: Images, x: np.ndarray, y: np.ndarray) -> None:
    assert images.x.dtype == torch.uint8
    assert images.y.dtype == torch.int64
    assert torch.equal(images.x, torch.from_numpy(x))
    assert images.y.tolist() == list(y)


@contextmanager
def refused(*words: str):
    """With a message that has all of the words."""
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        yield
    assert all(word in str(error.value) for word in words), str(error.value)


# ------------------------------------------------------------------------------------------------------------------- CIFAR


def python2(value) -> bytes:
    """As Python 2 pickled the files of CIFAR, text without an encoding; without the frame of protocol and stop."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, list):
        return b"](" + b"".join(python2(part) for part in value) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    dtype = (
        b"cnumpy\ndtype\n"
        + python2(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + python2(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2(b"b") + b"\x87R"
    shape = b"(" + b"".join(python2(side) for side in value.shape) + b"t"
    return made + b"(K\x01" + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


PICKLED = {
    "python 2": lambda held: b"\x80\x02" + python2(held) + b".",
    "protocol 2": lambda held: pickle.dumps(held, 2),
    "protocol 5": lambda held: pickle.dumps(held, 5),
    "text keys": lambda held: pickle.dumps({key.decode(): value for key, value in held.items()}, 4),
}


def cifar(classes: int, kind: str) -> tuple[str, dict[str, bytes], list[tuple[np.ndarray, np.ndarray]]]:
    """(folder, files, the images and labels of each) in one of the forms in which CIFAR can be downloaded."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    parts = [random_images(4, classes, seed=i) for i in range(len(names))]
    if kind == "binary":
        files = {}
        for name, (x, y) in zip(names, parts, strict=True):
            labels = [y] if classes == 10 else [y // 5, y]  # coarse and fine
            files[f"{name}.bin"] = np.column_stack([*labels, x.reshape(4, -1)]).astype(np.uint8).tobytes()
        return f"cifar-{classes}-{'batches-bin' if classes == 10 else 'binary'}", files, parts
    key = b"labels" if classes == 10 else b"fine_labels"
    files = {
        name: PICKLED[kind]({b"batch_label": b"batch", key: y.tolist(), b"coarse_labels": [0] * 4, b"data": x.reshape(4, -1)})
        for name, (x, y) in zip(names, parts, strict=True)
    }
    return f"cifar-{classes}-{'batches-py' if classes == 10 else 'python'}", files, parts


def packed(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def unpacked(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)


@pytest.mark.parametrize("place", ["folder", "folder itself", "archive", "archive itself"])
@pytest.mark.parametrize("kind", [*PICKLED, "binary"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(classes, kind, place, tmp_path):
    folder, files, parts = cifar(classes, kind)
    archive = tmp_path / f"cifar-{classes}-{'binary' if kind == 'binary' else 'python'}.tar.gz"
    if place.startswith("archive"):
        packed(archive, folder, files)
        root = archive if place.endswith("itself") else tmp_path
    else:
        unpacked(tmp_path / folder, files)
        root = tmp_path / folder if place.endswith("itself") else tmp_path
    dataset = load(f"cifar{classes}", root)
    assert (dataset.name, dataset.classes) == (f"cifar{classes}", classes)
    same(dataset.train, *(np.concatenate(column) for column in zip(*parts[:-1], strict=True)))
    same(dataset.test, *parts[-1])


def test_broken_cifar_is_refused(tmp_path):
    folder, files, _ = cifar(10, "binary")
    unpacked(tmp_path / folder, files | {"data_batch_3.bin": files["data_batch_3.bin"][:-1]})
    with pytest.raises(ValueError, match="records of 3073 bytes"):
        load("cifar10", tmp_path)
    folder, files, _ = cifar(100, "protocol 2")
    unpacked(tmp_path / folder, files | {"test": pickle.dumps({b"data": [1]}, 2)})
    with pytest.raises(ValueError, match="must hold data and fine_labels"):
        load("cifar100", tmp_path)
    x, _ = random_images(1)
    (tmp_path / folder / "test").write_bytes(pickle.dumps({b"data": x.reshape(1, -1), b"fine_labels": [100]}, 2))
    with pytest.raises(ValueError, match=re.escape("labels must lie from 0 to 99; they span 100 to 100")):
        load("cifar100", tmp_path)
    for data in (None, [[1]], x, np.zeros(3072)):
        (tmp_path / folder / "test").write_bytes(pickle.dumps({b"data": data, b"fine_labels": [1]}, 2))
        with pytest.raises(ValueError, match=r"must hold (arrays of numbers|data \[N, 3072\])"):
            load("cifar100", tmp_path)
    (tmp_path / folder / "train").write_bytes(files["train"][:50])
    with pytest.raises(ValueError, match="cifar100's train is not a pickle of arrays"):
        load("cifar100", tmp_path)
    cut = tmp_path / "cut.tar.gz"
    packed(cut, folder, files)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a whole tar archive"):
        load("cifar100", cut)


# ----------------------------------------------------------------------------------------------------------- hostile pickles


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def forged_array(dtype: bytes, data: bytes = b"\x01" * 8) -> bytes:
    """numpy would take these bytes for what the dtype says, be it a pointer."""
    whole = python2({b"data": np.zeros(8, np.uint8)})
    return b"\x80\x02" + whole.replace(python2(b"u1"), python2(dtype)).replace(python2(bytes(8)), python2(data)) + b"."


def python2_call(name: bytes) -> bytes:
    """An array that is made and never filled."""
    return b"\x80\x02}(" + python2(b"data") + b"c" + name + b"\n)R" + python2(b"extrapolated_targets") + b"]u."


@pytest.mark.parametrize(
    ("hostile", "why"),
    [
        (lambda flag: pickle.dumps({"data": Calls(os.system, f"touch {flag}")}), "system"),
        (lambda flag: pickle.dumps({"data": Calls(os.system, f"touch {flag}")}, 0), "system"),
        (lambda flag: pickle.dumps({"data": Calls(eval, f"open({str(flag)!r}, 'w')")}, 2), "eval"),
        (lambda flag: pickle.dumps({"data": Calls(getattr, Calls(__import__, "os"), "system")}, 4), "getattr"),
        (lambda flag: pickle.dumps({"data": Calls(np.load, str(flag))}), "asks for numpy.load"),
        (lambda flag: pickle.dumps({"data": Calls(np.ndarray, (1,), "O", b"\x01" * 8)}), "not callable"),
        (lambda flag: pickle.dumps({"data": np.array([open, print])}, 2), "array of 'O8'"),
        (lambda flag: pickle.dumps({"data": np.zeros(1, [("f", "O")])}, 2), "array of 'V8'"),
        (lambda flag: forged_array(b"O8"), "array of 'O8'"),
        (lambda flag: forged_array(b"u8"), "reshape"),  # 8 bytes are one number, not eight
        (lambda flag: forged_array(b"u1", b"\x01"), "reshape"),
        (lambda flag: python2_call(b"numpy.core.multiarray\n_reconstruct"), "pseudo.pickle"),
        (lambda flag: pickle.dumps([1, 2]), "must hold a dict"),
        (lambda flag: b"not a pickle", "not a pickle"),
        (lambda flag: b"", "not a pickle"),
    ],
)
def test_a_hostile_pickle_is_refused(hostile, why, tmp_path):
    flag = tmp_path / "executed"
    data = hostile(flag)
    (tmp_path / "pseudo.pickle").write_bytes(data)
    with refused("pseudo.pickle", why):
        load_extra(tmp_path / "pseudo.pickle", 10)
    folder, files, _ = cifar(10, "protocol 2")
    packed(tmp_path / "cifar-10-python.tar.gz", folder, files | {"data_batch_2": data})
    with pytest.raises(ValueError, match=r"cifar10's data_batch_2|every file of cifar-10-batches-py"):
        load("cifar10", tmp_path)
    assert not flag.exists()


def test_what_a_pickle_may_hold():
    held = {
        "a": np.arange(6, dtype=">i4").reshape(2, 3),
        "b": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "c": np.int64(7),
    }
    held |= {"k": np.arange(24).reshape(2, 3, 4).transpose(0, 2, 1), "z": np.zeros((0, 3)), "s": np.array(5)}
    held |= {"d": [np.float32(0.5), 1, "text", b"bytes"], "e": {"f": (None, True)}}
    for protocol in range(2, 6):
        read = formats.unpickled(pickle.dumps(held, protocol), "it")
        assert all(np.array_equal(read[name].numpy(), held[name]) for name in "abkzs")
        assert {name: read[name] for name in "cde"} == {name: held[name] for name in "cde"}


# ------------------------------------------------------------------------------------------------- SVHN, digits, numpy, torch


@pytest.mark.parametrize("extra", [False, True])
def test_svhn(extra, tmp_path):
    parts = {}
    for i, name in enumerate(["train", "test", "extra"]):
        x, y = random_images(5, seed=i)
        y[0] = 0
        parts[name] = x, y
        labels = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", {"X": x.transpose(2, 3, 1, 0), "y": labels})
    dataset = load("svhn", tmp_path, extra=extra)
    train = [parts["train"], *([parts["extra"]] if extra else [])]
    same(dataset.train, *(np.concatenate(column) for column in zip(*train, strict=True)))
    same(dataset.test, *parts["test"])


def test_digits():
    dataset = load("sklearn-digits")
    assert (dataset.train.x.shape, dataset.test.x.shape, dataset.classes) == ((1437, 1, 28, 28), (360, 1, 28, 28), 10)
    assert (int(dataset.train.x.min()), int(dataset.train.x.max())) == (0, 255)
    coloured = load("sklearn-digits", size=32, channels=3)
    assert coloured.test.x.shape == (360, 3, 32, 32)
    assert torch.equal(coloured.test.x[:, 0], coloured.test.x[:, 2])
    assert torch.equal(coloured.test.y, dataset.test.y)
    assert not torch.equal(load("sklearn-digits", seed=1).test.y, dataset.test.y)


def test_mnist5k_are_the_digits_of_the_demo():
    dataset, digits = load("mnist5k", seed=3), demo.load_digits(3)
    assert torch.equal(dataset.train.x.float() / 255, digits.x_train)
    assert torch.equal(dataset.test.x.float() / 255, digits.x_test)
    assert torch.equal(dataset.train.y, digits.y_train)
    assert torch.equal(dataset.test.y, digits.y_test)


X, Y = random_images(6, shape=(3, 8, 8))
X_TEST, Y_TEST = random_images(4, shape=(3, 8, 8), seed=1)
ARRAYS = {"x": X, "y": Y, "x_test": X_TEST, "y_test": Y_TEST}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"x": X / 255.0},
        {"x": (X - 0.3 * (X > 0)) / 255},
        {"x": (X / 255).astype(np.float32)},
        {"x": X.transpose(0, 2, 3, 1)},
    ],
)
def test_a_file_of_arrays(change, tmp_path):
    np.savez(tmp_path / "mine.npz", **(ARRAYS | change))
    torch.save({name: torch.from_numpy(array.copy()) for name, array in (ARRAYS | change).items()}, tmp_path / "mine.pt")
    for name in ("mine.npz", "mine.pt"):
        dataset = load(str(tmp_path / name))
        assert (dataset.name, dataset.classes) == ("mine", 1 + max(*Y, *Y_TEST))
        same(dataset.train, X, Y)
        same(dataset.test, X_TEST, Y_TEST)
        assert load(str(tmp_path / name), classes=20).classes == 20


def test_grey_images_may_lack_a_channel(tmp_path):
    np.savez(tmp_path / "grey.npz", **(ARRAYS | {"x": X[:, 0], "x_test": X_TEST[:, 0, :, :, None]}))
    dataset = load(str(tmp_path / "grey.npz"))
    same(dataset.train, X[:, :1], Y)
    same(dataset.test, X_TEST[:, :1], Y_TEST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": X.astype(np.float32)}, ["(0, 1)", "outside"]),
        ({"x": X.astype(np.int16)}, ["uint8 [N, C, H, W]", "int16"]),
        ({"x": X[:5]}, ["int64 [5]", "[6]"]),
        ({"y": Y / 10}, ["labels must be integers [N]", "float64"]),
        ({"y": Y - 10}, ["labels must lie from 0"]),
        ({"y": None}, ["x, y, x_test, y_test"]),
        ({"y": np.array(["a"] * 6)}, ["x, y, x_test, y_test"]),
        ({"y": np.array([print] * 6)}, ["is not a .npz file of numbers"]),
    ],
)
def test_a_bad_file_of_arrays_is_refused(change, words, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, allow_pickle=True, **{name: array for name, array in (ARRAYS | change).items() if array is not None})
    with refused(*words):
        load(str(path))


@pytest.mark.parametrize("name", ["mine.npz", "mine.pt"])
def test_a_file_that_is_something_else(name, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load(str(tmp_path / name))
    (tmp_path / name).write_text("something else")
    with pytest.raises(ValueError, match="is not a"):
        load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", ["cifar-10-batches-py", "data_batch_1", "cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/"]),
        ("cifar100", ["cifar-100-binary", "train", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"]),
        ("svhn", ["train_32x32.mat", "http://ufldl.stanford.edu/housenumbers/train_32x32.mat"]),
        ("imagenet", ["train and val", "class folders", "https://image-net.org"]),
    ],
)
def test_missing_files_are_named_with_where_to_get_them(name, words, tmp_path):
    with refused(name, str(tmp_path), *words):
        load(name, tmp_path)


def test_unknown_names_and_arguments(monkeypatch):
    with pytest.raises(ValueError, match=re.escape("did you mean 'cifar10'?")):
        load("CIFAR-10")
    with pytest.raises(ValueError, match=r"data must be one of 'mnist5k', .*'imagenet'; got 'xyz'$"):
        load("xyz")
    with pytest.raises(ValueError, match=r"data 'sklearn-digits': .*'sise'; its arguments are root, size, channels, seed"):
        load("sklearn-digits", sise=3)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"data 'sklearn-digits' needs sklearn.datasets; .*pip install 'fastadv\[demo\]'"):
        load("sklearn-digits")


# --------------------------------------------------------------------------------------------------------------- extra data


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_generated_images(save, mapped, tmp_path, monkeypatch):
    """In the layout of EDM's files: image [N, 32, 32, 3] and label."""
    monkeypatch.setattr(formats, "MAPPED", 1 if mapped else 2**26)
    x, y = random_images(9)
    save(tmp_path / "1m.npz", image=x.transpose(0, 2, 3, 1), label=y)
    same(load_extra(tmp_path / "1m.npz", 10), x, y)
    save(tmp_path / "other.npz", y=y.astype(np.int32) - 1, x=x)
    same(load_extra(tmp_path / "other.npz", 10), x, y - 1)


def test_large_arrays_are_mapped_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAPPED", 1)
    path, order = tmp_path / "it.npz", np.asfortranarray(X[0, 0])
    np.savez(path, x=X, f=order)
    read = formats.npz(path)
    assert torch.equal(read["f"], torch.from_numpy(order))
    bytes_of_x = X.tobytes()
    data = path.read_bytes()
    assert data.count(bytes_of_x) == 1
    with path.open("r+b") as file:  # what the file holds now is what the tensor holds
        file.seek(data.index(bytes_of_x))
        file.write(bytes(len(bytes_of_x)))
    assert not read["x"].any()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("as_list", [False, True])
def test_pseudo_labels(protocol, as_list, tmp_path):
    x, y = random_images(9)
    held = {"data": x.transpose(0, 2, 3, 1), "extrapolated_targets": y.tolist() if as_list else y, "prediction_model": "a path"}
    (tmp_path / "ti_500K_pseudo_labeled.pickle").write_bytes(pickle.dumps(held, protocol))
    same(load_extra(tmp_path / "ti_500K_pseudo_labeled.pickle", 10), x, y)


def test_bad_extra_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_extra(tmp_path / "none.npz", 10)
    path = tmp_path / "bad.npz"
    np.savez(path, image=X, labels=Y)
    with pytest.raises(ValueError, match=r"must hold image and label, .*; it holds image, labels"):
        load_extra(path, 10)
    np.savez(path, image=X, label=Y)
    with pytest.raises(ValueError, match="labels must lie from -1 to 2; they span"):
        load_extra(path, 3)


# ------------------------------------------------------------------------------------------------------------------ ImageNet


def photographs(root: Path, size: tuple[int, int] = (40, 30)) -> dict[str, Image.Image]:
    """A tiny ImageNet of two classes, smooth images that JPEG keeps well, and some files that are none."""
    written = {}
    for part, label, i in product(["train", "val"], ["n01", "n02"], range(3)):
        folder = root / part / label
        folder.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(len(written)).integers(256, size=(4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        path = folder / f"{i}{['.png', '.JPEG', '.jpg'][i]}"
        image = image.convert("L") if i == 2 else image
        image.save(path, **({"quality": 95} if i else {}))
        written[str(path.relative_to(root))] = Image.open(path).convert("RGB")
        (folder / "notes.txt").write_text("not an image")
    (root / "train" / "readme.txt").write_text("not a class")
    return written


def array(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_imagenet_centres(tmp_path):
    written = photographs(tmp_path)
    dataset = load("imagenet", tmp_path, size=14)
    assert dataset.classes == 2
    assert dataset.train.y.tolist() == dataset.test.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.shape == (3, 14, 14)
    taken = dataset.test.take(torch.tensor([4, 0]))
    for got, name in zip(taken, ["val/n02/1.JPEG", "val/n01/0.png"], strict=True):
        resized = written[name].resize((21, 16), Image.Resampling.BILINEAR)  # 16 is 8/7 of 14
        assert torch.equal(got, array(resized.crop((4, 1, 18, 15))))
    whole = load("imagenet", tmp_path, size=30, resize=30).test.take(torch.tensor([0]))[0]
    assert torch.equal(whole, array(written["val/n01/0.png"].crop((5, 0, 35, 30))))
    rows = dataset.test.rows(torch.tensor([5, 4]))
    assert rows.y.tolist() == [1, 1]
    assert torch.equal(rows.take(torch.tensor([1]))[0], taken[0])


def test_imagenet_crops(tmp_path):
    """Each as its own draws say, whatever the others are."""
    written = photographs(tmp_path)
    train = load("imagenet", tmp_path, size=16, workers=2).train
    samples = torch.tensor([3, 0, 3])
    draws = Draws(5, samples + torch.tensor([0, 0, 100]), 7)
    taken = train.take(samples, draws)
    assert not torch.equal(taken[0], taken[2])
    for i, name in enumerate(["train/n02/0.png", "train/n01/0.png", "train/n02/0.png"]):
        box = formats.random_box(40, 30, draws.uniform(0, 10, 4)[i].tolist())
        assert torch.equal(taken[i], array(written[name].crop(box).resize((16, 16), Image.Resampling.BILINEAR)))
    assert torch.equal(train.take(samples[1:], draws.rows(torch.tensor([1, 2]))), taken[1:])


def test_random_boxes_are_uniform_in_area_and_in_the_logarithm_of_the_ratio():
    boxes = np.array([formats.random_box(4000, 4000, t) for t in Draws(0, torch.arange(4000)).uniform(0, 10, 4).tolist()])
    (left, top), (width, height) = boxes[:, :2].T, (boxes[:, 2:] - boxes[:, :2]).T
    area, ratio = width * height / 4000**2, np.log(width / height)
    assert area.min() > 0.0799
    assert area.max() <= 1
    assert abs(ratio).max() < np.log(4 / 3) + 1e-3
    small = area < 0.5  # none of these is too wide or too high
    assert scipy.stats.kstest(area[small], scipy.stats.uniform(0.08, 0.42).cdf).pvalue > 0.01
    assert scipy.stats.kstest(ratio[small], scipy.stats.uniform(-np.log(4 / 3), 2 * np.log(4 / 3)).cdf).pvalue > 0.01
    for at, side in ((left, width), (top, height)):
        assert scipy.stats.kstest((at + 0.5) / (4000 - side + 1), "uniform").pvalue > 0.01
    assert scipy.stats.pearsonr(left / (4001 - width), top / (4001 - height)).pvalue > 0.01


def test_a_long_photograph_has_a_crop_in_its_middle():
    whole = [[0.999, 0.5, 0.0, 0.0]] * 10  # almost all of the area as a square: nowhere in these
    assert formats.random_box(300, 100, whole) == (83, 0, 216, 100)
    assert formats.random_box(100, 300, whole) == (0, 83, 100, 216)
    assert formats.random_box(110, 100, [[1.0, 0.0, 0.0, 0.0]]) == (0, 0, 110, 100)
    fits = [*whole[:3], [0.0, 0.5, 0.999, 0.0]]
    assert formats.random_box(300, 100, fits) == (300 - 49, 0, 300, 49)


def test_broken_imagenets(tmp_path):
    photographs(tmp_path)
    (tmp_path / "train" / "n02" / "0.png").write_text("no image")
    train = load("imagenet", tmp_path, size=8).train
    with pytest.raises(ValueError, match=r"n02/0.png cannot be decoded"):
        train.take(torch.arange(6))
    with pytest.raises(ValueError, match=r"n02/0.png cannot be decoded"):
        list(Batches(train, 2).epoch(0))
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n03")
    with pytest.raises(ValueError, match="same class folders; only one has n02, n03"):
        load("imagenet", tmp_path)


# --------------------------------------------------------------------------------------------------------------------- split


def numbered(n: int, shape: tuple[int, ...] = (1, 2, 2), classes: int = 10) -> Images:
    """Images that tell their numbers, in the first two pixels."""
    x = torch.zeros(n, *shape, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.arange(n) % 256, torch.arange(n) // 256
    return Images(x, torch.arange(n) % classes)


def numbers(x: torch.Tensor) -> list[int]:
    pixels = (x[:, 0, 0, :2] * 255 if x.is_floating_point() else x[:, 0, 0, :2]).round().long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def test_held_out_samples():
    images = numbered(1000)
    train, validation = split(images, 100, seed=1)
    assert (len(train), len(validation)) == (900, 100)
    assert sorted(numbers(train.x) + numbers(validation.x)) == list(range(1000))
    assert numbers(train.x) == sorted(numbers(train.x))
    assert all(y == number % 10 for y, number in zip(validation.y.tolist(), numbers(validation.x), strict=True))
    assert numbers(split(images, 100, seed=1)[1].x) == numbers(validation.x)
    assert numbers(split(images, 100, seed=2)[1].x) != numbers(validation.x)
    for bad in (0, 1000, -1, 0.1):
        with pytest.raises(ValueError, match="held_out"):
            split(images, bad)


# -------------------------------------------------------------------------------------------------------------- augmentation


def distinct(shape: tuple[int, ...]) -> torch.Tensor:
    """An image of which no two pixels are alike, and none is 0."""
    size = int(np.prod(shape))
    return (torch.arange(1, size + 1) / (size + 1)).view(shape)


def equally_often(counts: Counter, kinds: int) -> None:
    assert len(counts) == kinds
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


def occurrences(augment, image: torch.Tensor, expected: dict, n: int) -> Counter:
    """How often each of the expected images comes out, of n; nothing else may."""
    by_bytes = {value.numpy().tobytes(): key for key, value in expected.items()}
    assert len(by_bytes) == len(expected)
    out = augment(image.expand(n, *image.shape), Draws(3, torch.arange(n), 1))
    return Counter(by_bytes[one.numpy().tobytes()] for one in out)


def cropped(image: torch.Tensor, padding: int, mode: str, down: int, right: int) -> torch.Tensor:
    """One crop, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c, i, j in product(range(channels), range(height), range(width)):
        row, column = i + down - padding, j + right - padding
        if mode == "reflect":
            row, column = (2 * (side - 1) - at if at >= side else abs(at) for at, side in ((row, height), (column, width)))
        elif not (0 <= row < height and 0 <= column < width):
            continue
        out[c, i, j] = image[c, row, column]
    return out


@pytest.mark.parametrize(("item", "padding", "mode"), [
    ("crop", 4, "zeros"), ({"crop": {"mode": "reflect"}}, 4, "reflect"), ({"crop": 2}, 2, "zeros"),
    ("shift", 1, "zeros"), ({"shift": 2}, 2, "zeros"),
])  # fmt: skip
def test_all_crops_are_equally_likely_and_exact(item, padding, mode):
    image, places = distinct((2, 7, 6)), range(2 * padding + 1)
    expected = {place: cropped(image, padding, mode, *place) for place in product(places, places)}
    equally_often(occurrences(compose([item]), image, expected, 50 * len(expected)), len(expected))


def test_half_of_the_images_are_flipped():
    image = distinct((2, 3, 4))
    expected = {False: image, True: torch.stack([image[:, :, 3 - j] for j in range(4)], 2)}
    equally_often(occurrences(compose(["flip"]), image, expected, 2000), 2)


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_all_cutouts_are_equally_likely_and_exact(size, inside):
    image, (height, width) = distinct((2, 6, 7)), (6, 7)
    corners = {
        (i, j): (i, j) if inside else (i - size // 2, j - size // 2)
        for i, j in product(*(range(side - size + 1 if inside else side) for side in (height, width)))
    }
    likely: Counter = Counter()  # two corners outside may leave the same image
    expected = {}
    for i, j in corners.values():
        out = image.clone()
        out[:, max(i, 0) : i + size, max(j, 0) : j + size] = 0
        expected.setdefault(out.numpy().tobytes(), ((i, j), out))
        likely[expected[out.numpy().tobytes()][0]] += 1
    counts = occurrences(cutout(size, inside), image, dict(expected.values()), 4000)
    observed, ideal = zip(*((counts[key], 4000 * times / len(corners)) for key, times in likely.items()), strict=True)
    assert scipy.stats.chisquare(observed, ideal).pvalue > 0.01


ALL = [
    "crop",
    {"crop": {"padding": 3, "mode": "reflect"}},
    "flip",
    "shift",
    {"cutout": 3},
    {"cutout": {"size": 2, "inside": True}},
]


def test_what_an_image_becomes_depends_on_its_draws_alone():
    x, draws = torch.rand(40, 3, 8, 9), Draws(1, torch.arange(100, 140), 5)
    augment = compose(ALL)
    whole, before = augment(x, draws), x.clone()
    order = torch.randperm(40)
    assert torch.equal(augment(x[order], draws.rows(order)), whole[order])
    assert all(torch.equal(augment(x[i : i + 1], draws.rows(torch.tensor([i])))[0], whole[i]) for i in range(40))
    assert torch.equal(x, before)
    assert not torch.equal(augment(x, draws.of_stream(99)), whole)
    assert augment(x[:0], draws.rows(torch.arange(0))).shape == (0, 3, 8, 9)
    assert compose([])(x, draws) is x


def test_steps_of_a_composition_draw_independently():
    image = distinct((1, 1, 2))
    once, twice = compose(["flip"]), compose(["flip", "flip"])
    x, draws = image.expand(2000, 1, 1, 2), Draws(0, torch.arange(2000), 1)
    equally_often(Counter(zip(once(x, draws)[:, 0, 0, 0].tolist(), twice(x, draws)[:, 0, 0, 0].tolist(), strict=True)), 4)


def test_a_function_is_an_augmentation():
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(compose([lambda x, draws: x + 1])(x, Draws(0, torch.arange(3))), x + 1)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["crops"], ["augmentation must be one of 'crop', 'flip', 'cutout', 'shift'; got 'crops'; did you mean 'crop'?"]),
        (["Flip"], ["did you mean 'flip'?"]),
        (["xyz"], ["got 'xyz'"]),
        ([{"crop": 4, "flip": None}], ["got {'crop': 4, 'flip': None}"]),
        ([3], ["got 3"]),
        ("crop", ["must be a list", "'crop'"]),
        ([{"crop": {"pading": 4}}], ["augmentation 'crop'", "'pading'", "padding, mode"]),
        ([{"crop": 0}], ["padding must be an integer >= 1; got 0"]),
        ([{"crop": {"mode": "wrap"}}], ["mode must be one of 'zeros', 'reflect'; got 'wrap'"]),
        ([{"flip": 1}], ["augmentation 'flip'", "its arguments are none"]),
        ([{"cutout": "14"}], ["size must be an integer"]),
    ],
)
def test_bad_augmentations(items, words):
    with refused(*words):
        compose(items)


def test_a_cutout_inside_must_fit():
    with pytest.raises(ValueError, match="at most that of the image, 6; got 7"):
        cutout(7, inside=True)(torch.rand(1, 1, 6, 8), Draws(0, torch.arange(1)))


# -------------------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 1.4, 8.0])
def test_beta(alpha):
    drawn = beta(alpha, Draws(1, torch.arange(20000)))
    assert drawn.dtype == torch.float64
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    # Each half by itself, mirrored to 0, where floating numbers are dense: Beta(0.1, 0.1) is within 1e-16 of 1 at times.
    low = drawn[drawn < 0.5].numpy()
    assert scipy.stats.kstest(low, lambda x: 2 * scipy.stats.beta(alpha, alpha).cdf(x)).pvalue > 0.01
    assert scipy.stats.binomtest(len(low), 20000).pvalue > 0.01
    if alpha > 0.3:
        assert scipy.stats.kstest(drawn.numpy(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


def pairs(n: int, shape: tuple[int, ...] = (2, 7, 6), classes: int = 5):
    """(x, partner, y, partner_y) and draws; n images that are all ones next to images that are all zeros."""
    y, partner_y = torch.arange(n) % classes, (torch.arange(n) // classes) % classes
    return (torch.ones(n, *shape), torch.zeros(n, *shape), y, partner_y), Draws(2, torch.arange(n) + 7, 3)


def soft(y: int, partner_y: int, share: float, classes: int = 5) -> list[float]:
    label = [0.0] * classes
    label[y] += share
    label[partner_y] += 1 - share
    return label


@pytest.mark.parametrize("alpha", [0.2, 1.4])
def test_mixup(alpha):
    (x, partner, y, partner_y), draws = pairs(50)
    x, partner = torch.rand(x.shape), torch.rand(x.shape)
    out, label = mixup(alpha, classes=5)(x, partner, y, partner_y, draws)
    shares = beta(alpha, draws).tolist()  # whose distribution has a test above
    assert len(set(shares)) == 50
    for i, share in enumerate(shares):
        torch.testing.assert_close(out[i], share * x[i] + (1 - share) * partner[i])
        torch.testing.assert_close(label[i].tolist(), soft(int(y[i]), int(partner_y[i]), share), atol=1e-6, rtol=0)
    assert label.dtype == torch.float32


def test_cutmix():
    """Box by box as the paper's code has it: sides by the root of 1 - l, around a centre, cut off at the borders."""
    n, (height, width) = 3000, (7, 6)
    (x, partner, y, partner_y), draws = pairs(n)
    out, label = cutmix(1.0, classes=5)(x, partner, y, partner_y, draws)
    shares, centres = beta(1.0, draws).tolist(), Counter()
    u = draws.uniform(1, 2, dtype=torch.float64).tolist()
    for i in range(n):
        row, column = int(u[i][0] * height), int(u[i][1] * width)
        centres[row, column] += 1
        half_height, half_width = (int(side * (1 - shares[i]) ** 0.5) // 2 for side in (height, width))
        expected, area = torch.ones(2, height, width), 0
        for r, c in product(range(height), range(width)):
            if row - half_height <= r < row + half_height and column - half_width <= c < column + half_width:
                expected[:, r, c] = 0
                area += 1
        assert torch.equal(out[i], expected)
        share = 1 - area / (height * width)
        torch.testing.assert_close(label[i].tolist(), soft(int(y[i]), int(partner_y[i]), share), atol=1e-6, rtol=0)
    equally_often(centres, height * width)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_by_name(name):
    (x, partner, y, partner_y), draws = pairs(20)
    whole = mixing({name: 0.7}, classes=5)(x, partner, y, partner_y, draws)
    order = torch.randperm(20)
    part = mixing({name: {"alpha": 0.7}}, classes=5)(x[order], partner, y[order], partner_y[order], draws.rows(order))
    assert torch.equal(part[0], whole[0][order])
    assert torch.equal(part[1], whole[1][order])
    default, one = (mixing(item, classes=5)(x, partner, y, partner_y, draws) for item in (name, {name: 1.0}))
    assert torch.equal(default[0], one[0])
    assert torch.equal(default[1], one[1])
    with pytest.raises(ValueError, match=f"mix must be one of 'mixup', 'cutmix'; got '{name}s'; did you mean '{name}'"):
        mixing(f"{name}s", classes=5)
    with pytest.raises(ValueError, match="alpha must be a finite number > 0; got 0"):
        mixing({name: 0}, classes=5)


# ------------------------------------------------------------------------------------------------------------------- batches


AUGMENT = compose(["crop", "flip", {"cutout": 3}])


def colourful(n: int, seed: int = 0, shape: tuple[int, ...] = (3, 8, 8)) -> Images:
    x, y = random_images(n, shape=shape, seed=seed)
    return Images(torch.from_numpy(x), torch.from_numpy(y))


def equal(a, b) -> bool:
    return a.size == b.size and all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x", "y", "samples"))


SETTINGS = {
    "plain": {},
    "augmented": {"augment": AUGMENT},
    "views": {"augment": AUGMENT, "views": 2},
    "mixup": {"augment": AUGMENT, "mix": mixing("mixup", 10)},
    "cutmix of views": {"augment": AUGMENT, "mix": mixing("cutmix", 10), "views": 3},
    "extra": {"augment": AUGMENT, "extra": colourful(11, 1), "unsup_fraction": 0.7},
    "extra, mixed": {"extra": colourful(11, 1), "unsup_fraction": 0.3, "mix": mixing("mixup", 10), "views": 2},
    "steps": {"augment": AUGMENT, "steps": 9},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def test_an_epoch_is_a_permutation():
    images = numbered(1000)
    batches = Batches(images, 128)
    seen = []
    for epoch in (0, 1):
        got = list(batches.epoch(epoch))
        assert len(got) == len(batches) == 8
        assert [len(b.x) for b in got] == [b.size for b in got] == [128] * 7 + [104]
        samples = torch.cat([b.samples for b in got])
        assert sorted(samples.tolist()) == list(range(1000))
        assert numbers(torch.cat([b.x for b in got])) == samples.tolist()
        assert torch.cat([b.y for b in got]).tolist() == (samples % 10).tolist()
        seen.append(samples.tolist())
    assert seen[0] != seen[1]
    assert len(Batches(images, 125)) == 8
    assert len(Batches(images, 5000)) == 1


def test_all_orders_are_equally_likely():
    batches = Batches(numbered(4), 4)
    equally_often(Counter(tuple(batches.order(epoch)[0].tolist()) for epoch in range(1200)), 24)


def test_permutations_and_fractions_have_48_bits():
    draws = Draws(0, torch.arange(2**16))
    drawn = fractions(draws)
    assert torch.equal(permutation(draws), drawn.argsort())
    assert scipy.stats.kstest(drawn.numpy(), "uniform").pvalue > 0.01
    low = (drawn * 2**24).frac()
    assert scipy.stats.kstest(low.numpy(), "uniform").pvalue > 0.01


def test_images_come_as_they_are_without_augmentation():
    images = colourful(50)
    for b in Batches(images, 20).epoch(0):
        assert b.x.dtype == torch.float32
        assert torch.equal(b.x, images.x[b.samples].float() / 255)
        assert torch.equal(b.y, images.y[b.samples])


def test_augmented_images_are_crops_of_the_originals():
    images = Images(
        (distinct((1, 4, 4)) * 255).byte().expand(30, 1, 4, 4) + torch.arange(30).byte()[:, None, None, None],
        torch.zeros(30).long(),
    )
    kinds = Counter()
    for epoch in range(20):
        for b in Batches(images, 8, compose(["shift"])).epoch(epoch):
            for x, sample in zip(b.x, b.samples.tolist(), strict=True):
                original = images.x[sample].float() / 255
                (place,) = [p for p in product(range(3), range(3)) if torch.equal(x, cropped(original, 1, "zeros", *p))]
                kinds[place] += 1
    equally_often(kinds, 9)


@every_setting
def test_the_same_twice_and_other_with_another_seed(settings):
    images = colourful(50)
    for epoch in (0, 3):
        a, b, c = (list(Batches(images, 12, seed=seed, **settings).epoch(epoch)) for seed in (1, 1, 2))
        assert all(map(equal, a, b))
        assert not any(map(equal, a, c))


@every_setting
def test_starting_at_any_batch_gives_what_a_whole_pass_gives_from_there(settings):
    batches = Batches(colourful(50), 12, **settings)
    whole = list(batches.epoch(2))
    assert len(whole) == len(batches)
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(2, start))
        assert len(rest) == len(whole) - start
        assert all(map(equal, rest, whole[start:]))
    for bad in (-1, len(batches) + 1):
        with pytest.raises(ValueError, match="start"):
            batches.epoch(2, bad)
    with pytest.raises(ValueError, match="epoch"):
        batches.epoch(-1)


@every_setting
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_have_the_whole_batch(settings, world):
    images = colourful(52)  # 4 are left for a last batch of 12
    whole = list(Batches(images, 12, **settings).epoch(1))
    parts = [list(Batches(images, 12, rank=rank, world=world, **settings).epoch(1)) for rank in range(world)]
    views = settings.get("views", 1)
    for one, *ranks in zip(whole, *parts, strict=True):
        assert {part.size for part in ranks} == {one.size}
        for name in ("x", "y", "samples"):
            by_view = [torch.cat(view) for view in zip(*(getattr(part, name).chunk(views) for part in ranks), strict=True)]
            assert torch.equal(torch.cat(by_view), getattr(one, name))
        sizes = [len(part.x) // views for part in ranks]
        assert sizes == [len(t) for t in torch.arange(one.size // views).tensor_split(world)]


def test_a_last_batch_without_a_sample_for_every_rank_is_left_out():
    images = numbered(26)
    assert [b.size for b in Batches(images, 12, world=2).epoch(0)] == [12, 12, 2]
    assert [b.size for b in Batches(images, 12, world=3).epoch(0)] == [12, 12]
    assert [b.size for b in Batches(images, 12, world=3, steps=5).epoch(0)] == [12] * 5
    with pytest.raises(ValueError, match="must suffice for 27 ranks"):
        Batches(images, 30, world=27)
    with pytest.raises(ValueError, match="must suffice for 4 ranks; got 3"):
        Batches(images, 3, world=4)


@every_setting
def test_how_much_is_augmented_at_once_changes_nothing(settings, monkeypatch):
    batches = Batches(colourful(50), 12, **settings)
    together = list(batches.epoch(0))
    for chunk in (1, 20_000):
        monkeypatch.setattr(batches_module, "CPU_CHUNK", chunk)
        assert all(map(equal, batches.epoch(0), together))


def test_more_steps_than_a_pass_begin_another():
    batches = Batches(numbered(10), 4, steps=7)
    samples = [b.samples.tolist() for b in batches.epoch(0)]
    assert [len(s) for s in samples] == [4, 4, 2, 4, 4, 2, 4]
    first, second = ([i for s in samples[at : at + 3] for i in s] for at in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [b.samples.tolist() for b in Batches(numbered(10), 4, steps=2).epoch(0)] == samples[:2]


def test_a_sample_in_two_batches_is_augmented_twice():
    seen = [b.x[b.samples == 3] for b in Batches(colourful(5), 5, AUGMENT, steps=40).epoch(0)]
    assert len({x.numpy().tobytes() for x in seen}) > 35


# --------------------------------------------------------------------------------------------------- extra data in batches


@pytest.mark.parametrize(
    ("size", "fraction", "drawn"), [(128, 0.5, 64), (512, 0.7, 358), (10, 0.99, 9), (10, 1.0, 10), (8, 0.125, 1)]
)
def test_the_fraction_of_extra_data(size, fraction, drawn):
    """Originals without replacement, extra images with it; as many batches as the originals alone would fill."""
    images, extra = numbered(1000), numbered(600)
    batches = Batches(images, size, extra=Images(255 - extra.x, extra.y), unsup_fraction=fraction)
    assert len(batches) == -(-1000 // size)
    seen: Counter = Counter()
    positions = torch.zeros(size)
    for k, b in enumerate(batches.epoch(0)):
        own = b.samples < 1000
        assert int(own.sum()) == min(size - drawn, 1000 - k * (size - drawn))
        assert len(b.x) == b.size == size
        assert numbers(b.x[own]) == b.samples[own].tolist()
        assert numbers(1 - b.x[~own]) == (b.samples[~own] - 1000).tolist()
        assert torch.equal(b.y, torch.where(own, b.samples % 10, (b.samples - 1000) % 10))
        seen.update(b.samples.tolist())
        positions += ~own
    originals = {s: n for s, n in seen.items() if s < 1000}
    assert set(originals.values()) <= {1}
    assert max(seen) < 1600
    if fraction == 0.5:
        assert positions[: size // 2].sum() == pytest.approx(drawn * len(batches) / 2, rel=0.2)  # they stand anywhere
        whole = torch.stack(batches.order(0))
        place, number = (t[whole >= 1000] for t in (torch.arange(size).expand_as(whole), whole))
        assert scipy.stats.pearsonr(place, number).pvalue > 0.01


def test_every_extra_image_is_equally_likely():
    batches = Batches(numbered(1000), 100, extra=numbered(50), unsup_fraction=0.5)
    seen = Counter(s for epoch in range(6) for b in batches.epoch(epoch) for s in b.samples.tolist() if s >= 1000)
    assert sum(seen.values()) == 6 * 500
    equally_often(seen, 50)


def test_a_file_of_generated_images_feeds_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAPPED", 1)
    x, y = random_images(30)
    np.savez(tmp_path / "1m.npz", image=x.transpose(0, 2, 3, 1), label=y)
    images, extra = colourful(40, shape=(3, 32, 32)), load_extra(tmp_path / "1m.npz", 10)
    joined = torch.cat([images.x, torch.from_numpy(x)]).float() / 255
    for b in Batches(images, 8, extra=extra, unsup_fraction=0.5).epoch(0):
        assert torch.equal(b.x, joined[b.samples])
        assert b.x.is_contiguous()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"rank": 2, "world": 2}, ["rank must be below world, 2; got 2"]),
        ({"rank": -1}, ["rank", "-1"]),
        ({"views": 0}, ["views", "0"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"unsup_fraction": 0.5}, ["unsup_fraction", "0.5", "no extra data"]),
        ({"extra": colourful(3)}, ["unsup_fraction", "0.0 of 12"]),
        ({"extra": colourful(3), "unsup_fraction": 0.05}, ["unsup_fraction", "0.05 of 12"]),
        ({"extra": colourful(3), "unsup_fraction": 1.5}, ["unsup_fraction", "1.5"]),
        ({"extra": colourful(3), "unsup_fraction": -0.5}, ["unsup_fraction", "-0.5"]),
        ({"extra": numbered(3), "unsup_fraction": 0.5}, ["(3, 8, 8)", "(1, 2, 2)"]),
        (
            {"mix": mixing("mixup", 10), "extra": Images(colourful(3).x, torch.full((3,), -1)), "unsup_fraction": 0.5},
            ["mix", "-1"],
        ),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with refused(*words):
        Batches(colourful(50), **({"batch_size": 12} | settings))


# ------------------------------------------------------------------------------------------------------- views, mixing, files


def test_views_are_numbered_and_augmented_apart():
    images = colourful(30)
    for b in Batches(images, 7, AUGMENT, views=2).epoch(0):
        first, second = b.samples.chunk(2)
        assert torch.equal(second, first + 30)
        assert b.size == len(b.x) == 2 * len(first)
        assert torch.equal(b.y, images.y[b.samples % 30])
        x, other = b.x.chunk(2)
        assert sum(torch.equal(p, q) for p, q in zip(x, other, strict=True)) <= 1
    for b in Batches(images, 7, views=3).epoch(0):
        assert torch.equal(b.x, images.x[b.samples % 30].float() / 255)


@pytest.mark.parametrize("views", [1, 2])
def test_partners_are_the_images_before(views):
    """And are augmented as they are themselves in the batch."""

    def keep(x, partner, y, partner_y, draws):
        kept.append((x, partner, y, partner_y))
        return x, y

    images, kept = colourful(30), []
    plain = list(Batches(images, 8, AUGMENT, views=views).epoch(4))
    for b, same in zip(plain, Batches(images, 8, AUGMENT, keep, views=views).epoch(4), strict=True):
        assert equal(b, same)
        x, partner, y, partner_y = kept.pop()
        for of, to in ((x, partner), (y, partner_y)):
            for a, before in zip(of.chunk(views), to.chunk(views), strict=True):
                assert torch.equal(a.roll(1, 0), before)


def test_photographs_are_the_same_on_one_rank_or_two(tmp_path):
    photographs(tmp_path)
    train = load("imagenet", tmp_path, size=16).train
    whole = list(Batches(train, 3, compose(["flip"])).epoch(0))
    assert sorted(s for b in whole for s in b.samples.tolist()) == list(range(6))
    ranks = [list(Batches(train, 3, compose(["flip"]), rank=rank, world=2).epoch(0)) for rank in (0, 1)]
    for b, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.x for part in parts]), b.x)
    both = {"extra": train, "unsup_fraction": 0.5}
    whole_both, *ranks = (list(Batches(train, 4, rank=r, world=w, **both).epoch(0)) for r, w in ((0, 1), (0, 2), (1, 2)))
    for b, *parts in zip(whole_both, *ranks, strict=True):
        assert torch.equal(torch.cat([part.x for part in parts]), b.x)
    crops, centres = (
        torch.cat([b.x for b in whole])[torch.cat([b.samples for b in whole]).argsort()],
        train.take(torch.arange(6)) / 255,
    )
    assert not any(map(torch.equal, crops, centres))
    assert not equal(whole[0], next(Batches(train, 3, compose(["flip"])).epoch(1)))


def test_work_ahead_keeps_order_and_ends():
    threads = set(threading.enumerate())
    assert list(ahead(lambda i: i * i, range(20))) == [i * i for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda i: 1 // (5 - i), range(20)))
    begun = []
    left = ahead(begun.append, range(100))
    next(left)
    left.close()
    assert len(begun) < 10
    assert not {t for t in threading.enumerate() if t.is_alive()} - threads


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["augmented", "cutmix of views", "mixup"])
def test_nothing_in_the_loop_waits_for_the_device(name):
    """None of the operators that need a value on the CPU, or shapes that depend on values."""
    batches = Batches(colourful(50), 12, **SETTINGS[name])
    with Ops() as ops:
        assert len(list(batches.epoch(0))) == 5
    assert len(ops.names) > 10
    waits = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "unique", "masked_select")
    assert not [op for op in ops.names if op.split(".")[1] in waits]


@pytest.mark.gpu
@every_setting
def test_on_a_gpu_batches_are_those_of_the_cpu(settings):
    images = colourful(50)
    there = Batches(images, 12, device="cuda", **settings)
    for b, cpu in zip(there.epoch(1), Batches(images, 12, **settings).epoch(1), strict=True):
        assert b.x.is_cuda
        torch.testing.assert_close(b.x.cpu(), cpu.x, atol=1e-6, rtol=0)
        torch.testing.assert_close(b.y.cpu(), cpu.y, atol=1e-6, rtol=0)
        assert torch.equal(b.samples.cpu(), cpu.samples)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(there.epoch(2))) == len(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_augmentation_has_a_test_here():
    text = Path(__file__).read_text()
    assert all(f'"{name}"' in text for name in AUGMENTATIONS)
