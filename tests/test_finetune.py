"""finetune_encoder.py as a user meets it: keys, line, losses, runs, infer.py, bad input."""

import contextlib
import copy
import functools
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import make_twins
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from processes import run_processes
from test_training import Gpu, OnGpu

import finetune_encoder as ft
import infer
import model
import precompute
import train_phase2

CONFIGS, CPU = Path(__file__).parents[1] / "configs", torch.device("cpu")
KNOWN = model.flatten(OmegaConf.to_container(OmegaConf.create(ft.DEFAULTS)))
REAL_CURVES, read_manifest = ft.plot_curves, functools.cache(model.read_manifest)


def config(*arguments):
    return model.load_config([str(a) for a in arguments], ft.DEFAULTS)


def full_keys(lines):
    """`section: key=value key=value ...` -> [`section.key=value`, ...]; no colon: no section."""
    parts = [line.rpartition(": ") for line in lines.splitlines()]
    return [f"{part[0]}.{pair}".lstrip(".") for part in parts for pair in part[2].split()]


def changed(cfg, text):
    """A copy with `key=value key=value ...`, as typed on the command line."""
    cfg = copy.deepcopy(cfg)
    for key, value in (pair.split("=") for pair in full_keys(text)):
        OmegaConf.update(cfg, key, model.convert(value, KNOWN[key], key))
    return cfg


def train(world, folder, text="", *more):
    """stage1.yaml on the twin, with `key=value key=value ...`. Output: the run's folder."""
    ft.main(config(*world["stage1"], f"output_dir={folder}", *text.split(), *more))
    return Path(folder)


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def weights(folder, name="trained"):
    return model.read_weights(folder / f"{name}.pt")


def infer_on(folder, out, *arguments):
    """Lines of infer.py's .jsonl."""
    words = [f"model.dir={folder}", "workers=0", f"out={out}/out.jsonl", *map(str, arguments)]
    infer.main(model.load_config(infer.split_arguments(words), infer.DEFAULTS))
    return rows_of(out, "out.jsonl")


@pytest.fixture(autouse=True)
def faster(monkeypatch):  # together half of a run's time here
    monkeypatch.setattr(model.os, "fsync", lambda file: None)
    monkeypatch.setattr(ft, "plot_curves", lambda folder: None)
    monkeypatch.setattr(model, "read_manifest", read_manifest)


@pytest.fixture(scope="module")
def world(tmp_path_factory, official_folder):
    """Clips at 8 and 16 kHz, and the arguments that make stage1.yaml fit the twin."""
    folder = tmp_path_factory.mktemp("finetune")
    calls = make_twins.wav_files(folder / "narrow", n=10, rate=8000)
    wide = make_twins.wav_files(folder / "wide", n=4, rate=16000, seed=3)
    rows = rows_of(calls.parent, calls.name)
    rows[1]["target"], rows[0]["hotwords"] = "One, please!", ["one", "two"]
    dev, eight = (calls.with_name(f"{name}.jsonl") for name in ("dev", "eight"))
    for path, n in ((calls, 10), (dev, 3), (eight, 8)):
        model.save(path, rows[:n])
    sizes = [f"audio_encoder_conf.{key}={value}" for key, value in make_twins.ENCODER.items()]
    for part, width in (("audio_adaptor", 48), ("ctc_decoder", 32)):
        sizes += [f"{part}_conf.{k}" for k in (f"llm_dim={width}", "ffn_dim=64", "encoder_dim=32")]
    small = f"""train_data_set_list={calls} valid_data_set_list={dev} llm=none
        dataset_conf.batch_size_sample_max=4 dataset_conf.num_workers=0
        init_param={official_folder}/model.pt scheduler_conf.warmup_steps=2
        telephone_conf.silence_clips=0
        train_conf.log_interval=1 train_conf.max_epoch=2"""
    clean = [f"clean_data_set_list={wide}", f"clean_valid_data_set_list={wide}", "data_mix=0.3"]
    stage1 = [CONFIGS / "stage1.yaml", *sizes, *small.split()]
    return {"folder": folder, "calls": calls, "dev": dev, "eight": eight, "wide": wide,
            "stage1": stage1, "clean": clean}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(world):
    """The twin with all losses, its data with all kinds of clips, and one batch of them."""
    extra = f"""distill_weight=0.5 llm=Qwen3-0.6b ctc_decoder_conf.freeze=false seed=0
        telephone_conf.prob=1 telephone_conf.noise_prob=1 telephone_conf.packet_loss_prob=1
        telephone_conf.data_set_list={world["wide"]} output_dir={world["folder"] / "prepared"}"""
    cfg = config(*world["stage1"], *world["clean"], *extra.split())
    parts = ft.load_for_training(cfg, CPU)
    data = ft.read_data(cfg, parts, print)
    batch = ft.Clips(data.train, parts.frontend, cfg, 0)[0, 0, [[0, 3, 12]]]
    return world | {"cfg": cfg, "parts": parts, "data": data, "batch": batch}


# ---- configuration ----------------------------------------------------------

STAGE1 = """
audio_encoder_conf: freeze=false
audio_adaptor_conf: freeze=true
ctc_decoder_conf: freeze=true
llm_conf: freeze=true
frontend_conf: fs=8000
specaug_conf: lfr_rate=6 freq_mask_width_range=0,10 num_freq_mask=1 time_mask_width_range=0,50
specaug_conf: num_time_mask=2 apply_time_warp=false
train_conf: max_epoch=10 keep_nbest_models=5 avg_nbest_model=3 log_interval=10 grad_clip=5
train_conf: validate_interval=1000 save_checkpoint_interval=1000 accum_grad=1 use_bf16=false
train_conf: use_deepspeed=false
optim_conf: lr=1e-4 weight_decay=0.01
dataset_conf: batch_type=token batch_size=6000 batch_size_sample_max=10 max_token_length=3500
dataset_conf: num_workers=8 retry=2000 audio_encoder_downsample_rate=2 data_split_num=256
dataset_conf: max_source_length=12000 min_source_length=10 sort_size=1024
tokenizer_conf: init_param_path=Qwen3-0.6B unk_symbol=<unk>
scheduler_conf.warmup_steps=1000 model_conf.lsm_weight=0.1 detach_ctc_decoder=false
specaug=SpecAugLFR train_data_set_list=data/train_8k.jsonl valid_data_set_list=data/dev_8k.jsonl
"""
TELEPHONE = f"""{STAGE1}
ctc_decoder_conf.freeze=false ctc_weight=1 frontend_conf.fs=16000
specaug_conf: freq_mask_width_range=0,15 time_mask_width_range=0,10 num_time_mask=1
train_conf: max_epoch=20 keep_nbest_models=10 avg_nbest_model=100 validate_interval=2000
train_conf: save_checkpoint_interval=2000
optim_conf: lr=5e-5 betas=0.9,0.999
dataset_conf: max_token_length=1024 num_workers=4 data_split_num=512 batch_size_sample_max=15
dataset_conf: retry=20
"""


def test_the_three_configurations_hold_what_was_asked_for():
    paths = [CONFIGS / f"{name}.yaml" for name in ("stage1", "telephone_8k")]
    stage1, telephone = map(config, paths)
    for cfg, wanted in ((stage1, STAGE1), (telephone, TELEPHONE)):
        ft.check(cfg, print, False)
        assert changed(cfg, wanted) == cfg and not cfg.clean_data_set_list
    hub = config(paths[1], CONFIGS / "telephone_8k_from_hub.yaml", "++ctc_weight=2")
    assert hub.model == "FunAudioLLM/Fun-ASR-Nano-2512" and not hub.init_param
    one, two = (model.flatten(OmegaConf.to_container(cfg)) for cfg in (telephone, hub))
    names = {"model", "init_param", "output_dir", "ctc_weight"}
    assert {name for name in one if one[name] != two[name]} == names


EFFECTS = {  # each of these keys, so changed, changes what its observer sees
    "load": """init_param=nowhere.pt audio_encoder=nowhere llm=none model=x/y
audio_encoder_conf: output_size=64 attention_heads=2 linear_units=32 num_blocks=4 tp_blocks=1
audio_encoder_conf: kernel_size=9 dropout_rate=0.5 attention_dropout_rate=0.5 freeze=true
audio_encoder_conf: freeze_layer_num=2
llm_conf: freeze=false init_param_path=nowhere use_lora=true
audio_adaptor_conf: downsample_rate=2 use_low_frame_rate=false ffn_dim=32 llm_dim=32 n_layer=1
audio_adaptor_conf: encoder_dim=16 freeze=false
ctc_decoder_conf: downsample_rate=2 ffn_dim=32 llm_dim=16 encoder_dim=16 n_layer=4 freeze=true
ctc_conf.dropout_rate=0.5 dataset_conf.ctc_tokenizer_conf.vocab_path=nowhere""",
    "lora": "llm_conf.lora_conf: r=4 lora_alpha=8 lora_dropout=0.5 target_modules=k_proj",
    "step": """llm_weight=2 ctc_weight=2 distill_weight=2
feature_noise=0.5 detach_ctc_decoder=true specaug= seed=1
model_conf: lsm_weight=0.3 length_normalized_loss=false
train_data_set_list= valid_data_set_list= clean_data_set_list= clean_valid_data_set_list=
data_mix=0.6 scheduler_conf.warmup_steps=7 dataset_conf.prompt_conf.use_hotwords=false
frontend_conf: fs=16000 mel_axis=native dither=0 cmvn_file=nowhere
specaug_conf: apply_freq_mask=false freq_mask_width_range=20,30 num_freq_mask=5 lfr_rate=0
specaug_conf: apply_time_mask=false time_mask_width_range=1,2 num_time_mask=6 fill=zero
specaug_conf: time_mask_max_ratio=0.9
telephone_conf: data_set_list= prob=0 band_prob=0 noise_prob=0 snr_db=0,1 level_prob=0
telephone_conf: level_db=-60,-50 codec_prob=0 codecs=gsm packet_loss_prob=0 packet_loss_burst=9
telephone_conf: packet_loss_rate=0.5,0.6
dataset_conf: speed_perturb=0.5 num_workers=1 batch_type=length batch_size=500
dataset_conf: batch_size_sample_max=2 batch_size_token_max=90 max_token_length=70
dataset_conf: max_source_length=70 min_source_length=70 max_target_length=3
dataset_conf: ctc_target_normalize=false
optim_conf: lr=1e-3 ctc_lr=1e-2 layer_decay=0.5 weight_decay=0.5 betas=0.5,0.9""",
    "run": """enable_tf32=false device=tpu
train_conf: accum_grad=2 grad_clip=1e-3 max_epoch=1 max_steps=3 keep_nbest_models=1
train_conf: avg_nbest_model=1 log_interval=0 validate_interval=0 valid_clips=1
train_conf: use_bf16=true""",
}
ELSEWHERE = """output_dir train_conf.resume dataset_conf.retry dataset_conf.ctc_tokenizer
    train_conf.early_stopping_patience train_conf.save_checkpoint_interval llm_conf.llm_dtype
    dataset_conf.strip_tags dataset_conf.empty_targets telephone_conf.silence_share
    telephone_conf.silence_clips
    dataset_conf.prompt_conf.use_asr_hotwords dataset_conf.prompt_conf.min_neg_hotwords_num
    dataset_conf.prompt_conf.max_neg_hotwords_num dataset_conf.prompt_conf.chinese_hotwords_list
    dataset_conf.prompt_conf.english_hotwords_list dataset_conf.prompt_conf.itn"""


def test_every_key_is_read_or_answered():
    acting = [pair.split("=")[0] for lines in EFFECTS.values() for pair in full_keys(lines)]
    answered = [*model.marked(ft.DEFAULTS, "-"), *model.marked(ft.DEFAULTS, "=")]
    assert sorted([*acting, *ELSEWHERE.split(), *answered]) == sorted(KNOWN)
    assert all(model.marked(ft.DEFAULTS, "-").values())


def observe_load(cfg, world):
    torch.manual_seed(0)
    cfg.init_param = cfg.init_param if cfg.model == "FunASRNano" else None
    nano = ft.load_for_training(cfg, CPU).nano.train()
    for name, parameter in nano.named_parameters():
        if ".lora_B." in name:  # at 0 the rest of LoRA changes nothing
            parameter.data.fill_(0.1)
    enc, enc_lens = nano.encode(torch.ones(1, 20, 560), torch.tensor([20]))
    heard = nano.hear(enc, enc_lens)
    scores = nano.llm and nano.llm(inputs_embeds=heard.speech).logits.sum()
    trains = [name for name, p in nano.named_parameters() if p.requires_grad]
    return [enc.sum(), heard.log_probs.sum(), heard.speech_lens, heard.lens, scores, trains]


def observe_step(cfg, world):
    """Clips and their order, a batch, its loss and gradient, the optimizer's groups and rates."""
    frontend = ft.NanoFrontend(**cfg.frontend_conf)
    parts = ft.SimpleNamespace(**vars(world["parts"]) | {"frontend": frontend})
    data = ft.read_data(cfg, parts, print)
    loader = ft.load_batches(world["data"].train, [(0, 0, [[0, 3, 12]])], parts, cfg, 0, CPU)
    if loader.num_workers:
        return loader.num_workers
    (batch,), tuner = loader, ft.Finetune(parts, cfg).train()
    torch.manual_seed(0)
    sums, labels = tuner(batch.feats, batch), batch.labels(cfg)
    total = sum(weight * sums[name] / labels[name] for name, weight in tuner.weights.items())
    grad = torch.autograd.grad(total, parts.nano.audio_encoder.tp_norm.weight)[0]
    groups = ft.make_optimizer(parts.nano, cfg.optim_conf).param_groups
    groups = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    rates = [ft.learning_rate(step, cfg) for step in range(9)]
    clips = [ft.epoch_groups(data, cfg, 1, 1), *vars(data).values()]
    return [clips, model.hash_tensors({"": batch.feats}), total.item(), grad.sum(), groups, rates]


def observe_run(cfg, world):
    folder = world["folder"] / "observed" / model.hash_text(str(cfg))
    cfg.output_dir = str(folder)
    ft.main(cfg)
    rows = [{k: v for k, v in row.items() if "_per_s" not in k} for row in rows_of(folder)]
    files = sorted(path.name for path in folder.glob("*.pt"))
    return [rows, files, results(folder), torch.get_float32_matmul_precision()]


@pytest.mark.parametrize("observer", EFFECTS)
def test_a_changed_key_changes_what_is_computed(prepared, observer):
    look = {"step": observe_step, "run": observe_run}.get(observer, observe_load)
    base = prepared["cfg"]
    if observer == "lora":
        base = changed(base, "llm_conf.use_lora=true")
    elif observer == "run":
        few = "optim_conf.lr=5e-2 dataset_conf.batch_size_sample_max=2 output_dir=x"
        few += f" train_conf.validate_interval=1 train_data_set_list={prepared['dev']}"
        base = config(*prepared["stage1"], *few.split())
    before, idle = str(look(copy.deepcopy(base), prepared)), []
    for change in full_keys(EFFECTS[observer]):
        try:
            after = str(look(changed(base, change), prepared))
        except (model.UserError, ValueError) as error:
            after = str(error)
        idle += [change] * (after == before)
    assert not idle


# ---- the simulated line, and the data ---------------------------------------


def on_line(wave, *effects, seed=0, **settings):
    """Through the line with these effects for certain, and no others."""
    conf = config("output_dir=x").telephone_conf
    for effect in ("noise", "band", "level", "codec", "packet_loss"):
        conf[f"{effect}_prob"] = float(effect in effects)
    return ft.simulate_telephone(wave, OmegaConf.merge(conf, settings), random.Random(seed))


def decibel(one, two):
    return 20 * float((one.std() / two.std()).log10())


def test_the_line_does_what_its_keys_say():
    speech = torch.from_numpy(make_twins.spoken(["one", "two", "three", "please"], rate=8000))
    every = ("noise", "band", "level", "codec", "packet_loss")
    assert torch.equal(on_line(speech), speech)
    one, again, other = (on_line(speech, *every, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and len(one) == len(speech)
    for hz, low, high in ((1000, -1, 1), (60, -99, -12), (3900, -99, -12)):
        tone = torch.sin(2 * torch.pi * hz * torch.arange(8000) / 8000)
        assert low < decibel(on_line(tone, "band")[2000:], tone[2000:]) < high
    quiet = on_line(speech, "level", level_db=[-20.0, -20.0])
    assert float(quiet.abs().max()) == pytest.approx(0.1)
    noise = on_line(speech, "noise", snr_db=[10.0, 10.0]) - speech
    assert decibel(speech, noise) == pytest.approx(10, abs=0.2)
    for codec, low, high in (("mulaw", 30, 50), ("alaw", 30, 50), ("gsm", 3, 25)):  # SNR
        decoded = on_line(speech, "codec", codecs=[codec])
        assert len(decoded) == len(speech) and low < decibel(speech, decoded - speech) < high
    lost = ft.lose_packets(torch.ones(160 * 8000), 0.05, 2.5, random.Random(0)).view(-1, 160)
    assert bool(((lost == 0).all(1) | (lost == 1).all(1)).all())
    gone = (lost[:, 0] == 0).int()
    starts = int(F.pad(gone, (1, 0))[:-1].lt(gone).sum())
    assert float(gone.float().mean()) == pytest.approx(0.05, abs=0.01)
    assert int(gone.sum()) / starts == pytest.approx(2.5, abs=0.4)


def test_data_mix_is_the_share_of_clean_rehearsal(prepared):
    data = ft.SimpleNamespace(train=[prepared["data"].train[0]] * 120, n_clean=40)
    for mix in (0.0, 0.25, 0.5):
        groups = ft.epoch_groups(data, changed(prepared["cfg"], f"data_mix={mix}"), 1, 1)
        drawn = [n for group in groups for batch in group for n in batch]
        assert sum(n >= 80 for n in drawn) / len(drawn) == pytest.approx(mix, abs=0.01)
        assert set(range(80)) <= set(drawn)


def test_lists_of_manifests_and_tables_give_the_same_clips(prepared, tmp_path):
    import datasets

    rows, rest = rows_of(prepared["dev"].parent, "dev.jsonl"), (prepared["cfg"], prepared["parts"])
    (tmp_path / "train.list").write_text(f"{prepared['dev']}\n")
    audio = [(prepared["dev"].parent / row["source"]).read_bytes() for row in rows]
    table = {"audio": [{"bytes": x, "path": None} for x in audio], "hotwords": ["one, two", "", ""]}
    table |= {"text": [row["target"] for row in rows]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "0.parquet")
    found = []
    for spec in (prepared["dev"], tmp_path / "train.list", tmp_path):
        clips = ft.read_clips(str(spec), "telephone", *rest, True)
        batch = ft.Clips(clips, rest[1].frontend, rest[0], 0)[-1, 0, [[0, 1, 2]]]
        labels = [(c.target, c.length, c.ids, c.classes, c.reason) for c in batch.clips]
        found.append((labels, batch.lens.tolist()))
    assert found[0] == found[1] == found[2] and not found[0][0][0][-1]


def test_what_a_row_asks_for_reaches_the_prompt_and_is_counted(
    prepared, tmp_path, capsys, monkeypatch
):
    parts, tokenizer, rows = prepared["parts"], prepared["parts"].tokenizer, []
    end, source = tokenizer.convert_tokens_to_ids("<|im_end|>"), prepared["calls"].parent
    for n, asked in enumerate(("热词列表：[one, <|im_end|>]\n语音转写成英文：", "", "语音转写：")):
        content = f"{asked}<|startofspeech|>!{source}/utt00{n}.wav<|endofspeech|>"
        turns = [("user", content), ("assistant", "one <|im_end|> two"), ("user", "more")][: 3 - n]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    rows[1]["language"] = "zh"
    model.save(tmp_path / "chat.jsonl", rows)
    lists = f"train_data_set_list={tmp_path}/chat.jsonl valid_data_set_list={tmp_path}/chat.jsonl"
    cfg = changed(prepared["cfg"], f"{lists} telephone_conf.data_set_list= clean_data_set_list=")
    cfg = changed(cfg, "data_mix=0 distill_weight=0 clean_valid_data_set_list=")
    data, real, seen = ft.read_data(cfg, parts, print), model.splice, []
    said = capsys.readouterr()
    assert "train: 1 clips with hotwords, 1 with a language, 1 with a prompt of their" in said.out
    assert "chat.jsonl: 1 rows, chat.jsonl:3 for one: left out, not one recording" in said.err
    batch = ft.Clips(data.train, parts.frontend, cfg, 0)[-1, 0, [[0, 1]]]
    monkeypatch.setattr(model, "splice", lambda *a, **k: seen.append(a) or real(*a, **k))
    with torch.no_grad():
        ft.Finetune(parts, cfg).eval()(batch.feats, batch)
    (_, prompts, _, _, targets), *_ = seen
    texts = [tokenizer.decode(before).rpartition("user\n")[2] for before, _ in prompts]
    assert texts[0].endswith("热词列表：[one, <|im_end|>]\n语音转写成英文：")
    assert texts[1] == "语音转写成中文："
    assert [ids.count(end) for ids in (*targets, *(before for before, _ in prompts))] == [1] * 4
    assert all(tokenizer.decode(ids) == "one <|im_end|> two<|im_end|>" for ids in targets)
    stripped = changed(cfg, "dataset_conf.strip_tags=true")
    assert ft.read_data(stripped, parts, print).train[0].target == "one  two"
    spoken = ft.read_data(changed(cfg, "dataset_conf.prompt_conf.itn=false"), parts, print).train
    text = tokenizer.decode(ft.nano_prompt(tokenizer, *spoken[1].prompt)[0])
    assert text.endswith("语音转写成中文，不进行文本规整：")


# ---- losses -----------------------------------------------------------------


@torch.no_grad()
def test_losses_have_the_values_of_their_definitions(prepared):
    cfg, parts, batch = prepared["cfg"], prepared["parts"], prepared["batch"]
    tuner, nano, lens = ft.Finetune(parts, cfg).eval(), parts.nano, batch.lens[:3]
    sums, expected = tuner(batch.feats, batch), 0.0
    enc, _ = nano.encode(batch.feats[:3], lens)
    log_probs, _ = nano.ctc_log_probs(enc, lens)
    for n, clip in enumerate(batch.clips):
        sizes = lens[n : n + 1], torch.tensor([len(clip.classes)])
        target = torch.tensor([clip.classes]), *sizes, nano.ctc.blank, "sum"
        expected += F.ctc_loss(log_probs[n, : lens[n]][:, None], *target)
    torch.testing.assert_close(sums["ctc"], expected, rtol=1e-4, atol=1e-3)
    assert batch.twin_of == [2] and sums["impossible"] == 0 and len(batch.feats) == 4
    clean, _ = tuner.original(batch.feats[3:, : lens[2]], lens[2:])
    expected = (enc[2, : lens[2]] - clean[0]).pow(2).mean(-1).sum()
    torch.testing.assert_close(sums["distill"], expected, rtol=1e-4, atol=1e-4)
    ids, classes = [c.ids for c in batch.clips], [c.classes for c in batch.clips]
    labels = {"ce": sum(map(len, ids)), "ctc": sum(map(len, classes)), "distill": int(lens[2])}
    assert batch.labels(cfg) == labels
    by_clip = batch.labels(changed(cfg, "model_conf.length_normalized_loss=false"))
    assert by_clip == {"ce": 3, "ctc": 3, "distill": int(lens[2])}


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_smoothed_cross_entropy_equals_a_plain_formula(prepared, smoothing):
    cfg, parts, batch = prepared["cfg"], prepared["parts"], prepared["batch"]
    tuner = ft.Finetune(parts, changed(cfg, f"model_conf.lsm_weight={smoothing}"))
    nano, expected, embed = parts.nano.eval(), 0.0, parts.nano.llm.get_input_embeddings()
    tuner.training = True  # of the loss alone: without dropout
    found = float(tuner(batch.feats, batch)["ce"])
    speech, counts = nano.listen(*nano.encode(batch.feats[:3], batch.lens[:3]))
    for n, clip in enumerate(batch.clips):  # [before | speech | after | text], one by one
        before, after = ft.nano_prompt(parts.tokenizer, *clip.prompt)
        words = [embed(torch.tensor(ids)) for ids in (before, [*after, *clip.ids])]
        row = torch.cat([words[0], speech[n, : counts[n]], words[1]])[None]
        logits = nano.llm(inputs_embeds=row).logits[0, -1 - len(clip.ids) : -1]
        log_probs = logits.double().log_softmax(-1)
        true = log_probs[torch.arange(len(clip.ids)), torch.tensor(clip.ids)]
        expected -= float(((1 - smoothing) * true + smoothing * log_probs.mean(-1)).sum())
    assert found == pytest.approx(expected, rel=1e-4)
    tuner.training = False  # validation is not smoothed
    plain = float(tuner(batch.feats, batch)["ce"])
    assert (plain == pytest.approx(found)) is (smoothing == 0)


def test_frozen_parts_stay_in_eval_mode_and_are_not_saved(prepared):
    tuner, nano = ft.Finetune(prepared["parts"], prepared["cfg"]).train(), prepared["parts"].nano
    assert nano.audio_encoder.training and nano.ctc.training
    for part in (nano.llm, nano.audio_adaptor, tuner.original):
        assert not any(module.training for module in part.modules())
    names = {name.split(".")[0] for name in ft.trained_state(prepared["parts"])}
    assert names == {"audio_encoder", "ctc_decoder", "ctc"}
    tuner = ft.Finetune(prepared["parts"], changed(prepared["cfg"], "detach_ctc_decoder=true"))
    loss, first = tuner(prepared["batch"].feats, prepared["batch"])["ctc"], nano.blocks()[0]
    found = torch.autograd.grad(loss, [first.norm1.weight, nano.ctc.ctc_lo.bias], allow_unused=True)
    assert found[0] is None and bool(found[1].any())


def test_rates_are_warmuplrs_and_fall_with_the_depth(prepared):
    rates = "optim_conf: lr=1e-4 layer_decay=0.5 ctc_lr=1e-3 weight_decay=0.01"
    cfg = changed(prepared["cfg"], f"{rates}\nscheduler_conf.warmup_steps=10")
    for n in range(1, 40):
        expected = 1e-4 * 10**0.5 * min(n**-0.5, n * 10**-1.5)
        assert ft.learning_rate(n - 1, cfg) == pytest.approx(expected)
    nano = prepared["parts"].nano
    groups, blocks = ft.make_optimizer(nano, cfg.optim_conf).param_groups, nano.blocks()
    found = {p: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(blocks) == 5 and blocks[-1] is nano.audio_encoder.tp_encoders[-1]
    assert found[blocks[-1].norm1.weight] == found[nano.audio_encoder.tp_norm.bias] == (1.0, 0.0)
    assert found[blocks[0].feed_forward.w_1.weight] == (0.5**4, 0.01)
    assert found[nano.ctc.ctc_lo.weight] == (pytest.approx(10.0), 0.01)


def test_a_step_waits_for_the_gpu_at_most_once(prepared, monkeypatch):
    monkeypatch.setattr(model, "ctc_loss", lambda scores, *_: (scores.sum(), 0))  # torch's waits
    tuner, window = ft.Finetune(prepared["parts"], prepared["cfg"]).train(), ft.Counter()
    optimizer = torch.optim.SGD(tuner.nano.audio_encoder.parameters(), 1e-9)
    run = ft.SimpleNamespace(device=CPU, amp=torch.autocast("cpu", enabled=False), world=1)
    OnGpu.waits.clear()
    with Gpu():
        ft.train_step(tuner, tuner, optimizer, [prepared["batch"]], run, window)
    assert isinstance(window["ce"], OnGpu) and len(OnGpu.waits) <= 1, OnGpu.waits


# ---- runs -------------------------------------------------------------------


def test_a_run_ends_with_a_table_and_the_better_of_best_and_average(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ft, "plot_curves", REAL_CURVES)
    extra = "llm=Qwen3-0.6b optim_conf.lr=2e-3 train_conf.validate_interval=2"
    run = train(world, tmp_path, extra, *world["clean"])
    table, found = (run / "table.md").read_text(), results(run)
    for name in ("telephone", "simulated", "clean"):
        for kind in ("LLM", "CTC"):
            rate = r"[\d.]+ % \(\d+/\d+/\d+\)"
            assert re.search(rf"\| {name}, {kind} \| {rate} \| {rate} \|", table)
    assert found["before"].keys() == found["after"].keys() and found["steps"] == 8
    assert found["details"]["before"].keys() == found["details"]["after"].keys()
    assert re.search(r"first loss \d+\.\d\d \(expected 2 to 3\)", table)
    keys = ("telephone_llm_er", "telephone_ce")
    ranks = {name: [found[name][key] for key in keys] for name in ("best", "average")}
    assert ranks[found["chosen"]] == min(ranks.values())
    kept = [step for _, step in weights(run, "last")["kept"]]
    assert sorted(run.glob("step-*")) == sorted(ft.step_file(run, step) for step in kept)
    states = [model.read_weights(ft.step_file(run, step)) for step in kept[:3]]
    average, trained = weights(run, "avg"), weights(run)
    for name, value in average.items():
        torch.testing.assert_close(value, sum(state[name] for state in states) / 3)
    chosen = average if found["chosen"] == "average" else states[0]
    assert model.hash_tensors(chosen) == model.hash_tensors(trained)
    assert {name.split(".")[0] for name in trained} == {"audio_encoder"}
    assert len((run / "worst.txt").read_text().splitlines()) == 11
    assert (run / "curves.png").stat().st_size > 5000


def kill(at, start, *arguments):
    """start(*arguments), a training, dies before optimizer step `at`, counted from 0."""
    real = ft.learning_rate

    def learning_rate(step, cfg):
        if step == at:
            raise KeyboardInterrupt
        return real(step, cfg)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ft, "learning_rate", learning_rate)
        start(*arguments)


@pytest.mark.parametrize("extra", [
    "llm=Qwen3-0.6b llm_conf.use_lora=true llm_conf.lora_conf.lora_dropout=0.3",
    "distill_weight=0.5 train_conf.accum_grad=2 optim_conf.layer_decay=0.9",
], ids=["lora", "distill"])  # fmt: skip
def test_resume_is_bitwise_exact_and_takes_new_rates_but_no_other_base(
    world, tmp_path, extra, official_folder, monkeypatch
):
    extra += " train_conf.max_steps=5 train_conf.validate_interval=3 telephone_conf.prob=0.5"
    extra += f" train_conf.save_checkpoint_interval=2 telephone_conf.data_set_list={world['wide']}"
    whole = train(world, tmp_path / "whole", extra)
    kill(4, train, world, tmp_path / "cut", extra)
    assert 2 <= weights(tmp_path / "cut", "last")["step"] < 5
    cut = train(world, tmp_path / "cut", extra)
    ends = weights(whole, "last"), weights(cut, "last")
    assert ends[0]["step"] == ends[1]["step"] == 5 and ends[0]["kept"] == ends[1]["kept"]
    for one, two in ([end["trained"] for end in ends], (weights(whole), weights(cut))):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any("lora_A" in name for name in one) is ("use_lora" in extra)
    real, decays = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: (
        decays.append(max(group["weight_decay"] for group in self.param_groups)),
        real(self, *args),
    ))  # fmt: skip
    extra = extra.replace("max_steps=5", "max_steps=6")
    train(world, tmp_path / "cut", f"{extra} optim_conf.weight_decay=0.25")
    assert decays == [0.25]
    other = make_twins.official_folder(tmp_path / "other", seed=1)
    for change, message in {
        f"init_param={other}": "another base: weights was",
        f"valid_data_set_list={world['calls']}": "another valid: clips was",
        "train_conf.resume=false": "holds a run; give another folder",
    }.items():
        with pytest.raises(model.UserError, match=message):
            train(world, tmp_path / "cut", extra, change)


def test_a_run_that_stopped_early_does_not_train_on(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ft, "rank_of", lambda scores, tuner: [1.0, 0.0])
    extra = "train_conf.validate_interval=1 train_conf.early_stopping_patience=2"
    extra += " train_conf.max_epoch=30"
    first = results(train(world, tmp_path, extra))
    assert first["steps"] == 3
    monkeypatch.setattr(ft, "train_step", None)
    (tmp_path / "results.json").unlink()  # killed before its end: that alone is made again
    assert results(train(world, tmp_path, extra))["details"] == first["details"]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    capsys.readouterr()
    train(world, tmp_path, extra)
    said = capsys.readouterr().out
    assert "this run is finished at step 3, no better for 2 validations" in said
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.pt")}


def test_two_processes_give_the_weights_of_one_with_twice_the_batch(world, tmp_path):
    extra = f"""train_conf.max_steps=2 dataset_conf.batch_type=example device=cpu llm=Qwen3-0.6b
        audio_encoder_conf.dropout_rate=0 audio_encoder_conf.attention_dropout_rate=0
        ctc_decoder_conf.freeze=false train_conf.accum_grad=2 train_conf.grad_clip=0
        train_data_set_list={world["eight"]}"""
    one = train(world, tmp_path / "one", extra, "dataset_conf.batch_size=4")
    two = [*extra.split(), "dataset_conf.batch_size=2", f"output_dir={tmp_path / 'two'}"]
    run_processes(ft.main, config(*world["stage1"], *two))
    two = tmp_path / "two"
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[name], atol=2e-5, rtol=1e-3, msg=name)
    norms = [[row["grad_norm"] for row in rows_of(run) if "lr" in row] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # a sum, not a mean over processes
    worst = [(run / "worst.txt").read_text().splitlines() for run in (one, two)]
    assert len(worst[0]) == len(worst[1]) == 3  # they have shared the clips
    one, two = results(one), results(two)
    assert one["before"] == pytest.approx(two["before"], rel=1e-4)
    assert one["after"] == pytest.approx(two["after"], rel=1e-2)


def test_distillation_needs_no_transcripts_and_stage_1_learns(world, tmp_path):
    untold = world["wide"].with_name("untold.jsonl")
    model.save(untold, [row | {"target": ""} for row in rows_of(untold.parent, "manifest.jsonl")])
    extra = f"""train_data_set_list= distill_weight=1 ctc_weight=0 specaug= optim_conf.lr=1e-3
        train_conf.max_steps=12 telephone_conf.noise_prob=0 telephone_conf.packet_loss_prob=0
        valid_data_set_list= telephone_conf.data_set_list={",".join([str(untold)] * 9)}
        clean_valid_data_set_list={world["wide"]}"""  # epochs of 9 batches
    found = results(train(world, tmp_path / "a", extra))
    assert found["after"]["simulated_distill"] < 0.9 * found["before"]["simulated_distill"]
    extra = f"""train_conf.max_steps=30 specaug= optim_conf.lr=1e-2 ctc_decoder_conf.freeze=false
        audio_encoder_conf.dropout_rate=0 train_conf.grad_clip=0
        train_data_set_list={",".join([str(world["dev"])] * 40)}"""
    losses = [row["ctc"] for row in rows_of(train(world, tmp_path / "b", extra)) if "ctc" in row]
    assert losses[-1] < 0.4 * losses[0]


def test_whisper_with_a_head_of_its_own_and_a_run_from_the_first(world, whisper_folder, tmp_path):
    common = f"""audio_encoder={whisper_folder} init_param=null dataset_conf.ctc_tokenizer=char
        ctc_decoder_conf.freeze=false train_conf.max_steps=3 optim_conf.ctc_lr=1e-3"""
    head = train(world, tmp_path / "head", f"{common} audio_encoder_conf.freeze=true")
    assert set(weights(head)) == {"ctc.ctc_lo.weight", "ctc.ctc_lo.bias"}
    common = common.replace("=null", f"={head}")
    top = train(world, tmp_path / "top", f"{common} audio_encoder_conf.freeze_layer_num=1")
    names = weights(top).keys()
    assert any(name.startswith("audio_encoder.net.layers.1") for name in names)
    below = ("audio_encoder.net.layers.0", "audio_encoder.net.conv1")
    assert not any(name.startswith(below) for name in names)
    scores = [results(top)["before"], results(head)["after"]]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    body = train(world, tmp_path / "body", f"{common} ctc_decoder_conf.freeze=true")
    kept = weights(body)  # the head is frozen, but not the base's
    assert all(torch.equal(value, kept[name]) for name, value in weights(head).items())
    (out,) = infer_on(top, tmp_path, world["folder"] / "wide" / "utt001.wav")
    assert out["text"] == out["ctc_text"] and set(out["text"]) <= set("abcdefghijklmnopqrstuvwxyz ")
    other = make_twins.whisper_folder(tmp_path / "other", seed=1)
    with pytest.raises(model.UserError, match="is not what .*top was trained on, its hash is"):
        infer_on(top, tmp_path, world["calls"], f"encoder.name={other}")


def test_infer_gives_word_times_and_finds_a_base_that_was_moved(world, official_folder, tmp_path):
    run = train(world, tmp_path, "llm=Qwen3-0.6b train_conf.max_steps=1")
    cfg = model.load_config(["model.dir=x", "hotwords=甲"], infer.DEFAULTS)
    listener = ft.load_listener(run, cfg, CPU, torch.float32)
    labels, texts = zip(*listener.spell("one two"), strict=True)
    clip = infer.Clip({}, torch.zeros(1, 1), 0.0, 1.2, text="".join(texts))
    clip.log_probs = torch.full((20, listener.blank + 1), -20.0)
    clip.log_probs[:, listener.blank] = 0.0
    for place, label in zip(range(3, 20, 2), labels, strict=False):
        clip.log_probs[place, label], clip.log_probs[place, listener.blank] = 0.0, -20.0
    infer.align([clip], listener)
    assert [word["word"] for word in clip.words] == ["one", "two"]
    assert clip.words[0]["start"] == pytest.approx(3 * 0.06)
    assert "热词列表：[甲]" in listener.tokenizer.decode(listener.prompt({})[0])
    model.save(run / "config.json", json.loads((run / "config.json").read_text()) | {"base": "/no"})
    with pytest.raises(model.UserError, match="/no: no such file"):
        ft.load_listener(run, cfg, CPU, torch.float32)
    cfg.encoder.name = str(official_folder / "model.pt")
    assert ft.load_listener(run, cfg, CPU, torch.float32).llm is not None


# ---- bad input --------------------------------------------------------------


@pytest.mark.parametrize(("extra", "message"), [
    ("optim_conf.lrr=1", "unknown key 'optim_conf.lrr'; did you mean 'optim_conf.lr'"),
    ("frontend=Fbank", "frontend: only 'WavFrontend' is implemented, got 'Fbank'"),
    ("train_conf.use_deepspeed=true", "only False is implemented, got True .*torchrun"),
    ("specaug=SpecAug", "specaug: expected one of , SpecAugLFR; got 'SpecAug'"),
    ("dataset_conf.ctc_tokenizer=char", "ctc_tokenizer: expected one of SenseVoiceTokenizer; got"),
    ("telephone_conf.codecs=mp3", "telephone_conf.codecs: mp3 is none of"),
    ("data_mix=1.5", "packet_loss_rate are shares below 1"),
    ("ctc_weight=0", "nothing trains: unfreeze a part, or give a loss"),
    ("detach_ctc_decoder=true ctc_decoder_conf.freeze=false", "no loss reaches audio_encoder"),
    ("audio_encoder_conf.num_blocks=9", "does not fit.*Missing key.*audio_encoder.encoders.2"),
    ("init_param=nowhere/model.pt", "nowhere/model.pt: no such file"),
    ("init_param=null", "FunASRNano: no such folder; give one, or a hub name"),
    ("train_data_set_list=", "no clips: give train_data_set_list and valid_data_set_list"),
    ("distill_weight=1", "distill_weight: needs clean speech"),
    ("audio_encoder_conf.freeze_layer_num=5", "the encoder has 5 blocks"),
    ("train_conf.validate_interval=-1", "validate_interval: has to be at least 0, got -1"),
    ("dataset_conf.batch_size=0", "dataset_conf.batch_size: has to be at least 1"),
    ("llm_conf.use_lora=true llm_conf.freeze=false", "LoRA trains beside a frozen LLM"),
    ("dataset_conf.batch_size=40", "no clips: give"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_training(world, tmp_path, extra, message):
    with pytest.raises(model.UserError, match=message):
        train(world, tmp_path / "refused", extra)
    assert not (tmp_path / "refused").exists()


def test_check_goes_through_all_but_the_training(world, tmp_path, capsys):
    limit = "dataset_conf.max_token_length=100"  # of 10 ms frames and labels
    ft.main(config(*world["stage1"], f"output_dir={tmp_path / 'r'}", limit), check_only=True)
    said = capsys.readouterr().out
    seconds = {row["key"]: model.audio_seconds(world["calls"].with_name(row["source"]))
               for row in rows_of(world["calls"].parent, "manifest.jsonl")}  # fmt: skip
    longest = max(seconds, key=seconds.get)
    for line in ("audio_encoder: 96,352 of 96,352", "ctc (weight 1) trains ['audio_encoder']",
                 "; at most 5 checkpoints", "clips, left out, longer than max_token_length, ",
                 f"the longest is {longest} ({seconds[longest]:.1f} s)"):  # fmt: skip
        assert line in said, line
    assert not (tmp_path / "r").exists()
    for key, why in model.marked(ft.DEFAULTS, "-").items():
        assert f"note: {key}=" in said and why in said


def test_a_base_without_ctc_trains_a_new_branch_or_none(world, tmp_path):
    folder = make_twins.official_folder(tmp_path / "hf", with_ctc=False)
    common = f"init_param={folder} train_conf.max_steps=1"
    with pytest.raises(model.UserError, match="no CTC branch .*and a frozen random one is noise"):
        train(world, tmp_path / "x", common)
    run = train(world, tmp_path / "a", f"{common} ctc_decoder_conf.freeze=false")
    assert "ctc.ctc_lo.weight" in weights(run)
    assert "telephone_ctc_er" not in results(run)["before"]  # noise
    cfg = model.load_config(["model.dir=x", "decode.readout=ctc"], infer.DEFAULTS)
    assert ft.load_listener(run, cfg, CPU, torch.float32).read_ctc is not None


def test_unreadable_clips_are_named_limited_by_retry_and_not_scored(world, tmp_path):
    good = (world["folder"] / "narrow" / "utt001.wav").read_bytes()
    for name, content in (("0", b""), ("1", b"RIFFnonsense"), ("torn", good[: len(good) // 2])):
        (tmp_path / f"{name}.wav").write_bytes(content)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, "FLOAT")
    names = ("0", "1", "torn", "nan")
    bad = tmp_path / "bad.jsonl"
    model.save(bad, [{"key": n, "source": f"{n}.wav", "target": "one"} for n in names])
    mixed = f"train_conf.max_epoch=1 train_data_set_list={world['calls']},{bad}"
    run = train(world, tmp_path / "torn", f"{mixed} valid_data_set_list={world['dev']},{bad}")
    dropped = rows_of(run, "dropped.jsonl")
    assert {row["key"] for row in dropped if row["reason"]} == set(names)
    assert [row["dropped"] for row in rows_of(run) if "dropped" in row][-1] == 4
    whole = train(world, tmp_path / "whole", "train_conf.max_epoch=1")
    assert results(run)["before"] == pytest.approx(results(whole)["before"], rel=1e-5)
    for retry in (2, 3):  # the third is found by its header, the last while training
        with pytest.raises(model.UserError, match=f"dataset_conf.retry={retry}; the last is"):
            train(world, tmp_path / "x", f"{mixed} dataset_conf.retry={retry}")


def test_a_gradient_that_is_not_finite_is_never_saved(world, tmp_path, monkeypatch):
    real, extra = model.ctc_loss, "train_conf.log_interval=0 train_conf.save_checkpoint_interval=1"
    monkeypatch.setattr(model, "ctc_loss", lambda *a: (real(*a)[0] * float("inf"), 0))
    with pytest.raises(model.UserError, match="step 1: the gradient is not finite"):
        train(world, tmp_path, extra)
    assert not (tmp_path / "last.pt").exists()


# ---- silence and hotwords ---------------------------------------------------


@pytest.fixture(scope="module")
def quiet(world):
    """As `prepared`, with made-up silence, a row in which nobody speaks, and distractors."""
    folder = world["folder"] / "quiet"
    rows = rows_of(world["calls"].parent, world["calls"].name)
    rows = [row | {"source": str(world["calls"].parent / row["source"])} for row in rows]
    rows[2] |= {"target": "", "asr_hotwords": ["two"]}
    model.save(folder.with_suffix(".jsonl"), rows)
    names = ("zebra", "quartz", "violin", "copper", "marble", "walnut", "garden", "castle")
    Path(f"{folder}.txt").write_text("\n".join(names))
    extra = f"""llm=Qwen3-0.6b ctc_decoder_conf.freeze=false output_dir={folder} seed=0
        train_data_set_list={folder}.jsonl telephone_conf.silence_share=0.4
        telephone_conf.silence_clips=4
        dataset_conf.prompt_conf.max_neg_hotwords_num=4 dataset_conf.batch_size_token_max=600
        dataset_conf.prompt_conf.english_hotwords_list={folder}.txt"""
    cfg = config(*world["stage1"], *extra.split())
    parts = ft.load_for_training(cfg, CPU)
    return world | {"cfg": cfg, "parts": parts, "data": ft.read_data(cfg, parts, print)}


def test_silence_has_its_share_and_is_the_same_for_the_same_seed_and_epoch(quiet):
    clips, cfg, parts = quiet["data"].train, quiet["cfg"], quiet["parts"]
    made = [clip for clip in clips if clip.kind == "silence"]
    assert len(made) == round(0.4 / 0.6 * 10) and len(clips) == 10 + len(made)
    assert all(0.2 <= clip.seconds <= 20 and clip.silent and len(clip.ids) == 1 for clip in made)
    data = ft.Clips(clips, parts.frontend, cfg, 0, parts.pools)
    feats = [data.load(made[1], epoch)[1] for epoch in (0, 0, 1)]
    assert torch.equal(feats[0], feats[1]) and not torch.equal(feats[0], feats[2])
    for clip in made:
        frames = data.load(clip, 0)[1]
        assert torch.isfinite(frames).all() and len(frames) <= -(-clip.frames // 6) + 1
    budget, most = ft.batch_limits(cfg)
    for group in ft.epoch_groups(quiet["data"], cfg, 1, 0):
        assert max(clips[n].length for n in group[0]) * len(group[0]) <= budget


def test_every_kind_of_silence_is_made(monkeypatch):
    for kind in ("digital", "comfort", "room", "clicks", *ft.TONES):
        rng = random.Random(1)
        first = functools.partial(lambda kind, items: kind if kind in items else items[0], kind)
        monkeypatch.setattr(rng, "choice", first)
        wave = ft.make_silence(2.0, rng)
        assert wave.shape == (16000,) and float(wave.abs().max()) < 0.5
        assert bool(wave.any()) is (kind != "digital")
        spectrum = torch.fft.rfft(wave).abs()  # bins of 0.5 Hz
        if kind in ft.TONES:
            low, high = ft.TONES[kind][0][:2]
            top = sorted(round(n / 2) for n in spectrum.topk(2).indices.tolist())
            assert abs(top[0] - low) < 6 and abs(top[1] - high) < 6


def test_a_pause_of_a_call_is_cut_where_nobody_speaks(monkeypatch):
    spans = [(1000, 5000), (12000, 15000)]
    monkeypatch.setattr(model, "hear_speech", lambda wave, rate: spans)
    wave = torch.arange(16000.0)
    assert torch.equal(ft.longest_pause(wave, 8000), wave[5000:12000])
    spans[0] = 1000, 11000
    assert ft.longest_pause(wave[:15500], 8000) is None
    spans.clear()  # nobody is heard: faint speech, maybe
    assert ft.longest_pause(wave, 8000) is None


def test_an_empty_row_learns_the_end_of_turn_and_blanks(quiet):
    clips, cfg, parts = quiet["data"].train, quiet["cfg"], quiet["parts"]
    numbers = [n for n, clip in enumerate(clips) if clip.kind == "telephone"][1:3]
    assert [clips[n].silent for n in numbers] == [False, True]
    batch = ft.Clips(clips, parts.frontend, cfg, 0, parts.pools)[0, 0, [numbers]]
    tuner, nano = ft.Finetune(parts, cfg).eval(), parts.nano
    with torch.no_grad():
        sums = tuner(batch.feats, batch)
        log_probs, lens = nano.ctc_log_probs(*nano.encode(batch.feats, batch.lens))
    spoken = torch.tensor([batch.clips[0].classes])
    sizes = lens[:1], torch.tensor([spoken.shape[1]])
    expected = F.ctc_loss(log_probs[0, : lens[0]][:, None], spoken, *sizes, nano.ctc.blank, "sum")
    expected -= log_probs[1, : lens[1], nano.ctc.blank].sum()
    torch.testing.assert_close(sums["ctc"], expected, rtol=1e-4, atol=1e-3)
    stop = parts.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert batch.clips[1].ids == [stop] and sums["impossible"] == 0
    labels = batch.labels(cfg)
    assert labels["ctc"] == spoken.shape[1] + 1 and labels["ce"] == len(batch.clips[0].ids) + 1
    lists = f"train_data_set_list= telephone_conf.data_set_list={quiet['folder']}/quiet.jsonl"
    untold = ft.read_data(changed(cfg, f"{lists} distill_weight=1"), parts, print).train
    assert len(untold) > 9 and not any(clip.silent for clip in untold if clip.kind != "silence")
    kaldi = quiet["folder"] / "kaldi"  # a recording without a line in `text`: not silence
    kaldi.mkdir(exist_ok=True)
    (kaldi / "wav.scp").write_text(f"a {quiet['calls'].parent}/utt000.wav\n")
    (found,) = ft.read_clips([str(kaldi)], "telephone", cfg, parts, True)
    assert not found.silent and found.reason == "no transcript"
    dropped = changed(cfg, "dataset_conf.empty_targets=drop")
    assert all(c.target or c.kind == "silence" for c in ft.read_data(dropped, parts, print).train)


def test_distractors_are_drawn_for_seed_epoch_and_clip(quiet):
    cfg, parts, clips = quiet["cfg"], quiet["parts"], quiet["data"].train
    clip = next(clip for clip in clips if clip.prompt[0] == "one, two")
    data = ft.Clips(clips, parts.frontend, cfg, 0, parts.pools)
    shown = [data.load(clip, epoch)[0].prompt[0].split(", ") for epoch in range(60)]
    assert shown == [data.load(clip, epoch)[0].prompt[0].split(", ") for epoch in range(60)]
    words = [set(filter(None, names)) - {"one", "two"} for names in shown]
    assert {len(part) for part in words} == {0, 1, 2, 3, 4}
    said = model.normalize_text(clip.target)
    assert all(word not in said for part in words for word in part)
    alone = sum(not {"one", "two"} & set(names) for names in shown)
    assert 3 <= alone <= 20 and len({tuple(names) for names in shown}) > 20  # shuffled, too
    assert data.load(clip, -1)[0].prompt[0] == "one, two"  # validation as it is
    positions = len(sum(ft.nano_prompt(parts.tokenizer, *data.load(clip, 5)[0].prompt), []))
    assert positions <= len(sum(ft.nano_prompt(parts.tokenizer, *clip.prompt), [])) + parts.extra


def test_clips_with_distractors_are_scored_as_they_are_not_on_the_simulated_line(quiet):
    cfg, parts, clips = quiet["cfg"], quiet["parts"], quiet["data"].valid
    data = ft.Clips(clips, parts.frontend, cfg, 0, parts.pools)
    plain = next(clip for clip in clips if clip.kind == "telephone" and clip.prompt[0])
    same = [clip for clip in clips if clip.kind in ft.AGAIN and clip.key == plain.key]
    assert len(same) == len(ft.DISTRACTORS)
    assert all(torch.equal(data.load(plain, -1)[1], data.load(c, -1)[1]) for c in same)


def test_distractors_come_from_the_lists_where_they_are_given(quiet):
    assert len(quiet["parts"].pools[False]) == 8
    own = "dataset_conf.prompt_conf.english_hotwords_list=null"
    assert {"three", "one", "two"} <= set(ft.hotword_pools(changed(quiet["cfg"], own))[False])


def test_the_table_tells_of_silence_hotwords_and_short_turns():
    clip = functools.partial(ft.Clip, "k", "", None)
    rows = [
        (clip("one two", "telephone", ("", "", ""), 0.5), "one", "one two"),
        (clip("three", "telephone", ("", "", ""), 2.0), "three four", "tree"),
        (clip("", "silence", ("", "", ""), 30.0, silent=True), "oh no no", ""),
        (clip("", "silence", ("Ada, Eve", "", ""), 15.0, silent=True), "Ada.", ""),
        (clip("ask Ada now", "hotwords10", ("Ada, Eve", "", ""), 1.0), "ask Eve now", None),
        (clip("Bob", "hotwords10", ("Bob", "", ""), 1.0), "bob", None),
    ]
    found = ft.details(rows)
    assert found["telephone, LLM"]["rate"] == pytest.approx(2 / 3)
    assert found["telephone, turns under 1 s, LLM"]["deletions"] == 1
    assert found["telephone, 1 to 3 s, LLM"]["insertions"] == 1
    assert "telephone, over 3 s, LLM" not in found
    assert found["silence, words a minute, LLM"] == 6 and found["silence, words a minute, CTC"] == 0
    assert found["silence with hotwords shown, words a minute, LLM"] == 4
    assert found["said hotwords found, among 10 others, share"] == 0.5
    assert found["hotwords written that nobody said, 10 others"] == 1


def test_a_run_with_silence_and_distractors_resumes_to_the_bit(world, tmp_path):
    extra = """llm=Qwen3-0.6b telephone_conf.silence_share=0.3 train_conf.max_steps=4
        telephone_conf.silence_clips=4
        dataset_conf.prompt_conf.max_neg_hotwords_num=3
        dataset_conf.prompt_conf.min_neg_hotwords_num=1
        train_conf.save_checkpoint_interval=2 train_conf.valid_clips=2"""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(world, whole, extra)
    kill(3, train, world, killed, extra)
    train(world, killed, extra)
    assert model.hash_tensors(weights(whole)) == model.hash_tensors(weights(killed))
    told = results(whole)["details"]
    assert "silence, words a minute, LLM" in told["after"]
    assert told == results(killed)["details"]


# ---- a base of train_phase2.py ----------------------------------------------


@pytest.fixture(scope="module")
def adapted(world, whisper_folder, qwen3_folder):
    """A run folder of train_phase2.py for each kind of speech, and arguments to go on from it."""
    folder, calls, found = world["folder"] / "adapted", world["calls"], {}
    rows = rows_of(calls.parent, calls.name)
    rows = [row | {"source": str(calls.parent / row["source"])} for row in rows]
    model.save(folder.with_suffix(".jsonl"), [*rows[:9], rows[9] | {"target": ""}])
    data = [f"data.train={calls}", f"cache.dir={folder}-cache", "workers=0", "device=cpu"]
    given = [*data, f"encoder.name={whisper_folder}"]
    precompute.main(model.load_config(given, precompute.DEFAULTS))
    for speech in ("ctc", "frames"):
        text = f"""data.valid={calls} run.dir={folder}-{speech} llm.name={qwen3_folder}
            llm.speech=ctc llm.prompt=Write: llm.system= llm.lora.r=2 adaptor.stack=2
            adaptor.num_layers=1 adaptor.hidden_dim=32 adaptor.num_heads=4 adaptor.dropout=0
            loss.ctc_weight=0.5 optim.max_steps=60 optim.lr=1e-2 optim.warmup_steps=2
            run.valid_every=60 batch_clips=10""".replace("speech=ctc", f"speech={speech}")
        given = [*data, *text.split()]
        train_phase2.main(model.load_config(given, train_phase2.DEFAULTS))
        found[speech] = Path(f"{folder}-{speech}")
    common = f"""train_data_set_list={folder}.jsonl valid_data_set_list={folder}.jsonl
        dataset_conf.num_workers=0 scheduler_conf.warmup_steps=1 audio_adaptor_conf.freeze=false
        train_conf.log_interval=1 telephone_conf.silence_clips=4 detach_ctc_decoder=false
        dataset_conf.batch_size_sample_max=4 device=cpu"""
    return found | {"common": common.split(), "rows": f"{folder}.jsonl"}


def go_on(adapted, base, folder, text=""):
    given = [*adapted["common"], f"init_param={base}", f"output_dir={folder}", *text.split()]
    ft.main(config(*given))
    return Path(folder)


@pytest.mark.parametrize("speech", ["ctc", "frames"])
def test_a_run_of_phase_2_goes_on_from_audio(adapted, speech, tmp_path, capsys):
    base = adapted[speech]
    rest = [*adapted["common"], f"init_param={base}"]
    ft.main(config(*rest, f"output_dir={tmp_path}/c"), check_only=True)
    said = capsys.readouterr().out
    assert "a base of train_phase2.py" in said and "audio_encoder: 0 of " in said
    assert not (tmp_path / "c").exists()
    cfg = config(*rest, f"output_dir={tmp_path}/x")
    ft.check(cfg, print, False)
    parts = ft.load_for_training(cfg, CPU)
    run = SimpleNamespace(device=CPU, amp=contextlib.nullcontext(), rank=0, world=1)
    tuner = ft.Finetune(parts, cfg)
    _, rows = ft.evaluate(tuner, ft.read_data(cfg, parts, print), parts, run)
    ours = {clip.key: (llm, ctc.strip()) for clip, llm, ctc in rows if clip.kind == "telephone"}
    lines = infer_on(base, tmp_path, adapted["rows"], "decode.speculative=false")
    assert {line["key"]: (line["text"], line["ctc_text"]) for line in lines} == ours
    assert any(text for text, _ in ours.values()) and len(ours) == 10
    asked = {"hotwords": "one, two", "language": "zh", "prompt": ""}
    with_words = parts.nano.prompt(parts.tokenizer, *ft.row_prompt(asked))
    listener_cfg = model.load_config([f"model.dir={base}"], infer.DEFAULTS)
    listener = infer.load_listener(listener_cfg, CPU, torch.float32)
    assert with_words == listener.prompt(asked)  # inference and this training share one prompt

    extra = "train_conf.max_steps=3 optim_conf.lr=1e-3 audio_encoder_conf.freeze=false"
    out = go_on(adapted, base, tmp_path / "run", f"{extra} audio_encoder_conf.freeze_layer_num=1")
    trained = weights(out)
    names = {"lora" if "lora_" in name else name.split(".")[0] for name in trained}
    assert names == {"lora", "audio_adaptor", "ctc", "audio_encoder"}
    assert not any(name.startswith("audio_encoder.net.layers.0") for name in trained)
    told, first = results(out)["details"], parts.nano.state_dict()
    assert "silence with hotwords shown, words a minute, LLM" in told["after"]
    moved = {name for name, value in trained.items() if not torch.equal(value, first[name])}
    assert len(moved) > len(trained) / 2 and any("lora_A" in name for name in moved)
    heard = infer_on(out, tmp_path, adapted["rows"], "decode.ctc_weight=0.5")
    assert [line["key"] for line in heard] == [line["key"] for line in lines]
    further = go_on(adapted, out, tmp_path / "further", "train_conf.max_steps=1")
    scores = [results(folder) for folder in (out, further)]
    assert scores[1]["before"]["telephone_ce"] == pytest.approx(
        scores[0]["after"]["telephone_ce"], rel=1e-4
    )


@torch.no_grad()
def test_an_empty_rows_losses_on_such_a_base_by_hand(adapted, tmp_path):
    cfg = config(*adapted["common"], f"init_param={adapted['ctc']}", f"output_dir={tmp_path}/x")
    ft.check(cfg, print, False)
    parts = ft.load_for_training(cfg, CPU)
    (silent,) = [c for c in ft.read_data(cfg, parts, print).train if c.silent]
    batch = ft.Clips([silent], parts.frontend, cfg, 0, parts.pools)[-1, 0, [[0]]]
    tuner, nano = ft.Finetune(parts, cfg).eval(), parts.nano
    sums = tuner(batch.feats, batch)
    enc, lens = parts.frontend(batch.feats, batch.lens)
    emb, lens = nano.audio_adaptor(enc, lens)
    log_probs = nano.ctc(emb)
    expected = -log_probs[0, : lens[0], nano.ctc.blank].sum()
    torch.testing.assert_close(sums["ctc"], expected)
    soft, count = model.ctc_soft_speech(log_probs, log_probs.argmax(-1), lens, nano.ctc)
    before, after = nano.prompt(parts.tokenizer)
    embed, stop = nano.llm.get_input_embeddings(), model.end_of_turn(parts.tokenizer)
    halves = [embed(torch.tensor(ids)) for ids in (before, after)]
    inputs = torch.cat([halves[0], soft[0, : count[0]], halves[1]])[None]
    logits = nano.llm(inputs_embeds=inputs).logits[0, -1]
    torch.testing.assert_close(sums["ce"], -logits.log_softmax(-1)[stop], rtol=1e-4, atol=1e-5)


def test_such_a_run_resumes_to_the_bit_with_silence_and_distractors(adapted, tmp_path):
    extra = """telephone_conf.silence_share=0.3 train_conf.max_steps=4 train_conf.valid_clips=2
        dataset_conf.prompt_conf.max_neg_hotwords_num=3 dataset_conf.speed_perturb=0.9,1.1
        train_conf.save_checkpoint_interval=2"""
    whole = go_on(adapted, adapted["ctc"], tmp_path / "whole", extra)
    killed = tmp_path / "killed"
    kill(3, go_on, adapted, adapted["ctc"], killed, extra)
    go_on(adapted, adapted["ctc"], killed, extra)
    assert model.hash_tensors(weights(whole)) == model.hash_tensors(weights(killed))


def test_a_base_of_phase_2_that_does_not_fit_is_refused(adapted, whisper_folder, tmp_path):
    with pytest.raises(model.UserError, match="on such a base LoRA trains; set true"):
        go_on(adapted, adapted["ctc"], tmp_path / "x", "llm_conf.freeze=false")
    other = make_twins.whisper_folder(tmp_path / "other", seed=1)
    with pytest.raises(model.UserError, match="was made with another encoder: weights"):
        go_on(adapted, adapted["ctc"], tmp_path / "x", f"audio_encoder={other}")
    old = tmp_path / "old"
    shutil.copytree(adapted["ctc"], old)
    model.save(old / "config.json", json.loads((old / "config.json").read_text()) | {"format": 1})
    with pytest.raises(model.UserError, match="not of train_phase2.py as it is now"):
        go_on(adapted, old, tmp_path / "x")
