"""``tlpipe finetune --cached`` from the outside."""

from tests.finetune.conftest import write_photos


def test_activations_are_stored_and_trained_on(tlpipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    options = (
        "--backbone", "timm:test_efficientnet", "--weights", "random", "--image-size", "32",
        "--lr", "0.001", "--epochs", "1", "--threads", "1", "--device", "cpu", "--cached",
    )  # fmt: skip

    code, out, err = tlpipe("finetune", "photos", *options, "--policy", "last:1", "--views", "2")

    assert code == 0
    assert "Activations of blocks.3 (48×2×2, float16) for 30 images of 2 views each take" in err
    assert out.strip().splitlines()[-1].endswith("finetune-last1-timm-test_efficientnet-0001")

    code, _, err = tlpipe("finetune", "photos", *options, "--policy", "last:1", "--augment", "rand")
    assert code == 2
    assert "cannot be augmented anew" in err
