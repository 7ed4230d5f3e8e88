"""`convkit data`: the table, the galleries, and wrong input."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from convkit import cli
from convkit.lab import LabError, data, data_command, plots


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", *arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_data_shows_counts_and_draws_galleries(capsys, tmp_path):
    status, out, err = run(capsys, "digits5k", "--out", str(tmp_path / "new"))
    assert status == 0 and err == ""
    lines = [line.split() for line in out.splitlines()]
    for digit in "0123456789":
        assert [digit, "340", "60", "100"] in lines
    assert ["All", "3,400", "600", "1,000"] in lines
    assert "Pictures 1x28x28" in out and "mean 0.1315; standard deviation 0.3087" in out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"digits5k-samples.png", "digits5k-augmented.png"}
    for path in (tmp_path / "new").iterdir():
        assert str(path) in out and len(np.unique(pixels(path.read_bytes()))) > 50


def test_data_with_an_augmentation_of_ones_own(capsys, tmp_path):
    status, _, _ = run(capsys, "digits5k", "--out", str(tmp_path), "--augment", "pad_crop:2,reflect flip")
    assert status == 0 and (tmp_path / "digits5k-augmented.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits5"], "no such set; did you mean digits5k?"),
        (["digits5k", "--augment", "flop"], "did you mean flip?"),
        (["folder:nowhere"], "folder:nowhere: no such folder"),
        ([], "Missing argument 'name'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith("convkit: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot write .*digits5k-samples.png: .*; choose another folder with --out"):
        data_command.run_data("digits5k", out=tmp_path / "file", console=Console(quiet=True))


def test_the_test_pictures_are_not_looked_at(monkeypatch, tmp_path, few):
    blind = data.dataclasses.replace(few, test=data.Split(None, few.test.labels))
    monkeypatch.setattr(data, "load", lambda name: blind)
    assert len(data_command.run_data("digits5k", out=tmp_path, console=Console(quiet=True))) == 2


@pytest.mark.parametrize("classes", [2, 100])
def test_many_classes_and_a_folder(classes, monkeypatch, tmp_path):
    labels = torch.arange(3 * classes) % classes
    split = data.Split(torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8), labels)
    names = tuple(f"class number {i}" for i in range(classes))
    found = data.Data("folder:/some/where/pets", split, split, split, names, "made up")
    monkeypatch.setattr(data, "load", lambda name: found)
    paths = data_command.run_data("x", out=tmp_path, console=Console(quiet=True))
    assert [path.name for path in paths] == ["folder-pets-samples.png", "folder-pets-augmented.png"]


def test_a_gallery_shows_pixels_as_they_are():
    red, small = torch.zeros(3, 10, 10), torch.full((3, 5, 5), 0.2)
    small[2] = 1
    red[0] = 1
    seen = pixels(
        plots.gallery([[red, small], [small]], "title", titles=["one $x^", "a very long title of a picture", "x"])
    )
    assert (seen == [255, 0, 0]).all(2).sum() == 100 * 100  # each pixel ten by ten
    assert (seen == [51, 51, 255]).all(2).sum() == 2 * 50 * 50
    large = pixels(plots.gallery([[torch.zeros(1, 300, 200)]], "title"))
    assert (large == 0).all(2).sum() >= 112 * 74
