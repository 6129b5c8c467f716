"""Tars of others are adopted as they are, and ours are read by others: webdataset, GNU tar, DALI."""

import gc
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import warnings

import numpy as np
import pytest
import webdataset

from jobs import pack as job
from pipelines.dataset import open_dataset, verify
from pipelines.errors import ConfigError, DataError
from pipelines.pack import left_out_of
from pipelines.reader import Reader
from pipelines.sources.samples import Rule, read_samples
from pipelines.sources.tars import find_tars
from tests.datasets import make
from tests.jpegs import encode, jpeg, picture

PETS = ("cat", "dog", "eel")


def tarred(members, **options) -> bytes:
    """members: (name, bytes), or a TarInfo of something else than a file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sample(i: int, label: object, image: str = "jpg", kind: str = "cls") -> list[tuple[str, bytes]]:
    return [(f"{i:04d}.{image}", jpeg(i)), (f"{i:04d}.{kind}", str(label).encode())]


def several(count: int, label=lambda i: i % 3) -> bytes:
    return tarred([member for i in range(count) for member in sample(i, label(i))])


@pytest.fixture
def lies(tmp_path):
    """Puts a training tar beside a sound validation tar; what adopts the two."""
    place = tmp_path / "in"
    place.mkdir()
    (place / "val.tar").write_bytes(several(3))

    def adopt(data: bytes, *flags: str):
        (place / "train.tar").write_bytes(data)
        patterns = ["--train", str(place / "train.tar"), "--val", str(place / "val.tar")]
        assert job.main(["tars", *patterns, "--out", str(tmp_path / "out"), *flags]) == 0
        return open_dataset(tmp_path / "out")

    adopt.place = place
    return adopt


def fed(dataset, split: str = "train") -> list[tuple[bytes, str]]:
    """(bytes, class) of each image, as training reads them."""
    reader = Reader(dataset, split)
    batch = reader.read(np.arange(reader.split.samples))
    reader.close()
    assert batch.intact.all()
    return [
        (image.tobytes(), dataset.classes[label]) for image, label in zip(batch.images(), batch.labels, strict=True)
    ]


# -- what writes tars --------------------------------------------------------------------------------------------------


def test_what_webdataset_wrote_is_adopted(tmp_path):
    with webdataset.ShardWriter(f"file:{tmp_path}/train-%04d.tar", maxcount=5, verbose=0) as writer:
        for i in range(12):
            writer.write({"__key__": f"dir/{i:04d}", "jpg": jpeg(i), "cls": i % 4, "txt": f"caption {i}"})
    with webdataset.TarWriter(str(tmp_path / "val.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i}", "png": encode(picture(i), "PNG"), "json": {"label": i, "box": [1, 2]}})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flags = ["--train", f"{tmp_path}/train-{{0000..0002}}.tar", "--val", f"{tmp_path}/val.tar", "--out", str(tmp_path)]
    assert job.main(["tars", *flags]) == 0
    dataset = open_dataset(tmp_path)
    assert dataset.classes == ("0", "1", "2", "3")
    assert fed(dataset) == [(jpeg(i), str(i % 4)) for i in range(12)]
    assert fed(dataset, "val") == [(encode(picture(i), "PNG"), str(i)) for i in range(4)]
    assert [shard.name for shard in dataset.splits["train"].shards] == [f"train-{i:04d}.tar" for i in range(3)]
    shard = dataset.splits["train"].shards[1]
    assert (shard.samples, shard.bytes) == (5, len(before["train-0001.tar"]))
    assert shard.sha256 == hashlib.sha256(before["train-0001.tar"]).hexdigest()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"dataset.json", "train.index", "val.index"}


@pytest.mark.parametrize("format", ["gnu", "posix", "ustar", "v7", "oldgnu"])
def test_what_gnu_tar_wrote_is_adopted(tmp_path, format):
    """With `./` before names, folders among the members, long names, and files in the folder's order."""
    deep = "a-long-name/" * (10 if format in ("gnu", "posix", "oldgnu") else 1)
    for split, count in (("train", 6), ("val", 3)):
        folder = tmp_path / split / deep
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.jpeg").write_bytes(jpeg(i))
            (folder / f"{i}.cls").write_text(f"{PETS[i % 3]}\n")
        (folder / "._0.jpeg").write_bytes(b"what a Mac leaves")
        line = [
            "tar",
            "-c",
            f"--format={format}",
            "-f",
            str(tmp_path / f"{split}.tar"),
            "-C",
            str(tmp_path / split),
            ".",
        ]
        subprocess.run(line, check=True)
    flags = ["--train", str(tmp_path / "train.tar"), "--val", str(tmp_path / "val.tar"), "--out", str(tmp_path / "out")]
    assert job.main(["tars", *flags]) == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.classes == PETS
    assert sorted(fed(dataset)) == sorted((jpeg(i), PETS[i % 3]) for i in range(6))
    assert dataset.splits["train"].shards[0].name == f"file://{tmp_path}/train.tar"
    verify(dataset, "sha256")


# -- what reads ours ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return make(tmp_path_factory.mktemp("ours") / "data")


def tars(dataset) -> list[str]:
    return [str(dataset.root / shard.name) for shard in dataset.splits["train"].shards]


def expected(dataset) -> list[tuple[bytes, int]]:
    return [(data, dataset.classes.index(name)) for data, name in fed(dataset)]


def test_webdataset_reads_ours(ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(tars(ours), shardshuffle=False).to_tuple("jpg", "cls"))
        gc.collect()
    assert [(image, int(label)) for image, label in samples] == expected(ours)


def test_gnu_tar_reads_ours(ours, tmp_path):
    found = []
    for tar in tars(ours):
        names = subprocess.run(["tar", "-tf", tar], check=True, capture_output=True, text=True).stdout.split()
        subprocess.run(["tar", "-xf", tar, "-C", str(tmp_path)], check=True)
        images = [name for name in names if name.endswith(".jpg")]
        found += [((tmp_path / n).read_bytes(), int((tmp_path / n).with_suffix(".cls").read_text())) for n in images]
    assert found == expected(ours)


def test_dali_reads_ours(ours):
    from nvidia.dali import Pipeline, fn

    pipe = Pipeline(batch_size=40, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        pipe.set_outputs(*fn.readers.webdataset(paths=tars(ours), ext=["jpg", "cls"]))
    pipe.build()
    images, labels = pipe.run()
    found = [(images.at(i).tobytes(), int(labels.at(i).tobytes())) for i in range(40)]
    assert found == expected(ours)


def test_ours_adopted_have_the_index_that_packing_wrote(ours, tmp_path):
    place = str(ours.root)
    out = ["--out", str(tmp_path / "out")]
    assert job.main(["tars", "--train", f"{place}/train-*.tar", "--val", f"{place}/val-*.tar", *out]) == 0
    for name in ("train.index", "val.index"):
        assert (tmp_path / "out" / name).read_bytes() == (ours.root / name).read_bytes()
    shards = [shard.sha256 for shard in open_dataset(tmp_path / "out").splits["train"].shards]
    assert shards == [shard.sha256 for shard in ours.splits["train"].shards]


def test_tars_that_are_sorted_are_told(tmp_path, capsys):
    """Three tars of a class each, beside three in which the classes follow each other."""
    for name, label in (("sorted", lambda i: i // 12), ("mixed", lambda i: i % 3)):
        for part in range(3):
            members = [member for i in range(12 * part, 12 * part + 12) for member in sample(i, label(i))]
            (tmp_path / f"{name}-{part}.tar").write_bytes(tarred(members))
        out = str(tmp_path / name)
        place = ["--train", f"{tmp_path}/{name}-*.tar", "--val", f"{tmp_path}/{name}-0.tar", "--out", out]
        assert job.main(["tars", *place]) == 0
        assert job.main(["info", out]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("order")]
    # chi^2 of (12, 0, 0) against (4, 4, 4) is 24, of 2 degrees of freedom, where a shuffle gives (36 - 12) / 35 of them
    sorted_by_class = (
        "chi^2 of the shards' labels is 17.50 a degree of freedom, where a shuffle gives 1: sorted by class"
    )
    assert all(sorted_by_class in line and "data.window 0 and data.streams 1" in line for line in said[:2])
    assert said[2:] == [
        "order: chi^2 of the shards' labels is 0.00 a degree of freedom, about 1 or less: shuffled",
        "order       chi^2 of the shards' labels is 0.00 a degree of freedom, about 1 or less: shuffled",
    ]
    assert open_dataset(tmp_path / "sorted").made["order_chi2"] == 17.5


# -- WebDataset's rule -------------------------------------------------------------------------------------------------

NAMES = ["a.jpg", "d.ir/a.x.jpg", "d.ir/sub/b.JPG", "./c.jpg", "././e/f.jpg", ".hidden.jpg", "no", "x/._y.jpg", "z."]


def test_keys_are_webdatasets():
    """Where it has one: names that begin with a dot are no samples here, and garbage there."""
    from webdataset.tariterators import base_plus_ext

    data = tarred([(name, b"") for name in NAMES])
    found = {one.key: set(one.members) for one in read_samples(io.BytesIO(data), len(data), "it")}
    plain = [name.replace("./", "") if name.startswith("./") else name for name in NAMES]
    theirs = [base_plus_ext(name) for name in plain if "/." not in name]
    assert found == {key: {extension.lower()} for key, extension in theirs if key}


def test_members_come_in_any_order(lies):
    members = [(f"{i}.cls", str(i % 2).encode()) for i in range(4)] + [(f"{i}.jpg", jpeg(i)) for i in (2, 0, 3, 1)]
    assert fed(lies(tarred(members))) == [(jpeg(i), str(i % 2)) for i in (2, 0, 3, 1)]


def test_what_is_not_asked_for_is_left_alone(lies):
    more = [("0000.seg.png", b"mask"), ("__meta__", b"{}"), ("__meta__/x.jpg", b"no image"), ("0001.npy", b"")]
    assert len(fed(lies(tarred([*sample(0, 1), *sample(1, 0), *more])))) == 2


LABELS = {  # the member -> its class
    ("cls", b"7"): "7",
    ("cls", b" 007\n"): "7",
    ("index", b"0"): "0",
    ("label", "Stra\u00dfe".encode()): "Stra\u00dfe",
    ("txt", b"n01440764"): "n01440764",
    ("json", b'{"label": 3, "width": 10}'): "3",
    ("json", b'{"label": "cat"}'): "cat",
}


@pytest.mark.parametrize(("member", "name"), LABELS.items())
def test_labels(member, name):
    kind, data = member
    tar = tarred([("a.jpg", b"x"), (f"a.{kind}", data)])
    (found,) = read_samples(io.BytesIO(tar), len(tar), "it")
    assert Rule().label(found, io.BytesIO(tar)) == name


def test_extensions_are_what_is_said(lies):
    """The first of those asked for; others that a sample has are left alone."""
    members = [
        (f"{i}.{kind}", data) for i in range(3) for kind, data in (("IMG", jpeg(i)), ("jpg", b""), ("cls", b"9"))
    ]
    members += [(f"{i}.json", json.dumps({"label": 5, "id": "aab"[i]}).encode()) for i in range(3)]
    members += [("3.jpg", jpeg(3)), ("3.txt", b"b")]
    (lies.place / "val.tar").write_bytes(tarred([("0.jpg", jpeg(7)), ("0.txt", b"a")]))
    dataset = lies(tarred(members), "--image", ".img,jpg", "--label", "json:id,txt")
    assert fed(dataset) == [(jpeg(i), "aabb"[i]) for i in range(4)]
    assert (dataset.made["image"], dataset.made["label"]) == (["img", "jpg"], ["json:id", "txt"])


def test_names_of_classes_are_given(lies, tmp_path):
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nshark\neel\n")
    dataset = lies(
        tarred([*sample(0, 1), *sample(1, "shark"), *sample(2, "0")]), "--classes", str(tmp_path / "names.txt")
    )
    assert dataset.classes == ("tench", "goldfish", "shark", "eel")
    assert [name for _, name in fed(dataset)] == ["goldfish", "shark", "tench"]


# -- what is wrong with a sample ---------------------------------------------------------------------------------------


def linked(kind: bytes, name: str = "0001.jpg") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "0000.jpg"
    return info, b""


WRONG = {  # what is added to a sound sample -> the reason
    "no label": ([("0001.jpg", jpeg(1))], r"it has no label: there is jpg, and none of cls, index, label, txt, json"),
    "no image": ([("0001.cls", b"1")], r"it has no image: there is cls, and none of jpg, jpeg, png"),
    "a label by itself": ([("readme.txt", b"hello")], r"it has no image: there is txt"),
    "an image twice": ([*sample(1, 1), ("0001.jpg", jpeg(2))], "its jpg is there twice"),
    "a label twice": ([*sample(1, 1), ("0001.cls", b"2")], "its cls is there twice"),
    "no picture": ([("0001.jpg", b"<html>"), ("0001.cls", b"1")], "it is not an image"),
    "cut short": ([("0001.jpg", jpeg(1)[:-300]), ("0001.cls", b"1")], "truncated"),
    "empty": ([("0001.jpg", b""), ("0001.cls", b"1")], "it is empty"),
    "a hard link": ([linked(tarfile.LNKTYPE), ("0001.cls", b"1")], "its jpg is a hard link"),
    "a symbolic link": ([linked(tarfile.SYMTYPE), ("0001.cls", b"1")], "its jpg is a symbolic link"),
    "a device": ([linked(tarfile.CHRTYPE), ("0001.cls", b"1")], "its jpg is no plain file"),
    "an empty label": ([("0001.jpg", jpeg(1)), ("0001.cls", b"")], "its cls has 0 bytes, which is no label"),
    "a blank label": ([("0001.jpg", jpeg(1)), ("0001.cls", b" \n")], "its cls is empty"),
    "a large label": ([("0001.jpg", jpeg(1)), ("0001.cls", bytes(1 << 21))], "its cls has 2,097,152 bytes"),
    "a binary label": ([("0001.jpg", jpeg(1)), ("0001.cls", b"\xff\xfe")], "its cls is no label: 'utf-8'"),
    "no json": ([("0001.jpg", jpeg(1)), ("0001.json", b"{")], "its json is no label: Expecting"),
    "no field": (
        [("0001.jpg", jpeg(1)), ("0001.json", b'{"id": 1}')],
        "its json is no label: field 'label' is not there",
    ),
    "a list": ([("0001.jpg", jpeg(1)), ("0001.json", b'{"label": [1]}')], r"field 'label' is \[1\]"),
    "a truth": ([("0001.jpg", jpeg(1)), ("0001.json", b'{"label": true}')], "field 'label' is True"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_sample_that_cannot_be_used_is_refused_or_left_out(lies, wrong):
    members, reason = WRONG[wrong]
    data = tarred([*sample(0, 1), *members, *sample(2, 0)])
    with pytest.raises(DataError, match=rf"train\.tar/\w+ in train cannot be used \((.*{reason}.*)\); .* --bad skip"):
        lies(data)
    dataset = lies(data, "--bad", "skip")
    assert [image for image, _ in fed(dataset)] == [jpeg(0), jpeg(2)]
    (listed,) = left_out_of(dataset)
    assert listed["name"] in ("train.tar/0001", "train.tar/readme")


def test_a_label_outside_the_classes(lies, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n\u00e7\n")
    data = tarred([*sample(0, 2), *sample(1, 3), *sample(2, "d")])
    with pytest.raises(DataError, match="label '3' is none of the 3 classes of --classes"):
        lies(data, "--classes", str(tmp_path / "names.txt"))
    dataset = lies(data, "--classes", str(tmp_path / "names.txt"), "--bad", "skip")
    assert [name for _, name in fed(dataset)] == ["\u00e7"]
    assert len(left_out_of(dataset)) == 2


# -- what is wrong with a tar ------------------------------------------------------------------------------------------


def sparse(tmp_path) -> bytes:
    """Written by GNU tar, from a file with a hole."""
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / "0.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 20)
        file.write(jpeg(0))
    (tmp_path / "s" / "0.cls").write_text("1")
    subprocess.run(["tar", "-cSf", str(tmp_path / "s.tar"), "-C", str(tmp_path / "s"), "0.jpg", "0.cls"], check=True)
    return (tmp_path / "s.tar").read_bytes()


def test_a_sparse_image_is_refused(lies, tmp_path):
    with pytest.raises(DataError, match="its jpg is stored sparse"):
        lies(sparse(tmp_path))


TARS = {
    "gzip": (lambda data: __import__("gzip").compress(data), "compressed with gzip, .*: unpack it"),
    "bzip2": (lambda data: __import__("bz2").compress(data), "compressed with bzip2"),
    "xz": (lambda data: __import__("lzma").compress(data), "compressed with xz"),
    "cut in a member": (lambda data: data[:2000], "is not a plain tar, or cut short"),
    "cut between members": (lambda data: data[: data.rindex(b"0003.jpg")], "its end mark is missing"),
    "two laid end to end": (lambda data: data + data, "more behind its end mark, as when tars are laid end to end"),
    "a page": (lambda data: b"<html>" * 200, "is not a plain tar"),
    "nothing": (lambda data: b"", "is not a plain tar"),
}


@pytest.mark.parametrize("wrong", TARS)
def test_a_tar_that_is_not_plain_and_whole_is_refused_and_nothing_is_left(lies, tmp_path, wrong):
    change, says = TARS[wrong]
    with pytest.raises(DataError, match=rf"train\.tar .*{says}"):
        lies(change(several(4)), "--bad", "skip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_labels_of_two_kinds_are_refused(lies):
    with pytest.raises(DataError, match=r"labels are whole numbers and names \('1', 'cat'\); choose"):
        lies(tarred([*sample(0, 1), *sample(1, "cat")]))
    with pytest.raises(DataError, match="label 123,456,789 is no class"):
        lies(tarred(sample(0, 123456789)))


# -- which tars --------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    for name in ("b-1.tar", "b-0.tar", "b-x.txt", ".b-2.tar", "brace{0}.tar"):
        (tmp_path / name).write_bytes(b"x" * len(name))
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("b-0.tar", ["b-0.tar"]),
        ("*.tar", ["b-0.tar", "b-1.tar", "brace{0}.tar"]),
        ("b-{1,0}.tar", ["b-1.tar", "b-0.tar"]),
        ("b-{0..1}.tar", ["b-0.tar", "b-1.tar"]),
        ("brace{0}.tar", ["brace{0}.tar"]),
        ("{b,c}-[01].tar", ["b-0.tar", "b-1.tar"]),
    ],
)
def test_patterns(place, pattern, names):
    found = find_tars("--train", [f"{place}/{pattern}"], str(place))
    assert [(tar.name, tar.where, tar.size) for tar in found] == [(n, f"{place}/{n}", len(n)) for n in names]
    elsewhere = find_tars("--train", [f"{place}/{pattern}"], str(place / "out"))
    assert [tar.name for tar in elsewhere] == [
        f"file://{place}/{n.replace('{', '%7B').replace('}', '%7D')}" for n in names
    ]


@pytest.mark.parametrize(
    ("patterns", "kind", "says"),
    [
        (["c-*.tar"], ConfigError, "--train is '.*c-.*tar', which names no tar that is there"),
        (["b-{0..2}.tar"], DataError, r"b-2\.tar is missing"),
        (["b-{0..1.tar"], ConfigError, "--train is '.*', whose braces cannot be read"),
        (["b-0.tar", "b-*.tar"], ConfigError, r"--train names .*b-0\.tar twice"),
    ],
)
def test_patterns_that_lead_nowhere(place, patterns, kind, says):
    with pytest.raises(kind, match=says):
        find_tars("--train", [f"{place}/{pattern}" for pattern in patterns], str(place))


@pytest.mark.parametrize(
    ("pattern", "out", "says"),
    [
        ("ftp://x/a.tar", "/out", "--train: 'ftp://x/a.tar' is not a URL of s3://"),
        ("https://x/*.tar", "/out", r"a web server cannot be asked for names; use braces"),
    ],
)
def test_urls_that_cannot_be_followed(pattern, out, says):
    with pytest.raises(ConfigError, match=says):
        find_tars("--train", [pattern], out)


def test_tars_of_this_machine_for_a_dataset_elsewhere(place):
    with pytest.raises(
        ConfigError, match=r"b-0\.tar on this machine, which cannot be reached from --out s3://bucket/x"
    ):
        find_tars("--train", [f"{place}/b-0.tar"], "s3://bucket/x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has an empty line or a name twice"),
        ("a\n\nb\n", "has an empty line or a name twice"),
        ("a\nb\na\n", "has an empty line or a name twice"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_a_list_of_classes_that_is_none(place, text, says):
    if text is not None:
        (place / "names").write_text(text)
    flags = ["--train", str(place / "b-0.tar"), "--val", str(place / "b-1.tar"), "--out", str(place / "out")]
    with pytest.raises(ConfigError, match=f"--classes .*names {says}"):
        job.main(["tars", *flags, "--classes", str(place / "names")])


# -- as packing --------------------------------------------------------------------------------------------------------


def test_again_and_changed_and_in_use(lies, tmp_path, capsys):
    lies(several(6))
    lies(several(6))
    assert "is packed already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a dataset that was made in another way"):
        lies(several(12))


def test_adopting_that_was_stopped_goes_on_and_never_touches_a_tar(tmp_path):
    """A bad sample in the last tar stops it; the tars lie in the dataset's own folder."""
    ours = make(tmp_path / "ours").root
    place = tmp_path / "place"
    place.mkdir()
    for tar in ours.glob("*.tar"):
        shutil.copy(tar, place)
    (place / "val-000001.tar").write_bytes(tarred([*sample(0, 1), ("x.jpg", jpeg(1))]))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    flags = ["tars", "--train", f"{place}/train-*.tar", "--val", f"{place}/val-*.tar", "--out", str(place)]
    with pytest.raises(
        DataError, match=r"it has no label.*; 6 of 7 shards are done and kept: the same command goes on"
    ):
        job.main(flags)
    with pytest.raises(ConfigError, match=r"begun in another way \(label was .*\); give that command again"):
        job.main([*flags, "--label", "txt"])
    assert job.main([*flags, "--bad", "skip"]) == 0
    after = {path.name: path.read_bytes() for path in place.iterdir()}
    assert after.keys() - before.keys() == {"dataset.json", "train.index", "val.index"}
    assert {name: after[name] for name in before} == before
    assert after["train.index"] == (ours / "train.index").read_bytes()


@pytest.mark.slow
def test_adopting_with_processes_is_the_same(tmp_path, capsys):
    place = make(tmp_path / "ours").root
    patterns = ["--train", f"{place}/train-*.tar", "--val", f"{place}/val-*.tar"]
    for workers in ("1", "2"):
        assert job.main(["tars", *patterns, "--out", str(tmp_path / workers), "--workers", workers]) == 0
    assert "packing with 2 processes" in capsys.readouterr().out
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / w).iterdir()} for w in ("1", "2"))
    assert one == two
