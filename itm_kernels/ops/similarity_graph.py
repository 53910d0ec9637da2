"""SGR: the alignment vectors of every pair reason with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.library import define
from itm_kernels.ops.options import WORKSPACE_BYTES, check_workspace_bytes
from itm_kernels.ops.pairs import autocast_inputs, score_dtype
from itm_kernels.ops.parameters import GraphParameters, check_stage, size_of
from itm_kernels.ops.stage_options import product_dtype
from itm_kernels.ops.stages import check_alignments, check_beside, check_rows, products_like, split_words

OP = "similarity_graph"
_PARAMETERS = len(GraphParameters._fields)
_SIGNATURE = Signature(OP, tensors=4 + _PARAMETERS)


def similarity_graph(
    alignments: Tensor,  # [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    parameters: GraphParameters,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Let the alignments of every pair attend to each other, some steps, and keep the global one.

    With the nodes :math:`x_0` (the global alignment) and :math:`x_1 .. x_n` (one a word) of a pair, each step

    .. math::

        e_{ik} = \operatorname{softmax}_k((W_q x_i + b_q) \cdot (W_k x_k + b_k)), \quad
        x_i' = \operatorname{relu}(W_s \sum_k e_{ik} x_k + b_s).

    Parameters
    ----------
    alignments
        ``[I, N, S]`` alignments of the words, as :func:`alignment_vectors` makes them (direction ``"t2i"``); float64,
        float32, bfloat16 or float16. The products run in this dtype, or in that of half-precision matrices beside
        float32.
    global_alignments
        ``[I, C, S]``; in the dtype of the products, or in float32 beside half precision.
    word_counts
        ``[C]`` words of each caption, as :func:`alignment_vectors` took them.
    parameters
        :class:`GraphParameters` of all steps, stacked, at least one (published: 3); in the dtype of the products, or in
        float32 beside half precision.
    workspace_bytes
        Bound on the memory used beside inputs, parameters, outputs and their gradients. One image by one caption is the
        smallest block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    Tensor
        ``[I, C, S]`` the global node after the last step, float32 (float64 for float64 input), differentiable once in
        both alignments and in parameters.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, and its published code.
    """
    counts, offsets, _ = check_alignments(OP, alignments, word_counts, None, "t2i")
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    images, captions, s = alignments.shape[0], counts.shape[0], alignments.shape[-1]
    if isinstance(global_alignments, Tensor):
        alignments, global_alignments = autocast_inputs(alignments, global_alignments)
    shape = {"I": images, "C": captions, "S": s}
    beside = products_like(OP, alignments, getattr(parameters, "query_weight", None))
    check_beside(OP, "global_alignments", global_alignments, shape, *beside)
    sizes = {"S": s, "steps": size_of(getattr(parameters, "query_bias", None), 0)}
    check_stage(OP, GraphParameters, parameters, sizes, *beside)
    if not sizes["steps"]:
        raise ValueError(f"{OP}: parameters must be of one step at least, got {list(parameters.query_bias.shape)}")
    alignments = split_words(alignments, 1, counts)
    tensors = [alignments, global_alignments, counts, offsets, *parameters]
    return differentiable(_SIGNATURE, tensors, (workspace_bytes, requested(backend)))[0]


_INPUTS = (
    "Tensor alignments, Tensor global_alignments, Tensor word_counts, Tensor? word_offsets, "
    + "".join(f"Tensor {name}, " for name in GraphParameters._fields)
    + "int workspace_bytes, str backend"
)


def _forward(
    alignments: Tensor, global_alignments: Tensor, word_counts: Tensor, word_offsets: Tensor | None, *rest: Any
) -> Tensor:  # [I, C, S]
    *parameters, workspace_bytes, backend = rest
    check_rows(OP, alignments, word_counts, None, "t2i")
    floor = pick(OP, alignments.device, product_dtype(alignments.dtype, parameters[0].dtype), backend)
    if not alignments.shape[0] or not word_counts.shape[0]:
        return _forward_fake(alignments, global_alignments)
    pooled: Tensor = floor.forward(
        alignments,
        global_alignments,
        word_counts,
        GraphParameters(*parameters),
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return pooled


def _forward_fake(alignments: Tensor, global_alignments: Tensor, *rest: Any) -> Tensor:
    return global_alignments.new_empty(global_alignments.shape, dtype=score_dtype(alignments.dtype))


def _backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # of both alignments and of parameters
    *parameters, workspace_bytes, backend = rest
    check_rows(OP, alignments, word_counts, None, "t2i")
    floor = pick(OP, alignments.device, product_dtype(alignments.dtype, parameters[0].dtype), backend)
    if not alignments.shape[0] or not word_counts.shape[0]:
        return [made.zero_() for made in gradients_like([alignments, global_alignments, *parameters])]
    of_alignments, of_global, of_parameters = floor.backward(
        grad,
        alignments,
        global_alignments,
        word_counts,
        GraphParameters(*parameters),
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return [of_alignments, of_global, *of_parameters]


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]))


forward_op = define(OP, f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
backward_op = define(f"{OP}_backward", f"(Tensor grad, {_INPUTS}) -> Tensor[]", _backward, _backward_fake)
