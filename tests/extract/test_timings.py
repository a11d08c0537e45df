"""The stages of a run are told apart, add up, and the slowest is named."""

import pytest

from pipeline.extract.timings import Timings


def test_every_stage_of_a_run_is_counted(embed, photos, resnet):
    report = embed(photos, resnet)
    timings = report.timings
    one_after_another = timings.loading + timings.planning + timings.waiting
    one_after_another += timings.network + timings.stalled
    assert 0 < one_after_another <= report.seconds
    assert min(timings.network, timings.writing, timings.reading, timings.decoding) > 0
    assert timings.n_threads == 2
    unchanged = embed(photos, resnet).timings
    assert unchanged.network == unchanged.decoding == unchanged.reading == 0


@pytest.mark.parametrize(
    ("timings", "words"),
    [
        (Timings(network=9, waiting=1), "A GPU, a smaller --image-size"),
        (
            Timings(network=1, waiting=9, decoding=20, n_threads=2),
            "which 2 threads read and decode",
        ),
        (Timings(network=1, waiting=9, reading=20), "A faster disk or a local copy"),
        (Timings(loading=9, network=3), "more images pay for it"),
        (Timings(stalled=9, network=3), "A faster disk for --cache"),
        (Timings(stalled=4, network=4, waiting=3), ""),
        (Timings(), ""),
    ],
)
def test_the_bottleneck_is_named_with_what_would_help(timings, words):
    assert words in timings.bottleneck()
    assert bool(words) == bool(timings.bottleneck())


def test_an_error_while_waiting_passes_through():
    def broken():
        yield 1
        raise OSError("disk")

    timings = Timings()
    with pytest.raises(OSError, match="disk"):
        list(timings.waiting_for(broken()))
    assert timings.waiting > 0
