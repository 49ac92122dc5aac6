"""The training scripts as a user meets them: errors, resume, several processes, bad audio."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import make_twins
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import model
import precompute
import train_phase1
import train_phase2

ROOT = Path(__file__).parents[1]
SMALL_ADAPTOR = ["adaptor.hidden_dim=32", "adaptor.num_layers=1", "adaptor.num_heads=4", "adaptor.stack=2"]


def call(script, *arguments):
    script.main(script.load_config([str(a) for a in arguments], script.DEFAULTS))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    """A manifest of 12 clips, its cache made with the tiny Whisper, and the arguments that every phase needs."""
    folder = tmp_path_factory.mktemp("world")
    manifest = make_twins.wav_files(folder / "wavs", n=12)
    cache = [f"data.train={manifest}", f"cache.dir={folder / 'cache'}"]
    call(precompute, *cache, f"encoder.name={whisper_folder}", "workers=0", "cache.shard_clips=5")
    shared = [*cache, f"data.valid={manifest}", f"llm.name={qwen3_folder}", *SMALL_ADAPTOR, "optim.warmup_steps=2",
              "optim.lr=1e-3", "run.log_every=2", "run.valid_every=4", "run.save_every=2", "augment.time_masks=1"]
    return {"folder": folder, "manifest": manifest, "cache": folder / "cache", "phase1": [*shared, "batch_clips=4"],
            "phase2": [*shared, "batch_clips=4", "run.valid_decode=4"], "encoder": f"encoder.name={whisper_folder}"}


# ---- configuration ----------------------------------------------------------------------------------------------


def load(tmp_path, text, *arguments, script=train_phase1):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return script.load_config([str(path), *arguments], script.DEFAULTS)


NEEDED = "cache.dir: c\ndata: {train: t.jsonl, valid: v.jsonl}\nllm.name: l\nrun.dir: r\n"


def test_yaml_sections_dotted_keys_and_arguments_share_one_spelling(tmp_path):
    text = NEEDED + "optim: {lr: 3e-4, warmup_steps: 7}\n"
    config = load(tmp_path, text, "optim.warmup_steps=9", "data.speed=0.9,1.0")
    assert (config["optim.lr"], config["optim.warmup_steps"], config["data.speed"]) == (3e-4, 9, [0.9, 1.0])
    assert config["data.train"] == "t.jsonl" and config["optim.clip"] == 1.0


@pytest.mark.parametrize(("text", "message"), [
    (NEEDED + "optim: {learning_rate: 1}\n", r"c.yaml: unknown key 'optim.learning_rate'; did you mean '.*'"),
    (NEEDED + "optim: {lrr: 1}\n", "did you mean 'optim.lr'"),
    (NEEDED + "optim: {epochs: many}\n", r"c.yaml: optim.epochs: expected int, got 'many' \(str\)"),
    (NEEDED + "optim: {epochs: 2.5}\n", "expected int, got 2.5"),
    (NEEDED + "run.resume: 1\n", "run.resume: expected bool, got 1"),
    (NEEDED + "batch_clips: true\n", "batch_clips: expected int, got True"),
    (NEEDED + "seed: 1\nseed: 2\n", "c.yaml:6: key 'seed' is given twice"),
    (NEEDED + "optim: {lr: 1, lr: 2}\n", "c.yaml:5: key 'lr' is given twice"),
    (NEEDED + "optim: {lr: 1}\noptim.lr: 2\n", "c.yaml: key 'optim.lr' is given twice"),
    (NEEDED + "optim.lr: 2\noptim: {lr: 1}\n", "c.yaml: key 'optim.lr' is given twice"),
    ("cache.dir: c\n", "required key not given: data.train, data.valid, llm.name, run.dir"),
    ("- a\n", "expected `section:`"),
])
def test_a_wrong_configuration_is_refused_with_its_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text)


def test_text_on_the_command_line_stays_as_typed(tmp_path):
    config = load(tmp_path, NEEDED, "run.dir=007", "data.train=2026-11-21 # a", "data.perturb=1e3")
    assert (config["run.dir"], config["data.train"], config["data.perturb"]) == ("007", "2026-11-21 # a", "1e3")


@pytest.mark.parametrize(("phase", "argument", "message"), [
    ("phase1", "optim.schedule=linear", "optim.schedule: expected cosine or constant, got 'linear'"),
    ("phase1", "ctc.vocab=every", "ctc.vocab: expected train or all, got 'every'"),
    ("phase1", "data.repeat=1,2", "data.repeat has 2 numbers for 1 manifests"),
    ("phase1", "data.perturb=other.jsonl", "data.perturb names other.jsonl, which data.train does not"),
    ("phase1", "dtype=fp16", "dtype: expected one of fp32, bf16, auto, got 'fp16'"),
    ("phase1", "device=gpu", "device: expected auto, cpu or cuda, got 'gpu'"),
    ("phase2", "llm.speech=frame", "llm.speech is frames or ctc"),
    ("phase2", "data.source=disk", "data.source: expected cache or audio, got 'disk'"),
    ("audio", "data.repeat=1,2", "data.repeat has 2 numbers for 1 manifests"),
    ("audio", "data.perturb=m.jsonl", "data.perturb needs data.source=cache"),
])
def test_a_value_that_means_nothing_is_refused(world, tmp_path, phase, argument, message):
    script = train_phase1 if phase == "phase1" else train_phase2
    arguments = world["phase1" if phase == "phase1" else "phase2"]
    arguments = [*arguments, "data.source=audio", world["encoder"]] if phase == "audio" else arguments
    with pytest.raises(ValueError, match=message):
        call(script, *arguments, "optim.max_steps=1", f"run.dir={tmp_path / 'r'}", argument)


def test_an_absent_config_file_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml: no such config file"):
        train_phase1.load_config(["nowhere.yaml"], train_phase1.DEFAULTS)


def test_a_users_mistake_is_one_line_and_exit_status_2(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "precompute.py", "data.trian=x"], capture_output=True, text=True)
    assert run.returncode == 2
    said = "error: argument data.trian=x: unknown key 'data.trian'; did you mean 'data.train'? (--help lists all)"
    assert run.stderr.strip() == said


def test_cuda_without_a_gpu_says_so(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, but torch sees no GPU here; use device=cpu"):
        call(train_phase1, *world["phase1"], f"run.dir={tmp_path / 'r'}", "device=cuda")


# ---- precompute -------------------------------------------------------------------------------------------------


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_the_cache_holds_what_the_encoder_says(world):
    cache = train_phase1.EncoderCache(world["cache"])
    encoder = model.load_encoder(world["encoder"].split("=", 1)[1])
    for row in model.read_manifest(world["manifest"]):
        feats = encoder.features(model.load_audio(row["source"], 16000), f"0-{row['key']}")
        alone, lens = encoder(feats[None], torch.tensor([len(feats)]))
        assert cache[row["key"]].dtype == np.float16
        torch.testing.assert_close(torch.tensor(cache[row["key"]]).float(), alone[0, : lens[0]], atol=2e-3, rtol=2e-3)


def test_a_killed_precompute_completes_to_the_same_bytes(world, tmp_path, monkeypatch):
    arguments = [f"data.train={world['manifest']}", f"cache.dir={tmp_path}", world["encoder"], "workers=0",
                 "cache.shard_clips=5"]
    real, count = precompute.write_atomic, []

    def die_on_the_fourth_file(path, write):
        count.append(path)
        if len(count) == 4:
            path.with_name(f".{path.name}.4711.tmp").write_bytes(b"half a shard")  # what kill -9 leaves
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(precompute, "write_atomic", die_on_the_fourth_file)
    with pytest.raises(KeyboardInterrupt):
        call(precompute, *arguments)
    monkeypatch.setattr(precompute, "write_atomic", real)
    call(precompute, *arguments)
    assert bytes_of(tmp_path) == bytes_of(world["cache"])


@pytest.mark.parametrize("workers", [0, 2])
def test_how_many_clips_a_worker_hands_over_changes_nothing(world, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(precompute, "MESSAGE", 2)
    call(precompute, f"data.train={world['manifest']}", f"cache.dir={tmp_path}", world["encoder"],
         "cache.shard_clips=5", f"workers={workers}")
    assert bytes_of(tmp_path) == bytes_of(world["cache"])


def test_a_batch_of_clips_padded_to_30_s_counts_30_s_each(world, tmp_path, monkeypatch):
    real, sizes = model.WhisperEncoder.forward, []

    def forward(self, feats, lens):
        sizes.append(len(feats))
        return real(self, feats, lens)

    monkeypatch.setattr(model.WhisperEncoder, "forward", forward)
    call(precompute, f"data.train={world['manifest']}", f"cache.dir={tmp_path}", world["encoder"], "workers=0",
         "encoder.pad_to_30s=true", "batch_s=60")
    assert sizes == [2] * 6


def test_two_processes_write_the_same_cache_as_one(world, tmp_path):
    torchrun(2, "precompute.py", f"data.train={world['manifest']}", f"cache.dir={tmp_path}", world["encoder"],
             "workers=0", "cache.shard_clips=5", "device=cpu")
    assert bytes_of(tmp_path) == bytes_of(world["cache"])


def test_a_cache_of_another_encoder_is_refused(world, tmp_path):
    other = make_twins.whisper_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="made with another encoder.weights"):
        call(precompute, f"data.train={world['manifest']}", f"cache.dir={world['cache']}", f"encoder.name={other}")


def test_a_cache_of_another_version_is_refused(world, tmp_path):
    shutil.copytree(world["cache"], tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match="another version of precompute.py; delete it and run that again"):
        train_phase1.EncoderCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="made with another format"):
        call(precompute, f"data.train={world['manifest']}", f"cache.dir={tmp_path / 'cache'}", world["encoder"],
             "cache.shard_clips=5")


def test_clips_of_a_cache_are_found_by_their_keys(world, tmp_path):
    cache = train_phase1.EncoderCache(world["cache"])
    keys = [f"utt{number:03d}" for number in (7, 0, 11)]
    places = cache.find([keys[0], "nobody", *keys[1:]]).tolist()
    assert places[1] == -1 and [cache.frames[place] for place in places if place >= 0] == [len(cache[k]) for k in keys]
    with pytest.raises(KeyError, match="nobody"):
        cache["nobody"]
    shutil.copytree(world["cache"], tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00002.json"
    shard = json.loads(path.read_text())
    path.write_text(json.dumps(shard | {"key": ["utt000", *shard["key"][1:]]}))
    with pytest.raises(ValueError, match="two clips have the same key"):
        train_phase1.EncoderCache(tmp_path / "cache")
    for path in (tmp_path / "cache").glob("shard-*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no clip"):
        train_phase1.EncoderCache(tmp_path / "cache")


def test_a_truncated_cache_file_is_named(world, tmp_path):
    shutil.copytree(world["cache"], tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="shard-00001.npy: unreadable or truncated"):
        train_phase1.EncoderCache(tmp_path / "cache")


def test_a_cache_of_many_shards_raises_the_limit_of_open_files(world, tmp_path, monkeypatch):
    def limits_set(soft, hard):
        limits = []
        monkeypatch.setattr(train_phase1.resource, "getrlimit", lambda kind: (soft, hard))
        monkeypatch.setattr(train_phase1.resource, "setrlimit", lambda kind, both: limits.append(both))
        assert len(train_phase1.EncoderCache(world["cache"]).shards) == 3
        return limits

    unlimited = train_phase1.resource.RLIM_INFINITY
    assert limits_set(100, 400) == [(3 + 256, 400)] and limits_set(100, unlimited) == [(3 + 256, unlimited)]
    assert limits_set(100, 200) == [(200, 200)] and limits_set(1000, 2000) == limits_set(unlimited, unlimited) == []
    with pytest.raises(ValueError, match="3 shards stay open together, but this system allows 30 files"):
        limits_set(30, 30)


def test_a_resident_cache_gives_the_same_batches(world):
    cache = train_phase1.EncoderCache(world["cache"])
    resident = train_phase1.ResidentCache(cache, torch.device("cpu"))
    keys = [f"utt{number:03d}" for number in (11, 0, 5, 4, 9)]  # of several shards, the last clip among them
    (ours, our_lens), (enc, lens) = resident.batch(keys), cache.batch(keys)
    assert torch.equal(ours, enc) and torch.equal(our_lens, lens) and enc.dtype == torch.float32
    for key, row, length in zip(keys, enc, lens):
        assert np.array_equal(row[:length].numpy(), cache[key].astype(np.float32)) and not row[length:].any()
    with pytest.raises(KeyError, match="nobody"):
        resident.batch([keys[0], "nobody"])


@pytest.mark.parametrize("script", [train_phase1, train_phase2], ids=["phase1", "phase2"])
def test_a_large_manifest_is_read_once(world, tmp_path, monkeypatch, capsys, script):
    cache, manifest = tmp_path / "cache", tmp_path / "train.jsonl"
    shutil.copytree(world["cache"], cache)
    rows = [row | {"source": str(row["source"]), "language": "en"} for row in model.read_manifest(world["manifest"])]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    cfg = script.DEFAULTS | {"data.train": str(manifest), "data.repeat": [2], "run.dir": str(tmp_path / "run")}
    llm = next(argument for argument in world["phase1"] if argument.startswith("llm.name="))
    tokenizer = model.load_embedding(llm.removeprefix("llm.name="))[1]
    plain = script.read_utterances(str(manifest), script.EncoderCache(cache), tokenizer, True, repeat=[2])
    assert len(plain) == 24

    def start(reads, **other):
        count, real = [], script.read_utterances
        monkeypatch.setattr(script, "read_utterances", lambda *args: count.append(args) or real(*args))
        train = script.open_utterances(cfg | other, script.EncoderCache(cache), tokenizer)
        monkeypatch.setattr(script, "read_utterances", real)
        assert len(count) == reads
        return train

    assert list(start(1)) == list(plain) and not list(cache.glob("utterances-*"))  # small: nothing is kept
    monkeypatch.setattr(script, "LARGE", 0)
    for reads in (1, 0):
        train = start(reads)
        assert list(train) == list(plain) and train[3:5] == plain[3:5] and train[-1] == plain[-1]
        assert list(train.frames) == list(plain.frames) and list(train.seconds) == list(plain.seconds)
        assert train.num_ids.tolist() == plain.num_ids.tolist()
        assert train.token_counts().tolist() == plain.token_counts().tolist()
    folder, = cache.glob("utterances-*")
    assert f"as kept in {folder}" in capsys.readouterr().out and not list(cache.glob(".*"))
    assert len(start(1, **{"data.repeat": [1]})) == 12
    rows[0]["target"] = "another text"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    assert start(1)[0]["target"] == "another text" and len(list(cache.glob("utterances-*"))) == 3
    tokenizer.add_tokens(["another text"])
    start(1)
    monkeypatch.setattr(script.model, "__file__", script.__file__)  # other code
    start(1)
    assert len(list(cache.glob("utterances-*"))) == 5
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    blocks = model.Utterances.blocks

    def another_run_is_faster(utterances):
        half, = cache.glob(".utterances-*")
        shutil.copytree(whole, cache / half.name[1:].split(".")[0])
        return blocks(utterances)

    for path in cache.glob("utterances-*"):
        shutil.rmtree(path)
    monkeypatch.setattr(model.Utterances, "blocks", another_run_is_faster)
    assert list(start(1)) == list(plain) and not list(cache.glob(".*"))
    monkeypatch.setattr(model.Utterances, "blocks", blocks)

    def forbidden(path, *args, **kwargs):
        raise PermissionError("not yours")

    for path in cache.glob("utterances-*"):
        shutil.rmtree(path)
    monkeypatch.setattr(script.Path, "mkdir", forbidden)
    capsys.readouterr()
    assert start(1)[0]["target"] == "another text" and not list(cache.glob("*utterances-*"))
    assert "cannot be kept (not yours), so the next start reads the manifests again" in capsys.readouterr().out


def test_augmentation_leaves_the_padding_and_the_cache_alone(world):
    cache = train_phase1.EncoderCache(world["cache"])
    clips = [{"key": f"utt{n:03d}", "frames": len(cache[f"utt{n:03d}"])} for n in range(12)]
    cfg = {"augment.time_masks": 2, "augment.time_mask_frames": 9, "augment.feature_noise": 0.5}
    plain, lens = train_phase1.load_frames(clips, cache, cfg)
    noisy, _ = train_phase1.load_frames(clips, cache, cfg, seed="1")
    again, _ = train_phase1.load_frames(clips, cache, cfg, seed="1")
    assert torch.equal(noisy, again) and torch.equal(plain, train_phase1.load_frames(clips, cache, cfg)[0])
    real = model.length_mask(lens, plain.shape[1])
    assert not noisy[~real].any() and (noisy != plain)[real].float().mean() > 0.99
    alone, _ = train_phase1.load_frames(clips[3:4], cache, cfg, seed="1")
    assert torch.equal(alone[0], noisy[3, : lens[3]])


def test_prefetch_keeps_the_order_and_passes_errors_on():
    drawn = [threading.Event() for _ in range(6)]

    def batches():
        for number in range(5):
            drawn[number].set()
            yield number
        drawn[5].set()
        raise OSError("disk gone")

    ahead, found = train_phase1.prefetch(batches()), []
    with pytest.raises(OSError, match="disk gone"):
        while True:
            found.append(next(ahead))
            assert drawn[found[-1] + 1].wait(10)  # without being asked for
    assert found == list(range(5))


def test_pooled_texts_are_unit_means_whatever_the_padding():
    table = torch.randn(50, 8)
    ids = [[3], [4, 5, 6, 6], [49, 0]]
    wanted = [F.normalize(table[row].double().mean(0), dim=0) for row in ids]
    torch.testing.assert_close(train_phase1.pool_texts(ids, table).double(), torch.stack(wanted), atol=1e-6, rtol=0)


def test_a_manifest_that_was_not_cached_is_refused(world, tmp_path):
    manifest = make_twins.wav_files(tmp_path / "w", n=20)
    arguments = [a for a in world["phase1"] if not a.startswith("data.train")]
    with pytest.raises(ValueError, match="utt0.* is not in the cache; run precompute.py"):
        call(train_phase1, *arguments, f"data.train={manifest}", f"run.dir={tmp_path / 'r'}")


def bad_manifest(folder):
    """Good clips of every rate and channel count, then one clip for each way to be bad."""
    folder.mkdir()
    tone = make_twins.spoken(["one"])
    for rate in (8000, 22050, 44100, 48000):
        soundfile.write(folder / f"{rate}.wav", make_twins.spoken(["one", "two"], rate), rate)
    soundfile.write(folder / "stereo.wav", np.stack([tone, tone], 1), 16000)
    soundfile.write(folder / "short.wav", np.zeros(800, np.float32), 16000)
    soundfile.write(folder / "long.wav", np.zeros(600 * 8000, np.float32), 8000)
    soundfile.write(folder / "nothing.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not audio")
    (folder / "headerless.raw").write_bytes(b"\x00\x01" * 8000)
    whole = (folder / "48000.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    names = [*sorted(path.name for path in folder.iterdir()), "absent.wav"]
    rows = [json.dumps({"key": Path(n).stem, "source": n, "target": "one two"}) for n in names]
    (folder / "manifest.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "manifest.jsonl"


BAD = {  # what bad.jsonl says of each
    "short": r"^0.05 s is outside (data.min_s..max_s \(0.1..40\)|0.1..data.max_s \(30\))$",
    "long": r"^600.00 s is outside (data.min_s..max_s \(0.1..40\)|0.1..data.max_s \(30\))$",
    "nothing": "(nothing.wav: holds no samples|^0.00 s is outside)",
    "nan": "nan.wav: holds NaN or infinite samples",
    "empty": r"empty.wav: the file is empty \(0 bytes\)",
    "text": "text.wav: not readable as audio",
    "headerless": "headerless.raw: not readable as audio",
    "cut": r"cut.wav: truncated, \d+ samples are left of what its header promises",
    "absent": "absent.wav: no such file",
}


def check_reasons(path, wav_folder):
    rows = {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    assert rows.keys() == BAD.keys()
    for key, pattern in BAD.items():
        assert re.search(pattern, rows[key]["reason"]), rows[key]["reason"]
        assert Path(rows[key]["source"]).parent == wav_folder


def test_bad_clips_are_named_and_never_end_the_run(world, tmp_path):
    manifest = bad_manifest(tmp_path / "bad")
    call(precompute, f"data.train={manifest}", f"cache.dir={tmp_path / 'c'}", world["encoder"], "workers=2")
    check_reasons(tmp_path / "c" / "bad.jsonl", tmp_path / "bad")
    cache, good = train_phase1.EncoderCache(tmp_path / "c"), ["8000", "22050", "44100", "48000", "stereo"]
    assert sorted(cache.find(good).tolist()) == list(range(5)) and len(cache.frames) == 5


def test_past_max_bad_the_run_stops_and_says_which(world, tmp_path):
    manifest = bad_manifest(tmp_path / "bad")
    with pytest.raises(ValueError, match="9 clips cannot be used, more than data.max_bad=3; the last is"):
        call(precompute, f"data.train={manifest}", f"cache.dir={tmp_path}", world["encoder"], "data.max_bad=3")


def test_phase_2_trains_from_audio_with_bad_clips_among_them(world, tmp_path, capsys):
    manifest = bad_manifest(tmp_path / "bad")
    arguments = [a for a in world["phase2"] if not a.startswith(("data.train", "cache.dir"))]
    call(train_phase2, *arguments, f"data.train={manifest}", world["encoder"], "data.source=audio", "workers=0",
         "augment.noise=1", "augment.telephone=1", "augment.specaug=true", "data.speed=0.9,1.1", "optim.max_steps=2",
         f"run.dir={tmp_path / 'r'}")
    check_reasons(tmp_path / "r" / "bad.jsonl", tmp_path / "bad")
    said = capsys.readouterr().out
    assert re.search("manifest.jsonl: 7 clips left out, first empty: .*0 bytes", said)  # of two the header is sound


def late_bad_manifest(folder, bad=("bad1", "bad2"), good=2):
    """Clips whose header is sound and whose samples are not, before good ones: they show only when they are read."""
    folder.mkdir()
    wave, names = make_twins.spoken(["one", "two"]), [*bad, *(f"good{n}" for n in range(good))]
    for name in names:
        samples = np.where(np.arange(len(wave)) == 7, np.nan, wave) if name in bad else wave
        soundfile.write(folder / f"{name}.wav", samples, 16000, subtype="FLOAT")
    rows = [json.dumps({"key": name, "source": f"{name}.wav", "target": "one two"}) for name in names]
    (folder / "manifest.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "manifest.jsonl"


def from_audio(world, train, valid, *arguments):
    shared = [a for a in world["phase2"] if not a.startswith(("data.train", "data.valid", "cache.dir"))]
    return [*shared, f"data.train={train}", f"data.valid={valid}", world["encoder"], "data.source=audio", "workers=0",
            *arguments]


def bad_keys(folder):
    return [json.loads(line)["key"] for line in (folder / "bad.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_bad_clip_of_valid_is_named_and_not_scored(world, tmp_path):
    both = late_bad_manifest(tmp_path / "both")
    good = late_bad_manifest(tmp_path / "good", bad=())
    for name, valid in (("with", both), ("without", good)):
        call(train_phase2, *from_audio(world, world["manifest"], valid, "optim.max_steps=2", "loss.ctc_weight=0.3",
                                       f"run.dir={tmp_path / name}"))
    assert bad_keys(tmp_path / "with") == ["bad1", "bad2"] and bad_keys(tmp_path / "without") == []
    scores = [metrics(tmp_path / name)[-1] for name in ("with", "without")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and {"valid_ce", "er", "ctc_er"} <= scores[0].keys()
    only_bad = late_bad_manifest(tmp_path / "only", good=0)
    with pytest.raises(ValueError, match="manifest.jsonl: not one of its clips could be read"):
        call(train_phase2, *from_audio(world, world["manifest"], only_bad, "optim.max_steps=1",
                                       f"run.dir={tmp_path / 'r'}"))


def test_bad_clips_of_valid_count_towards_max_bad(world, tmp_path):
    valid = late_bad_manifest(tmp_path / "v")
    with pytest.raises(ValueError, match="2 clips cannot be used, more than data.max_bad=1; the last is bad2: .*NaN"):
        call(train_phase2, *from_audio(world, world["manifest"], valid, "optim.max_steps=4", "data.max_bad=1",
                                       f"run.dir={tmp_path / 'r'}"))
    assert bad_keys(tmp_path / "r") == ["bad1", "bad2"]


def test_steps_without_one_readable_clip_do_not_end_the_run(world, tmp_path):
    train = late_bad_manifest(tmp_path / "t")
    call(train_phase2, *from_audio(world, train, world["manifest"], "batch_clips=1", "optim.max_steps=4",
                                   "run.log_every=1", "loss.ctc_weight=0.3", f"run.dir={tmp_path / 'r'}"))
    losses = [row["ce"] for row in metrics(tmp_path / "r") if "ce" in row]
    assert len(losses) == 4 and losses.count(0.0) == 2 and all(map(math.isfinite, losses))
    assert sorted(bad_keys(tmp_path / "r")) == ["bad1", "bad2"]


def test_bad_clips_of_all_processes_are_named(world, tmp_path):
    train = late_bad_manifest(tmp_path / "t", good=0, bad=("a", "b", "c", "d"))
    torchrun(2, "train_phase2.py", *from_audio(world, train, world["manifest"], "batch_clips=1", "optim.max_steps=2",
                                               f"run.dir={tmp_path / 'r'}", "device=cpu"))
    assert sorted(bad_keys(tmp_path / "r")) == ["a", "b", "c", "d"]


# ---- losses and schedules ---------------------------------------------------------------------------------------


def test_info_nce_equals_the_plain_formula_and_spares_equal_transcripts():
    audio = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    text = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    text[3] = text[1]  # clips 1 and 3 say the same
    ids = torch.tensor([[0], [1], [2], [1], [4]])
    expected = 0.0
    for i in range(5):
        rivals = [j for j in range(5) if j == i or ids[j] != ids[i]]
        for own, others in ((audio[i], text), (text[i], audio)):
            scores = {j: math.exp(float(own @ others[j]) / 0.1) for j in rivals}
            expected -= math.log(scores[i] / sum(scores.values())) / 2
    got = train_phase1.info_nce(audio, text, ids, torch.tensor(0.1, dtype=torch.float64))
    assert float(got) == pytest.approx(expected, rel=1e-9)


def test_recall_counts_any_clip_with_the_right_text():
    similarity = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.3], [0.5, 0.4, 0.3]])
    assert float(train_phase1.recall_at(similarity, torch.tensor([0, 1, 2]), 1)) == 0.0
    assert float(train_phase1.recall_at(similarity, torch.tensor([0, 0, 2]), 1)) == pytest.approx(2 / 3)
    assert float(train_phase1.recall_at(similarity, torch.tensor([0, 1, 2]), 3)) == 1.0


def test_the_learning_rate_warms_up_then_falls_to_zero():
    cfg = {"optim.lr": 1.0, "optim.warmup_steps": 10, "optim.schedule": "cosine"}
    rates = [train_phase1.learning_rate(step, 110, cfg) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[60] == pytest.approx(0.5) and rates[109] < 0.001
    assert train_phase1.learning_rate(99, 110, cfg | {"optim.schedule": "constant"}) == 1.0


@pytest.mark.parametrize("script", [precompute, train_phase1, train_phase2])
def test_fp32_is_rounded_to_tf32_beside_bf16_only(script):
    for dtype, expected in (("bf16", ("high", True)), ("fp32", ("highest", False))):  # last: as it was
        script.pick_device({"device": "cpu", "dtype": dtype})
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # by model.py


def as_lists(batches):
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("seed", range(20))
def test_batches_are_cut_as_one_by_one(seed):
    """Against a plain loop: a clip joins its batch as long as limits allow, or if not every process has one yet."""
    rng = random.Random(seed)
    world, size, budget = rng.choice([1, 2, 3]), rng.randint(1, 6), rng.choice([20, 40, 90])
    lengths = sorted(rng.randint(1, 20) for _ in range(rng.randint(world, 40)))
    expected, batch = [], []
    for index, length in enumerate(lengths):
        fits = len(batch) < size * world and length * (len(batch) + 1) <= budget * world
        if len(batch) >= world and not fits:
            expected, batch = [*expected, batch], []
        batch.append(index)
    expected += [batch] if len(batch) >= world or not expected else []
    expected[-1] += batch if len(batch) < world and expected[-1] is not batch else []
    found = train_phase1.cut_batches(list(range(len(lengths))), lengths, size, budget, world)
    assert found == expected
    assert found == as_lists(train_phase1.cut_batches(np.arange(len(lengths)), np.array(lengths), size, budget, world))


@pytest.mark.parametrize("count", [3, 4, 64, 65, 66, 67, 127, 128, 129, 640])
def test_no_pool_is_too_small_for_all_processes(count):
    batches = train_phase1.epoch_batches(list(range(1, count + 1)), 1, 1000, 2, 0, 1)
    assert sorted(i for batch in batches for i in batch) == list(range(count)) and min(map(len, batches)) >= 2


def test_epoch_batches_hold_every_clip_once_within_the_budget_longest_first():
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 200, 500)]
    for epoch in (0, 1):
        batches = train_phase1.epoch_batches(lengths, 16, 1000, 2, 7, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(500))
        assert as_lists(batches) == as_lists(train_phase1.epoch_batches(lengths, 16, 1000, 2, 7, epoch))
        sizes = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        assert max(sizes) <= 2 * 1000 + 200 and max(map(len, batches)) <= 2 * 16 + 1 and min(map(len, batches)) >= 2
    first = train_phase1.epoch_batches(lengths, 16, 1000, 2, 7, 0)
    assert as_lists(first) != as_lists(train_phase1.epoch_batches(lengths, 16, 1000, 2, 8, 0))
    sizes = [len(batch) * max(lengths[i] for i in batch) for batch in first]
    assert sizes[0] == max(sizes)
    many = np.full(4096, 2**20, np.int32)  # 2048 of them have more frames than an int32 holds
    assert {len(batch) for batch in train_phase1.epoch_batches(many, 4096, 2**21, 1, 0, 0)} == {2}


# ---- training ---------------------------------------------------------------------------------------------------

PHASE1 = ["loss.ctc_weight=1", "optim.max_steps=6"]
PHASE2 = ["llm.lora.r=2", "loss.ctc_weight=0.3", "llm.draft=0.5", "optim.max_steps=6"]


def weights_of(folder, name="last.pt"):
    state = torch.load(Path(folder) / name, weights_only=True)
    return state.get("phase") or state.get("trained") or state


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_phase_1_on_a_gpu_is_the_same_run(world, tmp_path, monkeypatch):
    """The path that main takes on a GPU, the cache in its memory and batches fetched ahead, taken on the CPU."""
    arguments = [*world["phase1"], *PHASE1]
    call(train_phase1, *arguments, f"run.dir={tmp_path / 'plain'}")
    plain, held = train_phase1.stream, []
    monkeypatch.setattr(train_phase1, "speed_up", lambda cache, cfg, device: held.append(
        train_phase1.ResidentCache(cache, device)) or held[0])
    monkeypatch.setattr(train_phase1, "stream", lambda *rest: train_phase1.prefetch(plain(*rest)))
    call(train_phase1, *arguments, f"run.dir={tmp_path / 'gpu'}")
    assert len(held) == 1
    assert_equal_weights(weights_of(tmp_path / "plain"), weights_of(tmp_path / "gpu"))


@pytest.mark.parametrize(("script", "extra"), [(train_phase1, PHASE1), (train_phase2, PHASE2)], ids=["one", "two"])
def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path, script, extra, monkeypatch):
    arguments = [*world["phase1" if script is train_phase1 else "phase2"], *extra]
    call(script, *arguments, f"run.dir={tmp_path / 'whole'}")
    real, count = script.load_frames, []

    def die_in_the_fifth_step(*rest, seed=None):
        count.extend([seed] if seed is not None else [])
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*rest, seed=seed)

    monkeypatch.setattr(script, "load_frames", die_in_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        call(script, *arguments, f"run.dir={tmp_path / 'killed'}", "run.resume=true")
    monkeypatch.setattr(script, "load_frames", real)
    call(script, *arguments, f"run.dir={tmp_path / 'killed'}", "run.resume=true")
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    logged = {name: [row["step"] for row in metrics(tmp_path / name)] for name in ("killed", "whole")}
    assert logged["killed"] == logged["whole"]


def test_kill_9_of_the_real_process_then_resume_equals_the_whole_run(world, tmp_path):
    arguments = [*world["phase1"], "loss.ctc_weight=1", "optim.max_steps=40", "run.valid_every=40"]
    call(train_phase1, *arguments, f"run.dir={tmp_path / 'whole'}")
    command = [sys.executable, ROOT / "train_phase1.py", *arguments, f"run.dir={tmp_path / 'killed'}",
               "run.resume=true"]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums in another order have other last bits
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] >= 2
    call(train_phase1, *arguments, f"run.dir={tmp_path / 'killed'}", "run.resume=true")
    assert_equal_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))


def test_little_of_an_aishell_epoch_is_padding():
    """What packing could save, at most: lengths like AISHELL-1's (mean 4.52 s, 15 tokens), the configs' batches."""
    rng = random.Random(0)
    seconds = [min(14.5, max(1.2, rng.lognormvariate(1.462, 0.3))) for _ in range(120_098)]
    frames = [int(s / 0.06) for s in seconds]
    positions = [f + 2 * round(s * 15 / 4.52) + 25 for f, s in zip(frames, seconds)]
    for lengths, size, budget, most in ((frames, 256, 40000, 0.033), (positions, 64, 8192, 0.02)):
        batches = train_phase1.epoch_batches(lengths, size, budget, 1, 0, 0)
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        assert sum(map(len, batches)) == len(lengths) and 0.005 < 1 - sum(lengths) / padded < most


def torchrun(processes, script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port",
               str(20000 + os.getpid() % 20000), str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(("script", "extra"), [
    (train_phase1, ["loss.ctc_weight=1", "optim.max_steps=4"]),
    (train_phase2, ["llm.lora.r=2", "loss.ctc_weight=0.3", "optim.max_steps=4"]),
], ids=["phase1", "phase2"])
def test_two_processes_equal_one_with_the_doubled_batch(world, tmp_path, script, extra):
    arguments = [*world["phase1" if script is train_phase1 else "phase2"], *extra, "adaptor.dropout=0", "device=cpu"]
    call(script, *arguments, "batch_clips=6", "run.valid_every=100", f"run.dir={tmp_path / 'one'}")
    torchrun(2, f"{script.__name__}.py", *arguments, "batch_clips=3", "run.valid_every=100",
             f"run.dir={tmp_path / 'two'}")
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in one:
        if name.endswith("in_proj_bias"):  # the softmax does not feel the keys' bias: its gradient is rounding, which
            for weights in (one, two):  # AdamW blows up to steps of full size
                weights[name] = torch.cat([weights[name].chunk(3)[0], weights[name].chunk(3)[2]])
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4, msg=name)


def test_phase_1_lowers_both_losses_and_writes_loadable_weights(world, tmp_path):
    call(train_phase1, *world["phase1"], "loss.ctc_weight=1", "optim.max_steps=200", "run.log_every=10",
         "adaptor.dropout=0", "run.valid_every=200", "augment.time_masks=0", "optim.lr=5e-3", "batch_clips=12",
         f"run.dir={tmp_path}")
    rows = metrics(tmp_path)
    losses = [row for row in rows if "nce" in row]
    assert losses[-1]["nce"] < 0.7 * losses[0]["nce"] and losses[-1]["ctc"] < 0.5 * losses[0]["ctc"]
    adaptor = model.AudioAdaptor(32, 48, 32, 1, 4, stack=2)
    model.load_weights(adaptor, tmp_path / "adaptor_cached.pt")


def test_phase_2_overfits_a_few_clips_and_leaves_the_llm_alone(world, tmp_path, qwen3_folder):
    before = model.load_llm(qwen3_folder)[0].state_dict()
    call(train_phase2, *world["phase2"], "optim.max_steps=300", "optim.lr=1e-2", "optim.clip=1", "augment.time_masks=0",
         "adaptor.dropout=0", "run.valid_every=300", "run.save_every=300", "run.valid_decode=12", "batch_clips=12",
         "llm.lora.r=8", f"run.dir={tmp_path}")
    scores = metrics(tmp_path)
    final = next(row for row in reversed(scores) if "er" in row)
    # a random LLM is harder to steer than a trained one; untouched it scores 0 and over 1
    assert final["valid_acc"] > 0.8 and final["er"] < 0.7
    assert all("adaptor." in name or "lora_" in name for name in weights_of(tmp_path))
    after = model.load_llm(qwen3_folder)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["llm.prompt"] == train_phase2.DEFAULTS["llm.prompt"] and written["encoder.weights"]


@pytest.mark.parametrize(("script", "extra"), [(train_phase1, PHASE1), (train_phase2, PHASE2)], ids=["one", "two"])
def test_a_gradient_that_is_not_finite_is_named_and_never_saved(world, tmp_path, monkeypatch, script, extra):
    run, real, steps = tmp_path / "run", torch.nn.utils.clip_grad_norm_, []

    def overflow(*rest):
        steps.append(real(*rest))
        return steps[-1] * (math.nan if len(steps) == 6 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(ValueError, match="step 6: the gradient is not finite"):
        call(script, *world["phase1" if script is train_phase1 else "phase2"], *extra, f"run.dir={run}",
             "optim.max_steps=20", "run.save_every=4", "run.log_every=5")
    assert len(steps) == 8 and torch.load(run / "last.pt", weights_only=True)["step"] == 4


def test_a_used_output_folder_is_refused_unless_resuming(world, tmp_path):
    arguments = [*world["phase1"], "optim.max_steps=2", f"run.dir={tmp_path}"]
    call(train_phase1, *arguments)
    with pytest.raises(ValueError, match="already holds a run; give another run.dir, or run.resume=true"):
        call(train_phase1, *arguments)


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train_phase1.write_atomic(path, lambda file: torch.save({"step": 1}, file))

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="last.pt: could not be written .No space left on device.; what was there before"):
        train_phase1.write_atomic(path, lambda file: torch.save({"step": 2}, file))
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("write", [lambda file: torch.save({"a": torch.zeros(10**6)}, file),
                                   lambda file: np.save(file, np.zeros(10**6)),
                                   lambda file: file.write(b"0" * 10**6)], ids=["torch", "numpy", "bytes"])
def test_a_disk_that_fills_up_while_saving_is_named(tmp_path, write):
    path = tmp_path / "shard.npy"
    path.write_bytes(b"whole")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # the write fails half way, as on a full disk
    try:
        with pytest.raises(OSError, match="shard.npy: could not be written .*(too large|disk full).*before is whole"):
            train_phase1.write_atomic(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("shard.npy", b"whole")]


def test_what_a_kill_left_half_written_goes_with_the_next_write(tmp_path):
    for name in (".last.pt.4711.tmp", ".other.pt.4711.tmp", ".last.pt.tmp", "last.pt.1.tmp"):
        (tmp_path / name).write_bytes(b"half")
    train_phase1.write_atomic(tmp_path / "last.pt", lambda file: file.write(b"whole"))
    kept = [".last.pt.tmp", ".other.pt.4711.tmp", "last.pt", "last.pt.1.tmp"]  # what is not this file's stays
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def damaged(kind, path):
    good = model.AudioAdaptor(32, 48, 32, 1, 4, stack=2).state_dict()
    if kind == "shape":
        good["norm.weight"] = torch.zeros(7)
    elif kind == "missing":
        del good["norm.bias"]
    elif kind == "code":
        good = Malicious()
    torch.save(good, path)
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(("kind", "message"), [
    ("shape", "adaptor_cached.pt: does not fit the configured AudioAdaptor.*norm.weight"),
    ("missing", "does not fit the configured AudioAdaptor.*Missing key.*norm.bias"),
    ("code", "adaptor_cached.pt: not a plain state dict"),
    ("torn", "adaptor_cached.pt: not a plain state dict"),
])
def test_a_damaged_adaptor_is_refused_by_name(world, tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    damaged(kind, tmp_path / "adaptor_cached.pt")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(train_phase2, *world["phase2"], f"init.dir={tmp_path}", "optim.max_steps=1", f"run.dir={tmp_path / 'r'}")
    assert not (tmp_path / "pwned").exists()


def test_tokens_without_a_ctc_class_are_counted_once_at_the_start(world, tmp_path, capsys, qwen3_folder):
    rows = [json.loads(line) for line in world["manifest"].read_text(encoding="utf-8").splitlines()]
    rows = [row | {"source": str(world["manifest"].parent / row["source"])} for row in rows]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, rows[:2])), encoding="utf-8")
    tokenizer = model.load_embedding(qwen3_folder)[1]
    ids = [model.text_to_ids(tokenizer, row["target"]) for row in rows]
    unknown = sum(token not in {*ids[0], *ids[1]} for row in ids for token in row)
    assert unknown > 0
    said = f"{unknown} of {sum(map(len, ids))} {{}} tokens have no CTC class"
    one, two = ([a for a in world[phase] if not a.startswith("data.train")] for phase in ("phase1", "phase2"))
    call(train_phase1, *one, f"data.train={few}", "loss.ctc_weight=1", "optim.max_steps=1", f"run.dir={tmp_path / '1'}")
    assert capsys.readouterr().out.count(said.format("valid")) == 1
    call(train_phase2, *two, f"data.train={world['manifest']}", f"init.dir={tmp_path / '1'}", "loss.ctc_weight=1",
         "optim.max_steps=1", f"run.dir={tmp_path / '2'}")
    output = capsys.readouterr().out
    assert said.format("train") in output and said.format("valid") in output


@pytest.mark.parametrize(("script", "extra"), [(train_phase1, PHASE1), (train_phase2, PHASE2)], ids=["one", "two"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(world, tmp_path, script, extra, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*world["phase1" if script is train_phase1 else "phase2"], *extra, "optim.max_steps=2"]
    last = tmp_path / "r" / "last.pt"
    call(script, *arguments, "run.dir=r")
    good, bytes_ = torch.load(last, weights_only=True), last.read_bytes()
    name = "phase" if script is train_phase1 else "trained"
    lacking = good | {name: {k: v for k, v in good[name].items() if k != "adaptor.norm.bias"}}
    other = good | {"identity": good["identity"] | {"encoder.weights": "abc"}}
    cases = [(Malicious(), "not a checkpoint of this script"), (good[name], r"not a checkpoint.*\(KeyError\)"),
             (lacking, "does not fit this configuration: .*adaptor.norm.bias"),
             (good | {"format": 1}, "of an earlier version"),
             (other, "belongs to another encoder or LLM .encoder.weights=abc, now ")]
    for content, message in cases:
        torch.save(content, last)
        with pytest.raises(ValueError, match=f"(?s)last.pt.*{message}"):
            call(script, *arguments, "run.dir=r", "run.resume=true")
    assert not (tmp_path / "pwned").exists()
    last.write_bytes(bytes_[:3000])
    with pytest.raises(ValueError, match="last.pt: not a checkpoint of this script"):
        call(script, *arguments, "run.dir=r", "run.resume=true")
    last.write_bytes(bytes_)
    with pytest.raises(ValueError, match="(?s)last.pt does not fit this configuration.*size mismatch"):
        call(script, *arguments, "run.dir=r", "run.resume=true", "adaptor.hidden_dim=16")
    with pytest.raises(ValueError, match="r: already holds a run; give another run.dir, or run.resume=true"):
        call(script, *arguments, "run.dir=r")


def test_phase_2_refuses_a_phase_1_of_another_encoder_or_llm(world, tmp_path):
    call(train_phase1, *world["phase1"], "optim.max_steps=1", f"run.dir={tmp_path / '1'}")
    arguments = [*world["phase2"], f"init.dir={tmp_path / '1'}", "optim.max_steps=1"]
    call(train_phase2, *arguments, f"run.dir={tmp_path / '2'}")
    encoder, llm = make_twins.whisper_folder(tmp_path / "e", seed=1), make_twins.qwen3_folder(tmp_path / "l", seed=1)
    cache = [f"data.train={world['manifest']}", f"cache.dir={tmp_path / 'c'}"]
    call(precompute, *cache, f"encoder.name={encoder}", "workers=0")
    for other, key in ((cache[1], "encoder.weights"), (f"llm.name={llm}", "llm.weights")):
        with pytest.raises(ValueError, match=f"identity.json: belongs to another encoder or LLM .{key}="):
            call(train_phase2, *arguments, other, f"run.dir={tmp_path / key}")


def test_soft_speech_without_a_trained_ctc_head_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="need a trained CTC head"):
        call(train_phase2, *world["phase2"], "llm.speech=ctc", f"run.dir={tmp_path}")


def test_a_run_in_which_nothing_trains_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="nothing trains"):
        call(train_phase2, *world["phase2"], "adaptor.train=false", f"run.dir={tmp_path}")


@pytest.mark.parametrize("script", [train_phase1, train_phase2], ids=["one", "two"])
def test_empty_and_impossible_transcripts_are_counted_not_fatal(world, tmp_path, capsys, script):
    rows = [json.loads(line) for line in world["manifest"].read_text(encoding="utf-8").splitlines()]
    rows = [row | {"source": str(world["manifest"].parent / row["source"])} for row in rows]
    rows[0]["target"], rows[1]["target"] = "", "one two three four " * 40
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    arguments = [a for a in world["phase1" if script is train_phase1 else "phase2"] if not a.startswith("data.train")]
    call(script, *arguments, f"data.train={manifest}", "loss.ctc_weight=1", "optim.max_steps=6",
         f"run.dir={tmp_path / 'r'}")
    assert "1 clips left out, first utt000: empty transcript" in capsys.readouterr().out
    rows = metrics(tmp_path / "r")
    assert sum(row.get("impossible", 0) for row in rows) >= 1
    losses = [row["ctc"] for row in rows if "ctc" in row]
    assert len(losses) == 3 and all(map(math.isfinite, losses))


def test_bf16_autocast_trains_fp32_weights_to_nearly_the_same_losses(world, tmp_path):
    """The dtypes of a GPU run, on the CPU."""
    for dtype in ("fp32", "bf16"):
        folder = tmp_path / dtype
        shared = [f"dtype={dtype}", "optim.max_steps=2", "run.log_every=1", "adaptor.dropout=0", "loss.ctc_weight=0.3"]
        call(train_phase1, *world["phase1"], *shared, f"run.dir={folder / '1'}")
        call(train_phase2, *world["phase2"], *shared, f"init.dir={tmp_path / 'fp32' / '1'}", "llm.lora.r=2",
             "llm.draft=0.5", "llm.speech=ctc", f"run.dir={folder / '2'}")
        for part in ("1", "2"):
            assert {value.dtype for value in weights_of(folder / part).values()} <= {torch.float32, torch.int64}
    for part, names in (("1", ("nce", "ctc")), ("2", ("ce", "ctc"))):
        for exact, rounded in zip(metrics(tmp_path / "fp32" / part)[:2], metrics(tmp_path / "bf16" / part)[:2]):
            assert [exact[name] for name in names] == pytest.approx([rounded[name] for name in names], rel=0.03)
