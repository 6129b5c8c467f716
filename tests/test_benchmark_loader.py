"""The loader's benchmark runs, on class folders and on a packed dataset, and writes what it prints."""

import json

import pytest

from benchmarks import loader
from tests.datasets import make
from tests.jpegs import jpeg


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_it_measures_every_loader(tmp_path, capfd, packed):
    if packed:
        make(tmp_path / "data")
    for i in range(0 if packed else 24):
        folder = tmp_path / "data" / f"class-{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    file = tmp_path / "loader.json"
    data = ["--data", str(tmp_path / "data")]
    assert loader.main([*data, "--quick", "--batch", "4", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert list(written["loaders"]) == [loader.OURS, *loader.NATIVE, *loader.PILLOW]
    assert all(row["cpu_s_per_1000"] > 0 for row in written["loaders"].values())
    assert written["loaders"][loader.OURS]["our_cpu_to_its"] == 1.0
    assert {name: row["target"] for name, row in written["loaders"].items() if row["target"]} == loader.TARGETS
    assert all(value > 0 for value in written["host_us"].values())
    printed = capfd.readouterr().out
    assert "host time without the decode" in printed
