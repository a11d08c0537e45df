import json

import pytest
from click.testing import CliRunner

from pipeline.commands import backbones
from pipeline.errors import UnknownNameError


def run(*arguments):
    result = CliRunner().invoke(backbones.command, arguments)
    if result.exception is not None:
        raise result.exception
    return result


def test_the_bundled_network_comes_first_and_says_that_it_is_here():
    result = run()
    lines = [line.split() for line in result.stdout.splitlines() if "×" in line]
    assert lines[0] == ["efficientnet_lite0", "4.7", "M", "1,280", "224×224", "yes,", "bundled"]
    assert lines[1][0] == "pixels:32"
    assert "torchvision:resnet18" in result.stdout
    assert "of timm" in result.stderr
    assert "tlpipe backbones resnet" in result.stderr


def test_a_piece_of_a_name_lists_every_name_with_it():
    document = json.loads(run("*test_vit*", "--json", "--quiet").stdout)
    names = [facts["name"] for facts in document["backbones"]]
    assert document["n_matches"] == len(names)
    assert all("test_vit" in name for name in names)
    assert len(names) > 1


def test_a_long_list_is_cut_for_people_and_whole_for_programs(monkeypatch):
    monkeypatch.setattr(backbones, "MAX_ROWS", 2)
    document = json.loads(run("torchvision:resnet*", "--json").stdout)
    assert len(document["backbones"]) == document["n_matches"] > 2
    result = run("torchvision:resnet*")
    assert "2 of" in result.stderr
    assert "--json all of them" in result.stderr


def test_a_glob_is_understood():
    result = run("torchvision:resnet[13]*")
    names = [line.split()[0] for line in result.stdout.splitlines() if "×" in line]
    assert names == [f"torchvision:resnet{n}" for n in (101, 152, 18, 34)]


def test_one_name_shows_its_weights_and_layers():
    result = run("resnet50")
    assert "25.6 M parameters" in result.stdout
    assert "IMAGENET1K_V2 (default), IMAGENET1K_V1" in result.stdout
    assert ["layer4", "2048×7×7"] in [line.split() for line in result.stdout.splitlines()]
    assert "tlpipe extract DATA --backbone resnet50" in result.stderr


def test_modules_lists_every_module_path():
    document = json.loads(run("efficientnet_lite0", "--modules", "--json", "--quiet").stdout)
    assert document["stages"] == [f"blocks.{i}" for i in range(7)]
    assert document["layers"]["blocks.3.0.conv_dw"] == [240, 14, 14]
    assert document["layers"]["penultimate"] == [1280]


def test_a_tag_shows_its_own_input_size():
    document = json.loads(run("vit_b_16:IMAGENET1K_SWAG_E2E_V1", "--json", "--quiet").stdout)
    assert (document["height"], document["layers"]["penultimate"]) == (384, [768])


def test_quiet_prints_nothing_on_stderr():
    assert run("pixels:16", "--quiet").stderr == ""


def test_a_pattern_without_a_match_is_answered_with_close_names():
    with pytest.raises(UnknownNameError, match="resnet50"):
        run("reznet50")
