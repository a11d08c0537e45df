"""All of decoding on a GPU but the GPU: the CPU's decoder stands in for it, with faults."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.backbones.preprocess import Preprocess
from pipeline.data import codecs
from pipeline.data.decode import DECODING, _upright
from pipeline.errors import UsageError
from pipeline.extract import gpu_decode
from pipeline.extract.embedder import Embedder
from pipeline.extract.gpu_decode import (
    MAX_FAULTS,
    SENTINEL,
    GpuDecoder,
    check_decoder,
    open_decoder,
    plain_jpeg,
    upright,
)
from pipeline.extract.loader import Demand, load, load_in_order
from pipeline.extract.recipe import decoding_of
from pipeline.extract.settings import Settings
from pipeline.extract.stream import Job, embed
from pipeline.extract.timings import Timings
from pipeline.extract.views import make_views

from ..data.encoded import PNG, cut, encode, photo, with_end_marker

pytestmark = pytest.mark.skipif(
    codecs._torchcodec is None, reason="torchcodec finds no shared libraries here"
)

CPU = torch.device("cpu")


def picture(seed=0, mode="RGB", size=(90, 70), **options):
    """A JPEG of its own."""
    return encode(photo(*size, mode).resize((size[0] + seed, size[1])), "JPEG", **options)


def turned(orientation):
    exif = photo().getexif()
    exif[0x0112] = orientation
    return picture(exif=exif)


PLAIN = {
    "colour": picture(),
    "grey": picture(mode="L"),
    "not subsampled": picture(subsampling=0),
    "restart markers": picture(restart_marker_blocks=3),
    "followed by rubbish": picture() + b"\xff\xd8 rubbish",
    **{f"turned {i}": turned(i) for i in range(1, 9)},
}
ODD = {
    "progressive": picture(progressive=True),
    "CMYK": picture(mode="CMYK"),
    "small": picture(size=(40, 30)),
    "elongated": picture(size=(500, 40)),
    "RGB inside": picture(keep_rgb=True),
    "Adobe's, without a transform": picture().replace(
        b"\xff\xd8", b"\xff\xd8\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0", 1
    ),
    "cut": cut(picture(), 0.6),
    "cut in its header": picture()[:300],
    "PNG": PNG,
    "text": b"no image",
    "empty": b"",
}
CUT = with_end_marker(picture())  # plain, by all that its segments say


@pytest.fixture
def write(tmp_path):
    """Write files; gives their paths, in the same order."""

    def run(contents):
        for i, data in enumerate(contents):
            (tmp_path / f"{i:03d}").write_bytes(data)
        return [str(tmp_path / f"{i:03d}") for i in range(len(contents))]

    return run


def make(pixels, digest):
    return make_views(pixels, Preprocess(32, 32, 36), 2, digest)


def load_all(files, gpu=None, n_threads=3, make=make):
    demands = [Demand(lambda _: False, make), None]
    return list(load_in_order(files, lambda file: load(file, demands, gpu), n_threads, 8))


def real_decoder(encoded):
    return codecs._torchcodec.decode_jpeg(encoded, mode="RGB", device=CPU)


def faulty(fault, after=2):
    """The real decoder, whose results go through ``fault``; not those of the first calls."""
    calls = []

    def decode(encoded):
        calls.append(len(encoded))
        return real_decoder(encoded) if len(calls) <= after else fault(encoded)

    decode.calls = calls
    return decode


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        fields = {"pixels": (), "reading_seconds": 0, "decoding_seconds": 0}
        assert replace(one, **fields) == replace(other, **fields)
        assert [None if p is None else p.tolist() for p in one.pixels] == [
            None if p is None else p.tolist() for p in other.pixels
        ]


# The same results


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("is_shared", [False, True])
def test_results_reasons_and_order_are_those_of_the_cpu(write, is_shared, batch_size):
    contents = [*PLAIN.values(), CUT, *ODD.values(), *(picture(i) for i in range(20))]
    files = write(contents)
    with GpuDecoder(CPU, is_shared=is_shared, batch_size=batch_size) as gpu:
        found = load_all(files, gpu)
    assert_same(found, load_all(files))
    assert sum(bool(one.failure) for one in found) == 5
    n_plain = len(PLAIN) + 20
    assert gpu.note == ""
    if is_shared:
        assert 0 < gpu.n_decoded <= n_plain
    else:
        assert (gpu.n_decoded, gpu.n_returned) == (n_plain, 1)


def test_only_plain_files_go_to_the_gpu():
    assert [name for name, data in PLAIN.items() if plain_jpeg(data) is None] == []
    assert [name for name, data in ODD.items() if plain_jpeg(data) is not None] == []
    assert plain_jpeg(picture().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")) is None
    assert plain_jpeg(picture()[:-2]) is None
    plain = plain_jpeg(turned(6))
    assert (plain.height, plain.width, plain.orientation) == (70, 90, 6)


def test_a_file_of_another_process_than_its_header_says_is_for_the_cpu():
    for marker in (b"\xff\xc3", b"\xff\xc9", b"\xff\xcb"):
        assert plain_jpeg(picture().replace(b"\xff\xc0\0\x11", marker + b"\0\x11")) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone_as_on_the_cpu(orientation):
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    assert torch.equal(upright(pixels, orientation), _upright(pixels, orientation))


def test_seconds_of_decoding_are_counted(write):
    with GpuDecoder(CPU, decoder=faulty(lambda e: time.sleep(0.02) or real_decoder(e))) as gpu:
        (one,) = load_all(write([picture()]), gpu)
    assert one.decoding_seconds >= 0.02


# Batches, and how many wait


@pytest.fixture
def gate():
    """Holds a decoder until it is set."""
    event = threading.Event()
    yield event
    event.set()


def finish(image, seconds):
    return image


def test_as_many_as_wait_are_decoded_at_once(gate):
    decoder = faulty(lambda encoded: gate.wait() and real_decoder(encoded))
    with GpuDecoder(CPU, decoder=decoder, batch_size=4) as gpu:
        first = gpu.take(picture(), finish)
        while len(decoder.calls) < 3:
            time.sleep(0.001)
        others = [gpu.take(picture(i), finish) for i in range(7)]
        assert not first.done()
        gate.set()
        assert all(future.result() is not None for future in [first, *others])
    assert decoder.calls[2:] == [1, 4, 3]


def test_a_batch_has_only_so_many_pixels(gate, monkeypatch):
    monkeypatch.setattr(gpu_decode, "MAX_PIXELS", 2 * 90 * 70)
    decoder = faulty(lambda encoded: gate.wait() and real_decoder(encoded))
    with GpuDecoder(CPU, decoder=decoder, batch_size=4) as gpu:
        assert gpu.take(picture(size=(200, 100)), finish) is None
        futures = [gpu.take(picture(), finish)]
        while len(decoder.calls) < 3:
            time.sleep(0.001)
        futures += [gpu.take(picture(), finish) for _ in range(4)]
        gate.set()
        assert all(future.result() is not None for future in futures)
    assert decoder.calls[2:] == [1, 2, 2]


def test_no_more_wait_than_there_is_room_for(gate):
    decoder = faulty(lambda encoded: gate.wait() and real_decoder(encoded))
    taken = []
    with GpuDecoder(CPU, decoder=decoder, batch_size=2) as gpu:

        def take_all():
            for _ in range(20):
                taken.append(gpu.take(picture(), finish))

        taking = threading.Thread(target=take_all)
        taking.start()
        taking.join(0.2)
        assert taking.is_alive()
        assert len(taken) <= 4
        gate.set()
        taking.join()
        assert len([future.result() for future in taken]) == 20


def test_shared_work_is_taken_only_while_there_is_room(gate):
    decoder = faulty(lambda encoded: gate.wait() and real_decoder(encoded))
    with GpuDecoder(CPU, is_shared=True, decoder=decoder, batch_size=2) as gpu:
        taken = [gpu.take(picture(), finish) for _ in range(10)]
        assert [future is not None for future in taken] == [True] * 4 + [False] * 6
        gate.set()
        for future in taken[:4]:
            future.result()
        while (future := gpu.take(picture(), finish)) is None:
            time.sleep(0.001)
        assert future.result() is not None


# Ends


def names_of_threads():
    return {thread.name for thread in threading.enumerate() if "decode" in thread.name}


def test_nothing_hangs_when_the_consumer_stops_early(write):
    files = write([picture(i) for i in range(40)])
    decoder = faulty(lambda encoded: time.sleep(0.01) or real_decoder(encoded))
    with GpuDecoder(CPU, decoder=decoder, batch_size=2) as gpu:
        stream = load_in_order(
            files, lambda file: load(file, [Demand(lambda _: False, make)], gpu), 4, 8
        )
        next(stream)
        stream.close()
    assert names_of_threads() == set()


def test_closing_lets_go_of_those_that_wait_for_room(gate):
    decoder = faulty(lambda encoded: gate.wait() and real_decoder(encoded))
    gpu = GpuDecoder(CPU, decoder=decoder, batch_size=1)
    taken = []
    threads = [
        threading.Thread(target=lambda: taken.append(gpu.take(picture(), finish))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    while len(taken) < 2:
        time.sleep(0.001)
    time.sleep(0.1)  # the others wait for room by now
    closing = threading.Thread(target=gpu.close)
    closing.start()
    for thread in threads:
        thread.join()  # the batch in hand still waits at the gate
    gate.set()
    closing.join()
    given = [future for future in taken if future is not None]
    assert len(given) == 2
    assert sum(future.cancelled() for future in given) == 1
    assert gpu.take(picture(), finish) is None
    assert names_of_threads() == set()


def test_a_bug_reaches_the_consumer(write):
    def broken(pixels, digest):
        raise ZeroDivisionError("a bug")

    files = write([picture(i) for i in range(9)])
    with pytest.raises(ZeroDivisionError, match="a bug"), GpuDecoder(CPU, batch_size=2) as gpu:
        load_all(files, gpu, make=broken)
    assert names_of_threads() == set()


def test_an_interrupt_ends_it(write):
    files = write([picture(i) for i in range(40)])

    def interrupted(gpu):
        for _ in load_in_order(
            files, lambda file: load(file, [Demand(lambda _: False, make)], gpu), 4, 8
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), GpuDecoder(CPU, batch_size=2) as gpu:
        interrupted(gpu)
    assert names_of_threads() == set()


# Faults


def refusing(encoded):
    raise RuntimeError("trace\nFailed to decode batch: 6")


def leaving_one_out(encoded):
    outputs = real_decoder(encoded)
    outputs[0].copy_(torch.tensor(SENTINEL).view(3, 1, 1))
    return outputs


def stopping_early(encoded):
    outputs = real_decoder(encoded)
    rows = outputs[-1].shape[1] // 2
    outputs[-1][:, rows:] = torch.tensor(SENTINEL).view(3, 1, 1)
    return outputs


def of_another_size(encoded):
    return [*real_decoder(encoded)[1:], torch.zeros(3, 64, 64, dtype=torch.uint8)]


def too_few(encoded):
    return real_decoder(encoded)[1:]


def out_of_memory(encoded):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (refusing, "Failed to decode batch: 6"),
        (leaving_one_out, "not written"),
        (stopping_early, "not written"),
        (of_another_size, "another size"),
        (too_few, "another size"),
    ],
)
def test_what_goes_wrong_is_decoded_on_the_cpu_and_too_much_of_it_ends_it(write, fault, reason):
    files = write([picture(i) for i in range(60)])
    with GpuDecoder(CPU, decoder=faulty(fault), batch_size=2) as gpu:
        found = load_all(files, gpu)
    assert_same(found, load_all(files))
    assert MAX_FAULTS <= gpu.n_returned <= 2 * MAX_FAULTS + 4
    assert f"{MAX_FAULTS} times" in gpu.note
    assert reason in gpu.note


def test_one_bad_file_costs_its_batch_and_not_the_decoder(write):
    bad = picture(1)

    def decode(encoded):
        if any(bytes(data.numpy()) == plain_jpeg(CUT).data for data in encoded):
            refusing(encoded)
        return real_decoder(encoded)

    files = write([picture(), CUT, bad] * 15)
    with GpuDecoder(CPU, decoder=faulty(decode), batch_size=3) as gpu:
        found = load_all(files, gpu)
    assert_same(found, load_all(files))
    assert sum(bool(one.failure) for one in found) == 15
    assert gpu.note == ""


def test_out_of_memory_decodes_fewer_at_a_time(write, gate):
    files = write([picture(i) for i in range(8)])

    def decode(encoded):
        gate.wait()
        return real_decoder(encoded) if len(encoded) <= 2 else out_of_memory(encoded)

    decoder = faulty(decode)
    with GpuDecoder(CPU, decoder=decoder, batch_size=8) as gpu:
        threading.Timer(0.2, gate.set).start()
        found = load_all(files * 3, gpu)
    assert_same(found, load_all(files * 3))
    assert max(decoder.calls[2:]) > 2
    assert decoder.calls[-1] <= 2
    assert gpu.n_decoded > 0
    assert gpu.note == ""


def test_without_memory_for_a_single_image_the_cpu_does_it_all(write):
    files = write([picture(i) for i in range(12)])
    decoder = faulty(out_of_memory)
    with GpuDecoder(CPU, decoder=decoder, batch_size=4) as gpu:
        found = load_all(files, gpu)
    assert_same(found, load_all(files))
    assert len(decoder.calls) - 2 <= 3
    assert "too little memory for a single image" in gpu.note


def test_too_little_memory_to_resize_is_no_failure(write):
    def make_unless_large(pixels, digest):
        if threading.current_thread().name.startswith("decode on"):
            n_tried.append(1)
            if len(n_tried) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return make(pixels, digest)

    n_tried = []
    files = write([picture(i) for i in range(12)])
    with GpuDecoder(CPU, batch_size=4) as gpu:
        found = load_all(files, gpu, make=make_unless_large)
    assert_same(found, load_all(files))
    assert n_tried


def test_memory_is_filled_before_it_is_decoded_into(monkeypatch):
    filled = []
    copy = torch.Tensor.copy_

    def note(tensor, source):
        filled.append((tuple(tensor.shape), source.flatten().tolist()))
        return copy(tensor, source)

    with GpuDecoder(CPU) as gpu:
        monkeypatch.setattr(torch.Tensor, "copy_", note)
        gpu.take(picture(), finish).result()
    assert filled[0] == ((3, 70, 90), list(SENTINEL))


def test_no_jpeg_has_the_colour_that_memory_is_filled_with():
    y, c = np.arange(256.0)[:, None], np.arange(256.0) - 128
    red, green, blue = SENTINEL
    of_red, of_blue = np.round(y + 1.402 * c) == red, np.round(y + 1.772 * c) == blue
    greens = np.round(y[:, :, None] - 0.344136 * c[:, None] - 0.714136 * c)
    assert not ((greens == green) & of_red[:, None, :] & of_blue[:, :, None]).any()


# What is known before anything is read


def test_where_cut_files_cannot_be_told_every_file_is_decoded_twice(write):
    def without_grey(encoded):
        outputs = real_decoder(encoded)
        for output in outputs:
            output[:, (output == 128).all(dim=0)] = 0
        return outputs

    files = write([picture(), CUT, picture(1)])
    decoder = faulty(without_grey, after=0)
    with GpuDecoder(CPU, decoder=decoder, batch_size=1) as gpu:
        found = load_all(files, gpu)
    assert [one.failure for one in found] == [one.failure for one in load_all(files)]
    assert "truncated" in found[1].failure
    assert (gpu.n_decoded, gpu.n_returned) == (2, 1)
    assert len(decoder.calls) == 2 + 2 * 3


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (refusing, "cannot be decoded on cpu: Failed to decode batch: 6"),
        (out_of_memory, "cannot be decoded on cpu: out of memory"),
        (lambda encoded: [255 - one for one in real_decoder(encoded)], "come out different on cpu"),
        (lambda encoded: [one.flip(0) for one in real_decoder(encoded)], "come out different"),
    ],
)
def test_a_decoder_that_fails_its_probe_is_a_usage_error(decoder, words):
    with pytest.raises(UsageError, match=words) as raised:
        GpuDecoder(CPU, decoder=decoder)
    assert "--decode cpu" in str(raised.value)
    assert names_of_threads() == set()


@pytest.mark.parametrize("decode", ["gpu", "hybrid"])
def test_without_a_cuda_device_it_is_a_usage_error(decode):
    with pytest.raises(UsageError, match=f"--decode {decode} needs a CUDA device.*cpu"):
        check_decoder(decode, CPU)


@pytest.mark.parametrize("decode", ["cpu", "fast"])
def test_the_others_need_nothing(decode, monkeypatch):
    monkeypatch.setattr(codecs, "_torchcodec", None)
    check_decoder(decode, CPU)
    with open_decoder(decode, CPU) as gpu:
        assert gpu is None


class WithoutDevice:
    @staticmethod
    def decode_jpeg(source, *, mode="RGB"):
        raise AssertionError("is never called")


@pytest.mark.parametrize("module", [None, WithoutDevice])
def test_an_older_torchcodec_is_a_usage_error(module, monkeypatch):
    monkeypatch.setattr(codecs, "_torchcodec", module)
    with pytest.raises(UsageError, match=r"newer torchcodec.*\n.*pip install -U torchcodec"):
        open_decoder("gpu", CPU)


def test_the_recipe_tells_the_decoders_apart():
    assert decoding_of("cpu") == DECODING
    told = [decoding_of(decode) for decode in ("cpu", "fast", "gpu", "hybrid")]
    assert all(a != b for i, a in enumerate(told) for b in told[:i])
    assert all(DECODING.items() <= each.items() for each in told)


# In the stream


def units_of(files, backbones, decode, **arguments):
    settings = Settings(batch_size=4, n_threads=3, precision="fp32")
    timings = Timings()
    wants = [np.arange(len(files)) % (k + 2) > 0 for k in range(len(backbones))]
    jobs = [
        Job(Embedder(backbone, settings), wanted, lambda _: False)
        for backbone, wanted in zip(backbones, wants, strict=True)
    ]
    arguments = {"should_stop": lambda: False, **arguments}
    units = embed(files, jobs, timings, decode=decode, device=CPU, **arguments)
    return [
        (
            unit.job,
            unit.files,
            [(one.digest, one.failure, one.notes) for one in unit.loaded],
            {name: values.tobytes() for name, values in unit.features.items()},
        )
        for unit in units
    ], timings


@pytest.mark.parametrize("decode", ["gpu", "hybrid"])
def test_a_pass_gives_the_same_features_in_the_same_order(write, resnet, pixels, decode):
    files = write([*PLAIN.values(), CUT, *ODD.values()])
    notes = []
    found, timings = units_of(files, [resnet, pixels], decode, on_note=notes.append)
    assert found == units_of(files, [resnet, pixels], "cpu")[0]
    assert timings.decoding > 0
    assert notes == []
    stopped, _ = units_of(files, [resnet, pixels], decode, should_stop=lambda: True)
    assert stopped == found[: len(stopped)]
    assert 0 < len(stopped) < len(found)
    assert names_of_threads() == set()


def test_a_pass_tells_that_the_decoder_is_off(write, pixels, monkeypatch):
    monkeypatch.setattr(gpu_decode, "_torchcodec", lambda device: faulty(refusing))
    files = write([picture(i) for i in range(60)])
    monkeypatch.setattr(gpu_decode, "MAX_FAULTS", 2)
    notes = []
    found, _ = units_of(files, [pixels], "gpu", on_note=notes.append)
    assert found == units_of(files, [pixels], "cpu")[0]
    assert len(notes) == 1
    assert "decoded on the CPU" in notes[0]
