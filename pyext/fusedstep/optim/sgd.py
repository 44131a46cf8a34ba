"""Stochastic gradient descent."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedstep import _C
from fusedstep.optim._fused import Fused, fused_step, zero_grad

__all__ = ["SGD"]


class SGD(Fused, torch.optim.SGD):
    r"""Drop-in for :class:`torch.optim.SGD`: stochastic gradient descent, optionally with momentum.

    For a parameter :math:`p` with gradient :math:`g` and momentum buffer :math:`b`, a step is

    .. math::
        g &\leftarrow -g && \text{(maximize)} \\
        g &\leftarrow g + \lambda p && \text{(weight decay } \lambda) \\
        b &\leftarrow \mu b + (1 - \tau) g && \text{(momentum } \mu \text{, dampening } \tau) \\
        g &\leftarrow g + \mu b \text{ (nesterov) or } b && \\
        p &\leftarrow p - \gamma g && \text{(learning rate } \gamma)

    where the first step of a parameter takes :math:`b \leftarrow g`. The formula is the variant of
    Sutskever et al. (2013) that torch documents. float32 and float64 parameters become the same,
    bit for bit, as with ``torch.optim.SGD(foreach=False)``. bfloat16 and float16 parameters are
    computed in float32 and rounded once, and so are their momentum buffers. The number of threads
    does not change the result.

    Constructor, parameter groups, ``state_dict``, hooks and the protocol of
    :class:`torch.amp.GradScaler` are torch's, and each loads the other's checkpoints. ``foreach``
    and ``fused`` are accepted and stored: every step that the kernels cover is fused. With
    ``fused=True`` GradScaler hands its scale and its overflow flag to ``step``, as it does to
    torch's; otherwise it unscales the gradients before the step and skips one that overflowed.

    Covered are dense float32, float64, bfloat16 and float16 parameters of any shape on the CPU and
    on CUDA, in any mix, with gradients and momentum buffers of the same dtype and device. Of a
    :class:`torch.distributed.tensor.DTensor` each rank updates its part, if the gradient has the
    parameter's placements; its state consists of DTensors with the same placements. All other
    parameters (on other devices, with sparse gradients, of complex numbers, strided views, other
    tensor subclasses, those with ``Partial`` gradients), and all with ``differentiable=True``, are
    updated in the same call by torch's own functions.

    On CUDA a step is one kernel for each device, however many parameters there are. It runs on the
    current stream, does not wait for the device and can be captured in a CUDA graph. Take a step
    before the capture: one that makes momentum buffers or master weights cannot be captured,
    because every replay would make them anew. A tensor ``lr`` on the parameter's device is read
    there when the kernel runs. So it is not checked, and a captured step sees its changes. The
    scale and the overflow flag that GradScaler hands over are read in the same way; a first step
    that overflows leaves momentum buffers of zeros. With ``dampening`` a parameter's first
    step with momentum waits for that flag.

    Raises:
        ValueError: A hyperparameter is out of range or not finite, in the constructor, in
            ``add_param_group`` or in ``step``; or there are no parameters.
        RuntimeError: The shape or dtype of a gradient or of a momentum buffer does not fit its
            parameter, a hyperparameter overflows the parameter's dtype, or a CUDA graph is being
            captured and the step makes a momentum buffer or a master weight.

    An error in ``step`` leaves parameters, gradients and state as they were. If the error is raised
    by torch's own functions, which run before the kernels, this holds for the parameters that the
    kernels cover.

    Torch does not have the arguments below. They are not in ``defaults``, in the parameter groups
    or in a checkpoint, and none of them changes what float32 and float64 parameters become.

    Args:
        master_weights: Whether to keep a float32 copy, the master weight, of each bfloat16 and
            float16 parameter. It is in the parameter's state as ``master_param``, beside a float32
            ``momentum_buffer``. The update computes in float32 and rounds the result to the
            parameter, in one pass: master weights and momentum are those of a float32 run on the
            same gradients. An element of a parameter that differs from its rounded master weight
            must have been written since the last step, by ``load_state_dict`` of the model or by
            hand; it replaces the master weight. With ``fused=True``
            :class:`torch.amp.GradScaler`'s scale is divided out in float32, and float16 gradients
            are accepted, which it refuses otherwise. Torch's SGD can load such a checkpoint: it
            rounds the momentum to the parameter's dtype and ignores the master weights. When a
            checkpoint of torch's is loaded here, the master weights begin as copies of the
            parameters.
        stochastic_rounding: Whether to round bfloat16 parameters up or down at random, so that
            small updates are not lost but add up on average. The probability of rounding to one of
            the two neighbouring values grows linearly with the distance from the other. Momentum is
            rounded to nearest. The random numbers depend on ``seed``, on the parameter's place
            among all parameters, on its number of steps (``step`` in its state) and on the
            element's offset in memory. So results are the same, bit for bit, on the CPU and on
            CUDA, for any number of threads and in a resumed run, and replicas stay equal. Each
            part of a DTensor has its own random numbers; ranks that hold the same part draw the
            same ones. Refused are float16 parameters, parameters that the kernels do not cover, and
            capture in a CUDA graph, whose replays would all draw the same numbers. With
            ``fused=True``, a step that GradScaler's flag skips on CUDA counts as a step.
        seed: The seed of stochastic rounding; an integer in [0, 2**64).
        in_backward: Whether ``backward`` itself updates each parameter as soon as its gradient is
            complete, and then sets the gradient to None, so that only one gradient is in memory at
            a time. The result is that of ``step``, bit for bit, with the hyperparameters of that
            moment. Keep calling ``step``: schedulers, hooks and closures need it, and it updates
            parameters that still have a gradient. Each ``backward`` is an update. So gradients
            cannot be accumulated over several calls, clipped by their norm or scaled by GradScaler
            (``step`` raises), and a second backward through the old weights is torch's error. An
            error in the middle of ``backward`` leaves the parameters that it had not reached as
            they were. Reentrant activation checkpoints run a backward for each segment, so a
            parameter of two segments is updated twice. Parameters of ``fully_shard`` are updated
            when their gradient has been reduced; ``DistributedDataParallel`` reduces too late and
            is refused with a RuntimeError, and so is every other hook on the accumulation of a
            gradient, which would get none. This lasts as long as the optimizer, for parameters that
            are in a group of it, or until :meth:`remove_backward_hooks`; copies of the optimizer
            update their own copies of the parameters.
    """

    __module__ = "fusedstep.optim"
    _rule = _C.optimizers["SGD"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        in_backward: bool = False,
    ) -> None:
        self._extend(master_weights, stochastic_rounding, seed, in_backward, differentiable)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._begin(in_backward)

    step = fused_step(torch.optim.SGD)
    zero_grad = zero_grad
