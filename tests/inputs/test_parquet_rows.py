"""Rows of parquet files, as pyarrow and Hugging Face's datasets write them."""

import io

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from ovis_jax.errors import DataError
from ovis_jax.inputs import parquet_rows
from ovis_jax.inputs.dataset import read_dataset

TURNS = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A dot."}]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 1), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path, type=None, name="image", rows=5, row_group_size=2, **columns):
    values = {"conversations": [TURNS] * rows, **columns}
    arrays = {key: pa.array(value, type if key == name else None) for key, value in values.items()}
    parquet.write_table(pa.table(arrays), path, row_group_size=row_group_size)
    return path


def reds(row):
    return [image.getpixel((0, 0))[0] for image in row.open_images()]


@pytest.mark.parametrize("form", ["struct", "struct without paths", "binary", "large_binary"])
def test_one_image_per_row(tmp_path, form):
    values = [png(red) for red in range(4)]
    if form.startswith("struct"):
        kind = STRUCT if form == "struct" else pa.struct({"bytes": pa.binary()})
        values = [{"bytes": value, "path": f"{n}.png"} for n, value in enumerate(values)]
    else:
        kind = getattr(pa, form)()
    dataset = read_dataset([write(tmp_path / "a.parquet", kind, image=[*values, None])])
    assert dataset.errors == ()
    assert [reds(row) for row in dataset.rows] == [[0], [1], [2], [3], []]
    assert [len(row.images) for row in dataset.rows] == [1, 1, 1, 1, 0]
    assert [row.name for row in dataset.rows][-1] == f"{tmp_path / 'a.parquet'}: row 5"
    assert dataset.rows[0].turns[0]["content"] == "<image>\nWho?"


def test_lists_of_images(tmp_path):
    values = [[{"bytes": png(10 * n + k), "path": None} for k in range(n)] for n in range(5)]
    path = write(tmp_path / "a.parquet", pa.list_(STRUCT), "images", images=values)
    rows = read_dataset([path]).rows
    assert [reds(row) for row in rows] == [[], [10], [20, 21], [30, 31, 32], [40, 41, 42, 43]]


def test_paths_without_bytes(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "dot.png").write_bytes(png(7))
    values = [{"bytes": None, "path": "dot.png"}]
    struct = write(tmp_path / "struct.parquet", STRUCT, rows=1, image=values)
    text = write(tmp_path / "text.parquet", rows=1, image=["dot.png"])
    for row in read_dataset([struct, text], tmp_path / "pictures").rows:
        assert reds(row) == [7]


def test_only_the_row_group_of_an_image_is_read(tmp_path, monkeypatch):
    values = [{"bytes": png(red), "path": f"{red}.png"} for red in range(6)]
    path = write(tmp_path / "a.parquet", STRUCT, rows=6, image=values)
    read = []

    def record(file, path, row_group, columns):
        read.append((row_group, columns))
        return read_row_group(file, path, row_group, columns)

    read_row_group = parquet_rows._read_row_group
    monkeypatch.setattr(parquet_rows, "_read_row_group", record)
    rows = read_dataset([path]).rows
    texts = ["conversations.list.element.from", "conversations.list.element.value", "image.path"]
    assert [(group, sorted(columns)) for group, columns in read] == [(n, texts) for n in range(3)]
    read.clear()
    assert [reds(rows[n]) for n in (5, 4, 0)] == [[5], [4], [0]]
    assert read == [(2, ["image"]), (0, ["image"])]


def test_a_column_that_is_not_known_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", STRUCT, rows=1, image=[None], picture=[png(0)])
    (error,) = read_dataset([path]).errors
    assert error.startswith(f"{path}: row 1: the key 'picture' is unknown, expected image, images")


def test_images_with_neither_bytes_nor_a_path(tmp_path):
    values = [{"bytes": None, "path": None}]
    path = write(tmp_path / "a.parquet", STRUCT, rows=1, image=values)
    message = (
        rf"a\.parquet: row 1: image in {path} is \{{.*\}}, expected bytes or a path; write null"
    )
    with pytest.raises(DataError, match=message):
        read_dataset([path]).rows[0].open_images()


def test_damaged_files(tmp_path):
    path = write(tmp_path / "a.parquet", STRUCT, rows=1, image=[{"bytes": b"no", "path": "x"}])
    with pytest.raises(DataError, match=r"a\.parquet: row 1: image 1 "):
        read_dataset([path]).rows[0].open_images()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read as parquet: "):
        read_dataset([cut])
