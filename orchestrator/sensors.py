"""What a node is busy with: CPU, memory, disks, network, and its GPUs; one rank a node looks, now and then.

Values are the whole node's, of whatever runs there. The door to NVML (`nvidia-ml-py`): imported where a run trains on a
GPU and nowhere else, and without it there are no GPU values.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from statistics import mean
from typing import Any, Protocol, TypeVar

import psutil

from orchestrator.context import Record
from orchestrator.tally import now_ms

T = TypeVar("T")
Values = dict[str, float]
GIB, MB = 2.0**30, 1e6
FIRST_S = 1.0  # until the first look, so that a short run has one: a share of less time says little
LAST_S = 2.0  # that a look under way has at the end: NVML hangs where a GPU has fallen off the bus
CHIP = 0  # NVML_TEMPERATURE_GPU


class Sensor(Protocol):
    """Something to look at."""

    def look(self) -> Values:
        """Values by name."""

    def close(self) -> None:
        """After the last look."""


class Host:
    """CPU, memory, disks and network of this node. Shares and rates are those since the last look."""

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._counted, self._at = _counters(), time.monotonic()

    def look(self) -> Values:
        """cpu_percent and memory_percent (0..100), memory_gib (what programs cannot have), and in MB/s disk_read,
        disk_write, net_in and net_out (all interfaces but the loopback). What a system does not tell is left out."""
        memory, counted, now = psutil.virtual_memory(), _counters(), time.monotonic()
        seconds = max(now - self._at, 1e-9)
        rates = {name: (counted[name] - self._counted[name]) / seconds / MB for name in counted.keys() & self._counted}
        self._counted, self._at = counted, now
        return {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_gib": (memory.total - memory.available) / GIB,
            **{f"{name}_mb_per_s": max(rates[name], 0.0) for name in sorted(rates)},  # a card that went takes its bytes
        }

    def close(self) -> None:
        """Nothing is open."""


def _counters() -> Mapping[str, int]:
    """Bytes since the node started."""
    cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
    found = {"net_in": sum(c.bytes_recv for c in cards), "net_out": sum(c.bytes_sent for c in cards)}
    if disks := psutil.disk_io_counters():
        found |= {"disk_read": disks.read_bytes, "disk_write": disks.write_bytes}
    return found


class Gpus:
    """The node's NVIDIA GPUs, all that the driver shows. Raises OSError with the reason where they cannot be asked."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise OSError("the package nvidia-ml-py is not installed") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            raise OSError(f"NVML says: {error}") from error

    def look(self) -> Values:
        """gpu_utilization_percent (mean: an idle GPU shows), gpu_memory_gib (of the fullest: it is the one that runs
        out), gpu_power_w (sum: what the node draws), gpu_temperature_c (of the hottest: it slows down first).

        Values that a GPU does not tell (slices of a GPU know no utilisation) are left out.
        """
        nvml = self._nvml
        return {
            **self._of_all("utilization_percent", lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu, mean),
            **self._of_all("memory_gib", lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / GIB, max),
            **self._of_all("power_w", lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000, sum),
            **self._of_all("temperature_c", lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, CHIP), max),
        }

    def _of_all(self, name: str, ask: Callable[[Any], float], together: Callable[[list[float]], float]) -> Values:
        found = []
        for gpu in self._gpus:
            with suppress(self._nvml.NVMLError):
                found.append(float(ask(gpu)))
        return {f"gpu_{name}": float(together(found))} if found else {}

    def close(self) -> None:
        """Lets go of NVML."""
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


class Sensors:
    """A thread that looks every `every_s` seconds and hands `send` a record of what it saw, until it is closed.

        {"kind": "system", "node": "node-3", "time_ms": 1764115200000, "values": {"cpu_percent": 97.1, ...}}

    gpus: whether the run trains on GPUs. `say` hears once, from the thread, of what cannot be seen, and why; nothing is
    raised: a run never fails because of what is told of it. A look takes half a millisecond, and more with GPUs.
    """

    def __init__(self, every_s: float, send: Callable[[Record], None], say: Callable[[str], None], *,
                 gpus: bool) -> None:  # fmt: skip
        self._every_s, self._send, self._say = every_s, send, say
        self._kinds: dict[str, type[Sensor]] = {"node": Host} | ({"GPUs": Gpus} if gpus else {})
        self._node = socket.gethostname()
        self._ended = threading.Event()
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; one that hangs in a driver is left behind."""
        self._ended.set()
        self._thread.join(LAST_S)

    def _run(self) -> None:
        opened = {what: self._safely(what, kind, None) for what, kind in self._kinds.items()}
        sensors = {what: sensor for what, sensor in opened.items() if sensor}
        pause = min(self._every_s, FIRST_S)
        while not self._ended.wait(pause):
            pause, values = self._every_s, Values()
            for what, sensor in sensors.items():
                values |= self._safely(what, sensor.look, Values())
            if values:
                self._safely("mailbox", partial(self._tell, values), None)
        for what, sensor in sensors.items():
            self._safely(what, sensor.close, None)

    def _tell(self, values: Values) -> None:
        self._send({"kind": "system", "node": self._node, "time_ms": now_ms(), "values": values})

    def _safely(self, what: str, work: Callable[[], T], instead: T) -> T:
        """What `work` gives; where that fails `instead`, and why is said the first time."""
        try:
            return work()
        except Exception as error:
            if what not in self._said:
                self._said.add(what)
                with suppress(Exception):
                    self._say(f"no values of the {what} of {self._node}: {error}")
            return instead
