"""The packing benchmark runs, on class folders and on a packed dataset, and writes what it prints."""

import json

import pytest

from benchmarks import pack
from tests.datasets import make
from tests.test_pack import tree


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_it_measures_every_writer(tmp_path, capfd, packed):
    data = make(tmp_path / "data").root if packed else tree(tmp_path / "data", images=8)
    file = tmp_path / "pack.json"
    assert pack.main(["--data", str(data), "--quick", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    peers = ["webdataset.ShardWriter", "tarfile"]
    assert list(written["writing alone"]) == [pack.WRITER, *peers, "tarfile, with the same hashes"]
    assert list(written["the whole"]) == [pack.ONE, pack.TWO, *peers]
    for part in ("writing alone", "the whole"):
        rows = list(written[part].values())
        assert all(row["images_per_second"] > 0 and row["cpu_ms_per_image"] > 0 for row in rows)
        assert rows[0]["our_cpu_to_its"] == [1.0, 1.0, 1.0]
    printed = capfd.readouterr().out
    assert "writing alone: 2 rounds of 24 images" in printed
    assert "the whole: 2 rounds of 24 images" in printed


def test_all_write_the_same_samples(tmp_path):
    """What is compared is the same work: names, images and labels."""
    import tarfile

    items = pack._items(tree(tmp_path / "in", images=8), 20)
    setting = pack.Setting(images=20, shard_samples=8, rounds=1)
    samples = [(f"{i:08d}", item.load(), item.label) for i, item in enumerate(items)]
    found = {}
    for name, write in pack._writers(samples, setting).items():
        out = tmp_path / name.replace(" ", "-")
        out.mkdir()
        write(out)
        found[name] = []
        for path in sorted(out.iterdir()):
            with tarfile.open(path) as tar:
                found[name].append({member.name: tar.extractfile(member).read() for member in tar})
    assert [len(shard) for shard in found[pack.WRITER]] == [16, 16, 8]
    assert all(shards == found[pack.WRITER] for shards in found.values())
