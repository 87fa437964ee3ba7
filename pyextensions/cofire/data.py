# SPDX-License-Identifier: Apache-2.0
"""Data for the experiments: the digits that come with scikit-learn, images of a local folder, and the text of Python's own
library. Nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import itertools
import pickle
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FORMS", "Images", "Text", "load", "load_manual", "load_text"]

#: What networks trained on ImageNet expect of RGB images.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_SHARE = 0.3
VALIDATION_SHARE = 0.2
TEXT_VALIDATION_SHARE = 0.1
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")

#: The folders that :func:`load` understands, as its error message lists them.
FORMS = (
    "cifar10_train.npz and cifar10_test.npz (arrays jpeg, offsets, labels)",
    "data_batch_1 ... data_batch_5 and test_batch (the original CIFAR-10 for Python)",
    "train-images-idx3-ubyte and its three companions, or the same with .gz (MNIST, Fashion-MNIST)",
    "train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png (also .jpg, .jpeg, .bmp)",
)

Split = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # images uint8 [N, C, H, W], labels [N]


@dataclass(frozen=True)
class Images:
    """A labelled set of images of one size, split into training and test.

    Images are uint8 ``[N, C, H, W]`` and labels int64 ``[N]``; ``mean`` and ``std`` hold one number per channel, for
    images scaled to [0, 1].
    """

    name: str
    condition: str  #: one sentence on where the images come from, for the reports
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool  #: whether training may shift and mirror the images
    part: str = "test"  #: what ``test`` holds: ``"test"`` or ``"validation"`` images

    def normalize(self, images: Tensor) -> Tensor:
        """float32, with zero mean and unit deviation per channel."""
        scale = torch.tensor(self.std).view(1, -1, 1, 1) * 255
        shift = torch.tensor(self.mean).view(1, -1, 1, 1) * 255
        return (images.float() - shift) / scale

    def subset(self, train: int | None = None, test: int | None = None) -> Images:
        """The first ``train`` and ``test`` images (None: all) of the two parts; the training set is in random order."""
        verb = {"test": "Tested", "validation": "Validated"}[self.part]
        parts = (("Trained", train, self.train), (verb, test, self.test))
        notes = [f" {verb} on {n:,} of the {len(x):,} images." for verb, n, x in parts if n is not None and n < len(x)]
        return replace(
            self,
            condition=self.condition + "".join(notes),
            train=self.train[:train],
            train_labels=self.train_labels[:train],
            test=self.test[:test],
            test_labels=self.test_labels[:test],
        )

    def validation(self) -> Images:
        """Training images in the place of the test images, so that a setting can be chosen without a look at the test.

        The first fifth of each class is set aside; the training set is in random order. ``mean`` and ``std`` stay.

        Raises:
            ValueError: the images are from this method already.
        """
        if self.part != "test":
            raise ValueError("validation: a validation split is set aside already")
        aside = torch.zeros(len(self.train_labels), dtype=torch.bool)
        for label in self.train_labels.unique():
            rows = torch.nonzero(self.train_labels == label).flatten()
            aside[rows[: round(VALIDATION_SHARE * len(rows))]] = True
        count = int(aside.sum())
        note = f" Validation run: {count:,} of the {len(aside):,} training images are set aside, and accuracy is"
        return replace(
            self,
            condition=f"{self.condition}{note} measured on these; the test images are not used.",
            train=self.train[~aside],
            train_labels=self.train_labels[~aside],
            test=self.train[aside],
            test_labels=self.train_labels[aside],
            part="validation",
        )

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, augmented and normalised; a last batch of fewer than two images is left out."""
        for rows in torch.split(torch.randperm(len(self.train), generator=generator), batch):
            if len(rows) < 2:
                continue
            x = self.normalize(self.train[rows])
            yield (_shift_and_mirror(x, generator) if self.augment else x), self.train_labels[rows]

    def test_batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, normalised."""
        for x, y in zip(torch.split(self.test, batch), torch.split(self.test_labels, batch), strict=True):
            yield self.normalize(x), y


def _shift_and_mirror(x: Tensor, generator: torch.Generator, pixels: int = 4) -> Tensor:
    """Each image shifted by up to ``pixels`` with zeros moving in, and mirrored with probability one half."""
    n, _, h, w = x.shape
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, n, 1), generator=generator)
    columns = torch.arange(w).expand(n, w)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns) + dx
    rows = torch.arange(h) + dy
    padded = F.pad(x, (pixels,) * 4)
    return (
        padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def load(source: str | Path = "digits", *, seed: int = 0, size: int | None = None) -> Images:
    """Load ``"digits"`` or the images of a local folder.

    Args:
        source: ``"digits"`` (the 1,797 handwritten digits of scikit-learn, 8x8 pixels) or a folder in one of
            :data:`FORMS`.
        seed: draws the 70/30 split where the source has none, and the order of the training set.
        size: resize the images to ``size`` x ``size`` pixels (bilinear); None keeps theirs.

    Raises:
        ModuleNotFoundError: scikit-learn or Pillow is missing (``pip install cofire[data]``).
        FileNotFoundError: no such folder.
        ValueError: a folder in no known form, or images of different sizes.
    """
    images = _digits(seed) if str(source) == "digits" else _folder(Path(source), seed)
    return images if size is None else _resize(images, size)


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this data needs {package}: pip install 'cofire[data]'") from error


def _digits(seed: int) -> Images:
    bunch = _need("sklearn.datasets", "scikit-learn").load_digits()
    pixels = np.rint(bunch.images[:, None] * (255 / 16)).astype(np.uint8)
    train, test = _split((pixels, bunch.target), seed)
    condition = f"The handwritten digits of scikit-learn, 8x8 pixels; {_counts(train, test)}."
    return _images("digits", condition, train, test, tuple("0123456789"), seed, augment=False)


def _folder(folder: Path, seed: int) -> Images:
    forms = "; ".join(FORMS)
    if not folder.is_dir():
        raise FileNotFoundError(f"load: no folder {str(folder)!r}; give 'digits' or a folder with {forms}")
    readers: tuple[Callable[[Path, int], Images | None], ...] = (_cifar_npz, _cifar_batches, _idx, _image_folder)
    for read in readers:
        found = read(folder, seed)
        if found is not None:
            return found
    raise ValueError(f"load: nothing in {str(folder)!r} has a known form; expected {forms}")


def _images(
    name: str, condition: str, train: Split, test: Split, classes: tuple[str, ...], seed: int, augment: bool
) -> Images:
    order = np.random.default_rng(seed).permutation(len(train[1]))
    pixels = train[0][order]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if pixels.shape[1] == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = (float(pixels.mean() / 255),), (float(max(pixels.std() / 255, 1e-3)),)
    tensors = [torch.from_numpy(np.array(a)) for a in (pixels, train[1][order], *test)]
    return Images(
        name,
        condition,
        tensors[0],
        tensors[1].long(),
        tensors[2],
        tensors[3].long(),
        classes,
        mean,
        std,
        augment,
    )


def _counts(train: Split, test: Split) -> str:
    return f"{len(train[1]):,} images for training, {len(test[1]):,} for the test"


def _split(data: Split, seed: int) -> tuple[Split, Split]:
    """70 per cent for training, the rest for the test, in every class alike."""
    pixels, labels = data
    generator = np.random.default_rng(seed)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        test[rows[: round(TEST_SHARE * len(rows))]] = True
    return (pixels[~test], labels[~test]), (pixels[test], labels[test])


def _resize(images: Images, size: int) -> Images:
    def resized(x: Tensor) -> Tensor:
        y = F.interpolate(x.float(), size=(size, size), mode="bilinear", align_corners=False)
        return y.round_().clamp_(0, 255).to(torch.uint8)

    condition = f"{images.condition} Resized to {size}x{size} pixels."
    return replace(images, condition=condition, train=resized(images.train), test=resized(images.test))


def _decode(files: Iterable[Any], mode: str | None = None) -> np.ndarray[Any, Any]:
    """Image files to uint8 ``[N, C, H, W]``; ``mode`` as Pillow's, by default that of the first image."""
    image = _need("PIL.Image", "Pillow")
    pixels = []
    for file in files:
        with image.open(file) as picture:
            mode = mode or ("L" if picture.mode in ("1", "L") else "RGB")
            pixels.append(np.asarray(picture.convert(mode)))
        if pixels[-1].shape != pixels[0].shape:
            (h, w), (h0, w0) = pixels[-1].shape[:2], pixels[0].shape[:2]
            raise ValueError(f"load: images must all have one size, got {w0}x{h0} and then {w}x{h} ({file})")
    stacked = np.stack(pixels)
    return stacked[:, None] if mode == "L" else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def _cifar_npz(folder: Path, seed: int) -> Images | None:
    paths = [folder / f"cifar10_{part}.npz" for part in ("train", "test")]
    if not all(path.is_file() for path in paths):
        return None

    def read(path: Path) -> Split:
        with np.load(path, allow_pickle=False) as arrays:
            jpeg, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays["labels"]
        files = (io.BytesIO(jpeg[start:end].tobytes()) for start, end in itertools.pairwise(offsets))
        return _decode(files, "RGB"), labels

    with np.load(paths[0], allow_pickle=False) as arrays:
        classes = tuple(str(c) for c in arrays["class_names"]) if "class_names" in arrays else ()
    train, test = read(paths[0]), read(paths[1])
    condition = "JPEG-compressed copies of the CIFAR-10 images, so not identical to the original set."
    return _images("cifar10-jpeg", condition, train, test, classes or _numbered(train[1]), seed, augment=True)


class _ArraysOnly(pickle.Unpickler):
    """A pickle may run any function it names; these files need only what rebuilds a numpy array."""

    allowed = ("_reconstruct", "ndarray", "dtype", "encode", "_frombuffer")

    def find_class(self, module: str, name: str) -> Any:
        if name in self.allowed and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise ValueError(f"load: a CIFAR-10 batch must hold arrays only, got {module}.{name}")


def _cifar_batches(folder: Path, seed: int) -> Images | None:
    if not (folder / "test_batch").is_file():
        return None

    def read(names: Iterable[str]) -> Split:
        batches = []
        for name in names:
            with (folder / name).open("rb") as file:
                batches.append(_ArraysOnly(file, encoding="bytes").load())
        pixels = np.concatenate([np.asarray(b[b"data"], dtype=np.uint8) for b in batches]).reshape(-1, 3, 32, 32)
        return pixels, np.concatenate([np.asarray(b[b"labels"]) for b in batches])

    train = read(sorted(path.name for path in folder.glob("data_batch_*")))
    return _images("cifar10", "CIFAR-10.", train, read(["test_batch"]), _numbered(train[1]), seed, augment=True)


def _idx(folder: Path, seed: int) -> Images | None:
    def find(name: str) -> Path | None:
        return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)

    found = [find(f"{part}-{kind}-ubyte") for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    paths = [path for path in found if path is not None]
    if len(paths) < 4:
        return None
    images, labels, test_images, test_labels = (_read_idx(path) for path in paths)
    train, test = (images[:, None], labels), (test_images[:, None], test_labels)
    condition = f"{folder.name}; {_counts(train, test)}."
    return _images(folder.name, condition, train, test, _numbered(labels), seed, augment=False)


def _read_idx(path: Path) -> np.ndarray[Any, Any]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"load: {path.name} must be an idx file of bytes, got the magic {content[:4].hex()}")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _image_folder(folder: Path, seed: int) -> Images | None:
    parts = [folder / "train", folder / "test"]
    split_given = all(part.is_dir() for part in parts)
    roots = parts if split_given else [folder]
    classes = tuple(sorted(d.name for d in roots[0].iterdir() if d.is_dir() and any(_pictures(d))))
    if not classes:
        return None
    found = [_read_classes(root, classes) for root in roots]
    train, test = (found[0], found[1]) if split_given else _split(found[0], seed)
    condition = f"{folder.name}; {_counts(train, test)}."
    return _images(folder.name, condition, train, test, classes, seed, augment=False)


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES)


def _read_classes(root: Path, classes: tuple[str, ...]) -> Split:
    files = [(path, label) for label, name in enumerate(classes) for path in _pictures(root / name)]
    return _decode(path for path, _ in files), np.array([label for _, label in files])


def _numbered(labels: np.ndarray[Any, Any]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(int(labels.max()) + 1))


# ---------------------------------------------------------------------------------------------------------- text

#: The printable characters of ASCII, and the line feed; any other counts as the question mark.
VOCABULARY = "".join(map(chr, range(32, 127))) + "\n"
#: Modules of one file each, found in every version of Python that the library runs on.
TRAIN_MODULES = (
    *(
        "_pydecimal",
        "argparse",
        "ast",
        "calendar",
        "codecs",
        "configparser",
        "csv",
        "dataclasses",
        "datetime",
        "difflib",
    ),
    *(
        "dis",
        "doctest",
        "enum",
        "fractions",
        "ftplib",
        "functools",
        "gettext",
        "inspect",
        "ipaddress",
        "locale",
        "mailbox",
    ),
    *("optparse", "pdb", "pickle", "pickletools", "platform", "plistlib", "pydoc", "smtplib", "socket", "ssl"),
    *("subprocess", "tarfile", "threading", "tokenize", "trace", "turtle", "zipapp"),
)
TEST_MODULES = ("random", "shutil", "statistics", "tempfile", "textwrap", "traceback", "typing", "uuid", "weakref")
#: Of the files of Python 3.11.7, from which the published results are.
TEXT_SHA256 = "1835d923620fe260940d1f9f24594f906cca9c6aecec207c8a2b1732d98140e6"
#: Of the help topics of the same Python.
MANUAL_SHA256 = "2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4"
MANUAL_TEST = 8  #: every so many topics one is for the test


@dataclass(frozen=True)
class Text:
    """A text in two parts, as numbers of characters in ``vocabulary`` (uint8)."""

    name: str
    condition: str  #: one sentence on where the text comes from, for the reports
    train: Tensor
    test: Tensor
    vocabulary: str
    part: str = "test"  #: what ``test`` holds: ``"test"`` or ``"validation"`` text

    def validation(self) -> Text:
        """The end of the training text in the place of the test, so that a setting can be chosen without a look at it.

        Raises:
            ValueError: the text is from this method already.
        """
        if self.part != "test":
            raise ValueError("validation: a validation split is set aside already")
        kept = len(self.train) - round(TEXT_VALIDATION_SHARE * len(self.train))
        note = (
            f" Validation run: the last {len(self.train) - kept:,} characters of the training text are set aside, and"
        )
        return replace(
            self,
            condition=f"{self.condition}{note} results are measured on these; the test text is not used.",
            train=self.train[:kept],
            test=self.train[kept:],
            part="validation",
        )

    def batch(self, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows of the training text at random places ``[batch, context]``, and the characters that follow each place."""
        starts = torch.randint(len(self.train) - context, (batch,), generator=generator)
        windows = self.train[starts[:, None] + torch.arange(context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def test_batches(self, batch: int, context: int, windows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``windows`` windows, at even distances over the test text, in batches."""
        starts = torch.linspace(0, len(self.test) - context - 1, windows).long()
        for rows in torch.split(starts, batch):
            found = self.test[rows[:, None] + torch.arange(context + 1)].long()
            yield found[:, :-1], found[:, 1:]


def load_text(folder: Path | None = None) -> Text:
    """The source text of modules of Python's standard library: :data:`TRAIN_MODULES`, and others for the test.

    Args:
        folder: where the modules are; None: the library of the Python that runs.

    Raises:
        FileNotFoundError: a part of which no module is there.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    parts = [_modules(folder, names) for names in (TRAIN_MODULES, TEST_MODULES)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    same = _sameness(digest, TEXT_SHA256)
    train, test = (torch.from_numpy(_numbers(part)) for part in parts)
    condition = (
        f"Source text of Python {platform.python_version()}'s standard library, sha256 {digest[:8]}: {same}; "
        f"{len(train):,} characters for training, {len(test):,} of other modules for the test."
    )
    return Text("text", condition, train, test, VOCABULARY)


def load_manual() -> Text:
    """The help topics of Python's ``pydoc``: English prose with examples of code, from the language reference.

    Raises:
        ModuleNotFoundError: this Python comes without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("load_manual: this Python comes without pydoc_data.topics") from error
    names = sorted(topics)
    test = names[::MANUAL_TEST]
    digest = hashlib.sha256("\n".join(topics[name] for name in names).encode()).hexdigest()
    chosen = [[name for name in names if name not in test], test]
    parts = [torch.from_numpy(_numbers("\n".join(topics[name] for name in part))) for part in chosen]
    condition = (
        f"Help topics of Python {platform.python_version()}, sha256 {digest[:8]}: {_sameness(digest, MANUAL_SHA256)}; "
        f"{len(parts[0]):,} characters for training, {len(parts[1]):,} of other topics for the test."
    )
    return Text("manual", condition, parts[0], parts[1], VOCABULARY)


def _sameness(digest: str, published: str) -> str:
    same = "the text of the published results"
    if digest == published:
        return same
    return f"not {same}, whose sha256 begins with {published[:8]}, so numbers will differ a little"


def _modules(folder: Path, names: Iterable[str]) -> str:
    paths = [path for name in names if (path := folder / f"{name}.py").is_file()]
    if not paths:
        raise FileNotFoundError(f"load_text: none of the modules {', '.join(names)} is in {str(folder)!r}")
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _numbers(text: str) -> np.ndarray[Any, Any]:
    table = np.full(256, VOCABULARY.index("?"), dtype=np.uint8)
    for number, character in enumerate(VOCABULARY):
        table[ord(character)] = number
    return table[np.frombuffer(text.encode("latin-1", errors="replace"), np.uint8)]
