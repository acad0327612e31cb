"""The published runs on samples of their corpora, by their commands."""

import json

import pytest
import samples

from xlformer import evaluate, prepare, train

RUNS = {
    "performer_pg19:debug": samples.write_pg19,
    "performer_imagenet64:debug": samples.write_images,
    "performer_protein:debug": samples.write_proteins,
    "performer_protein:debug,causal=False": samples.write_proteins,
}


@pytest.mark.parametrize("spec", RUNS)
def test_a_run_trains_and_is_scored(spec, tmp_path):
    RUNS[spec](tmp_path / "own")
    run = f"--workdir={tmp_path / 'run'}"
    manual = f"--config.data.manual_dir={tmp_path / 'own'}"
    few = "--config.eval.max_tokens=100"  # in training; the evaluation scores all
    assert train.main([f"--config={spec}", run, manual, few]) == 0
    assert evaluate.main([run, "--split=test"]) == 0
    card = json.loads((tmp_path / "run" / "evaluation-test.json").read_text())
    if "imagenet64" in spec:
        assert card["bits_per_dim"] == card["bits_per_byte"] > 0
        assert card["tokens_scored"] == 12_287 and card["word_ppl"] is None
    elif "pg19" in spec:
        # Every word of both books, and the first token alone is not scored.
        assert card["words_scored"] == 539 and card["word_ppl"] > 1
        assert card["documents"]
    elif "False" in spec:
        assert card["objective"] == "masked" and not card["documents"]
    else:
        assert card["documents"] and 20 < card["ppl"] < 30
        assert card["bytes_scored"] == card["tokens_scored"]


@pytest.mark.parametrize(
    ("spec", "write", "wrong", "message"),
    [
        (
            "performer_pg19",
            samples.write_pg19,
            "train/1.txt",
            "1.txt: the book is empty",
        ),
        (
            "performer_imagenet64",
            samples.write_images,
            "train_64x64/0000003.png",
            "0000003.png: not a PNG file, or cut off",
        ),
        ("performer_protein", samples.write_proteins, "few.fasta", "the file is empty"),
    ],
)
def test_what_is_wrong_is_one_line(spec, write, wrong, message, tmp_path, capsys):
    write(tmp_path / "own")
    (tmp_path / "own" / wrong).write_bytes(b"")
    arguments = [f"--config={spec}", f"--manual_dir={tmp_path / 'own'}"]
    assert prepare.main([*arguments, f"--directory={tmp_path / 'made'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list((tmp_path / "made").glob("*/card.json"))
