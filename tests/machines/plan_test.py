"""Plans: the FLOPs of the paper's models, what a program sends, what does not fit."""

import json
from types import SimpleNamespace

import jax
import pytest
from training_runs import PERIOD, SYMBOLS, bag, refusal

from xlformer import config as config_lib
from xlformer import models, plan, prepare
from xlformer.machines import chips, plan_text, rehearsal, topologies, traffic
from xlformer.training.compiling import TrainingStep

WT103_SHARES = (0.86, 0.055, 0.06, 0.025)


def count(name, vocab_size, *, batch_size, segment_length, shares=None, **options):
    model = models.build(config_lib.load(name).model, vocab_size=vocab_size)
    sizes = {"batch_size": batch_size, "segment_length": segment_length}
    found = model.flops(**sizes, shares=shares, **options)
    tokens = 1e6 * batch_size * segment_length
    return found, tokens


# Counted by hand, in MFLOP a token: queries see half of their own segment.
@pytest.mark.parametrize(
    ("name", "vocab_size", "rows", "length", "forward", "training"),
    [
        ("enwik8_base", 204, 22, 512, 117.2, 338),
        ("enwik8_large", 204, 16, 768, 781, 2235),
        ("wt103_base", 267_735, 60, 150, 123.1, 358),
        ("wt103_large", 267_735, 128, 384, 636, 1831),
    ],
)
def test_flops_of_the_papers_models(name, vocab_size, rows, length, forward, training):
    shares = WT103_SHARES if name.startswith("wt103") else None
    sizes = {"batch_size": rows, "segment_length": length, "shares": shares}
    found, tokens = count(name, vocab_size, **sizes)
    assert found.forward / tokens == pytest.approx(forward, rel=0.02)
    assert found.training / tokens == pytest.approx(training, rel=0.02)


def test_zipfs_law_stands_for_the_words_of_wikitext():
    sizes = {"batch_size": 60, "segment_length": 150}
    law, _ = count("wt103_base", 267_735, **sizes)
    stated, _ = count("wt103_base", 267_735, **sizes, shares=WT103_SHARES)
    assert law.training == pytest.approx(stated.training, rel=0.02)
    model = models.build(config_lib.load("wt103_base").model, vocab_size=267_735)
    assert sum(model.config.bins.shares()) == pytest.approx(1)


def test_a_cache_saves_the_projections_of_the_memory():
    config = config_lib.load("enwik8_base")
    config.model.update(memory_length=2100, same_length=True)
    found = {}
    for cached in (False, True):
        model = models.build(config.model, vocab_size=204)
        counted = model.flops(batch_size=1, segment_length=80, cached=cached)
        found[cached] = (counted.forward - counted.vocabulary) / 80 / 12 / 1e6
    assert found[False] == pytest.approx(54.6, rel=0.02)
    assert found[True] == pytest.approx(12.8, rel=0.02)


def test_a_window_and_other_encodings_change_the_attention_only():
    config = config_lib.load("enwik8_base")
    sizes = {"batch_size": 22, "segment_length": 512}
    full = models.build(config.model, vocab_size=204).flops(**sizes)
    config.model.window = 511
    cut = models.build(config.model, vocab_size=204).flops(**sizes)
    assert cut.attention / full.attention == pytest.approx(512 / 768, rel=0.01)
    config.model.update(attn_type=2, allow_incoherent_positions=True)
    plain = models.build(config.model, vocab_size=204).flops(**sizes)
    assert plain.attention == cut.attention * 2 / 3 and plain.positions == 0
    assert plain.feed_forward == full.feed_forward


# Traffic ------------------------------------------------------------------------------

LOOP = """HloModule step

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = bf16[4,8]{1,0:T(8,128)} all-gather(%x), replica_groups=[4,2]<=[8], chain_id="0"
  %again = bf16[4,8]{1,0} all-gather(%x), replica_groups=[4,2]<=[8], chain_id="0"
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(3), metadata={}
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %ar = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
}

ENTRY %main (p: f32[8]) -> f32[] {
  %w = (s32[], f32[8]) while(%t), condition=%condition.1, body=%body.1
  %f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %s = (f32[2,3]{1,0}, pred[10]{0}) all-reduce-start(%a, %b), channel_id=1
}
"""


def test_collectives_count_by_kind_round_and_chain():
    found = traffic.collectives(LOOP, 8)
    assert found["all-gather"] == (3, 3 * 64, 3 * 32)
    assert found["reduce-scatter"] == (1, 16, 3 * 16)
    assert found["all-reduce"] == (1, 34, 34 * 2 * 7 / 8)


BRANCHES = """HloModule step

%few.1 (p: f32[8]) -> f32[8] {
  %one = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}
}

%many.1 (p: f32[8]) -> f32[8] {
  %one = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}
  %two = f32[8]{0} all-reduce(%one), replica_groups={{0,1}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%few.1, %many.1}
}
"""


def test_of_a_conditional_the_branch_that_sends_most_counts():
    assert traffic.collectives(BRANCHES, 2)["all-reduce"] == (2, 64, 64)


def debug(**model):
    config = config_lib.load("quickstart:debug")
    config.model.update(scan_layers=True, n_layer=3, vocab_size=256, **model)
    config.train.update(batch_size=8)
    return config


def test_data_parallel_training_sends_the_least_possible():
    found = plan.plan(debug(), "local", sizes={"data": 8})
    assert found["mesh"]["data"] == found["devices"] == 8
    (kind, sent), *others = found["collectives"].items()
    assert kind == "all-reduce" and not others
    parameters = found["memory"]["parameters"]
    assert sent["size"] == parameters + 4  # and the loss
    assert found["least_sent"]["gradients"] == parameters * 2 * 7 / 8


def test_split_parameters_take_a_share_of_the_memory_and_more_traffic():
    split = {"data": 2, "fsdp": 4}
    split = plan.plan(debug(), "v5e:2x4", sizes=split, arithmetic=True)
    whole = plan.plan(debug(), "v5e:2x4", sizes={"data": 8}, arithmetic=True)
    assert split["how"] == whole["how"] == "arithmetic"
    share = split["memory"]["optimizer"] / whole["memory"]["optimizer"]
    assert 1 / 4 < share < 1 / 2  # biases and norms are copies
    assert split["least_sent"]["parameters"] > whole["least_sent"]["parameters"] == 0


def test_how_each_parameter_is_split_is_listed(capsys, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["--config=enwik8_base:batch=64", "--topology=v5e:2x4", "--arithmetic"]
    arguments += ["--mesh=data=2,fsdp=2,tensor=2", f"--json={file}"]
    assert plan.main(arguments) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    arrays = {x["name"]: x for x in found["parameters"]}
    matrix = arrays["trunk/layers/feed_forward/in_kernel"]
    assert matrix["over"] == [[], ["fsdp"], ["tensor"]]
    assert matrix["bytes"] == 4 * 12 * 512 * 2048 / 4
    assert arrays["trunk/layers/norm/scale"]["over"] == [[], []]
    assert sum(x["bytes"] for x in arrays.values()) == found["memory"]["parameters"]
    assert f"of {len(arrays)} arrays" in shown and "of their 41,055,436 " in shown
    assert "in_kernel" not in shown
    assert plan.main([*arguments, "--parameters"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "in_kernel" in x)
    cells = [cell.strip() for cell in line.split("  ") if cell]
    assert cells[1:] == ["12 x 512 x 2048", "- x fsdp x tensor", "12.00 MiB"]


def test_a_compiler_that_counts_nothing_is_no_reason_to_fail(monkeypatch, capsys):
    real = TrainingStep.compile

    def compile_step(step, batch):
        compiled = real(step, batch)
        return SimpleNamespace(
            memory_analysis=compiled.memory_analysis,
            cost_analysis=lambda: None,  # as for a GPU that is not here
            as_text=compiled.as_text,
        )

    monkeypatch.setattr(TrainingStep, "compile", compile_step)
    arguments = ["--config=quickstart:debug", "--topology=local", "--mesh=data=2"]
    assert plan.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "compiled in" in shown and "all-reduce" in shown
    assert "FLOP and" not in shown


def test_without_a_compiler_it_is_arithmetic_and_says_so(monkeypatch, capsys):
    def missing(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", missing)
    assert plan.main(["--config=enwik8_base:batch=64", "--topology=h200:8"]) == 0
    shown = capsys.readouterr().out
    assert "arithmetic, nothing compiled" in shown and "xlformer[cuda12]" in shown
    assert "131.32 GiB" in shown


# Memory and money ---------------------------------------------------------------------


def test_what_does_not_fit_is_exit_code_1_and_what_to_change(capsys, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["--config=enwik8_large:batch=64", "--topology=v5e:2x2"]
    arguments += ["--arithmetic", f"--json={file}"]
    assert plan.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown and "arithmetic" in shown
    found = json.loads(file.read_text())
    assert "--config.model.remat=full" in found["advice"]
    assert found["memory"]["total"] > found["memory"]["available"]
    advised = [*arguments, "--config.model.remat=full"]
    assert plan.main([*advised, "--config.train.micro_batches=4"]) == 0


def test_a_program_that_the_compiler_refuses_does_not_fit(monkeypatch, capsys):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 335G exceeds 15.75G")

    monkeypatch.setattr(TrainingStep, "compile", refuse)
    arguments = ["--config=quickstart:debug", "--topology=local", "--mesh=data=2"]
    assert plan.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "335G exceeds 15.75G" in shown and "DOES NOT FIT" in shown
    assert "--mesh=data=1,fsdp=2" in shown


def test_the_schedule_is_priced_at_the_mfu(capsys, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["--config=enwik8_base:batch=64", "--topology=v5p:4x4x4"]
    arguments += ["--arithmetic", "--price_per_chip_hour=3", f"--json={file}"]
    assert plan.main([*arguments, "--mfu=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "chip-hours" in shown and "is the most that this leaves" not in shown
    assert plan.main([*arguments, "--mfu=0.9"]) == 0
    assert "MFU 0.70 is the most that this leaves" in capsys.readouterr().out
    assert plan.main([*arguments, "--mfu=0.5"]) == 0
    found = json.loads(file.read_text())
    step = found["flops"]["useful"] / 64 / 459e12 / 0.5
    assert found["seconds"]["at_mfu"] == pytest.approx(step)
    hours = 400_000 * (step + found["seconds"]["links"]) / 3600
    assert found["schedule"]["price"] == pytest.approx(3 * 64 * hours)
    assert found["memory"]["parameters"] == 4 * 41_055_436
    # Parameters and Adam's two moments, read and written, in float32.
    moved = 2 * 3 * 4 * 41_055_436
    assert found["seconds"]["memory"] == pytest.approx(moved / 2765e9, rel=1e-4)


def test_a_chip_is_known_by_its_whole_name():
    for kind, name in {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA L4": "l4",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }.items():
        assert chips.of_kind(kind) is chips.CHIPS[name]
    # An L40 is no L4, and a seventh of an A100 is none.
    for kind in ("cpu", "NVIDIA L40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):
        assert chips.of_kind(kind) is None


def test_datasheets_are_of_one_kind():
    """A slip of 1,000 or of 2, and a card entered twice, would show."""
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)
    for name, chip in chips.CHIPS.items():
        # From an RTX 3090 to a v6e; and how long a read of the whole memory takes.
        assert 70 < chip.flops / chip.bandwidth < 600, name
        assert 0.015 < chip.memory / chip.bandwidth < 0.09, name
        assert chip.link < chip.bandwidth / 3 and chip.source, name


# Bad input ----------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_prepared_data(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(PERIOD * 61, encoding="utf-8")
    config = config_lib.load(f"text:path={text},unit=chars,debug")
    line = refusal(rehearsal.vocab_size, "text", config)
    assert "config.model.vocab_size" in line and "config.data.directory" in line
    config.data.directory = str(tmp_path / "prepared")
    refusal(rehearsal.vocab_size, "text", config)
    size = prepare.prepare(config.data).vocabulary.size
    assert rehearsal.vocab_size("text", config) == size >= SYMBOLS
    config.model.vocab_size = 99
    assert rehearsal.vocab_size("text", config) == 99


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--topology=v7:2x2"], ["v7:2x2", "v5p:4x4x4", "h100", "local"]),
        (["--topology=v5p:4x4"], ["v5p:4x4 ", "known"]),
        (["--topology=v5e:4xa"], ["v5e:4xa", "known"]),
        (["--topology=v5e:4x4", "--mesh=data=3,fsdp=-1"], ["data=3", "16 devices"]),
        (
            ["--topology=v5e:4x4", "--mesh=rows=2"],
            ["--mesh", "'rows'", "fsdp"],
        ),
        (["--topology=v5e:4x4", "--config.train.batch_size=22"], ["22", "16 row"]),
        (["--topology=v5e:4x4", "--mfu=0"], ["--mfu=0.0"]),
        (["--topology=h100", "--price_per_chip_hour=-1"], ["-1.0", "negative"]),
        (["--topology=h100", "--config=text:unit=chars"], ["config.model.vocab_size"]),
    ],
)
def test_bad_input_is_one_line(arguments, fragments, capsys):
    assert plan.main(["--config=enwik8_base", "--arithmetic", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(fragment in line for fragment in fragments), line


def test_a_mesh_smaller_than_the_slice_leaves_chips_idle():
    config = config_lib.load("enwik8_base:batch=4", ["model.vocab_size=204"])
    found = plan.plan(config, "v5e:2x2", sizes={"data": 1}, arithmetic=True)
    assert found["devices"] == 1
    assert found["dtype"] == "bfloat16"  # not what the devices here would choose
    assert config.model.dtype == "auto"  # the caller's config stays as it was
    line = refusal(plan.plan, config, "v5e:2x2", sizes={"data": 5})
    assert "data=5" in line and "4 devices" in line


def test_the_least_traffic_of_tensor_is_that_of_activations():
    config = debug()
    found = plan.plan(config, "v5e:1x2", sizes={"tensor": 2}, arithmetic=True)
    tokens = 8 * config.train.segment_length
    assert found["least_sent"] == {
        "gradients": 0,
        "parameters": 0,
        "activations": 4 * 3 * tokens * 16 * 2,
    }


def test_what_a_model_does_not_know_is_said_and_not_guessed():
    config, model = debug(), bag(vocab_size=11)
    sizes = {"data": 2, "tensor": 2}
    found = plan.plan(config, "v5e:2x2", model=model, sizes=sizes, arithmetic=True)
    assert found["memory"]["parameters"] == 4 * (11 * 11 + 1)
    assert found["memory"]["temporaries"] is None and found["memory"]["fits"] is None
    assert found["flops"] is None and "schedule" not in found
    assert found["seconds"].keys() == {"links", "memory"}
    assert found["least_sent"]["gradients"] == 4 * 122 * 2 * 1 / 2
    assert found["least_sent"]["activations"] is None
    shown = plan_text.render(found)
    assert "temporaries not known" in shown and "activations not known" in shown
    (flops,) = (line for line in shown.splitlines() if line.startswith("FLOPs"))
    assert "not known" in flops
    sizes = {"data": 2}
    compiled = plan.plan(config, "local", model=model, sizes=sizes)
    assert compiled["memory"]["temporaries"] > 0
    assert "all-reduce" in compiled["collectives"]
