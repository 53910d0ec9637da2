"""Encoders and matching model against the formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from itm_pipeline.config import PRESETS, ModelConfig
from itm_pipeline.models import ImageEncoder, MatchingModel, TextEncoder, l2norm
from itm_pipeline.models.attention import word_attention


def test_l2norm_adds_the_constant_outside_the_root() -> None:
    x = torch.tensor([[3e-8, 4e-8], [3.0, 4.0]], dtype=torch.float64)
    expected = torch.tensor([[3e-8 / 6e-8, 4e-8 / 6e-8], [0.6, 0.8]], dtype=torch.float64)
    assert torch.allclose(l2norm(x), expected, rtol=1e-8)


def test_l2norm_of_zero_is_zero_and_passes_no_gradient() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    y = l2norm(x)
    y.sum().backward()
    assert x.grad is not None
    assert y[0].tolist() == [0, 0]
    assert x.grad[0].tolist() == [0, 0]
    assert x.grad[1].abs().min() > 0


def test_l2norm_gradient() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(l2norm, (x,))


def test_image_encoder_starts_as_published() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(40, 24)
    bound = math.sqrt(6 / 64)
    assert set(encoder.state_dict()) == {"fc.weight", "fc.bias"}
    assert encoder.fc.weight.abs().max() <= bound
    assert encoder.fc.weight.abs().max() > 0.95 * bound
    assert encoder.fc.bias.abs().max() == 0
    regions = encoder(torch.randn(2, 3, 40))
    assert torch.allclose(regions.norm(dim=-1), torch.ones(2, 3), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_image_encoder_with_mlp_is_the_sum_of_both(training: bool) -> None:
    """`l2norm(W x + b + W2 relu(BN(W1 x + b1)) + b2)`, the BatchNorm over all regions of all images."""
    torch.manual_seed(6)
    encoder = ImageEncoder(12, 8, mlp=True).double().train(training)
    state = encoder.state_dict()
    layers = [f"mlp.layers.{index}.{kind}" for index in (0, 1) for kind in ("weight", "bias")]
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = [f"mlp.bns.{index}.{kind}" for index in (0, 1) for kind in buffers]
    assert set(state) == {"fc.weight", "fc.bias", *layers, *norms}
    assert state["mlp.layers.0.weight"].shape == (4, 12)
    for name, value in state.items():  # nothing is left at a value that hides it
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value))
    before = {name: value.clone() for name, value in state.items()}
    features = torch.randn(3, 5, 12, dtype=torch.float64)
    hidden = features @ before["mlp.layers.0.weight"].T + before["mlp.layers.0.bias"]
    mean, variance = before["mlp.bns.0.running_mean"], before["mlp.bns.0.running_var"]
    if training:
        mean, variance = hidden.mean((0, 1)), hidden.var((0, 1), correction=0)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * before["mlp.bns.0.weight"] + before["mlp.bns.0.bias"]
    out = hidden.clamp(min=0) @ before["mlp.layers.1.weight"].T + before["mlp.layers.1.bias"]
    out = out + features @ before["fc.weight"].T + before["fc.bias"]
    assert torch.allclose(encoder(features), out / out.norm(dim=-1, keepdim=True), atol=1e-7)
    moved = [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]
    changing = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == ([f"mlp.bns.0.{kind}" for kind in changing] if training else [])


@pytest.mark.parametrize("gru_name", ["rnn", "cap_rnn"])
def test_text_encoder_names_are_the_published_ones(gru_name: str) -> None:
    encoder = TextEncoder(11, 5, 7, gru_name=gru_name)
    ways = [
        f"{gru_name}.{kind}_{side}_l0{way}"
        for kind in ("weight", "bias")
        for side in ("ih", "hh")
        for way in ("", "_reverse")
    ]
    assert set(encoder.state_dict()) == {"embed.weight", *ways}
    assert encoder.embed.weight.abs().max() <= 0.1


def test_word_dropout_hides_numbers_of_the_embedding_in_training_alone() -> None:
    torch.manual_seed(7)
    encoder = TextEncoder(11, 50, 8, dropout=0.4)
    seen: list[torch.Tensor] = []
    encoder.rnn.register_forward_pre_hook(lambda module, args: seen.append(args[0].data.detach()))
    tokens, counts = torch.randint(1, 11, (20, 6)), [6] * 20
    first = encoder(tokens, counts)
    assert not torch.equal(first, encoder(tokens, counts))
    encoder.eval()
    assert torch.equal(encoder(tokens, counts), encoder(tokens, counts))
    dropped, again, plain, _ = seen
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert torch.allclose(dropped[kept], plain[kept] / 0.6)
    assert not torch.equal(dropped, again)


def test_models_without_dropout_draw_no_numbers() -> None:
    """So that a run of SCAN has the same generator state, and resumes the same, as before there was any dropout."""
    torch.manual_seed(8)
    encoder = TextEncoder(11, 5, 8)
    before = torch.get_rng_state()
    encoder(torch.tensor([[1, 4, 2]]), [3])
    assert torch.equal(torch.get_rng_state(), before)


def test_text_encoder_is_each_caption_on_its_own() -> None:
    """Packing, any order of lengths: the same words as without a batch, zeros behind the end."""
    torch.manual_seed(1)
    encoder = TextEncoder(11, 5, 8).double()
    counts = [3, 6, 2, 6]
    tokens = torch.zeros(4, 7, dtype=torch.int64)  # one place wider than the longest caption
    for row, count in enumerate(counts):
        tokens[row, :count] = torch.randint(1, 11, (count,))
    words = encoder(tokens, counts)
    assert words.shape == (4, 7, 8)
    for row, count in enumerate(counts):
        both, _ = encoder.rnn(encoder.embed(tokens[row : row + 1, :count]))
        mean = (both[0, :, :8] + both[0, :, 8:]) / 2
        assert torch.allclose(words[row, :count], mean / mean.norm(dim=-1, keepdim=True), atol=1e-7)
        assert words[row, count:].abs().max() == 0 if count < 7 else True


def test_padding_stays_out_of_the_gradient() -> None:
    torch.manual_seed(2)
    encoder = TextEncoder(11, 5, 8)
    tokens = torch.tensor([[1, 4, 2, 0, 0], [1, 5, 6, 7, 2]])
    encoder(tokens, [3, 5]).square().sum().backward()
    gradient = encoder.embed.weight.grad
    assert gradient is not None
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)
    assert gradient[0].abs().max() == 0  # <pad> was never looked at
    assert gradient[[8, 9, 10]].abs().max() == 0


def test_matching_model_scores_every_pair() -> None:
    torch.manual_seed(3)
    model = MatchingModel(ModelConfig(embed_dim=16, word_dim=8), feature_dim=12, vocab_size=9)
    features, tokens, counts = torch.randn(4, 5, 12), torch.randint(1, 9, (3, 6)), [6, 2, 4]
    scores = model(features, tokens, counts)
    assert scores.shape == (4, 3)
    alone = model(features[2:3], tokens[1:2, :2], [2])
    assert torch.allclose(scores[2:3, 1:2], alone, atol=1e-6)
    scores.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_parameters_stand_where_checkpoints_expect_them() -> None:
    names = MatchingModel(ModelConfig(embed_dim=16, word_dim=8), 12, 9).state_dict()
    assert {name.partition(".")[0] for name in names} == {"img_enc", "txt_enc"}  # SCAN's scorer has none
    for preset, gru in (("sgraf-sgr", "cap_rnn"), ("rcar-t2i", "rnn")):
        config = dataclasses.replace(PRESETS[preset].model, embed_dim=16, word_dim=8, sim_dim=4)  # type: ignore[index]
        names = MatchingModel(config, 12, 9).state_dict()
        assert {name.partition(".")[0] for name in names} == {"img_enc", "txt_enc", "sim_enc"}
        assert f"txt_enc.{gru}.weight_ih_l0" in names


def test_options_reach_the_scorer() -> None:
    """The score of every published direction and aggregation, and of every scorer and its options, differs."""
    features, tokens, counts = torch.randn(2, 5, 12), torch.randint(1, 9, (2, 4)), [4, 3]
    options = [
        ModelConfig(embed_dim=16, word_dim=8),
        ModelConfig(embed_dim=16, word_dim=8, agg_func="Mean"),
        ModelConfig(embed_dim=16, word_dim=8, lambda_softmax=4.0),
        ModelConfig(embed_dim=16, word_dim=8, lambda_lse=3.0),
        ModelConfig(embed_dim=16, word_dim=8, raw_feature_norm="no_norm"),
        ModelConfig(embed_dim=16, word_dim=8, direction="i2t"),
        ModelConfig(embed_dim=16, word_dim=8, direction="both", agg_func="Mean", focal="equal"),
        *(
            ModelConfig(embed_dim=16, word_dim=8, sim_dim=4, **options)  # type: ignore[arg-type]
            for options in (
                {"scorer": "regulated"},
                {"scorer": "regulated", "direction": "i2t"},
                {"scorer": "regulated", "regulator": "rar"},
                {"scorer": "regulated", "regulator": "rcr"},
                {"scorer": "regulated", "regulator_steps": 3},
                {"scorer": "regulated", "temperature": 2.0},
                {"scorer": "regulated", "scorer_dropout": 0.1},
                {"scorer": "regulated", "region_encoder": "mlp"},
                {"scorer": "attention_filtration"},
                {"scorer": "attention_filtration", "scorer_dropout": 0.1},
                {"scorer": "similarity_graph"},
                {"scorer": "similarity_graph", "graph_steps": 1},
                {"scorer": "similarity_graph", "scorer_dropout": 0.1},
            )
        ),
    ]
    seen = []
    for config in options:
        torch.manual_seed(4)
        model = MatchingModel(config, 12, 9, num_regions=5).double()
        seen.append(model(features.double(), tokens, counts)[0, 0].item())
    assert len({round(score, 12) for score in seen}) == len(options)


@pytest.mark.parametrize(
    "norm", ["clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "softmax", "no_norm"]
)
def test_word_attention_explains_the_score(norm: str) -> None:
    """The mean cosine of words and what they attend to is the model's own score, so the picture shows what it did."""
    torch.manual_seed(5)
    config = ModelConfig(embed_dim=16, word_dim=8, agg_func="Mean", raw_feature_norm=norm)  # type: ignore[arg-type]
    model = MatchingModel(config, 12, 9).eval()
    features, tokens = torch.randn(1, 5, 12), torch.randint(1, 9, (1, 6))
    regions, words = model.encode_images(features), model.encode_captions(tokens, [6])
    weights = word_attention(regions[0], words[0], config)
    assert torch.allclose(weights.sum(-1), torch.ones(6))
    attended = weights @ regions[0]
    cosines = torch.cosine_similarity(words[0], attended)
    assert torch.allclose(cosines.mean(), model.score(regions, words, [6])[0, 0], atol=1e-6)


@pytest.mark.parametrize("focal", ["equal", "prob"])
def test_focal_attention_drops_the_weak_and_survives_uniform_weights(focal: str) -> None:
    config = ModelConfig(embed_dim=4, lambda_softmax=20.0, agg_func="Mean", direction="both", focal=focal)  # type: ignore[arg-type]
    regions = l2norm(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
    weights = word_attention(regions, l2norm(torch.tensor([[1.0, 0.2, 0.1, 0]])), config)
    assert weights[0].tolist() == [1, 0, 0]
    same = word_attention(regions[:1].repeat(3, 1), l2norm(torch.tensor([[1.0, 0, 0, 0]])), config)
    assert torch.allclose(same, torch.full((1, 3), 1 / 3))


def test_word_attention_needs_words_that_attend() -> None:
    with pytest.raises(ValueError, match="i2t"):
        word_attention(torch.randn(3, 4), torch.randn(2, 4), ModelConfig(direction="i2t"))
    with pytest.raises(ValueError, match="'regulated' are not drawn yet"):
        word_attention(torch.randn(3, 4), torch.randn(2, 4), ModelConfig(scorer="regulated"))
