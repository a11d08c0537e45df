"""Whatever computes the network, its features are those of eager float32; or it is refused."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.errors import MismatchError, ResourceError
from pipeline.extract.embed import embedder_for
from pipeline.extract.embedder import Embedder, default_batch_size
from pipeline.extract.engines import artefacts
from pipeline.extract.engines.choose import OFFERS, Offer, choose_engine
from pipeline.extract.engines.eager import EagerEngine
from pipeline.extract.engines.engine import EngineError
from pipeline.extract.engines.memo import Memo, user_cache
from pipeline.extract.extractor import extract
from pipeline.extract.forward import FrozenForward
from pipeline.extract.half import min_cosine, probe_images
from pipeline.extract.settings import Settings
from pipeline.store import open_store

CPU = torch.device("cpu")
KNOWN = {
    "images_per_second",
    "parity",
    "tried",
    "name",
    "version",
    "precision",
    "float32_until",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "tlpipe" / "engines"


def work_for(backbone, *, layers=("all",), pooling="avg", precision="auto", batch_size=4):
    settings = Settings(layers=layers, pooling=pooling, precision=precision, batch_size=batch_size)
    return Embedder(backbone, settings)._work


def photographs(work):
    images = [work.preprocess(image) for image in probe_images()][: work.batch_size]
    return torch.stack(images).permute(0, 2, 3, 1).contiguous()


def exact(work, images):
    return EagerEngine(replace(work, precision="fp32", until=""))(images)


NETWORKS = {
    "efficientnet": ("efficientnet_lite0", "default", 128, "avg", "auto"),
    "efficientnet-gem-fp32": ("efficientnet_lite0", "default", 128, "gem", "fp32"),
    "resnet18-maps": ("resnet18", "random", 64, "none", "auto"),
    "vit": ("timm:vit_tiny_patch16_224", "random", None, "avg", "bf16"),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_an_engine_gives_every_layer_of_eager_float32(name, network):
    if OFFERS[name].package:
        pytest.importorskip(OFFERS[name].package)
    spec, weights, size, pooling, precision = NETWORKS[network]
    backbone = load_backbone(spec, weights=weights, image_size=size)
    work = work_for(backbone, pooling=pooling, precision=precision)
    images = photographs(work)
    engine = OFFERS[name].make(work)
    least = 0.9999 if "fp32" in (work.precision, name) else 0.999
    found, expected = engine(images), exact(work, images)
    assert min_cosine(found, expected) >= least
    assert [a.shape for a in found] == [(4, *s) for s in work.net.shapes.values()]
    assert {a.dtype for a in found} == {torch.float32}
    if name != "eager":
        assert artefacts.is_kept(name, work)
        before = [a.clone() for a in found]
        again = OFFERS[name].make(work)(images)
        assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_compiler_gives_every_layer_of_eager_float32(precision):
    work = work_for(load_backbone("efficientnet_lite0", image_size=96), precision=precision)
    images = photographs(work)
    found = OFFERS["inductor"].make(work)(images)
    assert min_cosine(found, exact(work, images)) >= 0.999


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_a_row_is_the_same_wherever_it_stands_and_whatever_fills_the_batch(name):
    if OFFERS[name].package:
        pytest.importorskip(OFFERS[name].package)
    backbone = load_backbone("efficientnet_lite0", image_size=96)
    embedder = Embedder(backbone, Settings(batch_size=4, precision="bf16", engine=name))
    images = [backbone.preprocess(image) for image in probe_images()][:4]
    embedder.prepare(images, 4)
    whole = embedder.forward(images)[0]["penultimate"]
    alone = embedder.forward(images[2:3])[0]["penultimate"]
    moved = embedder.forward(images[::-1])[0]["penultimate"]
    assert np.array_equal(whole[2], alone[0])
    assert np.array_equal(whole, moved[::-1])


# Choosing


class Fake:
    """Eager, and what a test makes of it."""

    name = "fake"

    def __init__(self, work, change=lambda outputs: outputs, most=None):
        self.details = {"version": "1"}
        self._eager, self._change, self._most = EagerEngine(work), change, most
        self.sizes = []

    def __call__(self, images):
        if self._most and len(images) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(images))
        return self._change(self._eager(images))


class Slow(EagerEngine):
    def __call__(self, images):
        super().__call__(images)
        super().__call__(images)
        return super().__call__(images)


def offers(make, **arguments):
    arguments = {"speedup": {("cpu", "fp32"): 2.0}, **arguments}
    return {"eager": Offer(Slow), "fake": Offer(make, **arguments)}


@pytest.fixture
def work(resnet):
    return replace(work_for(resnet, precision="fp32"), key="test")


def test_a_small_job_builds_nothing(work):
    def never(work):
        raise AssertionError("built for four images")

    for build_seconds, n_images in ((60.0, 100), (0.0, 15)):
        choice = choose_engine(
            work, photographs(work), n_images, offers=offers(never, build_seconds=build_seconds)
        )
        assert (choice.engine.name, choice.notes) == ("eager", [])


def test_a_large_job_takes_the_fastest_and_says_so(work):
    choice = choose_engine(work, photographs(work), 10**7, offers=offers(Fake, build_seconds=1.0))
    assert (choice.engine.name, choice.notes) == ("fake", [])
    assert set(choice.figures) == KNOWN
    assert choice.figures["parity"] == pytest.approx(1)
    tried = choice.figures["tried"]
    assert tried["fake"]["images_per_second"] > tried["eager"]["images_per_second"]


def test_wrong_features_are_refused_with_their_figure(work):
    def make(work):
        return Fake(work, lambda outputs: tuple(output.flip(1) for output in outputs))

    choice = choose_engine(work, photographs(work), 10**7, offers=offers(make))
    assert choice.engine.name == "eager"
    (note,) = choice.notes
    assert f"a cosine of {choice.figures['tried']['fake']['parity']:.4f}" in note
    with pytest.raises(EngineError, match=r"a cosine of .* where 0.9999 is needed"):
        choose_engine(work, photographs(work), 10**7, asked="fake", offers=offers(make))
    again = choose_engine(work, photographs(work), 10**7, offers=offers(make))
    assert again.figures["tried"] == {}, "known to be wrong: not tried again"


def test_features_that_are_no_numbers_are_refused(work):
    def make(work):
        return Fake(work, lambda outputs: tuple(output * float("nan") for output in outputs))

    choice = choose_engine(work, photographs(work), 10**7, offers=offers(make))
    assert choice.engine.name == "eager"
    assert "cosine of nan" in choice.notes[0]


def test_an_engine_that_cannot_be_built_is_told_once_and_replaced(work):
    def make(work):
        raise EngineError("Fake cannot compute this network: no.\n  Use another.")

    choice = choose_engine(work, photographs(work), 10**7, offers=offers(make))
    assert choice.notes == ["Fake cannot compute this network: no. eager computes."]
    assert choose_engine(work, photographs(work), 10**7, offers=offers(make)).notes == []
    with pytest.raises(EngineError, match="Use another"):
        choose_engine(work, photographs(work), 10**7, asked="fake", offers=offers(make))


def test_too_little_memory_to_compare_leaves_eager(work):
    choice = choose_engine(
        work, photographs(work), 10**7, offers=offers(lambda work: Fake(work, most=2))
    )
    assert choice.engine.name == "eager"
    assert "too little memory" in choice.notes[0]


def test_what_rows_came_from_before_goes_on_without_a_probe(work):
    first = choose_engine(work, photographs(work), 10**7, offers=offers(Fake))
    before = json.loads(json.dumps(first.figures))
    again = choose_engine(work, photographs(work), 1, preferred=before, offers=offers(Fake))
    assert (again.engine.name, again.figures, again.notes) == ("fake", before, [])
    assert again.engine.sizes == []


def test_what_replaces_it_is_told(work):
    before = {"name": "gone", "float32_until": ""}
    choice = choose_engine(work, photographs(work), 1, preferred=before, offers=offers(Fake))
    assert choice.engine.name == "eager"
    assert choice.notes[0].startswith("What was embedded so far was computed by gone. There is no")
    before = {"name": "fake", "float32_until": ""}
    choice = choose_engine(
        work, photographs(work), 1, asked="eager", preferred=before, offers=offers(Fake)
    )
    assert choice.notes == ["What was embedded so far was computed by fake; eager goes on."]


def test_float32_ends_where_it_ended_before(resnet):
    work = work_for(resnet, precision="bf16")
    images = photographs(work)
    for before, until in (("network.layer2.0.conv1", "network.layer2.0.conv1"), ("x", work.until)):
        preferred = {"name": "eager", "float32_until": before}
        choice = choose_engine(work, images, 1, preferred=preferred)
        assert choice.work.until == choice.figures["float32_until"] == until


def test_missing_engines_name_what_to_install(work, monkeypatch):
    for name, extra in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(EngineError, match=rf"pip install 'tlpipe\[{extra}\]'"):
            choose_engine(work, photographs(work), 1, asked=name)
    with pytest.raises(EngineError, match="Known: auto, eager, inductor"):
        choose_engine(work, photographs(work), 1, asked="tensorrt")


def test_cpu_engines_refuse_a_gpu(work):
    for name in ("openvino", "onnxruntime"):
        with pytest.raises(EngineError, match="on CPUs only, not on cuda"):
            OFFERS[name].make(replace(work, device=torch.device("cuda")))


def test_what_had_to_be_float32_goes_on_in_float32(lite0):
    work = work_for(lite0, precision="bf16", batch_size=8)
    images = photographs(work)
    before = {"name": "eager", "version": torch.__version__, "precision": "fp32",
              "float32_until": ""}  # fmt: skip
    choice = choose_engine(work, images, n_images=8, preferred=before)
    assert (choice.work.precision, choice.figures["precision"]) == ("fp32", "fp32")
    for found, expected in zip(choice.engine(images), exact(work, images), strict=True):
        assert torch.equal(found, expected)


def test_another_version_of_what_was_before_is_checked_again(work):
    wrong = lambda outputs: tuple(-output for output in outputs)  # noqa: E731
    given = offers(lambda work: Fake(work, wrong))
    before = {"name": "fake", "version": "0", "parity": 0.99999, "float32_until": ""}
    choice = choose_engine(work, photographs(work), 1, preferred=before, offers=given)
    assert choice.engine.name == "eager"
    assert "fake" in choice.notes[0]
    with pytest.raises(EngineError, match=r"cosine of -1\.0000"):
        choose_engine(work, photographs(work), 1, asked="fake", preferred=before, offers=given)


@pytest.mark.parametrize(
    "engine", [{"name": 3}, {"name": "eager", "float32_until": ["x"]}, {"precision": 7}]
)
def test_nonsense_of_a_stranger_about_engines_does_no_harm(work, engine):
    choice = choose_engine(work, photographs(work), 1, preferred=engine)
    assert choice.engine.name == "eager"


def test_half_precision_is_checked_with_fewer_images_where_memory_is_short(lite0):
    work = work_for(lite0, precision="bf16", batch_size=8)
    given = {"eager": Offer(lambda work: Fake(work, most=3))}
    choice = choose_engine(work, photographs(work), 10**6, offers=given)
    assert choice.engine.name == "fake"
    assert choice.figures["parity"] is None or choice.figures["parity"] >= 0.999


# In a store


def test_the_engine_is_written_down_and_goes_on(photos, tmp_path, resnet):
    settings = Settings(batch_size=4, precision="bf16", engine="eager")
    report = extract(open_source(str(photos)), resnet, settings, cache_dir=tmp_path)
    engine = json.loads((report.store / "store.json").read_text())["provenance"]["engine"]
    assert set(engine) == KNOWN
    assert (engine["name"], engine["version"]) == ("eager", torch.__version__)
    assert open_store(report.store).features().shape == (12, 512)


# What is kept


def test_a_damaged_memo_is_ignored(cache, resnet):
    Embedder(resnet, Settings(precision="bf16"))
    (file,) = cache.glob("*.json")
    facts = json.loads(file.read_text())
    assert facts == {"float32_until": ""}
    for damage in (b"", b"\x80{", b"[1]", b'{"float32_until": ["x"]}', b'{"float32_until": "x"}'):
        file.write_bytes(damage)
        assert Embedder(resnet, Settings(precision="bf16"))._work.until == ""
        assert json.loads(file.read_text()) == facts


@pytest.mark.parametrize("engines", [3, {"fake": 3}, {"fake": {"parity": "x"}}, {"eager": None}])
def test_nonsense_in_a_memo_of_rates_is_ignored(work, engines):
    Memo(work.key).note(engines=engines)
    choice = choose_engine(work, photographs(work), 10**7, offers=offers(Fake))
    assert choice.engine.name == "fake"


def test_a_memo_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, resnet):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Embedder(resnet, Settings(precision="bf16"))._work.until == ""
    assert user_cache() == tmp_path / "file" / "tlpipe"


def test_artefacts_are_checked_made_anew_and_do_not_pile_up(work, cache, monkeypatch):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "net.bin").write_bytes(b"network")

    folder = artefacts.keep("fake", work, build)
    assert artefacts.keep("fake", work, build) == folder
    assert len(built) == 1
    (folder / "net.bin").write_bytes(b"netwerk")
    assert (artefacts.keep("fake", work, build) / "net.bin").read_bytes() == b"network"
    (folder / "net.bin").unlink()
    artefacts.keep("fake", work, build)
    (folder / "digests.json").write_text("[]")
    artefacts.keep("fake", work, build)
    assert len(built) == 4
    monkeypatch.setattr(artefacts, "_MAX_KEPT", 3)
    for n in range(5):
        artefacts.keep("fake", replace(work, key=str(n)), build)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3


def test_a_folder_that_cannot_be_written_is_an_engine_error(work, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    with pytest.raises(EngineError, match=r"cannot be kept in .*engines"):
        artefacts.keep("fake", work, lambda folder: None)


# Memory


def forward_with(work, engine):
    return FrozenForward(work.net, work.preprocess, device=CPU, precision="fp32",
                         storage="float32", batch_size=4, engine=engine)  # fmt: skip


def test_out_of_memory_halves_and_goes_on(work):
    images = list(photographs(work).permute(0, 3, 1, 2))
    whole = forward_with(work, Fake(work))
    halved = forward_with(work, engine := Fake(work, most=2))
    expected, _ = whole(images)
    for _ in range(2):
        found, refused = halved(images)
        assert refused == {}
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)
    assert engine.sizes == [2, 2, 2, 2]
    assert halved.note == "cpu has too little memory for batches of 4 images, which are run 2 at " \
        "a time."  # fmt: skip
    assert whole.note == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_no_memory_at_all_is_a_resource_error(work, error):
    def change(outputs):
        raise error

    forward = forward_with(work, Fake(work, change))
    with pytest.raises(ResourceError, match=r"too little memory for batches of \d.*\n.*--batch-si"):
        forward(list(photographs(work).permute(0, 3, 1, 2)))


def test_other_errors_keep_their_traceback(work):
    def change(outputs):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        forward_with(work, Fake(work, change))([])


def test_results_may_be_asked_for_late_and_buffers_are_let_go(work):
    images = list(photographs(work).permute(0, 3, 1, 2))
    forward = forward_with(work, None)
    first, second = forward.submit(images[:3]), forward.submit(images[3:])
    late = first.result()[0]["penultimate"]
    assert np.array_equal(late, forward(images[:3])[0]["penultimate"])
    assert np.array_equal(second.result()[0]["penultimate"], forward(images[3:])[0]["penultimate"])
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


# Settings


def test_small_batches_are_the_default_on_a_cpu():
    assert 16 <= default_batch_size(CPU) <= 64
    assert default_batch_size(torch.device("cuda")) == 256


def test_a_recipe_of_before_says_to_extract_again():
    recipe = {"schema": 1, "precision": "bf16 after blocks.1"}
    with pytest.raises(MismatchError, match=r"bf16 after blocks.1(?s:.*)tlpipe extract DATA"):
        embedder_for(recipe, {}, n_files=1)


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("efficientnet_lite0", image_size=128)


def test_images_that_half_precision_blurs_are_computed_more_exactly(lite0):
    """The probe chose how much stays in float32; some images need more of it."""
    work = replace(work_for(lite0, precision="bf16", batch_size=8), until="")
    images = photographs(work)
    choice = choose_engine(work, images, n_images=8)
    assert choice.work.until != ""
    assert choice.figures["float32_until"] == choice.work.until
    assert choice.figures["parity"] >= 0.999
    assert min_cosine(choice.engine(images), exact(work, images)) >= 0.999
    (note,) = choice.notes
    assert note.startswith("On these images bf16 falls to a cosine of 0.99")
    assert f"everything before {choice.work.until} is computed in float32" in note


def test_a_blank_image_is_no_measure(lite0):
    work = work_for(lite0, precision="bf16", batch_size=8)
    images = photographs(work)
    images[3] = 255
    choice = choose_engine(work, images, n_images=8)
    assert (choice.work.until, choice.notes) == (work.until, [])
