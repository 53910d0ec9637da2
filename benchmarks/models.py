"""What the ops with parameters share: inputs, the definition's truth, methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.chain import Product, bare_chain
from benchmarks.contender import FORWARD, PRODUCT, Contender, differentiable
from benchmarks.parity import Part, Tolerance
from itm_kernels import caption_layout, why_not
from itm_kernels.backends import use_backend

METHODS = (PRODUCT, "reference", "eager", "native", "triton")
SIMILARITY_WIDTH = 256
MOST = {("reference", "cpu"): 32, ("reference", "cuda"): 128, ("eager", "cpu"): 32, ("eager", "cuda"): 2048}
"""Images and captions; beyond, the loop keeps tens of GiB for its backward, and eager takes minutes a round."""
PARITY_IMAGES, PARITY_CAPTIONS = 8, 32
"""So many are scored in float64: the first images with the first captions, which are the longest."""


class ModelWorkload:
    """Inputs and methods of one batch of one model.

    Vectors of length 1, random, with a direction that all share and one for each image and its caption, so that
    attention has something to find. Parameters as the module of ``itm_kernels.nn`` draws them, twice as large: fresh
    modules score every pair near 0.5.
    """

    op: str

    def __init__(
        self, case: Case, direction: str, dtype: torch.dtype, device: torch.device, tolerance: Tolerance
    ) -> None:
        self.case, self.direction, self.dtype, self.device = case, direction, dtype, device
        self.word_counts = case.word_counts
        self.num_words = sum(self.word_counts)
        self.tolerance = tolerance
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        shared, topics = normal(1, 1, case.width), normal(max(case.images, case.captions), 1, case.width)
        longest = max(self.word_counts)
        valid = (torch.arange(longest) < torch.tensor(self.word_counts)[:, None]).to(device)

        def vectors(groups: int, members: int) -> Tensor:  # [groups, members, D]
            own = normal(groups, members, case.width)
            return F.normalize(own.mul_(1.5).add_(shared).add_(topics[:groups]), dim=-1).to(dtype)

        regions = vectors(case.images, case.regions)
        words = vectors(case.captions, longest) * valid[..., None]
        torch.manual_seed(0)
        self.module = self.make().to(device)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.mul_(2)
        self.module.eval()
        self.names, inputs = zip(*self.make_inputs(regions.detach(), words.detach()).items(), strict=True)
        parameters = [p.detach().to(dtype).requires_grad_() for p in self.flat_parameters()]
        self.leaves = tuple(t.detach().requires_grad_() for t in inputs) + tuple(parameters)
        self.grad_scores = normal(*self.output_shape())

    def make(self) -> torch.nn.Module:
        """The module whose parameters are taken."""
        raise NotImplementedError

    def flat_parameters(self) -> list[Tensor]:
        """Its parameters as the op takes them, those that are there."""
        raise NotImplementedError

    def make_inputs(self, regions: Tensor, words: Tensor) -> dict[str, Tensor]:  # [I, R, D], [C, W, D]
        """What the op takes beside parameters, by name."""
        return {"regions": regions, "words": words}

    def cut(self, name: str, tensor: Tensor, images: int, captions: int) -> Tensor:
        """Of an input what belongs to the first images and captions."""
        return tensor[: images if name in ("regions", "image_global") else captions]

    def output_shape(self) -> tuple[int, ...]:
        """Of what the op makes."""
        return self.case.images, self.case.captions

    def part(self, images: int, captions: int) -> tuple[slice, ...]:
        """Where in it the first images and captions stand."""
        return slice(images), slice(captions)

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        """The op."""
        raise NotImplementedError

    def products(self) -> list[Product]:
        """The products of the forward, packed."""
        raise NotImplementedError

    def attended(self, way: str) -> list[Product]:
        """Keys summed by the weights of every query of every pair; as many FLOPs as gated products take."""
        images, regions, d = self.case.images, self.case.regions, self.case.width
        if way == "t2i":
            return [Product(self.num_words, regions, d, images)]
        return [Product(images * regions, count, d) for count in self.word_counts]

    def graph_products(self, steps: int) -> list[Product]:
        """SGR's: queries and keys by one product of a node; the last step asks for the global nodes alone."""
        images, s = self.case.images, SIMILARITY_WIDTH
        pairs = images * self.case.captions
        made = []
        for step in range(steps):
            last = step == steps - 1
            rows = pairs if last else images * self.num_words + pairs
            made += [Product(rows, s, s), Product(rows, s, s)]
            for count in self.word_counts:
                asking = 1 if last else count + 1
                made += [Product(asking, s, count + 1, images), Product(asking, count + 1, s, images)]
        return made

    def flops(self, phase: str) -> int:
        forward = sum(product.flops for product in self.products())
        return forward if phase == FORWARD else 3 * forward

    def contender(self, method: str) -> Contender | str:
        if method == PRODUCT:
            return bare_chain(self.products(), self.dtype, self.device)
        most = MOST.get((method, self.device.type))
        if most is not None and max(self.case.images, self.case.captions) > most:
            return f"not run on {self.device.type} beyond {most} images and captions: minutes a round"
        reason = why_not(method, self.op, self.device, self.dtype)
        return reason or differentiable(method, method, self._op(method), self.leaves, self.grad_scores, {})

    def _op(self, backend: str) -> Callable[..., Tensor]:
        layout = caption_layout(self.word_counts, self.device)

        def scores(*leaves: Tensor) -> Tensor:
            with use_backend(backend):
                return self.scores(leaves[: len(self.names)], layout, leaves[len(self.names) :])

        return scores

    @cached_property
    def _truth(self) -> list[Part]:
        """Of some pairs; the gradients of these alone where they are all there is."""
        images, captions = min(self.case.images, PARITY_IMAGES), min(self.case.captions, PARITY_CAPTIONS)
        whole = (images, captions) == (self.case.images, self.case.captions)
        count = len(self.names)
        leaves = [leaf.detach() for leaf in self.leaves]
        cut = [self.cut(name, leaf, images, captions) for name, leaf in zip(self.names, leaves, strict=False)]
        leaves = [leaf.double().requires_grad_(whole) for leaf in (*cut, *leaves[count:])]
        with use_backend("reference"), torch.set_grad_enabled(whole):
            scores = self.scores(leaves[:count], self.word_counts[:captions], leaves[count:])
        parts = [Part("scores of some pairs", 0, self.part(images, captions), scores.detach())]
        if whole:
            grads = torch.autograd.grad(scores, leaves, self.grad_scores.double())
            parts += [Part(f"gradients of {name}", i + 1, slice(None), grads[i]) for i, name in enumerate(self.names)]
            largest = max(range(count, len(leaves)), key=lambda i: leaves[i].numel())
            parts.append(Part("gradients of the largest parameter", largest + 1, slice(None), grads[largest]))
        return parts

    def truth(self) -> Sequence[Part]:
        return self._truth
