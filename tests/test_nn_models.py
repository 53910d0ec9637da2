"""The modules of RCAR and SGRAF: what they hold, what training mode changes, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import random_batch
from itm_kernels import caption_layout
from itm_kernels.nn import AttentionFiltrationScorer, RegulatedScorer, SimilarityGraphScorer

REGIONS = 7
MAKERS: dict[str, Any] = {
    "rcar": lambda: RegulatedScorer(24, 10),
    "rcar-i2t": lambda: RegulatedScorer(24, 10, direction="i2t", steps=3),
    "rar": lambda: RegulatedScorer(24, 10, regulator="rar"),
    "rcr": lambda: RegulatedScorer(24, 10, regulator="rcr"),
    "base": lambda: RegulatedScorer(24, 10, regulator="rcr", steps=0),
    "saf": lambda: AttentionFiltrationScorer(24, 10, num_regions=REGIONS),
    "sgr": lambda: SimilarityGraphScorer(24, 10, num_regions=REGIONS),
    "sgr-0": lambda: SimilarityGraphScorer(24, 10, num_regions=REGIONS, steps=0),
}
every = pytest.mark.parametrize("name", MAKERS)
UNUSED = {"rcr": ("sim_eval_w",), "base": ("sim_eval_w",), "sgr-0": ("sim_tranloc_w",)}


def scores_of(module: nn.Module, **more: Any) -> Tensor:
    batch = random_batch(1, regions=REGIONS)
    scores: Tensor = module(batch.regions.requires_grad_(), batch.words.nan_to_num(), batch.word_counts, **more)
    return scores


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = MAKERS[name]()
    return module


@every
def test_every_parameter_that_is_used_gets_a_gradient(name: str) -> None:
    module = made(name).eval()
    scores = scores_of(module)
    assert scores.shape == (5, 6)
    scores.square().sum().backward()
    for key, parameter in module.named_parameters():
        unused = key.startswith(UNUSED.get(name, ()))
        assert (parameter.grad is None or not parameter.grad.any()) == unused or "bias" in key, key


@every
def test_packed_words_padded_words_and_layouts_score_alike(name: str) -> None:
    module = made(name).eval()
    batch = random_batch(1, regions=REGIONS)
    expected = scores_of(module)
    packed = batch.packed()
    for counts in (batch.word_counts, torch.tensor(batch.word_counts), caption_layout(batch.word_counts, "cpu")):
        assert torch.allclose(module(packed.regions, packed.words, counts), expected, atol=1e-6)


@every
def test_training_is_repeated_by_its_seed_and_evaluation_needs_none(name: str) -> None:
    module = made(name)
    module.eval()
    assert torch.equal(scores_of(module), scores_of(module))
    module.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(scores_of(module).detach())
    assert torch.equal(runs[0], runs[1])
    dropped = name not in ("rcr", "base")
    assert torch.equal(runs[0], runs[2]) != dropped


def test_a_seed_may_be_given() -> None:
    module = made("rcar").train()
    assert torch.equal(scores_of(module, seed=5), scores_of(module, seed=5))
    assert not torch.equal(scores_of(module, seed=5), scores_of(module, seed=6))


def test_saf_counts_captions_in_training() -> None:
    module = made("saf").train()
    scores_of(module)
    assert int(module.get_buffer("SAF_module.bn.num_batches_tracked")) == 6
    before = module.get_buffer("SAF_module.bn.running_mean").clone()
    scores_of(module.eval())
    assert torch.equal(module.get_buffer("SAF_module.bn.running_mean"), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegulatedScorer(24, 9), "sim_dim must be even"),
        (lambda: RegulatedScorer(0, 10), "embed_dim must be at least 1"),
        (lambda: RegulatedScorer(24, 10, workspace_bytes=0), "workspace_bytes must be positive"),
        (lambda: RegulatedScorer(24, 10, backend="x"), "backend must be one of"),
        (lambda: AttentionFiltrationScorer(24, 0), "sim_dim must be at least 1"),
        (lambda: SimilarityGraphScorer(24, 10, dropout=1.0), r"dropout must be within \[0, 1\)"),
        (lambda: RegulatedScorer(24, 10, direction="both"), "direction must be one of t2i, i2t"),
        (lambda: RegulatedScorer(24, 10, regulator="none"), "regulator must be one of rar, rcr, rcar"),
        (lambda: RegulatedScorer(24, 10, steps=0), "steps must be at least 1"),
        (lambda: RegulatedScorer(24, 10, regulator="rcr", dropout=0.4), "dropout is RAR's"),
        (lambda: SimilarityGraphScorer(24, 10, steps=-1), "steps must be at least 0"),
    ],
)
def test_what_is_refused_when_a_module_is_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


BAD = {
    "a count too large": ({"word_counts": [9, 1, 1, 1, 1, 10]}, "word_counts must be in 1..9, got 10"),
    "too few counts": ({"word_counts": [1, 2, 3]}, r"word_counts must be \[C\] with C = 6"),
    "another width": ({"words": torch.zeros(6, 9, 20)}, r"words must be \[C, W, D\]"),
    "another dtype": ({"words": torch.zeros(6, 9, 24).double()}, "regions and words must have one dtype"),
    "fewer regions": ({"regions": torch.zeros(5, 6, 24)}, r"regions must be \[I, R, D\] with R = 7 and D = 24"),
    "an image alone": ({"regions": torch.zeros(7, 24)}, r"regions must be \[I, R, D\]"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", ["saf", "sgr"])
def test_bad_input_changes_no_buffer(name: str, what: str) -> None:
    module, batch = made(name).train(), random_batch(1, regions=REGIONS)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    change, message = BAD[what]
    given = {"regions": batch.regions, "words": batch.words, "word_counts": batch.word_counts, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        module(**given)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_frozen_normalisation_stays_frozen() -> None:
    module = made("saf").train()
    module.get_submodule("SAF_module.bn").eval()
    before = module.get_buffer("SAF_module.bn.running_mean").clone()
    scores_of(module)
    assert torch.equal(module.get_buffer("SAF_module.bn.running_mean"), before)


def test_a_synchronised_normalisation_is_refused() -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(made("saf"))
    with pytest.raises(NotImplementedError, match="several ranks"):
        scores_of(module)


@every
def test_half_precision_beside_float32_parameters(name: str) -> None:
    module, batch = made(name).eval(), random_batch(1, regions=REGIONS)
    words = batch.words.nan_to_num()
    plain = module(batch.regions, words, batch.word_counts)
    half = module(batch.regions.bfloat16(), words.bfloat16(), batch.word_counts)
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.05


@every
def test_a_functional_call_takes_other_parameters(name: str) -> None:
    module = made(name).eval()
    parameters = {key: value.detach() * 2 for key, value in module.named_parameters()}
    batch = random_batch(1, regions=REGIONS)
    inputs = (batch.regions, batch.words.nan_to_num(), batch.word_counts)
    other = torch.func.functional_call(module, parameters, inputs)
    module.load_state_dict({**module.state_dict(), **parameters})
    assert torch.equal(module(*inputs), other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["train", "eval"])
@every
def test_modules_compile_once(name: str, mode: str) -> None:
    module = made(name)
    module.train(mode == "train")
    batch = random_batch(1, regions=REGIONS)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    counts = torch.tensor(batch.word_counts)
    for _ in range(3):
        scores = compiled(batch.regions.requires_grad_(), batch.words.nan_to_num(), counts)
        scores.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["saf", "sgr"])
def test_sgraf_needs_all_regions(name: str) -> None:
    with pytest.raises(ValueError, match="has a channel for every region and needs them all"):
        scores_of(made(name), region_counts=[REGIONS] * 5)


def test_extra_repr_names_the_options() -> None:
    assert "regulator='rcar', steps=2, temperature=10.0, dropout=0.4" in repr(made("rcar"))
