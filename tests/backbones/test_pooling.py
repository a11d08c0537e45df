import pytest
import torch

from pipeline.backbones.pooling import Pool, gem, layout_of, n_prefix_tokens


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((7,), "vector"),
        ((197, 768), "tokens"),
        ((512, 7, 7), "nchw"),
        ((7, 7, 768), "nhwc"),
        ((8, 8, 8), "nchw"),
        ((64, 8, 6), "nchw"),
        ((512, 1, 1), "nchw"),
        ((1, 1, 512), "nhwc"),
    ],
)
def test_the_layout_is_read_from_the_shape(shape, layout):
    assert layout_of(shape) == layout


def test_where_a_shape_allows_both_the_network_decides():
    assert layout_of((8, 8, 8), channels_last=True) == "nhwc"
    assert layout_of((8, 6, 64), channels_last=True) == "nhwc"


@pytest.mark.parametrize(
    ("n_tokens", "declared", "n_prefix"),
    [(197, 1, 1), (198, 2, 2), (201, 5, 5), (196, 0, 0), (196, 1, 0), (150, 1, 1)],
)
def test_prefix_tokens_leave_a_square_grid(n_tokens, declared, n_prefix):
    assert n_prefix_tokens(n_tokens, declared) == n_prefix


def test_gem_lies_between_the_mean_and_the_maximum():
    positions = torch.rand(4, 5, 49, generator=torch.Generator().manual_seed(0))
    pooled = gem(positions)
    assert (pooled > positions.mean(2)).all()
    assert (pooled < positions.amax(2)).all()
    torch.testing.assert_close(gem(positions, power=1.0), positions.mean(2))


def test_pooling_half_precision_maps_adds_up_in_float32():
    ones = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    ones[0, 0, 0, 0] = 300
    assert Pool("avg", "nchw")(ones).item() == pytest.approx(1 + 299 / 4096, rel=1e-6)


def test_both_layouts_of_a_map_are_pooled_alike():
    maps = torch.rand(2, 3, 4, 5)
    for pooling in ("avg", "max", "gem", "none"):
        nchw = Pool(pooling, "nchw")(maps)
        nhwc = Pool(pooling, "nhwc")(maps.permute(0, 2, 3, 1))
        torch.testing.assert_close(nchw, nhwc)


def test_an_unpooled_map_is_a_copy():
    maps = torch.ones(1, 2, 3, 3)
    kept = Pool("none", "nchw")(maps)
    maps.zero_()
    assert kept.min() == 1
