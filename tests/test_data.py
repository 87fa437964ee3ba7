# SPDX-License-Identifier: Apache-2.0
"""The loaders, on files made here."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cofire.data import FORMS, TEST_MODULES, TRAIN_MODULES, VOCABULARY, Text, load, load_text

RNG = np.random.default_rng(0)


def _png(folder: Path, pixels: np.ndarray) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(folder / f"{len(list(folder.iterdir()))}.png")


def test_digits_split_is_stratified_and_seeded() -> None:
    pytest.importorskip("sklearn")
    a, b, c = load("digits", seed=0), load("digits", seed=0), load("digits", seed=1)
    assert len(a.train) + len(a.test) == 1797
    assert abs(len(a.test) / 1797 - 0.3) < 0.005
    assert a.train.shape[1:] == (1, 8, 8)
    assert a.train.dtype == torch.uint8
    assert torch.equal(a.test, b.test)
    assert not torch.equal(a.test_labels, c.test_labels) or not torch.equal(a.test, c.test)
    shares = torch.bincount(a.test_labels) / torch.bincount(torch.cat([a.train_labels, a.test_labels]))
    assert (shares - 0.3).abs().max() < 0.01
    x = a.normalize(a.train)
    assert abs(x.mean()) < 1e-4
    assert abs(x.std() - 1) < 1e-3


def test_digits_can_be_resized() -> None:
    pytest.importorskip("sklearn")
    images = load("digits", size=16)
    assert images.train.shape[1:] == (1, 16, 16)
    assert "Resized to 16x16" in images.condition


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("scikit-learn: pip install 'cofire[data]'")):
        load("digits")


def test_cifar_npz(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    colours = RNG.integers(0, 255, (6, 3), dtype=np.uint8)
    for part, count in (("train", 6), ("test", 3)):
        files = []
        for colour in colours[:count]:
            buffer = io.BytesIO()
            image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        np.savez(
            tmp_path / f"cifar10_{part}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            labels=np.arange(count, dtype=np.uint8),
            class_names=np.array(list("abcdef")),
        )
    images = load(tmp_path)
    assert images.train.shape == (6, 3, 32, 32)
    assert images.classes == tuple("abcdef")
    assert "JPEG-compressed" in images.condition
    decoded = images.test.float().mean((2, 3)).numpy()
    assert np.abs(decoded - colours[:3]).max() < 4  # flat colours survive JPEG
    assert torch.equal(images.test_labels, torch.arange(3))


def test_cifar_batches(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (4, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [0, 1, 2, 3]}, protocol=2))
    images = load(tmp_path)
    assert images.train.shape == (8, 3, 32, 32)
    assert torch.equal(images.test, torch.from_numpy(pixels.reshape(4, 3, 32, 32)))


def test_cifar_batches_may_hold_arrays_only(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": print, b"labels": []}))
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": print, b"labels": []}))
    with pytest.raises(ValueError, match=r"arrays only, got builtins.print"):
        load(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path: Path, zipped: bool) -> None:
    pixels = RNG.integers(0, 255, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(5, dtype=np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = header + array.tobytes()
            name = f"{part}-{kind}-ubyte" + (".gz" if zipped else "")
            (tmp_path / name).write_bytes(gzip.compress(content) if zipped else content)
    images = load(tmp_path)
    assert images.train.shape == (5, 1, 28, 28)
    assert torch.equal(images.test[:, 0], torch.from_numpy(pixels))


def test_image_folder_with_and_without_a_split(tmp_path: Path) -> None:
    for name, value in (("cat", 10), ("dog", 200)):
        for _ in range(10):
            _png(tmp_path / "plain" / name, np.full((6, 5), value, np.uint8))
        _png(tmp_path / "given" / "train" / name, np.full((6, 5, 3), value, np.uint8))
        _png(tmp_path / "given" / "test" / name, np.full((6, 5, 3), value, np.uint8))
    plain, given = load(tmp_path / "plain"), load(tmp_path / "given")
    assert plain.train.shape == (14, 1, 6, 5)
    assert plain.test.shape == (6, 1, 6, 5)
    assert given.train.shape == (2, 3, 6, 5)
    assert plain.classes == given.classes == ("cat", "dog")
    for images in (plain, given):
        for x, label in zip(images.test, images.test_labels, strict=True):
            assert x.unique().item() == (10, 200)[label]


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    _png(tmp_path / "a", np.zeros((4, 4), np.uint8))
    _png(tmp_path / "a", np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match="one size, got 4x4 and then 5x4"):
        load(tmp_path)


def test_an_unknown_folder_lists_what_is_understood(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known form") as unknown:
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder") as missing:
        load(tmp_path / "nothing")
    assert all(form in str(unknown.value) and form in str(missing.value) for form in FORMS)


def test_batches_cover_the_epoch_and_repeat_with_the_seed() -> None:
    pytest.importorskip("sklearn")
    images = load("digits").subset(101)
    assert "Trained on 101 of the 1,258 images." in images.condition
    assert len(images.subset(None, 5).test_labels) == 5
    epochs = [list(images.batches(50, torch.Generator().manual_seed(3))) for _ in range(2)]
    assert [len(y) for _, y in epochs[0]] == [50, 50]  # the last single image is left out
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*epochs, strict=True))
    assert sum(len(y) for _, y in images.test_batches(100)) == len(images.test)


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    from cofire.data import _shift_and_mirror

    x = torch.arange(1.0, 65).reshape(1, 1, 8, 8).repeat(64, 2, 1, 1)
    y = _shift_and_mirror(x, torch.Generator().manual_seed(0), pixels=2)
    assert y.shape == x.shape
    assert torch.equal(y[:, 0], y[:, 1])
    centre = y[:, 0, 3:5, 3:5]  # zeros cannot reach it
    steps = centre[:, 0, 1] - centre[:, 0, 0]
    assert set(steps.tolist()) == {1.0, -1.0}
    assert torch.all(centre[:, 1, 0] - centre[:, 0, 0] == 8)


def test_validation_is_a_fixed_share_of_the_training_images() -> None:
    pytest.importorskip("sklearn")
    images = load("digits", seed=1)
    once, again = images.validation(), load("digits", seed=1).validation()
    for field in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(once, field), getattr(again, field))

    def rows(*parts: torch.Tensor) -> list[bytes]:
        return sorted(x.numpy().tobytes() for part in parts for x in part)

    # Train and validation are the training images, each once; so they are disjoint, and no test image is among them.
    assert rows(once.train, once.test) == rows(images.train)
    assert len(once.train) + len(once.test) == len(images.train)
    assert not set(rows(once.test)) & set(rows(images.test))
    assert not set(rows(once.train)) & set(rows(once.test))
    shares = torch.bincount(once.test_labels) / torch.bincount(images.train_labels)
    assert (shares - 0.2).abs().max() < 0.01
    assert (once.mean, once.std, once.part) == (images.mean, images.std, "validation")
    assert "Validation run: 2" in once.condition
    assert "Validated on 5 of" in once.subset(None, 5).condition
    with pytest.raises(ValueError, match="set aside already"):
        once.validation()


# ------------------------------------------------------------------------------------------------------- text


def _read(numbers: torch.Tensor) -> str:
    return "".join(VOCABULARY[i] for i in numbers.tolist())


def test_text_is_the_library_of_this_python() -> None:
    text = load_text()
    assert not set(TRAIN_MODULES) & set(TEST_MODULES)
    assert len(text.train) > 2_000_000
    assert len(text.test) > 300_000
    assert "def shuffle(self, x):" in _read(text.test)
    assert "characters for training" in text.condition


def test_text_of_other_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "ast.py").write_text("x = 'é'\t# \u4e2d\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="load_text: none of the modules random, shutil"):
        load_text(tmp_path)
    (tmp_path / "random.py").write_text("y\n", encoding="utf-8")
    text = load_text(tmp_path)
    assert _read(text.train) == "x = '?'?# ?\n"
    assert _read(text.test) == "y\n"
    assert "not the text of the published results" in text.condition


def test_text_batches_are_windows_and_what_follows() -> None:
    numbers = (torch.arange(1000) % 90).to(torch.uint8)
    text = Text("text", "Counting.", numbers, numbers[:200], VOCABULARY)
    x, y = text.batch(4, 16, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (4, 16)
    assert torch.equal((x + 1) % 90, y)
    again, _ = text.batch(4, 16, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    windows = list(text.test_batches(2, 16, 5))
    assert [len(a) for a, _ in windows] == [2, 2, 1]
    assert all(torch.equal((a + 1) % 90, b) for a, b in windows)
    assert int(windows[-1][1][0, -1]) == int(text.test[-1])


def test_text_validation_sets_the_end_aside() -> None:
    numbers = (torch.arange(1000) % 90).to(torch.uint8)
    text = Text("text", "Counting.", numbers, object(), VOCABULARY)  # type: ignore[arg-type]
    found = text.validation()
    assert torch.equal(torch.cat([found.train, found.test]), numbers)
    assert len(found.test) == 100
    assert "the last 100 characters of the training text are set aside" in found.condition
    with pytest.raises(ValueError, match="set aside already"):
        found.validation()
