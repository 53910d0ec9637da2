"""Differentiation of opaque ops: one ``autograd.Function`` for every op that has parameters of its own.

An op ``name`` that is differentiated through here has a partner ``name_backward``. Its schema starts with the tensors,
some of them optional, then come the options. The partner takes the gradients of the differentiable outputs in front of
the same arguments and returns a list: the gradient of every floating-point tensor that is there, in their order, but
for those named constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SLOTS = 32
OUTPUTS = 3


class Signature(NamedTuple):
    """What has to be known of an op to differentiate it."""

    name: str
    tensors: int
    """How many tensors its schema starts with."""
    outputs: int = 1
    """How many of its outputs are differentiable; they come first."""
    constants: tuple[int, ...] = ()
    """Floating-point tensors without a gradient, by position."""
    kept: tuple[tuple[int, int], ...] = ()
    """Outputs that the backward gets in the place of a constant tensor: (output, position of the tensor)."""


def differentiable(signature: Signature, tensors: list[Tensor | None], rest: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Call the op with these tensors and options; its outputs can be differentiated once."""
    assert len(tensors) == signature.tensors <= SLOTS
    assert signature.outputs <= OUTPUTS
    filled = [*tensors, *[None] * (SLOTS - len(tensors))]
    outputs: tuple[Tensor, ...] = Differentiable.apply(tuple(signature), rest, *filled)
    return outputs


class Differentiable(torch.autograd.Function):
    """Keeps its inputs alone; the backward makes what it needs again, block by block."""

    # Every tensor by name: where nothing requires grad, torch.compile counts the parameters of this signature to tell
    # whether the context is one of them, and *tensors would be one.
    @staticmethod
    def forward(
        signature: tuple[Any, ...],
        rest: tuple[Any, ...],
        t0: Tensor | None,
        t1: Tensor | None,
        t2: Tensor | None,
        t3: Tensor | None,
        t4: Tensor | None,
        t5: Tensor | None,
        t6: Tensor | None,
        t7: Tensor | None,
        t8: Tensor | None,
        t9: Tensor | None,
        t10: Tensor | None,
        t11: Tensor | None,
        t12: Tensor | None,
        t13: Tensor | None,
        t14: Tensor | None,
        t15: Tensor | None,
        t16: Tensor | None,
        t17: Tensor | None,
        t18: Tensor | None,
        t19: Tensor | None,
        t20: Tensor | None,
        t21: Tensor | None,
        t22: Tensor | None,
        t23: Tensor | None,
        t24: Tensor | None,
        t25: Tensor | None,
        t26: Tensor | None,
        t27: Tensor | None,
        t28: Tensor | None,
        t29: Tensor | None,
        t30: Tensor | None,
        t31: Tensor | None,
    ) -> tuple[Tensor, ...]:
        tensors = [
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
            t8,
            t9,
            t10,
            t11,
            t12,
            t13,
            t14,
            t15,
            t16,
            t17,
            t18,
            t19,
            t20,
            t21,
            t22,
            t23,
            t24,
            t25,
            t26,
            t27,
            t28,
            t29,
            t30,
            t31,
        ]
        name, count = signature[:2]
        outputs = getattr(torch.ops.itm_kernels, name).default(*tensors[:count], *rest)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.signature, ctx.rest, *tensors = inputs
        differentiable_outputs = ctx.signature[2]
        ctx.mark_non_differentiable(*output[differentiable_outputs:])
        for of_output, position in ctx.signature[4]:
            tensors[position] = output[of_output]
        ctx.save_for_backward(*tensors[: ctx.signature[1]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        _, count, outputs, constants, _ = ctx.signature
        upstream = [*grads[:outputs], *[None] * (OUTPUTS - outputs)]
        filled = [*tensors, *[None] * (SLOTS - count)]
        made = iter(DifferentiableBackward.apply(ctx.signature, ctx.rest, *upstream, *filled))
        of_tensors = [next(made) if _has_gradient(i, t, constants) else None for i, t in enumerate(tensors)]
        return (None, None, *of_tensors, *[None] * (SLOTS - count))


class DifferentiableBackward(torch.autograd.Function):
    """A node of its own, so that differentiating it again raises.

    ``once_differentiable`` raises where the upstream gradient requires grad, and passes for a constant where it does
    not (a sum of scores) and under ``torch.func``: a gradient penalty would be dropped in silence.
    """

    @staticmethod
    def forward(
        signature: tuple[Any, ...],
        rest: tuple[Any, ...],
        g0: Tensor | None,
        g1: Tensor | None,
        g2: Tensor | None,
        t0: Tensor | None,
        t1: Tensor | None,
        t2: Tensor | None,
        t3: Tensor | None,
        t4: Tensor | None,
        t5: Tensor | None,
        t6: Tensor | None,
        t7: Tensor | None,
        t8: Tensor | None,
        t9: Tensor | None,
        t10: Tensor | None,
        t11: Tensor | None,
        t12: Tensor | None,
        t13: Tensor | None,
        t14: Tensor | None,
        t15: Tensor | None,
        t16: Tensor | None,
        t17: Tensor | None,
        t18: Tensor | None,
        t19: Tensor | None,
        t20: Tensor | None,
        t21: Tensor | None,
        t22: Tensor | None,
        t23: Tensor | None,
        t24: Tensor | None,
        t25: Tensor | None,
        t26: Tensor | None,
        t27: Tensor | None,
        t28: Tensor | None,
        t29: Tensor | None,
        t30: Tensor | None,
        t31: Tensor | None,
    ) -> tuple[Tensor, ...]:
        tensors = [
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
            t8,
            t9,
            t10,
            t11,
            t12,
            t13,
            t14,
            t15,
            t16,
            t17,
            t18,
            t19,
            t20,
            t21,
            t22,
            t23,
            t24,
            t25,
            t26,
            t27,
            t28,
            t29,
            t30,
            t31,
        ]
        name, count, outputs = signature[:3]
        grads = [g0, g1, g2]
        backward_op = getattr(torch.ops.itm_kernels, name + "_backward").default
        return tuple(backward_op(*grads[:outputs], *tensors[:count], *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0][0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{ctx.name}: can be differentiated once, not twice; its gradient has no gradient")


def _has_gradient(position: int, tensor: Tensor | None, constants: tuple[int, ...]) -> bool:
    return tensor is not None and tensor.is_floating_point() and position not in constants


def gradients_like(tensors: list[Tensor | None], constants: tuple[int, ...] = ()) -> list[Tensor]:
    """Empty gradients, as a backward op's fake returns them."""
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for position, tensor in enumerate(tensors)
        if tensor is not None and _has_gradient(position, tensor, constants)
    ]
