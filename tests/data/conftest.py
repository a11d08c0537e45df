import pytest

from pipeline.data import codecs


@pytest.fixture(params=["the best", "torchvision", "pillow"])
def decoders(request, monkeypatch):
    """Run a test with the decoders of this machine, of an older torch, and with Pillow alone."""
    best = codecs.DECODERS
    older = {"torchvision": codecs._torchvision_decoders(), "pillow": {}}.get(request.param, best)
    monkeypatch.setattr(codecs, "DECODERS", older)
