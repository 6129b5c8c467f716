"""Every setting of a run, once: frozen, bounded, documented, checked at birth.

Each field has a kind: *identity* fixes what the weights will be, and a run name belongs to one
identity for ever; *placement* says where and how fast, and may change with every submission; *horizon* says how far
and what is reported, and may change where the schedule allows it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from orchestrator.training.models.arch import Arch

Kind = Literal["identity", "placement", "horizon"]
IDENTITY: Kind = "identity"
PLACEMENT: Kind = "placement"
HORIZON: Kind = "horizon"
# Schedules that are the same function of the step for any number of epochs: such runs may be prolonged.
PROLONGABLE = ("constant", "step")


def setting(default: Any, kind: Kind, description: str, **bounds: Any) -> Any:
    """One setting: default, kind, what it means with its unit, and pydantic's bounds (ge, le, gt, ...)."""
    return Field(default, description=description, json_schema_extra={"kind": kind}, **bounds)


class Section(BaseModel):
    """A group of settings; unknown names are refused and nothing changes after birth."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False)


def _pair(value: Any) -> Any:
    """A flag gives '0.08,1', a YAML file a list: both mean a pair."""
    return tuple(value.split(",")) if isinstance(value, str) else value


def _items(value: Any) -> Any:
    """A flag gives '30,60,80' (or nothing), a YAML file a list."""
    return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value


class DataConfig(Section):
    """What is read, in which order, and how it is cropped."""

    name: str = setting(
        "imagenet", IDENTITY, "folder under $SKIPLANE_HOME/data that is meant when data.root is not set"
    )
    root: str = setting(
        "",
        PLACEMENT,
        "dataset folder (absolute inside a job) or URL (s3://, gs://, az://, http://, https://); its content, not its "
        "place, is identity",
    )
    endpoint: str = setting("", PLACEMENT, "address of an S3-compatible store; default $AWS_ENDPOINT_URL")
    cache: str = setting(
        "", PLACEMENT, "folder on each node's own disk for streamed shards; default $SKIPLANE_HOME/cache"
    )
    cache_gb: float = setting(0.0, PLACEMENT, "GB that data.cache may hold; 0 = 90 % of what is free there", ge=0)
    cache_in_memory: bool = setting(False, PLACEMENT, "allow a data.cache that lies in memory (tmpfs)")
    fetches: int = setting(8, PLACEMENT, "shards that a node fetches at once", ge=1, le=256)
    wait_seconds: int = setting(
        600, PLACEMENT, "how long data that cannot be had is tried for before the run fails", ge=1
    )
    lanes: int = setting(8, IDENTITY, "virtual workers: BatchNorm sees one lane; at most this many real workers", ge=1)
    streams: int = setting(1, IDENTITY, "equal parts the training split is cut into; divides data.lanes", ge=1)
    window: int = setting(0, IDENTITY, "shards permuted together inside a stream; 0 = the whole stream", ge=0)
    size: int = setting(224, IDENTITY, "side of a training image, px", ge=8, le=1024)
    augment: Literal["none", "resized_crop", "short_side", "pad_crop"] = setting(
        "resized_crop",
        IDENTITY,
        "none | resized_crop (random area and ratio) | short_side (random scale, then crop) | pad_crop (zeros around "
        "the image, then crop; for CIFAR)",
    )
    scale: tuple[float, float] = setting((0.08, 1.0), IDENTITY, "share of the area that resized_crop takes")
    ratio: tuple[float, float] = setting((0.75, 4 / 3), IDENTITY, "width / height of what resized_crop takes")
    short_side: tuple[int, int] = setting((256, 480), IDENTITY, "short side that short_side draws from, px")
    pad: int = setting(4, IDENTITY, "zeros that pad_crop puts on each side of an image, px", ge=0, le=1024)
    flip: bool = setting(True, IDENTITY, "mirror half of the training images")
    pca_colour: float = setting(
        0.0, IDENTITY, "deviation of the PCA colour noise (the paper: 0.1); 0 = off", ge=0, le=1
    )
    mean: tuple[float, float, float] = setting((0.485, 0.456, 0.406), IDENTITY, "subtracted from the 0..1 channels")
    std: tuple[float, float, float] = setting((0.229, 0.224, 0.225), IDENTITY, "then divided by")
    eval_resize: int = setting(
        256, IDENTITY, "short side of a validation image before its centre crop, px", ge=8, le=2048
    )
    eval_size: int = setting(224, IDENTITY, "side of that centre crop, px; at most data.eval_resize", ge=8, le=2048)
    eval_batch: int = setting(64, PLACEMENT, "validation images a worker decodes and scores at once", ge=1, le=4096)
    decode: Literal["auto", "gpu", "cpu"] = setting(
        "auto", PLACEMENT, "where JPEGs are decoded; auto = where the net is"
    )
    threads: int = setting(0, PLACEMENT, "decode threads of a worker; 0 = cluster.cpus_per_worker", ge=0, le=256)
    prefetch: int = setting(2, PLACEMENT, "batches decoded ahead", ge=1, le=16)
    verify: Literal["size", "sha256"] = setting(
        "size", PLACEMENT, "how shards are checked at the start; crc32 always later"
    )
    max_bad: float = setting(
        1e-4,
        HORIZON,
        "share of a split that may be bad images before the run fails: over all workers and submissions",
        ge=0,
        le=1,
    )

    _pairs = field_validator("scale", "ratio", "short_side", "mean", "std", mode="before")(_pair)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lanes % self.streams:
            raise ValueError(
                f"data.streams is {self.streams}, which does not divide data.lanes = {self.lanes}; "
                f"use one of {', '.join(map(str, _divisors(self.lanes)))}"
            )
        if self.eval_size > self.eval_resize:
            raise ValueError(
                f"data.eval_size is {self.eval_size}, above data.eval_resize = {self.eval_resize}; lower it"
            )
        if min(self.std) <= 0:
            raise ValueError(f"data.std is {self.std}; three numbers above 0 are needed")
        for name in ("scale", "ratio", "short_side"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"data.{name} is {low},{high}; two rising numbers above 0 are needed")
        if self.augment == "short_side" and self.short_side[0] < self.size:
            raise ValueError(f"data.short_side starts at {self.short_side[0]}, below data.size = {self.size}; raise it")
        return self


class ModelConfig(Section):
    """The net (He et al. 2015, Table 1)."""

    layout: Literal["imagenet", "cifar"] = setting("imagenet", IDENTITY, "four stages, or CIFAR's three of 6n+2 layers")
    depth: int = setting(50, IDENTITY, "imagenet: 18, 34, 50, 101, 152; cifar: 6n+2, such as 20, 32, 44, 56, 110")
    shortcut: Literal["none", "A", "B", "C"] = setting(
        "B",
        IDENTITY,
        "none = the plain net; A = zero-padded identity; B = projection where shapes change; C = everywhere",
    )
    width: int = setting(0, IDENTITY, "channels of the first stage; 0 = the paper's (64, cifar 16)", ge=0, le=1024)
    stem: Literal["imagenet", "small"] = setting(
        "imagenet", IDENTITY, "7x7 stride 2 and pooling, or 3x3 stride 1 without"
    )
    version: Literal["v1", "v1.5"] = setting(
        "v1.5", IDENTITY, "a bottleneck's stride in its first 1x1 (v1) or its 3x3 (v1.5)"
    )
    zero_init: bool = setting(False, IDENTITY, "start the last BatchNorm of every block at gamma = 0")
    init: str = setting("", IDENTITY, "file of weights to start from (torchvision's names)")

    @model_validator(mode="after")
    def _exists(self) -> Self:
        try:
            self.arch(classes=2)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
        return self

    def arch(self, classes: int) -> Arch:
        """The net's description for this many classes; ValueError where no such net exists."""
        width = self.width or (64 if self.layout == "imagenet" else 16)
        return Arch(
            layout=self.layout,
            depth=self.depth,
            shortcut=self.shortcut,
            width=width,
            stem=self.stem,
            version=self.version,
            classes=classes,
            zero_init=self.zero_init,
        )


class OptimConfig(Section):
    """SGD and its learning rate."""

    lr: float = setting(0.1, IDENTITY, "peak learning rate for train.global_batch", gt=0, le=1000)
    momentum: float = setting(0.9, IDENTITY, "SGD momentum", ge=0, lt=1)
    nesterov: bool = setting(False, IDENTITY, "Nesterov's form of momentum")
    weight_decay: float = setting(1e-4, IDENTITY, "L2 penalty", ge=0, le=1)
    decay_norm: bool = setting(True, IDENTITY, "also decay BatchNorm's parameters and biases (the paper does)")
    schedule: Literal["constant", "step", "cosine", "linear", "one_cycle"] = setting(
        "step", IDENTITY, "shape of the rate"
    )
    milestones: tuple[float, ...] = setting((30, 60), IDENTITY, "epochs at which schedule 'step' multiplies by gamma")
    gamma: float = setting(0.1, IDENTITY, "factor at each milestone", gt=0, lt=1)
    warmup_epochs: float = setting(0.0, IDENTITY, "epochs of linear warm-up before the schedule", ge=0)
    warmup_start: float = setting(0.1, IDENTITY, "share of the rate that the warm-up starts from", ge=0, le=1)
    label_smoothing: float = setting(0.0, IDENTITY, "mass moved from the label to all classes", ge=0, lt=1)
    clip_norm: float = setting(0.0, IDENTITY, "largest norm of the gradient; 0 = no clipping", ge=0)

    _lists = field_validator("milestones", mode="before")(_items)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov is on with optim.momentum = 0; set a momentum or turn it off")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones is {self.milestones}; rising epochs are needed")
        return self


class TrainConfig(Section):
    """How long, how much at once, how exactly."""

    epochs: int = setting(
        90,
        HORIZON,
        "passes over the training split; fixed once started unless the schedule is step or constant",
        ge=1,
        le=100_000,
    )
    stop_after: int = setting(
        0, HORIZON, "epochs after which the run stops, its schedule unfinished; the same name goes on; 0 = none", ge=0
    )
    global_batch: int = setting(256, IDENTITY, "images of one step over all workers; data.lanes divides it", ge=1)
    seed: int = setting(0, IDENTITY, "of the weights, the order and the augmentation", ge=0, lt=2**32)
    fork: str = setting(
        "",
        IDENTITY,
        "checkpoint to begin from, with everything it holds: weights, momentum, position, curve: "
        "RUN_FOLDER/checkpoints/step-...; only optim.* and train.epochs may differ from that run's",
    )
    precision: Literal["fp32", "bf16"] = setting("fp32", IDENTITY, "of the forward pass; weights and sums stay fp32")
    reduce: Literal["fast", "ordered", "exact"] = setting(
        "fast", IDENTITY, "how lanes are summed: DDP | by rank | fixed point"
    )
    lanes_per_pass: int = setting(0, PLACEMENT, "lanes of one forward and backward; 0 = all that a worker has", ge=0)
    channels_last: bool = setting(False, PLACEMENT, "NHWC tensors: faster on tensor cores")
    compile: bool = setting(False, PLACEMENT, "torch.compile the net")
    deterministic: bool = setting(False, PLACEMENT, "deterministic kernels (on a GPU; a CPU's are)")
    checkpoint_steps: int = setting(
        0, HORIZON, "steps between checkpoints besides the one at each epoch's end; 0 = none", ge=0
    )
    checkpoint_minutes: float = setting(
        10.0, HORIZON, "minutes between checkpoints besides the one at each epoch's end; 0 = none", ge=0
    )
    keep: int = setting(2, HORIZON, "newest checkpoints kept; the best one is kept besides", ge=1, le=1000)
    memory_seconds: float = setting(
        10.0,
        PLACEMENT,
        "seconds between copies of the state in each node's memory, which a restart takes where they are newer than "
        "the checkpoint; 0 = none",
        ge=0,
    )
    eval_epochs: int = setting(1, HORIZON, "epochs between evaluations; the last epoch is always evaluated", ge=1)


class ClusterConfig(Section):
    """Where the run lives."""

    workers: str = setting("1", PLACEMENT, "DDP workers: a number, or least..most, such as 2..8")
    device: Literal["auto", "gpu", "cpu"] = setting(
        "auto", PLACEMENT, "auto = one GPU a worker where the cluster has any"
    )
    cpus_per_worker: int = setting(1, PLACEMENT, "CPU cores, and torch threads, of a worker", ge=1, le=512)
    storage: str = setting("", PLACEMENT, "folder or URL (s3://, gs://, az://) of runs; default $SKIPLANE_HOME/runs")
    max_restarts: int = setting(3, PLACEMENT, "failures in a row without a new checkpoint before the run fails", ge=0)
    start_seconds: int = setting(
        0,
        PLACEMENT,
        "how long to wait when it starts for nodes that an autoscaler adds, for the most of cluster.workers; 0 = what "
        "is there has to do. Where GPU nodes are still to come, set cluster.device gpu",
        ge=0,
    )
    wait_seconds: int = setting(60, PLACEMENT, "how long to wait for busy or lost resources before giving up", ge=0)
    grow_seconds: int = setting(
        60, PLACEMENT, "how long a group trains at least before it is started anew with more workers", ge=0
    )
    timeout_seconds: int = setting(300, PLACEMENT, "how long a worker may wait for the others in a sum", ge=10)

    @field_validator("workers", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("workers")
    @classmethod
    def _range(cls, value: str) -> str:
        least, _, most = value.partition("..")
        if not (least.isdigit() and (most or least).isdigit() and 1 <= int(least) <= int(most or least)):
            raise ValueError(f"is '{value}'; a number such as 4, or least..most such as 2..8, is needed")
        return value

    @property
    def span(self) -> tuple[int, int]:
        """(least, most) workers."""
        least, _, most = self.workers.partition("..")
        return int(least), int(most or least)

    @property
    def cpus(self) -> int:
        """CPU cores that the most workers take."""
        return self.span[1] * self.cpus_per_worker


class TrackingConfig(Section):
    """What is told to whom."""

    uri: str = setting(
        "",
        PLACEMENT,
        "MLflow; default $MLFLOW_TRACKING_URI, else $SKIPLANE_HOME/mlflow.db; 'offline' = a journal that "
        "`jobs.tracking sync` sends later, 'off' = none",
    )
    experiment: str = setting("", HORIZON, "MLflow experiment; default $MLFLOW_EXPERIMENT_NAME, else data.name")
    log_steps: int = setting(50, HORIZON, "steps averaged in one point of the training curves", ge=1)
    system_seconds: float = setting(
        10.0, HORIZON, "seconds between samples of a node's CPU, memory, GPUs; 0 = off", ge=0
    )
    model: bool = setting(
        True, HORIZON, "whether the best checkpoint becomes an MLflow model when the run has finished"
    )
    register_as: str = setting("", HORIZON, "registered model of MLflow that gets it as a new version; empty = none")
    alias: str = setting("", HORIZON, "alias of that version, such as champion; empty = none")
    wait_seconds: float = setting(30.0, HORIZON, "how long the end of a run waits while MLflow takes nothing", ge=0)
    progress_seconds: float = setting(5.0, HORIZON, "seconds between progress lines", gt=0)


class RunConfig(Section):
    """A run: six sections and a name."""

    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,99})?$")] = setting(
        "", HORIZON, "the run's name: the same name goes on with the same run"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        batch, lanes, most = self.train.global_batch, self.data.lanes, self.cluster.span[1]
        if batch % lanes:
            below, above = max(batch // lanes, 1) * lanes, -(-batch // lanes) * lanes
            raise ValueError(
                f"train.global_batch is {batch}, which data.lanes = {lanes} does not divide; "
                f"the nearest that fit are {below} and {above}"
            )
        if most > lanes:
            raise ValueError(
                f"cluster.workers is {self.cluster.workers}, more than data.lanes = {lanes}; a worker plays "
                f"at least one lane, so at most {lanes} workers"
            )
        if self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs is {self.optim.warmup_epochs}, not below train.epochs = {self.train.epochs}"
            )
        return self

    def replace(self, changes: dict[str, Any]) -> "RunConfig":
        """A copy with some settings changed by their dotted names, checked again."""
        values = self.model_dump()
        for name, value in changes.items():
            *path, last = name.split(".")
            section = values
            for part in path:
                section = section[part]
            section[last] = value
        return RunConfig.model_validate(values)

    def folder(self) -> str:
        """Where this run lives: <storage>/<name>."""
        return f"{self.cluster.storage.rstrip('/')}/{self.name}"


def flatten(config: BaseModel) -> dict[str, Any]:
    """Dotted name -> value, in the order of declaration."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        flat |= {f"{name}.{k}": v for k, v in flatten(value).items()} if isinstance(value, BaseModel) else {name: value}
    return flat


def kinds(model: type[BaseModel] = RunConfig) -> dict[str, Kind]:
    """Dotted name -> kind."""
    found: dict[str, Kind] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {f"{name}.{k}": v for k, v in kinds(field.annotation).items()}
        else:
            extra = field.json_schema_extra
            found[name] = extra["kind"] if isinstance(extra, dict) else HORIZON  # type: ignore[assignment]
    return found


def identity_difference(old: dict[str, Any], new: RunConfig) -> list[str]:
    """What keeps `new` from going on under the name of a run with the flat settings `old`, one line a setting.

    train.epochs counts as identity where the schedule's shape depends on it.
    """
    now, kind = flatten(RunConfig.model_validate(unflatten(old))), kinds()
    then = {**now, **old}
    changed = [n for n, v in flatten(new).items() if kind[n] == IDENTITY and _plain(v) != _plain(then[n])]
    if new.train.epochs != then["train.epochs"] and new.optim.schedule not in PROLONGABLE:
        changed.append("train.epochs")
    return [f"{n} was {_plain(then[n])}, is {_plain(flatten(new)[n])}" for n in changed]


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested form of `flatten`'s result."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        section = nested
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return nested


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def absolute(path: str, base: Path) -> str:
    """A local path made absolute; a URL as it is."""
    return path if "://" in path else str((base / Path(path).expanduser()).resolve())
