"""Images from datasets of every kind, and everything that can be wrong with them."""

import io
import socket
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import vision
from PIL import Image

from hf_prune import calibration
from hf_prune.calibration import BrokenImage, batches, decode, groups, images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in class order: 20 each of ant, bee, cat."""
    return vision.image_folder(tmp_path_factory.mktemp("images") / "data", {"ant": 20, "bee": 20, "cat": 20})


def parquet(path: Path, columns: dict, features: dict | None = None) -> Path:
    datasets.Dataset.from_dict(columns, datasets.Features(features) if features else None).to_parquet(path)
    return path


def pictures(count: int) -> list[dict]:
    return [{"bytes": vision.encoded(vision.photo(i)), "path": None} for i in range(count)]


def numbers(image_set: calibration.ImageSet) -> list[int]:
    """Which images came: each is told by its pixels."""
    known = {vision.photo(i).tobytes(): i for i in range(80)}
    return [known[image.tobytes()] for image, _ in image_set]


def message(dataset: object, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        list(images(str(dataset), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- order


def test_a_folder_is_shuffled_as_a_whole(folder: Path) -> None:
    found = images(str(folder), samples=12, seed=0)
    labels = [label for _, label in found]
    assert found.label_names == ["ant", "bee", "cat"] and set(labels) == {0, 1, 2}, "images of a folder come by class"
    assert found.expected == found.yielded == len(labels) == 12 and found.notes == []


def test_order_depends_on_the_seed_only(folder: Path) -> None:
    first = images(str(folder), samples=20, seed=1)
    order = numbers(first)
    assert order == numbers(first), "a second pass"
    assert order == numbers(images(str(folder), samples=20, seed=1))
    assert order != numbers(images(str(folder), samples=20, seed=2))
    assert order == numbers(images(str(folder), samples=40, seed=1))[:20], "more samples keep the first ones"


@pytest.mark.parametrize("samples", [None, 17, 2])
def test_ranks_share_one_order(tmp_path: Path, samples: int | None) -> None:
    """Rank r takes every third good image from the r-th on, with broken images among them."""
    cells = pictures(30)
    for bad in (0, 7, 8, 21):
        cells[bad] = {"bytes": b"no image", "path": None}
    file = parquet(tmp_path / "x.parquet", {"image": cells}, {"image": datasets.Image()})
    alone = images(str(file), samples=samples, seed=3)
    order = numbers(alone)
    assert len(order) == (samples or 26)
    shares = [images(str(file), samples=samples, seed=3, rank=rank, world_size=3) for rank in range(3)]
    found = [numbers(share) for share in shares]
    assert sorted(sum(found, [])) == sorted(order)
    assert sum(share.skipped for share in shares) == alone.skipped
    if samples is not None:
        assert found == [order[rank::3] for rank in range(3)]
    assert [share.expected for share in shares] == [len(range(rank, samples or 30, 3)) for rank in range(3)]
    dealt = [images(str(file), samples=samples, seed=3, rank=rank, world_size=3, deal=4) for rank in range(3)]
    whole = [numbers(share) for share in dealt]
    assert sorted(sum(whole, [])) == sorted(order)
    if samples is not None:  # the batches of one process, in turn
        runs = [order[k : k + 4] for k in range(0, samples, 4)]
        assert whole == [sum(runs[rank::3], []) for rank in range(3)]
        assert [share.expected for share in dealt] == [len(w) for w in whole]


def test_streaming_mixes_through_a_buffer(folder: Path) -> None:
    found = images(str(folder), samples=20, seed=0, streaming=True)
    order = numbers(found)
    assert order == numbers(found) and sorted(order) != order and len(set(order)) == 20
    assert any("mixed through a buffer" in note for note in found.notes)


def test_a_stream_that_decodes_ahead_survives_broken_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As datasets opens remote streams: in threads that would stop at the first broken image."""
    cells = pictures(6)
    cells[2] = {"bytes": b"no image", "path": None}
    file = parquet(tmp_path / "x.parquet", {"image": cells}, {"image": datasets.Image()})
    plain = datasets.DatasetBuilder.as_streaming_dataset

    def ahead(self: datasets.DatasetBuilder, split: str) -> datasets.IterableDataset:
        return plain(self, split=split)._resolve_features().decode(num_threads=2)

    monkeypatch.setattr(datasets.DatasetBuilder, "as_streaming_dataset", ahead)
    found = images(str(file), streaming=True)
    assert sorted(numbers(found)) == [0, 1, 3, 4, 5] and found.skip_reasons == {"not an image": 1}


def test_sorted_data_is_reported(tmp_path: Path) -> None:
    feature = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(50)])}
    file = parquet(tmp_path / "x.parquet", {"image": pictures(40), "label": [7] * 40}, feature)
    found = images(str(file))
    assert len(list(found)) == 40 and "only 1 of 50 classes" in found.notes[0]


# --- kinds of datasets


def test_parquet_file_and_folder(tmp_path: Path) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    file = parquet(tmp_path / "d" / "train.parquet", {"image": pictures(4), "label": [0, 1, 0, -1]}, features)
    for name in (file, file.parent):
        found = images(str(name))
        assert sorted(numbers(found)) == [0, 1, 2, 3] and found.label_names == ["a", "b"]
        assert sorted(str(label) for _, label in found) == ["0", "0", "1", "None"], "-1 is no label"
        assert found.available_splits == ["train"] and found.default_eval_split is None


def test_local_data_needs_no_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    tried: list[str] = []

    def refuse(*args: object, **_: object) -> None:
        tried.append(str(args))
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    file = parquet(tmp_path / "x.parquet", {"image": pictures(3)}, {"image": datasets.Image()})
    assert len(list(images(str(file)))) == 3 and len(list(images(str(folder), samples=3))) == 3
    assert tried == [] and datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_webdataset(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "train-0000.tar", "w") as tar:
        for i in range(6):
            for ending, content in (("png", vision.encoded(vision.photo(i))), ("cls", str(i % 3).encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    for name in (tmp_path / "shards", tmp_path / "shards" / "train-0000.tar"):
        found = images(str(name))
        assert (found.image_column, found.label_column, found.label_names) == ("png", "cls", None)
        assert sorted(numbers(found)) == list(range(6)) and sorted(label for _, label in found) == [0, 0, 1, 1, 2, 2]


def test_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        vision.image_folder(tmp_path, {"a": 2, "b": 2}, split)
    found = images(str(tmp_path))
    assert found.split == "train" and found.default_eval_split == "validation"
    assert set(found.available_splits) == {"train", "validation", "test"}
    assert images(str(tmp_path), split="validation").default_eval_split == "test"
    assert len(list(images(str(tmp_path), split="train[:50%]"))) == 2
    assert "has no split 'dev'; it has train, validation, test" in message(tmp_path, split="dev")


def test_configurations(tmp_path: Path) -> None:
    head = "---\nconfigs:\n"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        parquet(tmp_path / name / "train.parquet", {"image": pictures(2)}, {"image": datasets.Image()})
        head += f"- config_name: {name}\n  data_files: {name}/*.parquet\n"
    (tmp_path / "README.md").write_text(head + "---\n")
    assert "choose one with --config: first, second." in message(tmp_path)
    assert sorted(numbers(images(str(tmp_path), config="second"))) == [0, 1]
    assert "third" in message(tmp_path, config="third")


def test_columns(tmp_path: Path) -> None:
    cells = pictures(3)
    columns = {
        "mask": cells,
        "image": cells,
        "raw": [c["bytes"] for c in cells],
        "kind": ["x", "y", "x"],
        "n": [5, 6, 7],
    }
    features = {
        "mask": datasets.Image(),
        "image": datasets.Image(),
        "raw": datasets.Value("binary"),
        "kind": datasets.Value("string"),
        "n": datasets.Value("int32"),
    }
    file = str(parquet(tmp_path / "x.parquet", columns, features))
    found = images(file)
    assert found.image_column == "image" and found.label_column is None and {label for _, label in found} == {None}
    assert sorted(numbers(images(file, image_column="raw"))) == [0, 1, 2]
    assert sorted(label for _, label in images(file, label_column="n")) == [5, 6, 7]
    named = images(file, label_column="kind")
    assert named.label_names == ["x", "y"] and sorted(label for _, label in named) == [0, 0, 1]
    assert "has no such column; it has mask (Image)" in message(file, image_column="picture")
    assert "holds int32, not images" in message(file, image_column="n")
    assert "has no such column" in message(file, label_column="klass")
    assert "holds binary; class numbers or class names are needed" in message(file, label_column="raw")


def test_no_image_column(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", {"pixels": [b"1", b"2"], "label": [0, 1]})
    found = message(file)
    assert "has no image column; it has pixels (binary), label (int64)" in found and "--image-column" in found


# --- broken images


def test_broken_images_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    whole = vision.encoded(vision.photo(0))
    cells = pictures(6)
    cells[1] = {"bytes": b"plain text", "path": None}
    cells[2] = {"bytes": whole[: len(whole) // 2], "path": None}
    cells[3] = {"bytes": vision.encoded(vision.photo(1, (40, 40))), "path": None}
    cells[4] = None
    file = parquet(tmp_path / "x.parquet", {"image": cells}, {"image": datasets.Image()})
    found = images(str(file), samples=10)
    assert sorted(numbers(found)) == [0, 5] and found.skipped == 4
    assert found.skip_reasons == {
        "not an image": 1,
        "damaged or truncated": 1,
        "more than 500 pixels (decompression bomb)": 1,
        "no image in this row": 1,
    }
    assert "10 images were asked for; the dataset gave 2." in found.notes
    assert any(note.startswith("4 images were skipped") for note in found.notes)
    assert sorted(numbers(found)) == [0, 5] and found.skipped == 4, "a second pass counts anew"


def test_a_broken_image_is_replaced_by_the_next(tmp_path: Path) -> None:
    cells = pictures(10)
    cells[3] = {"bytes": b"", "path": None}
    file = parquet(tmp_path / "x.parquet", {"image": cells}, {"image": datasets.Image()})
    assert len(numbers(images(str(file), samples=9))) == 9


def test_missing_and_empty_files_of_a_folder(tmp_path: Path) -> None:
    vision.image_folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "000.png").write_bytes(b"")
    found = images(str(tmp_path))
    (tmp_path / "b" / "005.png").unlink()
    assert sorted(numbers(found)) == [1, 2, 3, 4]
    assert found.skip_reasons == {"not an image": 1, "file missing or not readable": 1}


def test_no_image_at_all(tmp_path: Path) -> None:
    cells = [{"bytes": b"nothing", "path": None}] * 3
    file = parquet(tmp_path / "x.parquet", {"image": cells}, {"image": datasets.Image()})
    assert "none of the 3 images in column 'image' could be decoded (3 x not an image)" in message(file)
    assert "none of the" in message(file, samples=2, world_size=2)


def test_decoding_is_that_of_datasets() -> None:
    """Orientation, palettes, transparency, CMYK and grey come out as Image(mode="RGB") gives them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    contents = [
        vision.encoded(vision.photo(0, (20, 10)), "JPEG", exif=exif),
        *(vision.encoded(vision.photo(1, mode=mode)) for mode in ("L", "LA", "P", "RGBA", "1")),
        vision.encoded(vision.photo(2, mode="CMYK"), "JPEG"),
        vision.encoded(vision.photo(3), "GIF", save_all=True, append_images=[vision.photo(4)]),
    ]
    own = datasets.Image(mode="RGB")
    for content in contents:
        theirs = own.decode_example({"bytes": content, "path": None})
        assert np.array_equal(np.asarray(decode(content)), np.asarray(theirs))
    assert decode(contents[0]).size == (10, 20)


def test_deep_grey_is_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    found = np.asarray(decode(vision.encoded(Image.fromarray(deep))))
    assert np.array_equal(found[..., 0].ravel(), np.arange(256)) and (found[..., 0] == found[..., 2]).all()
    with pytest.raises(BrokenImage, match="mode F"):
        decode(vision.encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"))


# --- datasets that are not there


def test_datasets_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "there is no such file or folder" in message(tmp_path / "nowhere")
    assert "the Hub could not be reached" in message("nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no data files" in message(tmp_path / "empty")
    (tmp_path / "note.txt").write_text("x")
    assert "a folder of images, or a file of one of these kinds: .parquet" in message(tmp_path / "note.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    assert "could not be read" in message(tmp_path / "broken.parquet")
    none = parquet(tmp_path / "none.parquet", {"image": []}, {"image": datasets.Image()})
    assert "split train is empty" in message(none)
    assert "split train is empty" in message(none, streaming=True)
    assert "at least one image" in message(none, samples=0)
    assert "has no revision" in message(none, revision="main")


# --- batches


def test_batches(folder: Path) -> None:
    class Model:
        def processor(self, found: list) -> list:
            return [image.size for image in found]

        def batch(self, found: list) -> list:
            return found

    sizes = [len(batch) for batch in batches(images(str(folder), samples=10), Model(), 4)]
    assert sizes == [4, 4, 2]
    with pytest.raises(ValueError, match="--batch-size 0"):
        list(groups([1], 0))


def test_images_are_decoded_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(content: bytes) -> Image.Image:
        nonlocal count
        count += 1
        return decode(content)

    monkeypatch.setattr(calibration, "decode", counted)
    stream = iter(images(str(folder)))
    assert count == 0
    next(stream)
    assert count == 1


# --- real data


def test_real_parquet_file(shared_data: Path) -> None:
    found = images(str(shared_data / "imagenet_val_800.parquet"), samples=8, seed=0)
    seen = list(found)
    assert len(seen) == 8 and {image.mode for image, _ in seen} == {"RGB"} and len(found.label_names) == 1000
    assert found.label_names[0] == "n01440764 tench, Tinca tinca" and found.label_column == "label"
