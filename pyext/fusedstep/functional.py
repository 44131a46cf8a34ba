"""Functional losses with the signatures of :mod:`torch.nn.functional`."""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import (
    _get_current_function_mode_stack,
    handle_torch_function,
    has_torch_function_variadic,
)
from torch.utils._device import DeviceContext

from fusedstep import _C
from fusedstep._exported import cross_entropy_with_lse_of_torch, focal_loss_of_torch
from fusedstep._names import under_torchs_name
from fusedstep._warnings import warning_at_the_users_line

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_L1, _MSE, _SMOOTH_L1, _HUBER, _BCE_WITH_LOGITS = range(5)  # Kind in pointwise_loss/math.h

__all__ = [
    "binary_cross_entropy_with_logits",
    "check_targets",
    "cross_entropy",
    "cross_entropy_with_lse",
    "focal_loss",
    "huber_loss",
    "l1_loss",
    "mse_loss",
    "smooth_l1_loss",
]

_Result = TypeVar("_Result")

# torch's own functions: those that torch.nn.functional held when this module was imported.
_TORCH: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch.nn.functional, name)
    for name in __all__
    if hasattr(torch.nn.functional, name)
}

_WITHOUT_WEIGHT = {"l1_loss", "mse_loss", "huber_loss"}  # whose weight is torch's to compute
_BROADCASTING = {"l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"}  # with a warning

_REDUCTIONS = ("none", "mean", "sum")  # each at its code
_PLAIN = (Tensor, torch.nn.Parameter)
_TRACED = (FakeTensor, FunctionalTensor)  # stand for tensors while torch traces a program


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
        IndexError: A class index is out of range. On CUDA the call does not wait for the targets to
            be known: the loss and the gradient of such a row are NaN, and the next call on that
            device raises, or :func:`check_targets`. Nothing is read or written outside the tensors,
            and the CUDA context stays intact.
        ValueError: ``reduction`` is unknown, or the batch sizes of ``input`` and ``target`` differ.
        RuntimeError: Shapes or dtypes do not fit together.

    With ``reduction="none"``, and for 16-bit logits, the backward pass may read the logits again.
    If they were changed in place in between, it raises autograd's RuntimeError; torch's own would
    not notice.

    On CUDA the loss with its reduction is one kernel, which computes the gradient as well where
    that is done in the forward pass. The backward pass is at most one more. Neither waits for the
    device, and both can be captured in a CUDA graph.

    If the logits are a :class:`torch.distributed.tensor.DTensor`, each rank computes its part, also
    where the classes are sharded: :func:`fusedstep.distributed.cross_entropy` says how.

    Arguments outside the above (other devices, other tensor subclasses, ``torch.func`` transforms,
    forward-mode differentiation, a ``target`` or ``weight`` that requires a gradient) go to torch's
    own op.
    """
    if size_average is None and reduce is None and not is_compiling():
        loss = _C.cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
        if loss is not None:
            return loss
    if _is_torchs(input, target, weight):
        return _from_torch(
            cross_entropy,
            (input, target),
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction_by_old_names(size_average, reduce)
    code = _reduction_code(reduction)
    if reduction != _REDUCTIONS[code]:  # an old name
        return cross_entropy(
            *(input, target, weight),
            ignore_index=ignore_index,
            reduction=_REDUCTIONS[code],
            label_smoothing=label_smoothing,
        )
    if _is_dtensor(input):
        from fusedstep import distributed

        return distributed.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing
        )
    if _is_traced(input):
        traced: Tensor = torch.ops.fusedstep.cross_entropy(
            input, target, weight, code, ignore_index, label_smoothing
        )
        return traced
    loss = _despite_default_device(
        _C.cross_entropy, input, target, weight, reduction, ignore_index, label_smoothing
    )
    if loss is not None:
        return loss
    return _from_torch(
        cross_entropy,
        (input, target),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def cross_entropy_with_lse(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy plus z-loss, and the log-sum-exp of each row, in one pass.

    Torch has no such function. Each row that counts adds to its cross-entropy

    .. math:: z\, r \Bigl(\log \sum_k e^{x_k}\Bigr)^2,

    where :math:`z` is ``z_loss`` and :math:`r` what the row adds to the divisor of a mean:
    :math:`w_y` for a class index :math:`y`, 1 for class probabilities. (Z-loss keeps logits near
    zero: Chowdhery et al., 2022, section 5.)

    Args:
        input: Logits; see :func:`cross_entropy`, also for the arguments that are not listed here.
        z_loss: A finite factor, not negative.

    Returns:
        The loss, as :func:`cross_entropy` returns it, and :math:`\log \sum_k e^{x_k}` of each row:
        of the shape ``()``, ``(N)`` or ``(N, d1, ..., dK)``, in float32 (float64 for float64), 0
        where the row is ignored and not finite where its greatest logit is not. Both are
        differentiable; the gradient of the second is computed by torch's own operators.

    Raises:
        ValueError: ``z_loss`` or ``reduction`` is not valid, or batch sizes differ.
        IndexError: A class index is out of range; on CUDA both results are NaN in such a row and
            the error comes later: see :func:`cross_entropy`.
        RuntimeError: Shapes or dtypes do not fit together.

    Arguments that :func:`cross_entropy` leaves to torch are computed by several of torch's
    operators here.
    """
    code = _reduction_code(reduction)
    if _is_exporting():
        return cross_entropy_with_lse_of_torch(
            input, target, weight, _REDUCTIONS[code], ignore_index, label_smoothing, z_loss
        )
    if not _is_traced(input):
        result = _from_kernels(
            _C.cross_entropy_with_lse,
            *(input, target, weight, _REDUCTIONS[code], ignore_index, label_smoothing, z_loss),
        )
        if result is not None:
            return result
    composed: tuple[Tensor, Tensor] = torch.ops.fusedstep.cross_entropy_with_lse(
        input, target, weight, code, ignore_index, label_smoothing, z_loss
    )
    return composed


def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Focal loss of logits and class indices, with its gradient computed in the same pass.

    Torch has no such function. For logits :math:`x` and a class index :math:`y` it is

    .. math:: \ell = -w_y\, (1 - p)^\gamma \log p, \qquad p = \operatorname{softmax}(x)_y

    (Lin et al., 2017, for more than two classes): cross-entropy in which rows count less the
    better they are classified. ``gamma=0`` is :func:`cross_entropy`.

    Args:
        input: Logits; see :func:`cross_entropy`, also for the arguments that are not listed here.
        target: Class indices (int64 or uint8).
        gamma: A finite exponent, not negative.
        weight: One factor per class, of shape ``(C)`` (the paper's alpha).
        reduction: ``"mean"`` (over the weights :math:`w_y` of the rows that count), ``"sum"`` or
            ``"none"``.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor of the shape of ``target``, in the dtype of
        ``input``: float32 for 16-bit logits under autocast.

    Raises:
        ValueError: ``gamma`` or ``reduction`` is not valid, or batch sizes differ.
        IndexError: A class index is out of range; on CUDA later: see :func:`cross_entropy`.
        RuntimeError: Shapes or dtypes do not fit together; ``target`` holds class probabilities.

    Arguments that :func:`cross_entropy` leaves to torch are computed by several of torch's
    operators here.
    """
    code = _reduction_code(reduction)
    if _is_exporting():
        return focal_loss_of_torch(input, target, gamma, weight, _REDUCTIONS[code], ignore_index)
    if not _is_traced(input):
        loss = _from_kernels(
            _C.focal_loss, input, target, gamma, weight, _REDUCTIONS[code], ignore_index
        )
        if loss is not None:
            return loss
    composed: Tensor = torch.ops.fusedstep.focal_loss(
        input, target, gamma, weight, code, ignore_index
    )
    return composed


def check_targets(device: torch.device | str | int | None = None) -> None:
    """Wait for a CUDA device, and raise if a loss on it met a class index that is out of range.

    :func:`cross_entropy` on CUDA does not wait for its targets to be known, so its IndexError comes
    with the next call. This function raises it now, for instance at the end of an epoch.

    Args:
        device: A CUDA device; by default the current one. On others there is nothing to check.

    Raises:
        IndexError: A target was neither ``ignore_index`` nor in ``[0, C)``. The message names the
            first such row, counted over all rows, and its value. Each error is raised once.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    _C.check_targets(found)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Absolute error :math:`|x - t|`, with its gradient computed in the same pass.

    Signature, semantics, warnings and errors are those of :func:`torch.nn.functional.l1_loss`.

    Args:
        input: Of any shape and strides; float32, float64, bfloat16 or float16. Never modified.
        target: Of the shape and dtype of ``input`` (under autocast, float32 beside 16 bits too).
            Another shape is broadcast, with torch's warning, by torch's own op.
        size_average: Deprecated, as in torch; see ``reduction``.
        reduce: Deprecated, as in torch; see ``reduction``.
        reduction: ``"mean"`` (over the elements), ``"sum"`` or ``"none"``.
        weight: One factor for each element; computed by torch's own op.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor of the shape of ``input``, in its dtype:
        float32 for 16-bit input under autocast. Both ``input`` and ``target`` get a gradient.

    Raises:
        ValueError: ``reduction`` is unknown, or the size of ``weight`` is not that of ``input``.
        RuntimeError: Shapes cannot be broadcast, or dtypes do not fit together.

    With ``reduction="none"``, and for 16 bits, the backward pass may read ``input`` and ``target``
    again: changing them in place in between raises autograd's RuntimeError.

    Arguments outside the above (other devices or dtypes, tensor subclasses, ``torch.func``
    transforms, forward-mode differentiation) go to torch's own op.
    """
    if weight is None:
        loss = _pointwise_loss(_L1, input, target, size_average, reduce, reduction)
        if loss is not None:
            return loss
    options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    weighted = {} if weight is None else {"weight": weight}  # torch's names none to a function mode
    return _from_torch(l1_loss, (input, target), **options, **weighted)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error :math:`(x - t)^2`, with its gradient computed in the same pass.

    Signature, semantics, warnings and errors are those of :func:`torch.nn.functional.mse_loss`;
    arguments, result and what is covered are described at :func:`l1_loss`.
    """
    if weight is None:
        loss = _pointwise_loss(_MSE, input, target, size_average, reduce, reduction)
        if loss is not None:
            return loss
    options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    return _from_torch(mse_loss, (input, target), **options, weight=weight)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Smooth L1 loss, with its gradient computed in the same pass.

    For :math:`d = x - t` it is :math:`d^2 / (2 \beta)` where :math:`|d| < \beta`, and
    :math:`|d| - \beta / 2` elsewhere (Girshick, 2015). Signature, semantics, warnings and errors
    are those of :func:`torch.nn.functional.smooth_l1_loss`; the other arguments, the result and
    what is covered are described at :func:`l1_loss`.

    Args:
        beta: Where the quadratic part ends, in units of ``input``; 0 gives the L1 loss.
    """
    kind = _L1 if beta == 0 else _SMOOTH_L1
    loss = _pointwise_loss(kind, input, target, size_average, reduce, reduction, parameter=beta)
    if loss is not None:
        return loss
    options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    return _from_torch(smooth_l1_loss, (input, target), **options, beta=beta)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Huber loss, with its gradient computed in the same pass.

    For :math:`d = x - t` it is :math:`d^2 / 2` where :math:`|d| \le \delta`, and
    :math:`\delta (|d| - \delta / 2)` elsewhere (Huber, 1964). Signature, semantics, warnings and
    errors are those of :func:`torch.nn.functional.huber_loss`; the other arguments, the result and
    what is covered are described at :func:`l1_loss`.

    Args:
        delta: Where the quadratic part ends, in units of ``input``; positive.
    """
    if weight is None:
        loss = _pointwise_loss(_HUBER, input, target, None, None, reduction, parameter=delta)
        if loss is not None:
            return loss
    return _from_torch(huber_loss, (input, target), reduction=reduction, delta=delta, weight=weight)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, with its gradient computed in the same pass.

    For a logit :math:`x`, a target :math:`t` and :math:`q` from ``pos_weight`` it is

    .. math:: (1 - t)\, x + (1 + (q - 1)\, t) \log (1 + e^{-x}).

    Signature, semantics and errors are those of
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`; the other arguments, the result
    and what is covered are described at :func:`l1_loss`.

    Args:
        weight: A factor for each element; broadcast to the shape of ``input``. Of its dtype, or of
            float32 beside 16 bits, as autocast leaves it.
        pos_weight: A factor for the positive part; shapes and dtypes as for ``weight``.

    Raises:
        ValueError: The size of ``target`` is not that of ``input``, or ``reduction`` is unknown.

    A ``target`` that requires a gradient goes to torch's own op.
    """
    loss = _pointwise_loss(
        _BCE_WITH_LOGITS,
        input,
        target,
        size_average,
        reduce,
        reduction,
        weight=weight,
        pos_weight=pos_weight,
    )
    if loss is not None:
        return loss
    options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    return _from_torch(
        binary_cross_entropy_with_logits,
        (input, target),
        weight=weight,
        **options,
        pos_weight=pos_weight,
    )


def _pointwise_loss(
    kind: int,
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    parameter: float = 0.0,
) -> Tensor | None:
    """Return a loss that the kernels cover, or None: torch's own function has to run."""
    if size_average is None and reduce is None and not is_compiling():
        loss = _C.pointwise_loss(input, target, weight, pos_weight, kind, reduction, parameter)
        if loss is not None:
            return loss
    operands = (input, target, weight, pos_weight)
    if _is_torchs(*operands):
        return None
    if size_average is not None or reduce is not None:
        reduction = _reduction_by_old_names(size_average, reduce)
        return _pointwise_loss(
            *(kind, input, target, None, None, reduction),
            weight=weight,
            pos_weight=pos_weight,
            parameter=parameter,
        )
    if not _is_traced(input):
        return _despite_default_device(_C.pointwise_loss, *operands, kind, reduction, parameter)
    if (
        reduction not in _REDUCTIONS
        or input.shape != target.shape
        or _is_dtensor(input)
        or _is_dtensor(target)
    ):
        return None
    code = _REDUCTIONS.index(reduction)
    traced: Tensor = torch.ops.fusedstep.pointwise_loss(*operands, kind, code, parameter)
    return traced


def _reduction_code(reduction: str) -> int:
    if reduction in _REDUCTIONS:
        return _REDUCTIONS.index(reduction)
    return _Reduction.get_enum(reduction)  # what else torch takes, with a warning, or its error


def _reduction_by_old_names(size_average: bool | None, reduce: bool | None) -> str:
    if not is_compiling():
        return _Reduction.legacy_get_string(size_average, reduce)  # warns
    if reduce is False:  # torch.compile cannot trace the function above
        return "none"
    return "sum" if size_average is False else "mean"


def _from_kernels(loss: Callable[..., _Result | None], *args: Any) -> _Result | None:
    """Return what the compiled core computes, or None: torch's own function has to run."""
    result = loss(*args)
    return _despite_default_device(loss, *args) if result is None else result


def _despite_default_device(loss: Callable[..., _Result | None], *args: Any) -> _Result | None:
    """Call the core again if it declined only because of ``torch.set_default_device``.

    That is a function mode, and the core leaves calls under function modes to torch. But this mode
    only says where new tensors are made, and those of a loss are made where its input is.
    """
    if not _only_default_device_is_active():
        return None
    with torch._C.DisableTorchFunction():
        return loss(*args)


def _only_default_device_is_active() -> bool:
    """Whether function modes are active, and none but ``torch.set_default_device``'s."""
    if not torch._C._is_torch_function_mode_enabled():
        return False
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _is_traced(input: Tensor) -> bool:
    """Whether torch traces the program, so that the call has to be one of an operator."""
    return is_compiling() or type(input) in _TRACED


def _is_exporting() -> bool:
    """Whether torch.export traces the program: torch's own functions are what it shall hold.

    The flag itself: older compilers take :func:`torch.compiler.is_exporting` for always true.
    """
    return torch.compiler._is_exporting_flag


def _is_torchs(*operands: Tensor | None) -> bool:
    """Whether torch's own function has to see a call as it is, with nothing converted.

    That is while torch.export traces, and where a function mode or a tensor subclass handles calls.
    """
    if _is_exporting() or _mode_handles():
        return True
    return has_torch_function_variadic(*operands) and not _none_overrides(operands)


def _mode_handles() -> bool:
    """Whether a function mode is active that may do more than say where tensors are made."""
    return torch._C._is_torch_function_mode_enabled() and not _only_default_device_is_active()


def _none_overrides(operands: Iterable[Any]) -> bool:
    """Whether no operand is of a tensor subclass that handles torch's functions by itself."""
    return all(
        type(t) in _PLAIN or type(t).__torch_function__ is torch._C._disabled_torch_function_impl
        for t in operands
        if isinstance(t, Tensor)
    )


def _is_dtensor(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor, without importing the module if nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _from_torch(
    ours: Callable[..., Tensor], operands: tuple[Tensor, ...], **options: Any
) -> Tensor:
    """Let torch compute what the kernels do not cover, or a function mode handle our function.

    Calls that the compiled core declined are counted there; the others are counted here.
    """
    name = ours.__name__
    torchs = _TORCH[name]
    if _is_exporting():
        return torchs(*operands, **options)
    tensors = [t for t in (*operands, *options.values()) if isinstance(t, Tensor)]
    patched = getattr(torch.nn.functional, name) is stand_ins[name]
    overridden = not _none_overrides(tensors)
    handled_by_mode = _mode_handles()
    if handled_by_mode and not overridden and (is_compiling() or not patched):
        public = stand_ins[name] if patched else ours
        handled: Tensor = handle_torch_function(public, tensors, *operands, **options)
        return handled
    if is_compiling() or not tensors:
        return torchs(*operands, **options)
    if name in _BROADCASTING and _shapes_differ(*operands):  # of which torch warns
        torchs = warning_at_the_users_line(torchs)
    if patched and (overridden or handled_by_mode) and has_torch_function_variadic(*tensors):
        return torchs(*operands, **options)  # whose handler calls ours, by its name
    if any(type(t) not in _PLAIN for t in tensors):
        _count_fallback(name, tensors[0], "a tensor subclass")
    elif name in _WITHOUT_WEIGHT and options.get("weight") is not None:
        _count_fallback(name, tensors[0], "a weight for each element")
    if overridden:
        return torchs(*operands, **options)
    with torch._C.DisableTorchFunction():  # the mode of a default device would call ours again
        return torchs(*operands, **options)


def _shapes_differ(input: Any, target: Any) -> bool:
    try:
        with torch._C.DisableTorchFunction():  # a mode is to see no more than torch's call
            return bool(input.shape != target.shape)
    except (AttributeError, RuntimeError):  # no tensor, or one of many shapes: torch's to refuse
        return False


def _count_fallback(name: str, input: Tensor, reason: str) -> None:
    with torch._C.DisableTorchFunction():  # a handler sees the call of the loss alone
        _C.count_fallback(name, input.device, reason)


for _name, _original in _TORCH.items():
    # torch.jit.script() compiles torch's own function in the place of ours: it asks whether there
    # is this attribute. torch.compile asks whether it is true, and traces ours.
    vars(globals()[_name]).update(__script_if_tracing_wrapper=False, __original_fn=_original)

# What torch.nn.functional's names mean while they are patched.
stand_ins = {name: under_torchs_name(globals()[name], torchs) for name, torchs in _TORCH.items()}
