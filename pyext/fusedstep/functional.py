"""Functional losses with the signatures of :mod:`torch.nn.functional`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function

from fusedstep import _C

__all__ = ["check_targets", "cross_entropy"]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy between logits and target, with its gradient computed in the same pass.

    Signature, semantics and errors are those of :func:`torch.nn.functional.cross_entropy`. For
    logits :math:`x` and a target vector :math:`u` over the classes,

    .. math::
        \ell = \sum_c u_c \Bigl(\log \sum_k e^{x_k} - x_c\Bigr), \qquad
        \frac{\partial \ell}{\partial x_c} = p_c \sum_k u_k - u_c, \qquad
        p = \operatorname{softmax}(x),

    where :math:`u_c = (1 - \epsilon)\, w_y [c = y] + \tfrac{\epsilon}{C} w_c` for a class index
    :math:`y` and :math:`u_c = w_c \bigl((1 - \epsilon)\, t_c + \tfrac{\epsilon}{C}\bigr)` for class
    probabilities :math:`t`; the definitions are those of :class:`torch.nn.CrossEntropyLoss`.

    Args:
        input: Logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)`` with any strides, on
            the CPU or on CUDA; float32, float64, bfloat16 or float16. Never modified.
        target: Class indices (int64 or uint8) of shape ``()``, ``(N)`` or ``(N, d1, ..., dK)``,
            each in ``[0, C)`` or equal to ``ignore_index``; or class probabilities of the shape of
            ``input``.
        weight: One factor per class, of shape ``(C)``.
        size_average: Deprecated, as in torch; see ``reduction``.
        ignore_index: A class index whose rows add nothing to the loss, the mean's divisor or the
            gradient. Only for class indices.
        reduce: Deprecated, as in torch; see ``reduction``.
        reduction: ``"mean"`` (over the weights of the rows that count; over rows for
            probabilities), ``"sum"`` or ``"none"``.
        label_smoothing: :math:`\epsilon` in ``[0, 1]``.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor of shape ``()``, ``(N)`` or
        ``(N, d1, ..., dK)``, in the dtype of ``input``: float32 for 16-bit logits under autocast.

    Raises:
        IndexError: A class index is out of range. On CUDA, where nobody waits for the targets to be
            known, the loss and the gradient of such a row are NaN, and the next call on that device
            raises, or :func:`check_targets`; nothing is read or written outside the tensors, and
            the CUDA context stays intact.
        ValueError: ``reduction`` is unknown, or the batch sizes of ``input`` and ``target`` differ.
        RuntimeError: Shapes or dtypes do not fit together.

    With ``reduction="none"``, and for 16-bit logits, the backward pass may read the logits again:
    changing them in place in between raises autograd's RuntimeError, where torch would not notice.

    On CUDA the loss with its reduction is one kernel, which also computes the gradient where that
    is done in the forward pass; the backward pass is at most one more. Neither waits for the
    device, and both can be captured in a CUDA graph.

    Arguments outside the above (other devices, tensor subclasses, ``torch.func`` transforms,
    forward-mode differentiation, a ``target`` or ``weight`` that requires a gradient) go to torch's
    own op.
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    code = _REDUCTIONS.get(reduction)
    if code is None:
        raise ValueError(f"{reduction!r} is not a valid value for reduction")
    if is_dynamo_compiling():
        loss: Tensor = torch.ops.fusedstep.cross_entropy(
            input, target, weight, code, ignore_index, label_smoothing
        )
        return loss
    try:
        fused = _C.cross_entropy(input, target, weight, code, ignore_index, label_smoothing)
    except TypeError:  # not a number; torch's own op names the argument
        fused = None
    if fused is not None:
        return fused
    return _torch_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def check_targets(device: torch.device | str | int | None = None) -> None:
    """Wait for a CUDA device and raise for a class index out of range that a loss met on it.

    :func:`cross_entropy` on CUDA does not wait for its targets to be known, so that its IndexError
    comes with the next call; this raises it now, for instance at the end of an epoch.

    Args:
        device: A CUDA device; by default the current one. On others there is nothing to check.

    Raises:
        IndexError: A target was neither ``ignore_index`` nor in ``[0, C)``: names the first such
            row, flattened, and its value. Raised once.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    _C.check_targets(found)


def _torch_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Let a function mode see our function, and torch compute what the kernels do not cover."""
    plain = all(
        type(t) in (Tensor, torch.nn.Parameter) for t in (input, target, weight) if t is not None
    )
    if plain and torch._C._is_torch_function_mode_enabled():
        loss: Tensor = handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return loss
    return torch.nn.functional.cross_entropy(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
