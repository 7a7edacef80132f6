"""Whole runs of `gguflora.train` on tiny models: what is written, how a run goes on, and how it fails."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import gguflora
from gguflora.errors import MismatchError, OutputError, TrainingDataError, TrainingError, UsageError
from gguflora.training import loop, run
from gguflora.training.layers import PackedLinear
from gguflora.training.outputs import write_folder
from support import builders
from support.oracles.gguf_files import read_metadata
from support.oracles.llama_cpp import llama_logits

SAY = "the cat sat on the mat and the dog ran "
OPTIONS = {"rank": 4, "lr": 1e-2, "steps": 6, "batch": 4, "eval_every": 3, "threads": 1, "precision": "f32"}


@pytest.fixture(scope="module")
def base():
    return builders.gguf_model("llama", "wide", "Q4_K_M")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Q{n}:", "completion": SAY[n % 7 :] + "x" * (n % 5)} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """One run, and its report."""
    out = tmp_path_factory.mktemp("run") / "tuned"
    seen = []
    report = gguflora.train(base, data, out, **OPTIONS, sample=["Q1:"], show_plan=seen.append, watch=seen.append)
    return out, report, seen


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(one, other):
    assert weights(one).keys() == weights(other).keys()
    for name, values in weights(one).items():
        np.testing.assert_array_equal(values, weights(other)[name], err_msg=name)


def test_the_report(trained):
    out, report, seen = trained
    assert (report.output, report.lora) == (out, out.with_name("tuned.gguf"))
    assert report.valid_loss < report.base_valid_loss - 0.5
    assert report.steps == 6 and len(report.curve) == 6
    assert [row["step"] for row in report.curve if row["valid_loss"] is not None] == [3, 6]
    assert report.valid_loss == min(row["valid_loss"] for row in report.curve if row["valid_loss"] is not None)
    assert report.trained_tokens > 0 and report.seconds > 0 and report.peak_memory > 1e8
    assert set(report.scales) == {"0.5", "0.75", "1", "1.25", "1.5"}
    assert report.samples[0].prompt == "Q1:" and report.samples[0].base != report.samples[0].trained
    plan, *steps = seen
    assert plan.samples == 23 and plan.valid_samples == 1 and plan.self_check < 0.05
    assert plan.example.count("[[") == 1 and plan.example.startswith("Q")
    assert [done.step for done in steps] == [1, 2, 3, 4, 5, 6]
    fields = json.loads(json.dumps(report.to_dict()))
    assert {"base_valid_loss", "valid_loss", "steps", "trained_tokens", "seconds", "peak_memory", "curve"} <= set(
        fields
    )
    assert set(fields["curve"][0]) == {"step", "loss", "valid_loss", "lr"}


def test_the_outputs_load_in_peft_and_llama_cpp(trained, base):
    out, report, _ = trained
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base.parent, gguf_file=base.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.tensor([list(range(40, 64))])
    with torch.inference_mode():
        before = model(tokens).logits[0].numpy()
        after = peft.PeftModel.from_pretrained(model, out).eval()(tokens).logits[0].numpy()
    assert np.abs(after - before).max() > 0.5
    hot = llama_logits(base, report.lora)
    assert np.abs(hot - after).max() < 0.2 * np.abs(after - before).max()  # llama.cpp rounds activations to 8 bits
    assert not out.with_name("tuned.training").exists()


def test_the_metadata_says_how_it_was_made(trained, base, data):
    out, report, _ = trained
    from gguflora.files.checksum import sha256_of

    found = read_metadata(report.lora)
    record = json.loads((out / "training.json").read_text())
    assert found["gguflora.training.base_sha256"] == record["base_sha256"] == sha256_of(base)
    assert found["gguflora.training.data_sha256"] == record["data_sha256"] == sha256_of(data)
    assert float(found["gguflora.training.valid_loss"]) == record["valid_loss"] == report.valid_loss
    assert json.loads(found["gguflora.training.settings"])["rank"] == 4


def test_a_record_with_a_loss_that_overflowed_is_strict_json(trained, tmp_path):
    """The factors may be finite when the loss is not."""
    out = trained[0]
    tensors = load_file(out / "adapter_model.safetensors")

    class Trained:
        def tensors(self, values):
            return values

        def config(self):
            return json.loads((out / "adapter_config.json").read_text())

    write_folder(tmp_path, Trained(), tensors, {"valid_loss": math.inf, "settings": {"lr": math.nan}})
    record = json.loads((tmp_path / "training.json").read_text(), parse_constant=pytest.fail)
    assert record["valid_loss"] is None
    assert record["valid_loss_text"] == "inf"
    assert record["settings"] == {"lr": None, "lr_text": "nan"}


def test_the_held_out_loss_is_that_of_torch(trained, base, data):
    """Torch, on the weights as floats with the written adapter, for the row that was held out."""
    from random import Random

    out, report, _ = trained
    [held] = Random(0).sample(range(24), 1)
    row = json.loads(data.read_text().splitlines()[held])
    tokenizer = builders._tokenizer()
    prompt = tokenizer(row["prompt"]).input_ids
    tokens = [*tokenizer(row["prompt"] + row["completion"]).input_ids, 257]
    model = transformers.AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    losses = []
    for each in (model, lambda: peft.PeftModel.from_pretrained(model, out).eval()):
        found = each() if not isinstance(each, torch.nn.Module) else each
        labels = torch.tensor([[-100] * len(prompt) + tokens[len(prompt) :]])
        with torch.inference_mode():
            losses.append(found(torch.tensor([tokens]), labels=labels).loss.item())
    assert report.base_valid_loss == pytest.approx(losses[0], abs=0.02)
    assert report.valid_loss == pytest.approx(losses[1], abs=0.02)


def test_the_same_seed_gives_the_same_bits(trained, base, data, tmp_path):
    gguflora.train(base, data, tmp_path / "tuned", **OPTIONS)
    assert_same_weights(trained[0], tmp_path / "tuned")


def test_parts_of_a_step_change_nothing_but_rounding(trained, base, data, tmp_path):
    gguflora.train(base, data, tmp_path / "tuned", **OPTIONS, accumulate=4)
    for name, values in weights(tmp_path / "tuned").items():
        np.testing.assert_allclose(values, weights(trained[0])[name], atol=2e-3, err_msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_run_goes_on_with_the_same_bits(base, data, tmp_path, monkeypatch, dropout):
    options = OPTIONS | {"dropout": dropout}
    gguflora.train(base, data, tmp_path / "whole", **options)

    def interrupt(done):
        if done.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gguflora.train(base, data, tmp_path / "tuned", **options, watch=interrupt)
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "tuned.gguf").exists()
    with pytest.raises(UsageError, match="--resume"):
        gguflora.train(base, data, tmp_path / "tuned", **options)
    with pytest.raises(TrainingError, match="begun with rank 4"):
        gguflora.train(base, data, tmp_path / "tuned", **options | {"rank": 8}, resume=True)
    steps = []
    report = gguflora.train(base, data, tmp_path / "tuned", **options, resume=True, watch=steps.append)
    assert [done.step for done in steps] == [3, 4, 5, 6] and len(report.curve) == 6
    assert_same_weights(tmp_path / "whole", tmp_path / "tuned")
    assert not (tmp_path / "tuned.training").exists()
    with pytest.raises(TrainingError, match="no run to resume"):
        gguflora.train(base, data, tmp_path / "tuned", **options, resume=True, force=True)


def test_ctrl_c_ends_with_130_and_the_line_that_resumes(base, data, tmp_path):
    command = [
        sys.executable,
        "-P",
        "-m",
        "gguflora",
        "train",
        str(base),
        "--data",
        str(data),
        "-o",
        "tuned",
        "--rank",
        "4",
    ]
    command += ["--lr", "1e-2", "--steps", "400", "--batch", "4", "--eval-every", "200", "--threads", "1"]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "tuned.training/state.safetensors").exists():
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 130, said
    assert f"to go on: gguflora {' '.join(command[4:])} --resume" in said
    assert not (tmp_path / "tuned").exists()


def test_early_stop_keeps_the_best(base, data, tmp_path):
    options = OPTIONS | {"lr": 0.3, "steps": 30, "eval_every": 1, "schedule": "constant", "max_grad_norm": 0}
    try:
        report = gguflora.train(base, data, tmp_path / "tuned", **options, patience=2)
    except TrainingError:
        pytest.skip("so high a rate diverges at once here")
    assert report.stopped == "early stop" and report.steps == report.best_step + 2 < 30


def test_time_is_up(base, data, tmp_path):
    options = {**OPTIONS, "steps": None, "hours": 1e-9}
    report = gguflora.train(base, data, tmp_path / "tuned", **options)
    assert report.steps <= 1 and report.valid_loss is not None
    assert (tmp_path / "tuned.gguf").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_best(base, data, tmp_path, monkeypatch):
    real, count = loop.backward_loss, iter(range(100))
    monkeypatch.setattr(loop, "backward_loss", lambda *a, **k: math.nan if next(count) == 4 else real(*a, **k))
    with pytest.raises(TrainingError, match=r"loss is not finite in step 5, at .*rows\.jsonl:\d+.*of step 3, are kept"):
        gguflora.train(base, data, tmp_path / "tuned", **OPTIONS, accumulate=1)
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "tuned.gguf").exists()
    from safetensors.numpy import load_file

    state = load_file(tmp_path / "tuned.training/state.safetensors")
    assert any(name.startswith("best/") for name in state)


def test_a_full_disk_loses_nothing(base, data, tmp_path, monkeypatch):
    from gguflora.training import checkpoints

    gguflora_output, count = checkpoints.atomic_output, iter(range(100))

    def full(path, **options):
        if next(count) == 1:
            raise OutputError(f"{path}: cannot be written: No space left on device")
        return gguflora_output(path, **options)

    gguflora.train(base, data, tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "atomic_output", full)
        with pytest.raises(OutputError, match="No space"):
            gguflora.train(base, data, tmp_path / "tuned", **OPTIONS)
    gguflora.train(base, data, tmp_path / "tuned", **OPTIONS, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "tuned")


def test_a_dry_run_writes_nothing(base, data, tmp_path):
    report = gguflora.train(base, data, tmp_path / "tuned", **OPTIONS, dry_run=True)
    assert report.dry_run and report.steps == 0
    assert report.plan.seconds_per_step > 0
    assert [row.rank for row in report.plan.ranks] == [4, 8, 16, 32, 64, 128]
    costs = [(row.parameters, row.memory, row.seconds) for row in report.plan.ranks]
    assert costs == sorted(costs)
    assert list(tmp_path.iterdir()) == []


def test_go_on_from_an_adapter(trained, base, data, tmp_path):
    for source in (trained[0], trained[1].lora):
        report = gguflora.train(
            base,
            data,
            tmp_path / "tuned",
            **OPTIONS | {"steps": 1, "rank": 6, "lr": 1e-9},
            from_adapter=source,
            force=True,
        )
        assert report.valid_loss == pytest.approx(trained[1].valid_loss, abs=2e-3)
    with pytest.raises(UsageError, match="rank 4"):
        gguflora.train(base, data, tmp_path / "x", **OPTIONS | {"rank": 2}, from_adapter=trained[0])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_other_first_factors_are_written_converted(base, data, tmp_path, init):
    report = gguflora.train(base, data, tmp_path / "tuned", **OPTIONS | {"lr": 1e-3}, init=init, valid=data)
    assert report.valid_loss < report.base_valid_loss
    config = json.loads((tmp_path / "tuned/adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    from gguflora.adapters.adapter import read_adapter

    assert not read_adapter(tmp_path / "tuned").warnings


def test_dora_is_evaluated_in_torch(base, data, tmp_path):
    report = gguflora.train(base, data, tmp_path / "tuned", **OPTIONS, method="dora", check_merge=True)
    assert report.lora is None and not (tmp_path / "tuned.gguf").exists()
    assert report.valid_loss < report.base_valid_loss - 0.5
    assert any("evaluated in torch" in note for note in report.plan.notes)
    assert report.merge.kept > 0.5
    model = transformers.AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    assert peft.PeftModel.from_pretrained(model, tmp_path / "tuned").peft_config["default"].use_dora


def test_prompt_tuning_is_served(base, data, tmp_path):
    from gguflora.engine import Engine, Request, Sampling

    report = gguflora.train(base, data, tmp_path / "tuned", **OPTIONS | {"lr": 0.05}, method="prompt")
    assert report.lora is None and report.valid_loss < report.base_valid_loss
    model = transformers.AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    assert peft.PeftModel.from_pretrained(model, tmp_path / "tuned").peft_config["default"].num_virtual_tokens == 4
    with Engine(base, adapters={"tuned": tmp_path / "tuned"}, n_ctx=64, threads=1) as engine:
        request = Request(
            engine.tokenize("Q1:"), engine.adapter_set("tuned"), max_tokens=2, sampling=Sampling(temperature=0)
        )
        assert engine.submit(request).text() is not None


def test_only_the_last_layers(base, data, tmp_path):
    report = gguflora.train(base, data, tmp_path / "tuned", **OPTIONS | {"steps": 1}, targets="attention", layers=1)
    assert {name.split(".")[4] for name in weights(report.output)} == {"1"}
    assert all("self_attn" in name for name in weights(report.output))


LAST = OPTIONS | {"layers": 1, "steps": 9}
"""More than one epoch of the last block only, so that the output of the first is worth keeping."""


def test_states_below_the_adapted_layers_are_computed_once(base, data, tmp_path, monkeypatch):
    plans = []
    with monkeypatch.context() as patch:
        patch.setattr(run.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        gguflora.train(base, data, tmp_path / "each", **LAST, show_plan=plans.append)
    assert plans[0].kept_blocks == 0 and "has 0 MB free" in plans[0].notes[0]

    real, ran, by_step = PackedLinear.product, [], []
    monkeypatch.setattr(PackedLinear, "product", lambda self, x: ran.append(id(self)) or real(self, x))

    def watch(_):
        by_step.append(set(ran))
        ran.clear()

    gguflora.train(base, data, tmp_path / "once", **LAST, show_plan=plans.append, watch=watch)
    assert plans[1].kept_blocks == 1 and plans[1].kept_bytes > 0 and plans[1].kept_seconds > 0
    assert len(by_step[0]) > 14 and len(by_step[1]) == 7 + 1, "after that the last block and the output only"
    for name, values in weights(tmp_path / "once").items():
        np.testing.assert_allclose(values, weights(tmp_path / "each")[name], atol=2e-3, err_msg=name)
    assert not (tmp_path / "once.training").exists()


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_run_with_kept_states_goes_on_with_the_same_bits(base, data, tmp_path, is_lost):
    gguflora.train(base, data, tmp_path / "whole", **LAST)

    def interrupt(done):
        if done.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gguflora.train(base, data, tmp_path / "tuned", **LAST, watch=interrupt)
    kept = tmp_path / "tuned.training/hidden.f32"
    before = kept.stat().st_mtime_ns
    if is_lost:
        kept.unlink()
    seen = []
    gguflora.train(
        base, data, tmp_path / "tuned", **LAST, resume=True, watch=lambda _: seen.append(kept.stat().st_mtime_ns)
    )
    assert (seen[0] == before) != is_lost
    assert_same_weights(tmp_path / "whole", tmp_path / "tuned")


def test_a_pipeline_trains(base, data, tmp_path):
    shutil.copy(data, tmp_path / "rows.jsonl")
    (tmp_path / "recipe.toml").write_text(
        f'output = "out"\n[[steps]]\nname = "tune"\naction = "train"\nbase = "{base}"\n'
        'data = "rows.jsonl"\nsteps = 2\nrank = "{rank}"\nbatch = 4\nthreads = 1\n'
        'for = { rank = [2, 3] }\nout = "rank-{rank}"\n[steps.checks]\nvalid_loss = { max = 20 }\n'
    )
    report = gguflora.run_pipeline(tmp_path / "recipe.toml")
    assert report.failed == 0, [result.error for result in report.results]
    for rank in (2, 3):
        assert json.loads((tmp_path / f"out/rank-{rank}/adapter_config.json").read_text())["r"] == rank
        assert (tmp_path / f"out/rank-{rank}.gguf").exists()


WRONG = {
    "expected one of lora, dora, prompt; PEFT trains the other methods": {"method": "lokr"},
    "no linear layer matches the target 'wq'": {"targets": "wq"},
    "layers is 7, expected 1 to 2": {"layers": 7},
    "the base was trained with 128 tokens of context": {"length": 4096},
    "training needs about": {"memory": "100M"},
    "memory is 'lots'": {"memory": "lots"},
    "rank is 0": {"rank": 0},
    "is for LoRA": {"method": "prompt", "rslora": True},
    "seed is 1099511627776, expected 0 to 2147483647": {"seed": 2**40},
    "threads is 100000, expected 1 to 512": {"threads": 100000},
    "sample has an empty prompt": {"sample": [""]},
    "lr is '1', expected a positive number": {"lr": "1"},
    "warmup is nan": {"warmup": math.nan},
    r"targets is \(3,\)": {"targets": 3},
    "chat template .*none.jinja: cannot be read": {"chat_template": "none.jinja"},
}


@pytest.mark.parametrize("said", WRONG)
def test_bad_options(base, data, tmp_path, said):
    with pytest.raises(UsageError, match=said):
        gguflora.train(base, data, tmp_path / "tuned", **OPTIONS | WRONG[said])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "/", ".gguf"])
def test_an_output_needs_a_name(base, data, name):
    with pytest.raises(OutputError, match="is no name"):
        gguflora.train(base, data, name, **OPTIONS)


def test_an_adapter_of_another_base_is_refused(trained, data, tmp_path):
    with pytest.raises(MismatchError, match=r"of shape \(\d+, 256\), but the base's has .*right base"):
        gguflora.train(builders.gguf_model("llama"), data, tmp_path / "x", **OPTIONS, from_adapter=trained[0])


def test_held_out_samples_may_be_longer_than_those_to_learn(base, data, tmp_path):
    valid = tmp_path / "valid.jsonl"
    valid.write_text(json.dumps({"prompt": "word " * 20, "completion": "yes"}) + "\n")
    report = gguflora.train(base, data, tmp_path / "tuned", **OPTIONS | {"steps": 1}, valid=valid)
    assert report.plan.length > 60 and report.valid_loss is not None
    with pytest.raises(TrainingDataError, match=r"none of the 1 held-out samples .*valid\.jsonl:1.*--length"):
        gguflora.train(base, data, tmp_path / "x", **OPTIONS | {"length": 24}, valid=valid)


def test_the_second_ctrl_c_ends_at_once_and_what_was_saved_stays(base, data, tmp_path, monkeypatch):
    real = loop.backward_loss

    def interrupt(*given, **more):
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second was not heard")
        return real(*given, **more)

    steps = []
    gguflora.train(base, data, tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gguflora.train(base, data, tmp_path / "tuned", **OPTIONS, watch=steps.append)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    gguflora.train(base, data, tmp_path / "tuned", **OPTIONS, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "tuned")


def test_too_little_data(base, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(TrainingDataError, match="too little data: of 1 rows 1 would be held out"):
        gguflora.train(base, tmp_path / "one.jsonl", tmp_path / "tuned", **OPTIONS)
    report = gguflora.train(base, tmp_path / "one.jsonl", tmp_path / "tuned", **OPTIONS | {"steps": 1}, valid_split=0)
    assert report.valid_loss is None and "not the best" in report.warnings[0]


def test_a_model_that_is_not_the_served_one_is_refused(base, data, tmp_path, monkeypatch):
    from gguflora.training import configs

    wrong = configs.Kind("LlamaConfig", lambda header: {**configs._llama(header), "rms_norm_eps": 3.0})
    monkeypatch.setattr(configs, "KINDS", {**configs.KINDS, "llama": wrong})
    with pytest.raises(TrainingError, match=r"nats from llama\.cpp's on the same file"):
        gguflora.train(base, data, tmp_path / "tuned", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_the_curve_is_drawn(base, data, tmp_path):
    gguflora.train(base, data, tmp_path / "tuned", **OPTIONS | {"steps": 2}, plot=tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
