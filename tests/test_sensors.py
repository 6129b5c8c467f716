"""What a node is busy with: this one's real values, GPUs of a made-up NVML, and sensors that fail."""

import queue
import socket
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest

from orchestrator import sensors
from orchestrator.sensors import GIB, Gpus, Host, Sensors

ALWAYS = {"cpu_percent", "memory_percent", "memory_gib", "net_in_mb_per_s", "net_out_mb_per_s"}


class NVMLError(Exception):
    pass


class Nvml:
    """Of the module pynvml what is used, over GPUs that are dicts of raw values; what one lacks raises."""

    NVMLError = NVMLError

    def __init__(self, *gpus):
        self.gpus, self.open = gpus, 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number):
        return self.gpus[number]

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=self._of(gpu, "percent"))

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used=self._of(gpu, "bytes"))

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self._of(gpu, "milliwatts")

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        assert sensor == 0
        return self._of(gpu, "celsius")

    def _of(self, gpu, name):
        if name not in gpu:
            raise NVMLError("Not Supported")
        return gpu[name]


def gpu(percent, gib, watts, celsius):
    return {"percent": percent, "bytes": int(gib * GIB), "milliwatts": 1000 * watts, "celsius": celsius}


@pytest.fixture
def two_gpus(monkeypatch):
    nvml = Nvml(gpu(100, 70.0, 650, 61), gpu(40, 75.5, 350, 55))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


# -- values ------------------------------------------------------------------------------------------------------------


def test_this_node():
    host = Host()
    values = host.look()
    assert values.keys() >= ALWAYS
    assert all(value >= 0 for value in values.values())
    assert values["memory_percent"] <= 100
    assert 0 < values["memory_gib"] < psutil.virtual_memory().total / GIB


def test_rates_are_bytes_since_the_last_look(monkeypatch):
    counts, clock = {"net_in": 5_000_000, "disk_read": 0}, [100.0]
    monkeypatch.setattr(sensors, "_counters", lambda: dict(counts))
    monkeypatch.setattr(sensors.time, "monotonic", lambda: clock[0])
    host = Host()
    clock[0], counts["net_in"], counts["disk_read"] = 104.0, 25_000_000, 1_000_000
    first = host.look()
    assert (first["net_in_mb_per_s"], first["disk_read_mb_per_s"]) == (5.0, 0.25)
    clock[0], counts["net_in"] = 105.0, 0  # a network card was taken out
    counts["disk_write"] = 7  # and a disk put in: no rate yet
    second = host.look()
    assert (second["net_in_mb_per_s"], second["disk_read_mb_per_s"]) == (0.0, 0.0)
    assert "disk_write_mb_per_s" not in second


def test_the_loopback_is_no_network(monkeypatch):
    cards = {"lo": (1000, 1000), "eth0": (3, 5), "eth1": (10, 20)}
    told = {name: SimpleNamespace(bytes_recv=got, bytes_sent=sent) for name, (got, sent) in cards.items()}
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: told)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)  # a container may have none
    assert sensors._counters() == {"net_in": 13, "net_out": 25}


def test_gpus_of_a_node_are_one_value_each(two_gpus):
    gpus = Gpus()
    assert gpus.look() == {
        "gpu_utilization_percent": 70.0,  # mean
        "gpu_memory_gib": 75.5,  # of the fullest
        "gpu_power_w": 1000.0,  # sum
        "gpu_temperature_c": 61.0,  # of the hottest
    }
    gpus.close()
    assert two_gpus.open == 0


def test_what_a_gpu_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml({"bytes": 2**30, "percent": 7}, {"bytes": 2**31}))
    assert Gpus().look() == {"gpu_utilization_percent": 7.0, "gpu_memory_gib": 2.0}


# -- the thread --------------------------------------------------------------------------------------------------------


class Heard:
    """Sensors, the records that they send, and what they say."""

    def __init__(self, every_s=0.01, **settings):
        self.records, self.said = queue.Queue(), []
        self.sensors = Sensors(every_s, self.records.put, self.said.append, **({"gpus": False} | settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sensors.close()

    def next(self):
        return self.records.get(timeout=20)


def test_a_record_of_all_values_again_and_again(two_gpus):
    with Heard(gpus=True) as heard:
        first, second = heard.next(), heard.next()
    assert (first["kind"], first["node"]) == ("system", socket.gethostname())
    assert first["values"].keys() >= ALWAYS | {"gpu_utilization_percent", "gpu_power_w"}
    assert first["time_ms"] <= second["time_ms"]
    assert heard.said == []


def test_closed_no_thread_is_left_and_nvml_is_let_go(two_gpus):
    with Heard(gpus=True) as heard:
        heard.next()
        assert "sensors" in [thread.name for thread in threading.enumerate()]
        assert two_gpus.open == 1
    assert "sensors" not in [thread.name for thread in threading.enumerate()]
    assert two_gpus.open == 0


def test_closing_does_not_wait_for_the_next_look():
    with Heard(every_s=3600.0) as heard:
        pass
    assert not heard.sensors._thread.is_alive()


def test_a_run_without_gpus_does_not_ask_for_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    with Heard() as heard:
        assert not [name for name in heard.next()["values"] if name.startswith("gpu_")]
    assert heard.said == []


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "the package nvidia-ml-py is not installed"),
        ("no driver", "NVML says: Driver Not Loaded"),
    ],
)
def test_without_nvml_the_rest_is_sent_and_the_reason_said_once(monkeypatch, module, reason):
    def refuse():
        raise NVMLError("Driver Not Loaded")

    if module:
        module = Nvml()
        module.nvmlInit = refuse
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with Heard(gpus=True) as heard:
        assert heard.next()["values"].keys() >= ALWAYS
        heard.next()
    assert heard.said == [f"no values of the GPUs of {socket.gethostname()}: {reason}"]


def test_a_sensor_that_fails_is_said_once_and_tried_again(monkeypatch, two_gpus):
    looks = []

    def look(self):
        looks.append(len(looks))
        if len(looks) < 4:
            raise OSError("/proc is not mounted")
        return {"cpu_percent": 1.0}

    monkeypatch.setattr(Host, "look", look)
    with Heard(gpus=True) as heard:
        assert "cpu_percent" not in heard.next()["values"]  # the GPUs are still seen
        while "cpu_percent" not in heard.next()["values"]:
            pass
    assert heard.said == [f"no values of the node of {socket.gethostname()}: /proc is not mounted"]


def test_whom_nobody_hears_raises_nothing():
    tried = threading.Semaphore(0)

    def refuse(_):
        tried.release()
        raise ConnectionError("the mailbox is gone")

    def mute(_):
        raise BrokenPipeError

    working = Sensors(0.01, refuse, mute, gpus=False)
    assert tried.acquire(timeout=20)
    assert tried.acquire(timeout=20)  # it went on after the first
    working.close()
    assert not working._thread.is_alive()
