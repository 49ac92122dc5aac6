"""finetune_encoder.py as a user meets it: configuration, check, signal, losses, training, resume, merge, bad input."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import make_twins
import pytest
import soundfile
import torch
import torch.nn.functional as F

import finetune_encoder as ft
import model

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "configs" / f"{name}.yaml" for name in ("stage1", "telephone_8k", "telephone_8k_from_hub")]
SPECIALS = model.SENSEVOICE_SPECIALS


def config(*arguments):
    return ft.load_config(ft.expand_arguments([str(a) for a in arguments]), ft.DEFAULTS)


def call(*arguments):
    ft.main(config(*arguments))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def chat(rows, path, mark="!"):
    """Fun-ASR's ChatML jsonl."""
    lines = []
    for row in rows:
        user = f"语音转写：<|startofspeech|>{mark}{row['source']}<|endofspeech|>"
        frames = model.fbank_frames(round(soundfile.info(row["source"]).duration * 16000))
        lines.append(json.dumps({"messages": [
            {"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": user},
            {"role": "assistant", "content": row["target"]}], "speech_length": frames, "text_length": 3,
        }, ensure_ascii=False))  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory, official_folder):
    """Clips at 8 and 16 kHz, and the arguments that make configs/stage1.yaml fit the twin."""
    folder = tmp_path_factory.mktemp("finetune")
    narrow = make_twins.wav_files(folder / "narrow", n=10, rate=8000)
    wide = make_twins.wav_files(folder / "wide", n=6, rate=16000, seed=3)
    calls = chat(model.read_manifest(narrow), folder / "calls.jsonl")
    classes = torch.load(official_folder / "model.pt", weights_only=True)["ctc.ctc_lo.bias"].numel()
    sizes = [f"audio_encoder_conf.{k}={v}" for k, v in make_twins.ENCODER.items()]
    twin = [*sizes, "audio_adaptor_conf.ffn_dim=64", "audio_adaptor_conf.llm_dim=48", "ctc_decoder_conf.ffn_dim=64",
            "ctc_decoder_conf.llm_dim=32", f"ctc_vocab_size={classes}", f"init_param={official_folder}/model.pt"]
    lists = [f"train_data_set_list={calls}", f"valid_data_set_list={narrow}", f"clean_data_set_list={wide}",
             f"clean_valid_data_set_list={wide}"]
    small = ["dataset_conf.batch_size_sample_max=4", "dataset_conf.num_workers=0", "train_conf.log_interval=1",
             "train_conf.max_epoch=2", "scheduler_conf.warmup_steps=2", "train_conf.valid_decode=4"]
    return {"folder": folder, "narrow": narrow, "wide": wide, "calls": calls, "lists": lists, "twin": twin,
            "stage1": [CONFIGS[0], *twin, *lists, *small]}


# ---- configuration -----------------------------------------------------------------------------------------------


def test_every_key_is_read_or_answered():
    text = (ROOT / "finetune_encoder.py").read_text(encoding="utf-8")
    start, end = text.index("NO_EFFECT = {"), text.index("CRITICAL = [")
    body = text[text.index("ONLY = {") : start] + text[text.index("# ---- configuration") :]
    specaug = {f"specaug_conf.{name}" for name in re.findall(r'"(\w+)"', body[body.index("def make_masking") :][:900])}
    telephone = {f"telephone_conf.{effect}_prob" for effect in re.findall(r'draws\("(\w+)"\)', body)}
    nano = {key for key in ft.DEFAULTS if key.startswith(("audio_encoder_conf.", "audio_adaptor_conf.",
                                                          "ctc_decoder_conf.", "ctc_conf.", "llm_conf."))}
    in_model = (ROOT / "model.py").read_text(encoding="utf-8")
    sections = {key for key in nano if f'"{key.split(".")[-1]}"' in in_model}
    read = specaug | telephone | sections | {"data.speed", "dataset_conf.prompt_conf.use_hotwords",
                                             "dataset_conf.prompt_conf.use_asr_hotwords"}  # fmt: skip
    for key in ft.DEFAULTS:
        short = key.split(".", 1)[-1]
        found = f'"{key}"' in body or key in read or key in ("llm_weight", "ctc_weight", "distill_weight", "base")
        found |= key.startswith("dataset_conf.") and f'conf + "{short}"' in body
        found |= key.startswith("train_conf.") and f'"{short}"' in body
        assert found != (key in ft.NO_EFFECT), key
    assert not set(ft.NO_EFFECT) & set(ft.ONLY) and not set(ft.ONLY) - set(ft.DEFAULTS) and end > start


def test_the_defaults_are_the_releases_values():
    released = config(ROOT / "configs" / "fun_asr_nano.yaml")
    for key, value in released.items():
        if key in ft.written_keys(ROOT / "configs" / "fun_asr_nano.yaml"):
            assert value == ft.DEFAULTS[key], key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    cfg = ft.finish_config(config(path))
    assert cfg["tokenizer_conf.init_param_path"] == "Qwen3-0.6B" and cfg["audio_encoder_conf.num_blocks"] == 50
    assert cfg["dataset_conf.audio_adaptor_downsample_rate"] in (1, "1")


def test_what_the_three_configurations_ask_for():
    stage1, telephone, hub = (ft.finish_config(config(path)) for path in CONFIGS)
    keys = ("frontend_conf.fs", "optim_conf.lr", "ctc_decoder_conf.freeze", "train_conf.max_epoch")
    assert [stage1[key] for key in keys] == [8000, 1e-4, True, 10]
    assert [telephone[key] for key in keys] == [16000, 5e-5, False, 20]
    assert not stage1["audio_encoder_conf.freeze"] and stage1["specaug_conf.time_mask_width_range"] == [0, 50]
    differing = {key for key in ft.DEFAULTS if telephone[key] != hub[key]}
    assert differing == {"model", "init_param", "output_dir"}
    assert hub["model"] == "FunAudioLLM/Fun-ASR-Nano-2512" and hub["init_param"] == ""


def test_hydras_overrides_are_taken():
    cfg = config(CONFIGS[0], "++optim_conf.lr=3e-5", "++train_conf.use_bf16=true", "dataset_conf.batch_size=7")
    assert (cfg["optim_conf.lr"], cfg["train_conf.use_bf16"], cfg["dataset_conf.batch_size"]) == (3e-5, True, 7)


@pytest.mark.parametrize(("argument", "message"), [
    ("optim_conf.lrr=1", "unknown key 'optim_conf.lrr'; did you mean 'optim_conf.lr'"),
    ("frontend=Fbank", "frontend: only 'WavFrontend' is implemented, got 'Fbank'"),
    ("frontend_conf.n_mels=40", "frontend_conf.n_mels: only 80 is implemented"),
    ("train_conf.use_deepspeed=true", "DeepSpeed is not used here; set it to false. Several GPUs: torchrun"),
    ("specaug=SpecAug", "specaug: expected one of , SpecAugLFR, got 'SpecAug'"),
    ("telephone_conf.codecs=[mp3]", "no codec mp3; there are mulaw, alaw, gsm"),
    ("data_mix=1.5", "data_mix is a share"),
])  # fmt: skip
def test_a_wrong_configuration_is_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        ft.finish_config(config(CONFIGS[0], argument))


def test_two_files_may_share_a_base_and_none_builds_on_itself(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 5\n")
    for name, key in (("a", "ctc_weight: 2"), ("b", "llm_weight: 3")):
        (tmp_path / f"{name}.yaml").write_text(f"base: base.yaml\n{key}\n")
    cfg = config(tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert (cfg["seed"], cfg["ctc_weight"], cfg["llm_weight"]) == (5, 2.0, 3.0)
    (tmp_path / "base.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match="builds on itself"):
        config(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="--compare needs YAML files"):
        ft.command_line(["--compare"])


def test_an_absent_base_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ValueError, match="a.yaml: base: nowhere.yaml: no such file beside it"):
        config(tmp_path / "a.yaml")


def test_compare_marks_same_changed_new_and_left_out():
    table = ft.compare([str(path) for path in CONFIGS])
    assert "| key | fun_asr_nano | stage1 | telephone_8k | telephone_8k_from_hub |" in table
    assert "| **`frontend_conf.fs`** | `16000` | **`8000`** | same | same |" in table
    assert "| **`specaug`** | n/a | new `SpecAugLFR` | new `SpecAugLFR` | new `SpecAugLFR` |" in table
    assert "| `audio_encoder_conf.kernel_size` | `11` | left out | left out | left out |" in table
    rows = table.splitlines()[2:]
    keys = [re.search(r"`([\w.]+)`", row)[1] for row in rows]
    assert set(keys) >= set(ft.written_keys(ROOT / "configs" / "fun_asr_nano.yaml"))
    assert keys[: len(ft.CRITICAL)] == [key for key in ft.CRITICAL if key in keys] + keys[len(
        [key for key in ft.CRITICAL if key in keys]) : len(ft.CRITICAL)]  # fmt: skip


def test_the_readmes_table_is_what_compare_prints():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ft.compare([f"configs/{path.name}" for path in CONFIGS[:2]]) in readme


# ---- signal ------------------------------------------------------------------------------------------------------


def only(cfg, *effects, **extra):
    """Configuration with these telephone effects on for certain and the others off."""
    probabilities = {f"telephone_conf.{e}_prob": float(e in effects)
                     for e in ("band", "noise", "level", "codec", "packet_loss")}
    return cfg | probabilities | extra


@pytest.fixture
def cfg():
    return ft.finish_config(config("train_conf.use_deepspeed=false"))


@pytest.fixture
def speech():
    return torch.from_numpy(make_twins.spoken(["one", "two", "three", "please"], rate=8000))


def test_without_effects_the_line_is_transparent(cfg, speech):
    assert torch.equal(ft.simulate_telephone(speech, only(cfg), random.Random(0)), speech)


def test_the_line_is_a_function_of_its_seed(cfg, speech):
    first, again, other = (ft.simulate_telephone(speech, cfg, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first) == len(speech)


def test_band_keeps_300_to_3400_hz(cfg):
    def gain_db(hz):
        tone = torch.sin(2 * torch.pi * hz * torch.arange(8000) / 8000)
        out = ft.simulate_telephone(tone, only(cfg, "band"), random.Random(0))
        return 20 * float((out[2000:].std() / tone[2000:].std()).log10())

    assert abs(gain_db(1000)) < 1 and gain_db(60) < -12 and gain_db(3900) < -12


def test_level_and_noise_have_the_size_that_was_asked_for(cfg, speech):
    cfg = cfg | {"telephone_conf.level_db": [-20.0, -20.0], "telephone_conf.snr_db": [10.0, 10.0]}
    quiet = ft.simulate_telephone(speech, only(cfg, "level"), random.Random(0))
    assert abs(float(quiet.abs().max()) - 0.1) < 1e-6
    noise = ft.simulate_telephone(speech, only(cfg, "noise"), random.Random(0)) - speech
    assert abs(20 * float((speech.std() / noise.std()).log10()) - 10) < 0.2


@pytest.mark.parametrize(("codec", "snr_db"), [("mulaw", 30), ("alaw", 30), ("gsm", 3)])
def test_codecs_are_close_to_what_they_code(codec, snr_db, speech):
    decoded = ft.through_codec(speech, codec)
    assert len(decoded) == len(speech) and not torch.equal(decoded, speech)
    assert 20 * float((speech.std() / (decoded - speech).std()).log10()) > snr_db


def test_packets_are_lost_in_bursts_at_the_rate_asked_for():
    rng, wave = random.Random(0), torch.ones(160 * 20000)
    lost = ft.lose_packets(wave, 0.05, 2.5, rng).view(-1, 160)
    assert bool(((lost == 0).all(1) | (lost == 1).all(1)).all())
    gone = (lost[:, 0] == 0).int()
    starts = int((F.pad(gone, (1, 0))[:-1].lt(gone)).sum())
    assert abs(float(gone.float().mean()) - 0.05) < 0.01 and abs(int(gone.sum()) / starts - 2.5) < 0.3


def test_show_writes_a_picture(tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    ft.show(world["folder"] / "narrow" / "utt000.wav", config(CONFIGS[0]))
    assert (tmp_path / "utt000.show.png").read_bytes()[:4] == b"\x89PNG"


# ---- data: units, batches, drops ---------------------------------------------------------------------------------


def utterances(lengths):
    return [{"key": str(n), "frames": length, "length": length, "positions": 0} for n, length in enumerate(lengths)]


def test_every_clip_is_in_one_batch_and_no_batch_is_empty_or_too_large(cfg):
    cfg = cfg | {"dataset_conf.batch_size": 1000, "dataset_conf.batch_size_sample_max": 5, "dataset_conf.sort_size": 16}
    lengths = [random.Random(n).randint(10, 400) for n in range(99)] + [3000]  # the last alone exceeds batch_size
    rows = utterances(lengths)
    batches = ft.epoch_batches(rows, 0, cfg, 1, epoch=3)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    for batch in batches:
        assert 1 <= len(batch) <= 5 and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 1000)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest)  # FunASR's go from short to long
    assert batches != ft.epoch_batches(rows, 0, cfg, 1, epoch=4)
    assert batches == ft.epoch_batches(rows, 0, cfg, 1, epoch=3)
    shares = [len(batch) for batch in ft.epoch_batches(rows, 0, cfg, 4, epoch=0)]
    assert min(shares) >= 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_process_has_a_clip_of_every_batch_even_where_each_clip_alone_is_over_the_budget(cfg, world_size):
    cfg = cfg | {"dataset_conf.batch_size": 1000, "dataset_conf.batch_size_sample_max": 5, "dataset_conf.sort_size": 16}
    rows = utterances([5000 + n for n in range(41)] + [100] * 30)
    batches = ft.epoch_batches(rows, 0, cfg, world_size, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(71))
    assert min(map(len, batches)) >= world_size
    assert all(len(batch) < 2 * world_size for batch in batches if rows[batch[0]]["frames"] > 1000)


def test_batch_type_example_counts_clips(cfg):
    cfg = cfg | {"dataset_conf.batch_type": "example", "dataset_conf.batch_size": 3}
    assert {len(batch) for batch in ft.epoch_batches(utterances([9] * 9), 0, cfg, 1, 1)} == {3}


def test_llm_positions_limit_a_batch_too(cfg):
    cfg = cfg | {"dataset_conf.batch_size": 10000, "dataset_conf.batch_size_token_max": 100}
    rows = [row | {"positions": 40} for row in utterances([50] * 8)]
    assert {len(batch) for batch in ft.epoch_batches(rows, 0, cfg, 1, 1)} == {2}


@pytest.mark.parametrize("mix", [0.0, 0.25, 0.5])
def test_data_mix_is_the_share_of_clean_rehearsal(cfg, mix):
    batches = ft.epoch_batches(utterances([50] * 120), 40, cfg | {"data_mix": mix}, 1, 1)
    drawn = [i for batch in batches for i in batch]
    assert sum(i >= 80 for i in drawn) / len(drawn) == pytest.approx(mix, abs=0.01)
    assert set(range(80)) <= set(drawn)


def tools(fs=16000, tokenizer=None):
    return {"frontend": model.NanoFrontend(fs), "tokenizer": tokenizer, "ctc_tokenizer": None}


def test_max_token_length_counts_10_ms_frames_and_names_the_longest(cfg, world):
    drops = {}
    cfg = cfg | {"dataset_conf.max_token_length": 100}
    kept = ft.read_list(str(world["narrow"]), "telephone", cfg, tools(), drops)
    assert all(u["frames"] + len(u["heard"]) <= 100 for u in kept)
    assert kept[0]["frames"] == model.fbank_frames(round(kept[0]["seconds"] * 16000))
    assert len(kept) + len(drops["longer than max_token_length=100"]) == 10


def test_all_manifest_forms_give_the_same_utterances(cfg, world, tmp_path):
    rows = model.read_manifest(world["narrow"])
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    (kaldi / "wav.scp").write_text("".join(f"{r['key']} {Path(r['source']).resolve()}\n" for r in rows))
    (kaldi / "text").write_text("".join(f"{r['key']} {r['target']}\n" for r in rows))
    classic = tmp_path / "classic.jsonl"
    classic.write_text("".join(json.dumps({
        "key": r["key"], "source": str(Path(r["source"]).resolve()), "target": r["target"],
        "source_len": model.fbank_frames(round(soundfile.info(r["source"]).duration * 16000)), "target_len": 2,
    }) + "\n" for r in rows))  # fmt: skip
    plain = chat(rows, tmp_path / "plain.jsonl", mark="")
    (tmp_path / "train.list").write_text(f"{classic}\n")
    expected = [(u["target"], u["frames"]) for u in ft.read_list(str(world["narrow"]), "telephone", cfg, tools(), {})]
    for spec in (kaldi, classic, world["calls"], plain, tmp_path / "train.list"):
        found = ft.read_list(str(spec), "telephone", cfg, tools(), {})
        assert [(u["target"], u["frames"]) for u in found] == expected, spec


# ---- losses ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory):
    """A tuner on the twin with all three losses, and one batch with telephone, simulated and clean clips."""
    cfg = ft.finish_config(config(*world["stage1"], "distill_weight=1.0", "ctc_decoder_conf.freeze=false", "specaug=",
                                  f"telephone_conf.data_set_list={world['wide']}", "clean_data_set_list=", "data_mix=0",
                                  f"output_dir={tmp_path_factory.mktemp('prepared')}"))
    found, parts, data = ft.checklist(cfg, torch.device("cpu"))
    assert all(ok for ok, _, _ in found), found
    batch = next(ft.batches_of(data["train"], [[0, 3, 11]], parts, cfg, 0, []))
    return cfg, parts, data, batch


def test_losses_have_the_values_of_their_definitions(prepared):
    cfg, parts, _, batch = prepared
    tuner = ft.Finetune(parts, cfg)
    tuner.eval()
    with torch.no_grad():
        sums = tuner(batch)
        nano = parts["nano"]
        enc, lens = nano.encode(batch["feats"], batch["lens"])
        log_probs, _ = nano.ctc_log_probs(enc, lens)
        expected = sum(F.ctc_loss(log_probs[i, : lens[i]][:, None], torch.tensor([row]), lens[i : i + 1],
                                  torch.tensor([len(row)]), nano.ctc.blank, reduction="sum")
                       for i, row in enumerate(batch["classes"]))  # fmt: skip
        torch.testing.assert_close(sums["ctc"], expected, rtol=1e-4, atol=1e-3)
        assert batch["has_twin"].tolist() == [False, False, True] and sums["impossible"] == 0
        clean, _ = parts["original"](batch["twin"][2:, : lens[2]], lens[2:])
        expected = (enc[2, : lens[2]] - clean[0]).pow(2).mean(-1).sum()
        torch.testing.assert_close(sums["distill"], expected, rtol=1e-4, atol=1e-4)
    assert ft.count_labels(batch, cfg) == [sum(map(len, batch["ids"])), sum(map(len, batch["classes"])), int(lens[2])]
    by_clip = ft.count_labels(batch, cfg | {"model_conf.length_normalized_loss": False})
    assert by_clip == [3, 3, int(lens[2])]


def test_label_smoothing_changes_training_only(prepared):
    cfg, parts, _, batch = prepared
    values = {}
    for weight in (0.0, 0.1):
        tuner = ft.Finetune(parts, cfg | {"model_conf.lsm_weight": weight})
        for mode in (True, False):
            tuner.train(mode)
            torch.manual_seed(0)
            with torch.no_grad():
                values[weight, mode] = float(tuner(batch)["ce"])
    assert values[0.0, False] == values[0.1, False] and values[0.0, True] != values[0.1, True]


@pytest.mark.parametrize("detached", [True, False])
def test_detach_ctc_decoder_keeps_ctc_from_the_encoder(prepared, detached):
    cfg, parts, _, batch = prepared
    tuner = ft.Finetune(parts, cfg | {"detach_ctc_decoder": detached, "llm_weight": 0.0, "distill_weight": 0.0})
    tuner.zero_grad()
    tuner(batch)["ctc"].backward()
    reached = any(p.grad is not None and bool(p.grad.any()) for p in parts["nano"].audio_encoder.parameters())
    assert reached is not detached
    nano = parts["nano"]
    assert bool(nano.ctc.ctc_lo.weight.grad.any()) and bool(nano.ctc_decoder.linear1.weight.grad.any())


def test_frozen_parts_stay_in_eval_and_without_gradient(prepared):
    cfg, parts, _, _ = prepared
    tuner = ft.Finetune(parts, cfg).train()
    nano = tuner.nano
    assert nano.audio_encoder.training and not nano.llm.training and not nano.audio_adaptor.training
    assert not tuner.original.training
    names = {name.split(".")[0] for name in ft.trained_state(parts)}
    assert names == {"audio_encoder", "ctc_decoder", "ctc"}


def test_warmuplr_is_funasrs():
    from funasr.schedulers.warmup_lr import WarmupLR

    cfg = config("optim_conf.lr=1e-4", "scheduler_conf.warmup_steps=10")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    theirs = WarmupLR(optimizer, warmup_steps=10)
    for step in range(40):
        assert ft.learning_rate(step, cfg) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        theirs.step()


def test_optimizer_groups(prepared):
    cfg, parts, _, _ = prepared
    cfg = cfg | {"optim_conf.layer_decay": 0.5, "optim_conf.ctc_lr": 1e-3, "optim_conf.lr": 1e-4}
    optimizer = ft.make_optimizer(parts["nano"], cfg, torch.device("cpu"))
    found = {id(p): (group["scale"], group["weight_decay"]) for group in optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    nano, blocks = parts["nano"], ft.encoder_blocks(parts["nano"].audio_encoder)
    assert found[id(blocks[-1].norm1.weight)] == (1.0, 0.0)
    assert found[id(blocks[0].feed_forward.w_1.weight)] == (0.5 ** (len(blocks) - 1), 0.01)
    assert found[id(nano.ctc.ctc_lo.weight)] == (10.0, 0.01)
    assert found[id(nano.audio_encoder.tp_norm.bias)] == (1.0, 0.0)


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world):
    """stage1.yaml run to its end on the twin: encoder trains at 8 kHz, with rehearsal and SpecAug."""
    folder = world["folder"] / "finished"
    call(*world["stage1"], f"output_dir={folder}", "optim_conf.lr=2e-3", "train_conf.max_epoch=1")
    return folder


def test_a_run_ends_with_table_curves_worst_utterances_and_results(finished):
    table = (finished / "table.md").read_text(encoding="utf-8")
    for name in ("telephone", "simulated", "clean"):
        for kind in ("LLM", "CTC"):
            assert re.search(rf"\| {name} dev \| {kind} \| [\d.]+ % \| [\d.]+ % \|", table)
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len((finished / "worst.txt").read_text(encoding="utf-8").splitlines()) == 10
    results = json.loads((finished / "results.json").read_text())
    assert results["before"].keys() == results["after"].keys()
    names = {name for row in metrics(finished) for name in row}
    assert {"ce", "ctc", "lr", "grad_norm", "telephone_ctc_er", "telephone_llm_er"} <= names
    assert (finished / "avg.pt").is_file() and (finished / "trained.pt").is_file()


def test_only_what_trains_is_saved_and_it_has_changed(finished, official_folder):
    trained, base = model.read_weights(finished / "trained.pt"), model.read_nano_weights(official_folder / "model.pt")
    assert set(trained) == {name for name in base if name.startswith("audio_encoder.")}
    assert any(not torch.equal(value, base[name].float()) for name, value in trained.items())
    run = json.loads((finished / "config.json").read_text())
    assert run["base_hash"] == model.hash_tensors(base)


def test_keep_nbest_models_and_the_average(world, tmp_path):
    call(*world["stage1"], f"output_dir={tmp_path / 'r'}", "train_conf.validate_interval=1", "train_conf.max_steps=5",
         "train_conf.keep_nbest_models=2", "train_conf.avg_nbest_model=2", "optim_conf.lr=1e-3")
    steps = sorted((tmp_path / "r").glob("step-*.pt"))
    assert len(steps) == 2
    average, states = model.read_weights(tmp_path / "r" / "avg.pt"), [model.read_weights(path) for path in steps]
    for name, value in average.items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2)


class Killed(Exception):
    pass


def kill(monkeypatch, at, *arguments):
    """Train, and die in optimizer step `at`."""
    real, steps = ft.train_step, []

    def train_step(*args):
        steps.append(1)
        if len(steps) == at:
            raise Killed
        return real(*args)

    monkeypatch.setattr(ft, "train_step", train_step)
    with pytest.raises(Killed):
        call(*arguments)
    monkeypatch.setattr(ft, "train_step", real)


@pytest.mark.parametrize("extra", [[], ["distill_weight=0.5", "train_conf.accum_grad=2", "optim_conf.layer_decay=0.9",
                                   "llm=none", "llm_weight=0"]])
def test_resume_is_bitwise_exact(world, tmp_path, monkeypatch, extra):
    arguments = [*world["stage1"], "train_conf.max_steps=6", "train_conf.max_epoch=4",
                 "train_conf.save_checkpoint_interval=2", "train_conf.validate_interval=3",
                 f"telephone_conf.data_set_list={world['wide']}", "data_mix=0",
                 "clean_data_set_list=", *extra]  # fmt: skip
    call(*arguments, f"output_dir={tmp_path / 'whole'}")
    kill(monkeypatch, 4, *arguments, f"output_dir={tmp_path / 'cut'}")
    call(*arguments, f"output_dir={tmp_path / 'cut'}")
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 6 and whole["kept"] == cut["kept"]
    for name, value in whole["trained"].items():
        assert torch.equal(value, cut["trained"][name]), name
    assert model.hash_tensors(model.read_weights(tmp_path / "whole" / "trained.pt")) == model.hash_tensors(
        model.read_weights(tmp_path / "cut" / "trained.pt"))


def test_a_run_goes_on_with_other_batches_other_rates_and_a_checkpoint_that_is_gone(world, tmp_path, monkeypatch):
    arguments = [*world["stage1"], "train_conf.max_epoch=2", "data_mix=0", f"output_dir={tmp_path / 'r'}",
                 "train_conf.save_checkpoint_interval=1", "train_conf.validate_interval=1"]
    kill(monkeypatch, 5, *arguments, "dataset_conf.batch_size_sample_max=2", "optim_conf.weight_decay=0.5")
    last = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    assert last["step"] == 4 and last["used"] == 4  # of 5 batches of 2 clips
    number = last["kept"][-1][1]
    (tmp_path / "r" / f"step-{number:06d}.pt").unlink()  # pushed out by a validation after last.pt
    real, decays = ft.train_step, []

    def watched(wrapped, optimizer, *args):
        decays.append(max(group["weight_decay"] for group in optimizer.param_groups))
        return real(wrapped, optimizer, *args)

    monkeypatch.setattr(ft, "train_step", watched)
    call(*arguments, "dataset_conf.batch_size_sample_max=10", "optim_conf.weight_decay=0.25")  # now one batch an epoch
    assert decays == [0.25]
    assert json.loads((tmp_path / "r" / "results.json").read_text())["steps"] == 5
    with pytest.raises(ValueError, match="scored other validation clips than there are now"):
        call(*arguments, "clean_valid_data_set_list=")


def test_early_stopping(world, tmp_path):
    call(*world["stage1"], f"output_dir={tmp_path / 'r'}", "train_conf.validate_interval=1", "train_conf.max_epoch=30",
         "train_conf.early_stopping_patience=2", "optim_conf.lr=1e-9")
    assert json.loads((tmp_path / "r" / "results.json").read_text())["steps"] <= 4


def test_two_processes_give_the_weights_of_one_with_twice_the_batch(world, tmp_path):
    common = [str(a) for a in [*world["stage1"], "train_conf.max_steps=3", "specaug=", "data_mix=0", "seed=3",
                               "audio_encoder_conf.dropout_rate=0", "audio_encoder_conf.attention_dropout_rate=0",
                               "ctc_decoder_conf.freeze=false", "dataset_conf.batch_type=example"]]  # fmt: skip
    call(*common, "dataset_conf.batch_size=4", f"output_dir={tmp_path / 'one'}")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "finetune_encoder.py",
         *common, "dataset_conf.batch_size=2", f"output_dir={tmp_path / 'two'}"],
        cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True)["trained"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("extra", [
    ["train_conf.use_bf16=true"], ["audio_encoder_conf.activation_checkpoint=true"], ["llm_conf.use_lora=true"],
    ["llm_conf.freeze=false", "audio_adaptor_conf.freeze=false"], ["llm=none"],
    ["audio_encoder_conf.freeze_layer_num=2"],
])  # fmt: skip
def test_other_ways_to_train(world, tmp_path, extra):
    call(*world["stage1"], f"output_dir={tmp_path / 'r'}", "train_conf.max_steps=2", *extra)
    trained = model.read_weights(tmp_path / "r" / "trained.pt")
    if "llm_conf.use_lora=true" in extra:
        assert any("lora_A" in name for name in trained) and not any("base_layer" in name for name in trained)
    if "audio_encoder_conf.freeze_layer_num=2" in extra:
        assert not any(name.startswith(("audio_encoder.encoders0", "audio_encoder.encoders.0")) for name in trained)
        assert any(name.startswith("audio_encoder.encoders.1") for name in trained)
    assert all(torch.isfinite(value).all() for value in trained.values())


def test_distillation_needs_no_transcripts(world, tmp_path):
    rows = [{"key": r["key"], "source": r["source"], "target": ""} for r in model.read_manifest(world["wide"])]
    (tmp_path / "untold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(CONFIGS[0], *world["twin"], "train_data_set_list=",
         f"telephone_conf.data_set_list={tmp_path / 'untold.jsonl'}", f"clean_valid_data_set_list={world['wide']}",
         "valid_data_set_list=", "clean_data_set_list=", "data_mix=0", "llm=none", "llm_weight=0", "ctc_weight=0",
         "distill_weight=1", "optim_conf.lr=1e-3",
         "train_conf.max_epoch=12",
         "scheduler_conf.warmup_steps=4", "dataset_conf.num_workers=0", "specaug=", "telephone_conf.noise_prob=0",
         "telephone_conf.packet_loss_prob=0", "train_conf.log_interval=1", f"output_dir={tmp_path / 'r'}")
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["after"]["simulated_distill"] < 0.9 * results["before"]["simulated_distill"]


def test_a_small_encoder_from_scratch_overfits(world, tmp_path):
    """The whole stage-1 path (8 kHz, SpecAug, CTC) on a 4-block SANM encoder with a word head."""
    many = ",".join([str(world["narrow"])] * 10)  # epochs of 100 clips: fewer validations
    call(CONFIGS[0], "init_param=scratch", "llm=none", "llm_weight=0", "ctc_decoder=none",
         "ctc_decoder_conf.freeze=false", "dataset_conf.ctc_tokenizer=word",
         "audio_encoder_conf.num_blocks=3", "audio_encoder_conf.tp_blocks=1",
         "audio_encoder_conf.output_size=64", "audio_encoder_conf.linear_units=128", f"train_data_set_list={many}",
         f"valid_data_set_list={world['narrow']}", "clean_valid_data_set_list=", "clean_data_set_list=", "data_mix=0",
         "optim_conf.lr=3e-3", "optim_conf.ctc_lr=3e-3", "scheduler_conf.warmup_steps=20", "train_conf.max_epoch=25",
         "dataset_conf.num_workers=0", "train_conf.validate_interval=1000", "train_conf.early_stopping_patience=0",
         "audio_encoder_conf.dropout_rate=0", "audio_encoder_conf.attention_dropout_rate=0",
         f"output_dir={tmp_path / 'r'}")
    assert json.loads((tmp_path / "r" / "results.json").read_text())["after"]["telephone_ctc_er"] < 0.05


def test_whisper_encoder_with_a_head_of_its_own_and_a_second_run_from_the_first(world, whisper_folder, tmp_path):
    common = [CONFIGS[0], f"audio_encoder={whisper_folder}", "init_param=", "llm=none", "llm_weight=0",
              "ctc_decoder=none", "ctc_decoder_conf.freeze=false", "dataset_conf.ctc_tokenizer=char",
              "frontend_conf.fs=16000", *world["lists"], "dataset_conf.num_workers=0", "scheduler_conf.warmup_steps=2"]
    call(*common, "audio_encoder_conf.freeze=true", "train_conf.max_epoch=2", "optim_conf.ctc_lr=1e-3",
         f"output_dir={tmp_path / 'head'}")
    assert all(name.startswith("ctc.") for name in model.read_weights(tmp_path / "head" / "trained.pt"))
    call(*common, "audio_encoder_conf.freeze_layer_num=1", "train_conf.max_epoch=1", f"init_run={tmp_path / 'head'}",
         f"output_dir={tmp_path / 'top'}")
    trained = model.read_weights(tmp_path / "top" / "trained.pt")
    assert any(name.startswith("audio_encoder.net.layers.1") for name in trained)
    assert not any(name.startswith(("audio_encoder.net.layers.0", "audio_encoder.net.conv1")) for name in trained)
    nano, frontend, _, tokenizer = model.load_nano(tmp_path / "top")
    assert frontend is nano.audio_encoder and tokenizer.kind == "char"
    before = json.loads((tmp_path / "top" / "results.json").read_text())["before"]
    after = json.loads((tmp_path / "head" / "results.json").read_text())["after"]
    assert before["telephone_ctc_er"] == pytest.approx(after["telephone_ctc_er"])
    call(*common, "ctc_decoder_conf.freeze=true", "train_conf.max_steps=1", f"init_run={tmp_path / 'head'}",
         f"output_dir={tmp_path / 'body'}")  # the head came from the first run: it has to be kept, though it is frozen
    head, kept = (model.read_weights(tmp_path / name / "trained.pt") for name in ("head", "body"))
    assert head and all(torch.equal(value, kept[name]) for name, value in head.items())
    with pytest.raises(ValueError, match="was trained on another base"):
        other = make_twins.whisper_folder(tmp_path / "other", seed=1)
        call(*common, f"audio_encoder={other}", f"init_run={tmp_path / 'head'}", f"output_dir={tmp_path / 'x'}")


def test_what_init_run_brought_is_part_of_the_run_even_where_it_is_frozen(world, tmp_path, finished):
    call(*world["stage1"], "audio_encoder_conf.freeze=true", "ctc_decoder_conf.freeze=false", "train_conf.max_steps=1",
         f"init_run={finished}", f"output_dir={tmp_path / 'r'}")
    first, second = (model.load_nano(folder)[0].state_dict() for folder in (finished, tmp_path / "r"))
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("audio_encoder."))
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith("ctc"))


def test_the_file_that_init_param_names_is_the_one_that_is_read(world, official_folder, tmp_path):
    folder = Path(shutil.copytree(official_folder, tmp_path / "nano"))
    weights = {name: value.clone() for name, value in model.read_nano_weights(folder / "model.pt").items()}
    weights["audio_encoder.after_norm.bias"] += 1.0
    torch.save(weights, folder / "model.pt.best")
    call(*world["stage1"], f"init_param={folder}/model.pt.best", "train_conf.max_steps=1",
         f"output_dir={tmp_path / 'r'}", "audio_encoder_conf.freeze=true", "ctc_decoder_conf.freeze=false")
    shutil.move(folder, tmp_path / "moved")
    with pytest.raises(ValueError, match="model.pt.best: not there, but .* if it was moved, give .* as encoder.name"):
        model.load_nano(tmp_path / "r")
    nano, *_ = model.load_nano(tmp_path / "r", base=tmp_path / "moved" / "model.pt.best")
    assert torch.equal(nano.audio_encoder.after_norm.bias, weights["audio_encoder.after_norm.bias"])
    with pytest.raises(ValueError, match="is not what .* was trained on"):
        model.load_nano(tmp_path / "r", base=tmp_path / "moved")  # the folder's model.pt is another one
    assert infer_on(tmp_path / "r", f"encoder.name={tmp_path / 'moved' / 'model.pt.best'}", "decode.readout=ctc",
                    world["folder"] / "wide" / "utt001.wav")["results"][0]["text"] is not None


@pytest.mark.parametrize("kind", ["whisper", "parakeet", "sensevoice"])
def test_distillation_counts_encoder_frames_whatever_the_encoder(world, tmp_path, request, capsys, kind):
    name = request.getfixturevalue(f"{kind}_folder")
    cfg = ft.finish_config(config(
        CONFIGS[0], f"audio_encoder={name}", "init_param=", "llm=none", "llm_weight=0", "ctc_decoder=none",
        "ctc_decoder_conf.freeze=false", "dataset_conf.ctc_tokenizer=char", "frontend_conf.fs=16000", *world["lists"],
        "train_data_set_list=", f"telephone_conf.data_set_list={world['wide']}", "dataset_conf.num_workers=0",
        "distill_weight=1", f"output_dir={tmp_path / 'r'}"))
    found, parts, data = ft.checklist(cfg, torch.device("cpu"))
    assert all(ok for ok, _, _ in found), found
    batch = next(ft.batches_of(data["train"], [[0, 3, 5]], parts, cfg, 0, []))
    _, lens = parts["nano"].encode(batch["feats"], batch["lens"])
    assert ft.count_labels(batch, cfg)[2] == int(lens.sum())
    ft.print_checklist(found, cfg | {"audio_adaptor_conf.n_layer": 9}, verbose=False)
    said = capsys.readouterr().out
    assert f"note  audio_adaptor_conf.n_layer=9 changes nothing: {name} has its own" in said and "llm=" not in said
    frame_s = 0.06 if kind == "sensevoice" else 0.01
    assert any(f"frames ({50 * frame_s:.2f} s)" in line for _, title, lines in found for line in lines)
    sums = ft.Finetune(parts, cfg).train()(batch)
    (sums["ctc"] + sums["distill"]).backward()
    assert all(p.grad is not None for p in parts["nano"].parameters() if p.requires_grad)
    assert ft.make_optimizer(parts["nano"], cfg, torch.device("cpu")).param_groups
    for module in parts["nano"].modules():
        assert not (isinstance(module, torch.nn.BatchNorm1d) and module.training)


# ---- merge --------------------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "finetune_encoder.py", *map(str, arguments)], capture_output=True,
                          text=True, cwd=ROOT)  # fmt: skip


def test_merged_folder_loads_into_funasr_with_no_missing_key(finished, official_folder, tmp_path, capsys):
    from funasr import AutoModel

    out = tmp_path / "merged"
    run = command("merge", finished, official_folder / "model.pt", "-o", out)
    assert run.returncode == 0, run.stderr
    capsys.readouterr()
    theirs = AutoModel(model=str(out), device="cpu", disable_update=True, disable_pbar=True, ncpu=1,
                       llm_conf={"llm_dtype": "fp32"}, frontend_conf={"dither": 0.0})  # fmt: skip
    assert "miss key" not in capsys.readouterr().out and theirs.model.ctc is not None
    nano, *_ = model.load_nano(out)
    again, *_ = model.load_nano(finished)
    own = theirs.model.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, nano.state_dict()[name]), name
        torch.testing.assert_close(own[name].float(), value.float(), msg=name)
    clip = finished.parent / "wide" / "utt000.wav"
    assert isinstance(theirs.generate(input=[str(clip)], max_length=8)[0]["ctc_text"], str)


def test_merge_folds_lora_into_the_llm(world, official_folder, tmp_path):
    call(*world["stage1"], f"output_dir={tmp_path / 'r'}", "train_conf.max_steps=3", "llm_conf.use_lora=true",
         "optim_conf.lr=1e-2")
    ft.merge(tmp_path / "r", official_folder / "model.pt", tmp_path / "m")
    merged, *_ = model.load_nano(tmp_path / "m")
    run, *_ = model.load_nano(tmp_path / "r")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.llm(ids).logits, run.llm(ids).logits, atol=0.05, rtol=0)  # bf16 weights


def test_merge_refuses_another_base_and_a_used_folder(finished, official_folder, tmp_path):
    other = make_twins.official_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was trained on"):
        ft.merge(finished, other / "model.pt", tmp_path / "m")
    with pytest.raises(ValueError, match="is not empty"):
        ft.merge(finished, official_folder / "model.pt", other)
    with pytest.raises(ValueError, match="no config.json; give the output_dir"):
        ft.merge(tmp_path, official_folder / "model.pt", tmp_path / "m")


# ---- check, and bad input -----------------------------------------------------------------------------------------


def test_check_goes_through_the_list_and_exits_0(world, tmp_path):
    run = command(*world["stage1"], f"output_dir={tmp_path / 'r'}", "--check")
    assert run.returncode == 0, run.stdout + run.stderr
    for line in ("missing: none, mismatched: none", "audio_encoder: ", "trainable",
                 "llm (weight 1) reaches audio_encoder", "ctc (weight 1) reaches audio_encoder", "learning rate: peak",
                 "SpecAug: 1 x up to 10 mel bins", "train: 10 clips", "GiB free", "memory: about",
                 "data_split_num=256 changes nothing: one epoch is one pass"):
        assert line in run.stdout, line
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
    for key in ft.NO_EFFECT:
        assert f"note  {key}=" in run.stdout


def refused(world, tmp_path, *extra):
    """The one line with which both --check (exit 1) and training (exit 2) refuse this."""
    arguments = [str(a) for a in [*world["stage1"], f"output_dir={tmp_path / 'refused'}", *extra]]
    with pytest.raises(ValueError) as error:
        call(*arguments)
    with pytest.raises(SystemExit) as status:
        ft.check(config(*arguments))
    assert status.value.code == 1 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("extra", "message"), [
    (["ctc_weight=0", "llm_weight=0"], "no loss is left: llm_weight, ctc_weight and distill_weight are 0"),
    (["detach_ctc_decoder=true", "llm_weight=0", "ctc_decoder_conf.freeze=false"],
     "no loss reaches audio_encoder, which is trainable; detach_ctc_decoder=true"),
    (["ctc_decoder_conf.freeze=false", "ctc_weight=0"], "no loss reaches ctc, which is trainable"),
    (["audio_encoder_conf.freeze=true"], "nothing trains"),
    (["audio_encoder_conf.num_blocks=9"], "tensors are missing: audio_encoder.encoders.2"),
    (["audio_encoder_conf.output_size=64"], "of another size"),
    (["init_param=nowhere/model.pt"], "init_param=nowhere/model.pt: no such file"),
    (["init_param="], "init_param: say where the weights are"),
    (["train_data_set_list=nowhere.jsonl"], "nowhere.jsonl: no such manifest"),
    (["train_data_set_list="], "nothing to train on"),
    (["valid_data_set_list=", "clean_valid_data_set_list="], "nothing to score on"),
    (["optim_conf.lr=1"], "optim_conf.lr=1 is no learning rate"),
    (["output_dir=/proc/nowhere"], "No such file or directory|Permission denied|cannot"),
    (["train_conf.keep_nbest_models=100000000"], "GiB free, .* GiB needed"),
    (["audio_encoder_conf.freeze_layer_num=5"], "the encoder has 5 blocks"),
    (["distill_weight=1", "data_mix=0"], "distill_weight needs clean speech to compare with"),
    (["llm_weight=0", "ctc_weight=0", "distill_weight=1", "clean_valid_data_set_list="], "nothing to score"),
    (["train_conf.validate_interval=0"], "train_conf.validate_interval: has to be at least 1, got 0"),
    (["dataset_conf.batch_size=0"], "dataset_conf.batch_size: has to be at least 1"),
    (["telephone_conf.snr_db=[10]"], "telephone_conf.snr_db: expected .lowest, highest., got .10"),
    (["telephone_conf.packet_loss_rate=[0.1,1.0]"], "packet_loss_rate: expected .lowest, highest. from 0 up to"),
    (["llm=Qwen3-4B"], "llm: expected Qwen3-0.6b .* or none, got 'Qwen3-4B'"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_training(world, tmp_path, extra, message):
    assert re.search(message, refused(world, tmp_path, *extra))


def test_a_frozen_random_ctc_head_is_refused_and_a_trainable_one_trains(world, tmp_path):
    folder = make_twins.official_folder(tmp_path / "hf", with_ctc=False)
    init = f"init_param={folder}/model.pt"
    assert "a frozen random head would teach noise" in refused(world, tmp_path, init)
    call(*world["stage1"], init, "ctc_decoder_conf.freeze=false", "train_conf.max_steps=1",
         f"output_dir={tmp_path / 'a'}")
    assert "ctc.ctc_lo.weight" in model.read_weights(tmp_path / "a" / "trained.pt")
    assert model.load_nano(tmp_path / "a")[0].ctc is not None
    call(*world["stage1"], init, "ctc_weight=0", "train_conf.max_steps=1", f"output_dir={tmp_path / 'b'}")
    assert model.load_nano(tmp_path / "b")[0].ctc is None


def test_16_khz_files_under_fs_8000_are_named(world, tmp_path):
    said = refused(world, tmp_path, f"train_data_set_list={world['wide']}")
    assert re.search(r"manifest.jsonl:1: .*utt000.wav has 16000 Hz, but frontend_conf.fs=8000 takes native 8 kHz", said)


@pytest.mark.parametrize(("factor", "unit"), [(1 / 6, "60 ms frames"), (10, "milliseconds"), (80, "8 kHz samples")])
def test_speech_length_in_another_unit_is_named(world, tmp_path, factor, unit):
    rows = [json.loads(line) for line in world["calls"].read_text(encoding="utf-8").splitlines()]
    source = re.search(r"!(.*)<\|end", rows[0]["messages"][1]["content"])[1]
    seconds = soundfile.info(source).duration
    rows[0]["speech_length"] = round(seconds * 100 * factor)
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = refused(world, tmp_path, f"train_data_set_list={tmp_path / 'u.jsonl'}")
    assert "u.jsonl:1: speech_length" in said and f"would be its {unit}" in said


@pytest.mark.parametrize(("messages", "message"), [
    ([("user", "<|startofspeech|>!a.wav<|endofspeech|>"), ("assistant", "a"), ("user", "b"), ("assistant", "c")],
     "several turns or clips"),
    ([("user", "<|startofspeech|>!a.wav<|endofspeech|><|startofspeech|>!b.wav<|endofspeech|>"), ("assistant", "a")],
     "several turns or clips"),
    ([("user", "语音转写："), ("assistant", "a")], "needs a turn with"),
    ([("user", "<|startofspeech|>!<|endofspeech|>"), ("assistant", "a")], "needs a turn with"),
    ([("user", ["<|startofspeech|>!a.wav<|endofspeech|>"]), ("assistant", "a")], "each with role and content as text"),
])  # fmt: skip
def test_chat_rows_with_several_turns_or_no_audio_are_refused(world, tmp_path, messages, message):
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    said = refused(world, tmp_path, f"train_data_set_list={tmp_path / 'c.jsonl'}")
    assert "c.jsonl:1" in said and message in said


@pytest.mark.parametrize("length", ["166", True, [5]])
def test_a_speech_length_that_is_no_number_is_named(world, tmp_path, length):
    row = json.loads(world["calls"].read_text(encoding="utf-8").splitlines()[0]) | {"speech_length": length}
    (tmp_path / "u.jsonl").write_text(json.dumps(row) + "\n")
    said = refused(world, tmp_path, f"train_data_set_list={tmp_path / 'u.jsonl'}")
    assert "u.jsonl:1: speech_length" in said and "is not a number of 10 ms frames" in said


def test_a_model_pt_that_holds_no_state_dict_is_refused(world, official_folder, tmp_path):
    folder = Path(shutil.copytree(official_folder, tmp_path / "nano"))
    torch.save([torch.zeros(1)], folder / "model.pt")
    assert "model.pt: not a plain state dict of tensors" in refused(world, tmp_path, f"init_param={folder}")


def test_a_missing_or_foreign_tiktoken_file_is_refused(world, official_folder, tmp_path):
    folder = Path(shutil.copytree(official_folder, tmp_path / "nano"))
    lines = (folder / "multilingual.tiktoken").read_text().splitlines(keepends=True)
    (folder / "multilingual.tiktoken").write_text("".join(lines[:-3]))
    assert "a tokenizer of another vocabulary" in refused(world, tmp_path, f"init_param={folder}")
    (folder / "multilingual.tiktoken").unlink()
    assert "multilingual.tiktoken: no such file; it comes with the model's folder" in refused(
        world, tmp_path, f"init_param={folder}")


def test_a_gradient_that_is_not_finite_names_the_clips_and_changes_nothing(world, tmp_path, monkeypatch):
    real = model.transcript_loss

    def overflow(*args):
        loss, *rest = real(*args)
        return loss * float("inf"), *rest

    monkeypatch.setattr(model, "transcript_loss", overflow)
    with pytest.raises(ValueError, match="gradient is not finite, clips .*utt0.*: nothing was changed by this step"):
        call(*world["stage1"], f"output_dir={tmp_path / 'r'}", "train_conf.max_steps=1")


def test_a_validation_clip_that_cannot_be_read_is_not_scored(world, tmp_path):
    good = (world["folder"] / "narrow" / "utt001.wav").read_bytes()
    (tmp_path / "torn.wav").write_bytes(good[: len(good) // 2])
    lines = [json.dumps({"key": "torn", "source": "torn.wav", "target": "a long text that nobody hears"})]
    for row in model.read_manifest(world["narrow"]):
        lines.append(json.dumps({k: row[k] for k in ("key", "source", "target")}))
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    scores = {}
    for name, manifest in (("whole", world["narrow"]), ("torn", tmp_path / "dev.jsonl")):
        call(*world["stage1"], f"valid_data_set_list={manifest}", "train_conf.max_steps=1",
             "clean_valid_data_set_list=", f"output_dir={tmp_path / name}")
        scores[name] = json.loads((tmp_path / name / "results.json").read_text())["before"]
    assert scores["whole"] == scores["torn"]
    assert "torn" in (tmp_path / "torn" / "bad.jsonl").read_text()


def test_the_llm_reads_validation_clips_of_every_length(prepared, monkeypatch):
    cfg, parts, data, _ = prepared
    real, read = ft.read_llm, []
    monkeypatch.setattr(ft, "read_llm", lambda tuner, enc, lens, utterances: read.extend(
        u["frames"] for u in utterances) or real(tuner, enc, lens, utterances))
    tuner = ft.Finetune(parts, cfg)
    lengths = sorted(u["frames"] for u in data["valid"]["telephone"])
    scores, texts = ft.evaluate(tuner, {"telephone": data["valid"]["telephone"]}, parts, cfg, torch.device("cpu"),
                                torch.float32, 3)
    assert read == [lengths[1], lengths[5], lengths[8]] and read[0] < read[2]
    rows = {row[0]: row for row in texts["telephone"]}
    assert sum(row[2] is not None for row in rows.values()) == 3 and len(rows) == len(lengths) == 10
    assert "telephone_llm_er" in scores
    read.clear()
    ft.evaluate(tuner, {"telephone": data["valid"]["telephone"]}, parts, cfg, torch.device("cpu"), torch.float32, 99)
    assert len(read) == 10


def test_bad_audio_is_named_and_limited_by_retry(world, tmp_path):
    for n, content in enumerate((b"", b"RIFFnonsense")):
        (tmp_path / f"{n}.wav").write_bytes(content)
    good = (world["folder"] / "narrow" / "utt001.wav").read_bytes()
    (tmp_path / "torn.wav").write_bytes(good[: len(good) // 2])
    rows = [{"key": name, "source": f"{name}.wav", "target": "one"} for name in ("0", "1", "torn", "absent")]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lists = f"train_data_set_list={world['narrow']},{tmp_path / 'bad.jsonl'}"
    call(*world["stage1"], lists, "data_mix=0", f"output_dir={tmp_path / 'r'}", "train_conf.max_epoch=1")
    named = {json.loads(line)["key"] for line in (tmp_path / "r" / "bad.jsonl").read_text().splitlines()}
    assert named == {"0", "1", "torn", "absent"}
    assert "more than dataset_conf.retry=2" in refused(world, tmp_path, lists, "dataset_conf.retry=2")


def test_a_used_folder_is_refused_without_resume(finished, world):
    with pytest.raises(ValueError, match="already holds a run"):
        call(*world["stage1"], f"output_dir={finished}", "train_conf.resume=false")


def test_a_users_mistake_is_one_line_and_exit_status_2(tmp_path):
    run = command(CONFIGS[0], "optim_conf.lrr=1")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "did you mean 'optim_conf.lr'" in run.stderr
    assert command("merge", "a").returncode == 2 and command(CONFIGS[0], "--show").returncode == 2


# ---- infer.py on what training leaves -------------------------------------------------------------------------------


def infer_on(folder, *arguments):
    import infer

    words = infer.split_arguments([str(a) for a in (f"model.dir={folder}", "workers=0", *arguments)])
    return infer.main(infer.load_config(words, infer.DEFAULTS))


def test_infer_takes_a_run_folder_and_a_merged_folder(finished, official_folder, world, tmp_path):
    ft.merge(finished, official_folder / "model.pt", tmp_path / "m")
    clip = world["folder"] / "wide" / "utt001.wav"
    by_ctc = infer_on(finished, "decode.readout=ctc", clip)["results"][0]
    assert by_ctc["text"] == by_ctc["ctc_text"] != ""
    by_llm = infer_on(tmp_path / "m", "decode.max_new_tokens=6", "hotwords=张三,李四", clip)["results"][0]
    assert "ctc_text" in by_llm and by_llm["duration_s"] == pytest.approx(soundfile.info(clip).duration, abs=0.01)
    words = by_ctc["segments"][0].get("words")
    assert words is None or all(w["start"] <= w["end"] <= by_ctc["duration_s"] + 0.06 for w in words)


def test_a_ctc_decoder_that_stacks_frames_has_longer_positions(official_folder, monkeypatch):
    import infer

    real = model.load_nano

    def stacking(*args):
        nano, *rest = real(*args)
        nano.ctc_decoder.stack = 2
        return nano, *rest

    monkeypatch.setattr(model, "load_nano", stacking)
    cfg = infer.load_config([f"model.dir={official_folder}"], infer.DEFAULTS)
    assert infer.load_listener(cfg, torch.device("cpu"), torch.float32).position_s == pytest.approx(0.12)


def test_infer_gives_word_times_by_forced_alignment(official_folder, world):
    import infer

    cfg = infer.load_config([f"model.dir={official_folder}"], infer.DEFAULTS)
    listener = infer.load_listener(cfg, torch.device("cpu"), torch.float32)
    log_probs = torch.full((20, listener.ctc.blank + 1), -20.0)
    log_probs[:, listener.ctc.blank] = 0.0
    for place, label in zip((3, 5, 12), listener.ctc_tokenizer.encode("one two")):
        log_probs[place, label], log_probs[place, listener.ctc.blank] = 0.0, -20.0
    words = infer.align(log_probs, "one two", listener)
    assert [word for word, _, _ in words] == ["one", "two"] and words[0][1] == pytest.approx(3 * 0.06)
