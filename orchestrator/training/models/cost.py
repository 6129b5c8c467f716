"""What a net costs: parameters and multiply-adds, counted from its layer list without building it."""

from orchestrator.training.models.arch import Arch, Conv


def parameters(arch: Arch) -> int:
    """Trainable numbers: convolutions, two a channel for BatchNorm, the classifier with its bias.

    >>> parameters(Arch(depth=50))
    25557032
    """
    convs = sum(conv.outputs * (conv.inputs * conv.kernel**2 + 2) for conv in _convs(arch))
    return convs + (arch.features + 1) * arch.classes


def multiply_adds(arch: Arch, size: int) -> int:
    """Multiply-adds of one image of size x size pixels: convolutions and classifier, as the paper counts FLOPs.

    BatchNorm, ReLU, pooling and additions are left out. Raises ValueError for a size below 1.

    >>> multiply_adds(Arch(depth=50), 224)
    4089184256
    """
    if size < 1:
        raise ValueError(f"size is {size} pixels; it must be at least 1")
    side = _shrink(size, arch.stem_conv)
    total = _cost(arch.stem_conv, side)
    side = (side - 1) // 2 + 1 if arch.pool else side
    for block in arch.blocks:
        before = side
        for conv in block.convs:
            side = _shrink(side, conv)
            total += _cost(conv, side)
        if block.shortcut == "projection":
            total += _cost(block.projection, _shrink(before, block.projection))
    return total + arch.features * arch.classes


def _convs(arch: Arch) -> list[Conv]:
    projections = [block.projection for block in arch.blocks if block.shortcut == "projection"]
    return [arch.stem_conv, *(conv for block in arch.blocks for conv in block.convs), *projections]


def _shrink(side: int, conv: Conv) -> int:
    return (side + 2 * conv.padding - conv.kernel) // conv.stride + 1


def _cost(conv: Conv, side: int) -> int:
    return conv.inputs * conv.outputs * conv.kernel**2 * side * side
