"""Our tars are webdataset's to the byte, and their records lead to the images."""

import hashlib
import io
import zlib

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.index import BLOCK
from pipelines.packing.tar import TarWriter

SAMPLES = st.lists(st.tuples(st.binary(max_size=1600), st.integers(0, 2**31 - 1)), max_size=25)


def written(samples):
    file = io.BytesIO()
    tar = TarWriter(file)
    for i, (image, label) in enumerate(samples):
        tar.add(f"{i:08d}-name_{i}", image, label, i, 2 * i)
    return file, tar, *tar.finish()


@settings(max_examples=50, deadline=None)
@given(SAMPLES)
def test_bytes_are_webdatasets(samples):
    ours, tar, _, sha256 = written(samples)
    theirs = io.BytesIO()
    with webdataset.TarWriter(theirs, encoder=False, mtime=0) as other:
        for i, (image, label) in enumerate(samples):
            other.write({"__key__": f"{i:08d}-name_{i}", "jpg": image, "cls": str(label).encode()})
    assert ours.getvalue() == theirs.getvalue()
    assert tar.bytes == len(theirs.getvalue())
    assert sha256 == hashlib.sha256(theirs.getvalue()).hexdigest()


@settings(max_examples=50, deadline=None)
@given(SAMPLES)
def test_records_lead_to_the_images(samples):
    file, _, records, _ = written(samples)
    data = file.getvalue()
    for i, (image, label) in enumerate(samples):
        begin = int(records["block"][i]) * BLOCK
        assert data[begin : begin + int(records["size"][i])] == image
        assert records[i].tolist()[3:] == (zlib.crc32(image), label, i, 2 * i)
    assert records.dtype.itemsize == 24
    assert (np.diff(records["block"].astype(int)) > 0).all()


@pytest.mark.parametrize(("images", "blocks"), [(0, 20), (4, 20), (5, 40)])
def test_a_tar_ends_as_tars_end(images, blocks):
    """Two empty blocks, then up to a multiple of 20: four blocks a sample here, so 18 are full with 4 of them."""
    file, *_ = written([(b"x", 1)] * images)
    assert len(file.getvalue()) == blocks * BLOCK


def test_a_file_that_refuses_is_heard_at_once():
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        TarWriter(Full()).add("key", b"image", 0, 1, 1)
