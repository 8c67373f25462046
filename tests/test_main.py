"""`python -m sret_jax`."""

import os
import pathlib
import subprocess
import sys

import pytest

from sret_jax.__main__ import main
from sret_jax.models.zoo import PUBLISHED

ROOT = pathlib.Path(__file__).parents[1]


def test_the_table_has_a_line_for_each_model(capsys, monkeypatch):
    monkeypatch.setattr("sret_jax.__main__.PUBLISHED", {"sret_t": PUBLISHED["sret_t"]})
    main([])
    _, _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["sret_t", "224", "4,755,979", "1,112,444,672", "4.8", "M", "1.1", "G", "76.0", "%"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_usage_and_names_the_programs(flag, capsys):
    with pytest.raises(SystemExit) as end:
        main([flag])
    shown = capsys.readouterr()
    assert (end.value.code, shown.err) == (0, "")
    assert "usage: python -m sret_jax" in shown.out
    assert "python -m sret_jax.plan" in shown.out
    assert "4,755,979" not in shown.out


@pytest.mark.parametrize("words", [["plan"], ["sret_t"], ["--bogus"], ["train", "--config=configs/sret_t.py"]])
def test_unknown_words_are_an_error_that_names_what_is_there(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    shown = capsys.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert f"unknown arguments {' '.join(words)}" in shown.err
    assert "python -m sret_jax.plan" in shown.err


def test_every_program_that_help_names_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    named = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  python ")]
    files = [words[2].replace(".", "/") if words[1] == "-m" else words[1] for words in named]
    assert len(files) == 7
    for file in files:
        assert any((ROOT / place).is_file() for place in (file, f"{file}.py", f"{file}/__main__.py")), file


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    short = "import sret_jax.__main__ as program; program.PUBLISHED = {}; program.main([])"
    command = [sys.executable, "-c", short]
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")
