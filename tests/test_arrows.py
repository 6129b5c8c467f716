"""The house's arrows: jobs -> orchestrator -> pipelines, each vendor behind one door, pure modules pure."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p for package in ("jobs", "orchestrator", "pipelines") for p in (ROOT / package).rglob("*.py"))
LAYERS = ["pipelines", "orchestrator", "jobs"]  # each may import itself and what stands before it
DOORS = {
    "ray": "orchestrator/cluster/",
    "optuna": "orchestrator/cluster/",
    "mlflow": "orchestrator/tracking/",
    "nvidia": "pipelines/dali.py",
    "pynvml": "orchestrator/sensors.py",
    "obstore": "pipelines/remote/store.py",
}
VENDORS = {
    "ray",
    "mlflow",
    "optuna",
    "nvidia",
    "pynvml",
    "torch",
    "obstore",
    "sklearn",
    "scipy",
    "matplotlib",
    "webdataset",
    "PIL",
    "psutil",
}
PURE = [
    "pipelines/order.py",
    "pipelines/augment.py",
    "pipelines/errors.py",
    "orchestrator/goodput.py",
    "orchestrator/meters.py",
    "orchestrator/plan.py",
    "orchestrator/config.py",
    "orchestrator/sweep/config.py",
    "orchestrator/sweep/notation.py",
    "orchestrator/sweep/outlook.py",
    "orchestrator/sweep/runs.py",
    "orchestrator/sweep/space.py",
    "orchestrator/training/schedule.py",
    "orchestrator/training/metrics.py",
    "orchestrator/training/models/arch.py",
    "orchestrator/training/models/cost.py",
]


def imports(path: Path) -> set[str]:
    """Every module a file names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def upward(path: Path) -> list[str]:
    """Imports of a higher layer."""
    own = LAYERS.index(name(path).split("/")[0])
    return sorted({i.split(".")[0] for i in imports(path)} & set(LAYERS[own + 1 :]))


def through_the_wall(path: Path) -> list[str]:
    """Vendors imported elsewhere than at their door."""
    tops = {i.split(".")[0] for i in imports(path)}
    return [
        f"{vendor} belongs behind {door}"
        for vendor, door in DOORS.items()
        if vendor in tops and not name(path).startswith(door)
    ]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_arrows_point_down_and_vendors_stay_behind_their_doors(path):
    assert not upward(path), (
        f"{name(path)} imports {upward(path)}: the arrow is jobs -> orchestrator -> pipelines, never back"
    )
    assert not through_the_wall(path), f"{name(path)}: {through_the_wall(path)}"


@pytest.mark.parametrize("path", PURE)
def test_pure_modules_import_no_vendor(path):
    vendors = sorted({i.split(".")[0] for i in imports(ROOT / path)} & VENDORS)
    assert not vendors, f"{path} is arithmetic, and imports {vendors}"


def test_training_and_pipelines_run_without_ray_and_mlflow():
    below = [p for p in MODULES if name(p).startswith(("pipelines/", "orchestrator/training/"))]
    known = {"orchestrator.training", "orchestrator.training.models"}
    for path in below:
        outside = {i for i in imports(path) if i.startswith("orchestrator") and not i.startswith(tuple(known))} - {
            "orchestrator"
        }
        assert not outside, (
            f"{name(path)} imports {sorted(outside)}: training and pipelines stand on torch and themselves"
        )


def test_python_never_imports_infra():
    assert not [name(p) for p in MODULES if any(i.split(".")[0] == "infra" for i in imports(p))]


def test_the_check_itself_finds_a_wrong_arrow(tmp_path, monkeypatch):
    wrong = tmp_path / "pipelines" / "bad.py"
    wrong.parent.mkdir()
    wrong.write_text("def f():\n    from orchestrator import plan\n    import ray.train\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert upward(wrong) == ["orchestrator"]
    assert through_the_wall(wrong) == ["ray belongs behind orchestrator/cluster/"]
