"""Cross-entropy of logits that are spread over several ranks.

:func:`fusedstep.functional.cross_entropy` calls this module for a
:class:`~torch.distributed.tensor.DTensor`; :func:`vocab_parallel_cross_entropy` is for programs
that keep their shards themselves. The kernels compute each rank's part. Ranks exchange three
numbers for each row whose classes are spread, and one number for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fusedstep import _C

__all__ = ["cross_entropy", "vocab_parallel_cross_entropy"]

_Group = ProcessGroup | tuple[DeviceMesh, int]

# Renamed in torch 2.13.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor

_NARROW = (torch.bfloat16, torch.float16)
_COVERED = (torch.float32, torch.float64, *_NARROW)
_NO_REDUCTION = 0
_IGNORED = -100  # in a shard's own numbering of classes, which starts at 0


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    num_classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of logits whose classes are spread over the ranks of a group.

    For a rank's part :math:`x_c` of a row, with maximum :math:`m_r` and
    :math:`S_r = \sum_c e^{x_c - m_r}`, the ranks gather :math:`(m_r, S_r, x_y)` and each computes

    .. math::
        m = \max_r m_r, \qquad S = \sum_r S_r e^{m_r - m}, \qquad \ell = \log S - (x_y - m),

    so that no rank ever holds the logits of another. The backward pass communicates nothing; with
    ``create_graph=True`` torch's operators compute it, and passes behind it add up over the ranks.

    Args:
        input: This rank's logits, of shape ``(C_r)``, ``(N, C_r)`` or ``(N, C_r, d1, ..., dK)``
            with any strides (``logits.movedim(-1, 1)`` where classes come last); float32, float64,
            bfloat16 or float16.
        target: Class indices (int64 or uint8) as in the whole vocabulary, the same on every rank;
            of the shape of ``input`` without the class dimension.
        weight: One factor for each of the ``num_classes`` classes, the same on every rank.
        group: The ranks that share the classes, in the order of their shards; by default all.
        num_classes: Of the whole vocabulary. Rank ``r`` holds the classes from
            ``r * ceil(num_classes / ranks)`` on, as many or, at the end, fewer or none: the chunks
            of :func:`torch.chunk` and of :class:`torch.distributed.tensor.Shard`. By default
            shards are of one size.
        ignore_index: A class index whose rows add nothing to the loss, the mean's divisor or the
            gradient.
        reduction: ``"mean"`` (over the weights of the rows that count), ``"sum"`` or ``"none"``.

    Returns:
        The loss of the whole logits, the same on every rank: a scalar, or for ``"none"`` a tensor
        of the shape of ``target``; in the dtype of ``input``, float32 for 16 bits under autocast.

    Raises:
        IndexError: A class index is neither ``ignore_index`` nor in ``[0, num_classes)``. On CUDA
            and under ``torch.compile`` the loss and the gradient of its row are NaN instead.
        ValueError: ``reduction`` is unknown, shapes or dtypes do not fit together, or ``input`` has
            not as many classes as this rank should hold.
    """
    _check_reduction(reduction)
    group = dist.group.WORLD if group is None else group
    assert group is not None
    class_dim = _class_dim(input)
    classes = input.shape[class_dim] * group.size() if num_classes is None else num_classes
    shape = (*input.shape[:class_dim], classes, *input.shape[class_dim + 1 :])
    if not _is_index(input.dtype, shape, target, weight):
        raise ValueError(
            f"cross_entropy: logits of shape {list(shape)} and {input.dtype} do not "
            f"fit a target of shape {list(target.shape)} and {target.dtype}"
            + ("" if weight is None else f", weight {list(weight.shape)} and {weight.dtype}")
        )
    target = target.long()
    shard = _ClassShard.of(group, classes)
    rows = _class_parallel_rows(input, target, weight, ignore_index, shard)
    if reduction == "mean":
        rows = _total(rows) / _divisor(target, weight, ignore_index)
    elif reduction == "sum":
        rows = _total(rows)
    return rows.to(_loss_dtype(input, target))


def cross_entropy(
    input: DTensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Cross-entropy of distributed logits, wherever their rows and classes lie.

    A mesh dimension over which the classes are sharded stays so with class indices and without
    label smoothing; else the classes are gathered first. Rows stay where they are. What the kernels
    do not cover goes to torch's own function.

    Args:
        input: Logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``.
        target: As for :func:`fusedstep.functional.cross_entropy`: a DTensor on the mesh of
            ``input``, or, where the rows of ``input`` are not sharded, a plain tensor that is the
            same on every rank.
        weight: One factor per class, a DTensor or a plain tensor that is the same on every rank.
        ignore_index: As for :func:`fusedstep.functional.cross_entropy`.
        reduction: ``"mean"`` (over the rows of all ranks), ``"sum"`` or ``"none"``.
        label_smoothing: As for :func:`fusedstep.functional.cross_entropy`.

    Returns:
        A DTensor: for ``"none"`` with the placements of the rows; else a scalar that is
        ``Partial`` over mesh dimensions that shard rows, ``Replicate`` over all others. The
        gradient has the placements of ``input``.

    Raises:
        IndexError: A class index is out of range, as in :func:`vocab_parallel_cross_entropy`.
        ValueError: ``reduction`` is unknown, or ``target`` is a plain tensor though rows are
            sharded, or lies on another mesh.
    """
    _check_reduction(reduction)
    mesh, class_dim = input.device_mesh, _class_dim(input)
    is_index = _is_index(input.dtype, input.shape, target, weight)
    is_probability = not is_index and _is_probability(input, target, weight, ignore_index)
    if not (is_index or is_probability) or not 0 <= label_smoothing <= 1:
        return torch.nn.functional.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    placements = _kept(input.placements, class_dim, is_index and label_smoothing == 0)
    if placements != input.placements:
        input = input.redistribute(placements=placements)
    row_placements = [_of_rows(placement, class_dim) for placement in placements]
    logits = input.to_local(grad_placements=placements)
    target = _local("target", target, mesh, row_placements if is_index else placements)
    target = target.long() if is_index else target
    if weight is not None:
        weight = _local("weight", weight, mesh, [Replicate()] * mesh.ndim)

    spread = [dim for dim, placement in enumerate(placements) if placement.is_shard(class_dim)]
    if spread:
        shard = _ClassShard.of((mesh, spread[0]), input.shape[class_dim])
        rows = _class_parallel_rows(logits, target, weight, ignore_index, shard)
    else:
        rows = _RowLosses.apply(  # type: ignore[no-untyped-call]
            logits, target, weight, ignore_index, label_smoothing
        )
    loss_dtype = _loss_dtype(input, target)
    if reduction == "none":
        shape = _rows_shape(input.shape)
        stride = tuple(
            math.prod(max(size, 1) for size in shape[d + 1 :]) for d in range(len(shape))
        )
        return DTensor.from_local(
            rows.to(loss_dtype), mesh, row_placements, shape=shape, stride=stride
        )
    loss = _total(rows)
    if reduction == "mean":
        if is_index:
            divisor = _divisor(target, weight, ignore_index)
            for dim, placement in enumerate(row_placements):
                if placement.is_shard():
                    divisor = funcol.all_reduce(divisor, "sum", (mesh, dim))
            loss = loss / divisor
        else:
            loss = loss / math.prod(_rows_shape(input.shape))
    reduced = [Partial() if p.is_shard() else Replicate() for p in row_placements]
    for dim, placement in enumerate(row_placements):
        if placement.is_shard():
            loss = _PartOfSum.apply(loss, (mesh, dim))  # type: ignore[no-untyped-call]
    return DTensor.from_local(loss.to(loss_dtype), mesh, reduced)


# ------------------------------------------------------------------ what is covered


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction!r} is not a valid value for reduction")


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _rows_shape(shape: Sequence[int]) -> torch.Size:
    """The shape of class indices for logits of this shape: without the class dimension."""
    return torch.Size((*shape[:1], *shape[2:]) if len(shape) > 1 else ())


def _is_index(
    dtype: torch.dtype, shape: Sequence[int], target: Tensor, weight: Tensor | None
) -> bool:
    """Whether the kernels cover class indices, and a weight, for logits of this dtype and shape."""
    return (
        _fits(dtype, shape, weight, target)
        and target.dtype in (torch.int64, torch.uint8)
        and target.shape == _rows_shape(shape)
    )


def _is_probability(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> bool:
    """Whether the kernels cover class probabilities, and a weight, for these logits."""
    return (
        _fits(input.dtype, input.shape, weight, target)
        and target.shape == input.shape
        and (target.dtype == input.dtype or _is_widened(input.dtype, target.dtype))
        and not target.requires_grad
        and ignore_index < 0
    )


def _fits(dtype: torch.dtype, shape: Sequence[int], weight: Tensor | None, target: Tensor) -> bool:
    if dtype not in _COVERED or len(shape) == 0 or shape[0 if len(shape) == 1 else 1] == 0:
        return False
    if weight is None:
        return True
    in_autocast = torch.is_autocast_enabled(target.device.type)
    same = weight.dtype == dtype or (in_autocast and _is_widened(dtype, weight.dtype))
    return same and not weight.requires_grad and weight.shape == (shape[min(len(shape) - 1, 1)],)


def _is_widened(dtype: torch.dtype, other: torch.dtype) -> bool:
    return dtype in _NARROW and other == torch.float32


def _loss_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """As torch has it: float32 for 16-bit logits under autocast or with float32 probabilities."""
    narrow = input.dtype in _NARROW
    wide_target = target.dtype == torch.float32
    if narrow and (wide_target or torch.is_autocast_enabled(input.device.type)):
        return torch.float32
    return input.dtype


def _accumulate_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------ placements


def _kept(
    placements: Sequence[Placement], class_dim: int, classes_may_be_spread: bool
) -> tuple[Placement, ...]:
    """The placements that logits are computed at; anything but a plain shard is gathered."""
    kept: list[Placement] = []
    for placement in placements:
        keep = type(placement) is Shard
        if placement.is_shard(class_dim):
            keep = keep and classes_may_be_spread and placement not in kept
        kept.append(placement if keep else Replicate())
    return tuple(kept)


def _of_rows(placement: Placement, class_dim: int) -> Placement:
    """Where the rows of logits of this placement lie."""
    if not isinstance(placement, Shard) or placement.dim == class_dim:
        return Replicate()
    return Shard(placement.dim - 1) if placement.dim > class_dim else placement


def _local(name: str, tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """This rank's part of a tensor that has to have these placements."""
    if isinstance(tensor, DTensor):
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"cross_entropy: {name} is on {tensor.device_mesh}, but input on {mesh}"
            )
        if tensor.placements != tuple(placements):
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local()
    if any(placement.is_shard() for placement in placements):
        raise ValueError(
            f"cross_entropy: input shards its rows, so that {name} must be a DTensor: a plain "
            f"tensor does not say whether it holds all rows or those of this rank"
        )
    return tensor


# ------------------------------------------------------------------ derivatives over ranks


class _SumOverRanks(torch.autograd.Function):
    """The sum of what each rank of a group has; the same on every rank, and so its gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        whole: Tensor = funcol.wait_tensor(funcol.all_reduce(part, "sum", group))
        return whole

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _ForEachRank.apply(grad_output, ctx.group), None  # type: ignore[no-untyped-call]


class _ForEachRank(torch.autograd.Function):
    """A tensor that is the same on every rank of a group, of which each rank makes something else.

    Its gradient is the sum of what arrives on the ranks.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad_output, ctx.group), None  # type: ignore[no-untyped-call]


class _PartOfSum(torch.autograd.Function):
    """A rank's part of a sum over the ranks of a group, whose gradient is the same on all.

    DTensor would take what is made of that gradient for the same on every rank, too.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        if is_dynamo_compiling() or not torch.is_grad_enabled():
            return grad_output, None
        return _ForEachRank.apply(grad_output, ctx.group), None  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------ rows


def _total(rows: Tensor) -> Tensor:
    """A sum that neither overflows nor rounds where what is made of it would not."""
    return rows.sum(dtype=torch.float64)


def _divisor(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean over these rows is divided by: the sum of the weights of those that count."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    return _total(torch.where(counts, _weight_of(target, weight), 0))


def _weight_of(target: Tensor, weight: Tensor) -> Tensor:
    """The weight of each row's class, in the dtype that losses are computed in."""
    in_range = target.clamp(0, weight.shape[0] - 1)
    return weight.to(_accumulate_dtype(weight))[in_range]


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = _IGNORED,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, not rounded to 16 bits, and the stats that a backward needs."""
    rows, _, stats, _ = torch.ops.fusedstep.cross_entropy_forward(
        logits,
        target,
        weight,
        _NO_REDUCTION,
        ignore_index,
        label_smoothing,
        z_loss=0.0,
        gamma=None,
        loss_dtype=_accumulate_dtype(logits),
        with_grad=False,
        with_stats=True,
        with_lse=False,
    )
    return rows, stats


def _is_differentiated(logits: Tensor) -> bool:
    """Whether a backward pass is to be differentiated itself, and so is left to torch's ops."""
    if is_dynamo_compiling() or not torch.is_grad_enabled():
        return False
    _C.count_fallback(
        "cross_entropy",
        logits.device,
        "a backward pass that is differentiated itself (create_graph=True)",
    )
    return True


class _RowLosses(torch.autograd.Function):
    """The loss of each row, not rounded to 16 bits, of logits that lie here as a whole."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        rows, stats = _forward(logits, target, weight, ignore_index, label_smoothing)
        ctx.save_for_backward(logits, target, weight, stats)
        ctx.options = (ignore_index, label_smoothing)
        return rows

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, weight, stats = ctx.saved_tensors
        if _is_differentiated(logits):
            grad = _C.cross_entropy_gradient(grad_output, logits, target, weight, *ctx.options)
            return grad, None, None, None, None
        grad = torch.ops.fusedstep.cross_entropy_backward(
            grad_output, logits, target, weight, *ctx.options, stats
        )
        return grad, None, None, None, None


# ------------------------------------------------------------------ rows whose classes are spread


class _ClassShard(NamedTuple):
    """The classes ``[begin, end)`` of all that this rank of a group holds."""

    group: _Group
    ranks: int
    begin: int
    end: int
    classes: int

    @staticmethod
    def of(group: _Group, classes: int) -> _ClassShard:
        """Of classes in chunks as :func:`torch.chunk` makes them, one for each rank."""
        if isinstance(group, tuple):
            mesh, dim = group
            rank, ranks = mesh.get_local_rank(dim), mesh.size(dim)
        else:
            rank, ranks = group.rank(), group.size()
        chunk = -(-classes // ranks)
        begin, end = min(rank * chunk, classes), min((rank + 1) * chunk, classes)
        return _ClassShard(group, ranks, begin, end, classes)


def _class_parallel_rows(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, shard: _ClassShard
) -> Tensor:
    """The loss of each row, not rounded to 16 bits, of logits whose classes are spread."""
    held = logits.shape[_class_dim(logits)]
    if held != shard.end - shard.begin:
        raise ValueError(
            f"cross_entropy: of {shard.classes} classes on {shard.ranks} ranks, this one holds "
            f"those from {shard.begin} to {shard.end}, but its logits have {held} classes"
        )
    ignored = target == ignore_index
    invalid = ~ignored & ((target < 0) | (target >= shard.classes))
    if target.device.type == "cpu" and not is_dynamo_compiling() and invalid.any():
        row = int(invalid.flatten().int().argmax())
        raise IndexError(
            f"cross_entropy: target {int(target.flatten()[row])} at row {row} is out of bounds for "
            f"{shard.classes} classes (and is not ignore_index, {ignore_index})"
        )
    mine = (target >= shard.begin) & (target < shard.end)
    here = torch.where(ignored, _IGNORED, torch.where(mine, target - shard.begin, 0))
    rows: Tensor = _ClassParallelRowLosses.apply(  # type: ignore[no-untyped-call]
        logits, here, mine, shard.group, shard.ranks
    )
    factor = rows.new_ones(()) if weight is None else _weight_of(target, weight)
    return torch.where(ignored, 0, rows * torch.where(invalid, torch.nan, factor))


class _ClassParallelRowLosses(torch.autograd.Function):
    """The loss of each row of a shard of logits.

    ``target`` is numbered as the shard's own classes are. Where a row's class lies on another rank,
    ``mine`` is False and ``target`` is any class.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, mine: Tensor, group: _Group, ranks: int
    ) -> Tensor:
        peak, exp_sum, at_target = _shard_sums(logits, target)
        at_target = torch.where(mine, at_target, 0)
        gathered = _all_gather(torch.stack((peak, exp_sum, at_target)), 0, group)
        peaks, exp_sums, at_targets = gathered.view(ranks, 3, *target.shape).unbind(1)
        peak = peaks.amax(0)
        # Where a rank has only classes of -inf, and so no sum, its part of the whole is 0.
        exp_sum = torch.where(peaks == -torch.inf, 0, exp_sums * (peaks - peak).exp()).sum(0)
        counts = target != _IGNORED
        stats = torch.stack((peak, counts / exp_sum, mine & counts), -1).flatten()
        ctx.group = group
        ctx.save_for_backward(logits, target, torch.cat((stats, stats.new_ones(1))))
        return exp_sum.log() - (at_targets.sum(0) - peak)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, stats = ctx.saved_tensors
        if _is_differentiated(logits):
            grad = _differentiable_gradient(grad_output, logits, target, stats, ctx.group)
            return grad, None, None, None, None
        if logits.numel() == 0:
            return torch.empty_like(logits), None, None, None, None
        grad = torch.ops.fusedstep.cross_entropy_backward(
            grad_output, logits, target, None, _IGNORED, 0.0, stats
        )
        return grad, None, None, None, None


def _differentiable_gradient(
    grad_output: Tensor, logits: Tensor, target: Tensor, stats: Tensor, group: _Group
) -> Tensor:
    """The gradient of a shard's row losses, g (p_c - [c = y]), of ops that can be differentiated.

    Takes what :class:`_ClassParallelRowLosses` has saved.
    """
    class_dim = _class_dim(logits)

    def for_each_class(rows: Tensor) -> Tensor:
        return rows.unsqueeze(class_dim)

    peak, _, mine = stats[:-1].view(*target.shape, 3).unbind(-1)
    counts = for_each_class(target != _IGNORED)
    exps = torch.where(counts, logits.to(stats.dtype) - for_each_class(peak), 0).exp()
    exp_sum = _SumOverRanks.apply(exps.sum(class_dim), group)  # type: ignore[no-untyped-call]
    exp_sum, g = (
        _ForEachRank.apply(rows, group)  # type: ignore[no-untyped-call]
        for rows in (exp_sum, grad_output)
    )
    classes = torch.arange(logits.shape[class_dim], device=logits.device)
    classes = classes.view(-1, *[1] * (logits.dim() - 1 - class_dim))
    one_hot = (classes == for_each_class(target)) * for_each_class(mine)
    grad = for_each_class(g) * (exps / for_each_class(exp_sum) - one_hot)
    return torch.where(counts, grad, 0).to(logits.dtype)


def _shard_sums(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row m = max_c x_c, sum_c exp(x_c - m) and x_y; anything for an ignored row."""
    class_dim = _class_dim(logits)
    if logits.shape[class_dim] == 0:
        nothing = torch.zeros(target.shape, dtype=_accumulate_dtype(logits), device=logits.device)
        return nothing - torch.inf, nothing, nothing
    _, stats = _forward(logits, target)
    peak, scale, _ = stats[:-1].view(*target.shape, 3).unbind(-1)
    index = target.clamp(min=0).unsqueeze(class_dim)
    at_target = logits.gather(class_dim, index).squeeze(class_dim).to(peak.dtype)
    return peak, scale.reciprocal(), at_target
