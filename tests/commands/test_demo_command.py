"""``tlpipe demo`` from the outside, on fewer pixels and one head."""

from pathlib import Path

from click.testing import CliRunner

from pipeline.commands import cli, demo


def test_the_demo_ends_with_a_page_and_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "HEADS", ("prototype",))
    monkeypatch.setattr(demo, "IMAGE_SIZE", 32)
    places = ["--cache", str(tmp_path / "cache"), "--runs", str(tmp_path / "runs")]

    result = CliRunner().invoke(cli, ["demo", *places, "--quiet"], catch_exceptions=False)

    *_, page, run = result.stdout.splitlines()
    assert (Path(run) / "run.json").is_file()
    html = Path(page.removeprefix("page: ")).read_text(encoding="utf-8")
    assert "<h1>Which head: digits</h1>" in html
    for features in ("pixels-8, ", "efficientnet_lite0, penultimate", "efficientnet_lite0, 8 lay"):
        assert f"prototype ({features}" in html
