"""precompute.py and both phases as a user meets them: cache, losses, resume, processes, errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_twins
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from processes import run_processes
from torch.overrides import TorchFunctionMode

import model
import precompute
import train_phase1
import train_phase2

ROOT = Path(__file__).parents[1]
ADAPTOR = [
    "adaptor.hidden_dim=32",
    "adaptor.num_layers=1",
    "adaptor.num_heads=4",
    "adaptor.stack=2",
]
PHASE1 = ["loss.ctc_weight=1", "optim.max_steps=6"]
PHASE2 = ["llm.lora.r=2", "llm.lora.dropout=0.1", "loss.ctc_weight=0.3", "optim.max_steps=6"]
BOTH = pytest.mark.parametrize(
    ("script", "extra"), [(train_phase1, PHASE1), (train_phase2, PHASE2)], ids=["one", "two"]
)


def config(script, *arguments):
    return model.load_config([str(a) for a in arguments], script.DEFAULTS)


def call(script, *arguments):
    script.main(config(script, *arguments))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    state = torch.load(Path(folder) / "last.pt", weights_only=True)
    return state["trained"]


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    """A manifest of 12 clips, its cache made with a tiny Whisper, what every phase needs."""
    folder = tmp_path_factory.mktemp("world")
    manifest = make_twins.wav_files(folder / "wavs", n=12)
    encoder = ["workers=0", "cache.shard_clips=5", f"encoder.name={whisper_folder}"]
    cache = [f"data.train={manifest}", f"cache.dir={folder / 'cache'}"]
    call(precompute, *cache, *encoder)
    phase = [*cache, f"data.valid={manifest}", f"llm.name={qwen3_folder}", *ADAPTOR, "workers=0",
             "optim.warmup_steps=2", "optim.lr=1e-3", "run.log_every=2", "run.valid_every=4",
             "run.save_every=2", "augment.time_masks=1", "augment.feature_noise=0.1",
             "batch_clips=4", f"data.cache_dir={folder / 'manifests'}"]  # fmt: skip
    return {"folder": folder, "manifest": manifest, "phase": phase, "encoder": encoder}


# ---- precompute.py ----------------------------------------------------------


def shards(folder):
    paths = [*Path(folder).glob("shard-*"), *Path(folder).glob("*.json*")]
    return {path.name: path.read_bytes() for path in sorted(paths)}


def test_the_cache_holds_what_the_encoder_says(world, whisper_folder):
    cache = model.EncoderCache(world["folder"] / "cache")
    encoder, index = model.freeze(model.load_encoder(whisper_folder)), cache.index()
    assert len(index) == 12 and {shard for shard, *_ in index.values()} == {0, 1, 2}
    for row in model.read_manifest(world["manifest"], world["folder"] / "m"):
        feats = encoder.features(model.load_audio(row["source"], 16000), f"0-{row['key']}")
        alone, lens = encoder(feats[None], torch.tensor([len(feats)]))
        shard, number, frames, seconds = index[row["key"]]
        cached = cache.read(shard, number)
        assert cached.dtype == torch.float16 and len(cached) == frames == lens[0]
        assert seconds == pytest.approx(soundfile.info(row["source"]).duration, abs=1e-3)
        torch.testing.assert_close(cached.float(), alone[0, :frames], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("workers", "message"), [(0, 32), (2, 2)])
def test_readers_and_messages_change_no_byte(world, tmp_path, monkeypatch, workers, message):
    monkeypatch.setattr(precompute, "MESSAGE", message)
    train = f"data.train={world['manifest']}"
    call(precompute, train, *world["encoder"], f"cache.dir={tmp_path}", f"workers={workers}")
    assert shards(tmp_path) == shards(world["folder"] / "cache")


def test_two_processes_write_the_same_cache_as_one(world, tmp_path):
    cfg = config(precompute, f"data.train={world['manifest']}", *world["encoder"],
                 f"cache.dir={tmp_path}", "device=cpu")  # fmt: skip
    run_processes(precompute.main, cfg)
    assert shards(tmp_path) == shards(world["folder"] / "cache")


def test_a_killed_precompute_completes_to_the_same_bytes(world, tmp_path, monkeypatch):
    arguments = [f"data.train={world['manifest']}", *world["encoder"], f"cache.dir={tmp_path}"]
    real, count = model.save_atomic, []

    def die_in_the_third_file(path, write):
        count.append(path)
        if len(count) == 3:
            Path(f"{path}.tmp4711").write_bytes(b"half a shard")  # what kill -9 leaves
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(model, "save_atomic", die_in_the_third_file)
    with pytest.raises(KeyboardInterrupt):
        call(precompute, *arguments)
    monkeypatch.setattr(model, "save_atomic", real)
    call(precompute, *arguments)
    assert shards(tmp_path) == shards(world["folder"] / "cache")
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_cache_grows_and_notices_files_that_have_changed(world, tmp_path, capsys):
    manifest = make_twins.wav_files(tmp_path / "w", n=6)
    few = tmp_path / "w" / "few.jsonl"
    few.write_text("".join(manifest.read_text().splitlines(keepends=True)[:4]))
    arguments = [*world["encoder"], f"cache.dir={tmp_path / 'c'}", "cache.shard_clips=2"]
    call(precompute, f"data.train={few}", *arguments)
    first = shards(tmp_path / "c")
    call(precompute, f"data.train={manifest}", *arguments)
    grown = shards(tmp_path / "c")
    assert {name: grown[name] for name in first} == first and len(grown) == len(first) + 1
    clip = tmp_path / "w" / "utt002.wav"
    samples, rate = soundfile.read(clip)
    soundfile.write(clip, samples[::-1].copy(), rate)  # other audio in a file of the same size
    capsys.readouterr()
    call(precompute, f"data.train={manifest}", *arguments)
    assert "utt002 has changed" in capsys.readouterr().out
    again = shards(tmp_path / "c")
    changed = {name for name in again if again[name] != grown[name]}
    assert changed == {"shard-00001.safetensors"}


def test_a_cache_of_another_encoder_or_layout_is_refused(world, tmp_path):
    other = make_twins.whisper_folder(tmp_path / "other", seed=1)
    shutil.copytree(world["folder"] / "cache", tmp_path / "cache")
    train = [
        f"data.train={world['manifest']}",
        *world["encoder"],
        f"cache.dir={tmp_path / 'cache'}",
    ]
    with pytest.raises(model.UserError, match="was made with another encoder: weights was"):
        call(precompute, *train, f"encoder.name={other}")
    with pytest.raises(model.UserError, match="another settings: max_s was 40.0, is 5.0"):
        call(precompute, *train, "data.max_s=5")
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(model.UserError, match="made by an earlier layout; run precompute.py again"):
        call(precompute, *train)


def test_clips_padded_to_30_s_count_30_s_each(world, tmp_path, monkeypatch):
    real, sizes = model.WhisperEncoder.forward, []

    def forward(self, feats, lens):
        sizes.append(len(feats))
        return real(self, feats, lens)

    monkeypatch.setattr(model.WhisperEncoder, "forward", forward)
    call(precompute, f"data.train={world['manifest']}", *world["encoder"], f"cache.dir={tmp_path}",
         "encoder.pad_to_30s=true", "batch_s=60", "cache.shard_clips=100")  # fmt: skip
    assert sizes == [2] * 6


DROPPED = {  # what dropped.jsonl says of each
    "short": r"0.05 s, outside data.min_s..max_s \(0.1 to 40\)",
    "nothing": "nothing.wav: holds no samples",
    "nan": "nan.wav: holds NaN or infinite samples",
    "empty": "empty.wav: not readable as audio",
    "text": "text.wav: not readable as audio",
    "headerless": "headerless.raw: not readable as audio",
    "cut": r"cut.wav: truncated, \d+ samples are left of what its header says",
    "absent": "absent.wav: cannot be opened .No such file",
}


def test_clips_that_cannot_be_used_are_named_and_never_end_the_run(world, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for rate in (8000, 22050, 48000):
        soundfile.write(folder / f"{rate}.wav", make_twins.spoken(["one", "two"], rate), rate)
    soundfile.write(folder / "short.wav", np.zeros(800, np.float32), 16000)
    soundfile.write(folder / "nothing.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, "FLOAT")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not audio")
    (folder / "headerless.raw").write_bytes(b"\x00\x01" * 8000)
    whole = (folder / "48000.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    names = [*sorted(path.name for path in folder.iterdir()), "absent.wav"]
    rows = [{"key": Path(name).stem, "source": name, "target": "one two"} for name in names]
    model.save(folder / "m.jsonl", rows)
    arguments = [
        f"data.train={folder / 'm.jsonl'}",
        *world["encoder"],
        f"cache.dir={tmp_path / 'c'}",
    ]
    call(precompute, *arguments)
    found = [
        json.loads(line) for line in (tmp_path / "c" / "dropped.jsonl").read_text().splitlines()
    ]
    assert {row["key"] for row in found} == DROPPED.keys()
    for row in found:
        assert re.search(DROPPED[row["key"]], row["reason"]), row["reason"]
    assert model.EncoderCache(tmp_path / "c").index().keys() == {"8000", "22050", "48000"}
    with pytest.raises(model.UserError, match="8 clips cannot be used, more than .*max_dropped=3"):
        call(precompute, *arguments, "data.max_dropped=3")


def test_one_key_for_two_files_is_refused(world, tmp_path):
    other = make_twins.wav_files(tmp_path / "w", n=1)
    with pytest.raises(model.UserError, match="utt000 stands for another file elsewhere"):
        call(precompute, f"data.train={world['manifest']}", f"data.valid={other}",
             *world["encoder"], f"cache.dir={tmp_path / 'c'}")  # fmt: skip


# ---- losses -----------------------------------------------------------------


def test_info_nce_equals_the_plain_formula_and_spares_equal_transcripts():
    audio, text = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1) for _ in range(2))
    text[3] = text[1]  # clips 1 and 3 say the same
    ids, expected = torch.tensor([0, 1, 2, 1, 4]), [0.0] * 5
    for i in range(5):
        rivals = [j for j in range(5) if j == i or ids[j] != ids[i]]
        for one, many in ((audio, text), (text, audio)):
            scores = torch.stack([one[i] @ many[j] / 0.1 for j in rivals])
            expected[i] -= float(scores.log_softmax(0)[rivals.index(i)]) / 2
    whole = train_phase1.info_nce(audio, audio, text, ids, 0, 0.1)
    assert float(whole) == pytest.approx(sum(expected))
    part = train_phase1.info_nce(audio[2:4], audio, text, ids, 2, 0.1)  # of the second process
    assert float(part) == pytest.approx(sum(expected[2:4]))


def test_pooled_texts_are_unit_means():
    table, ids = torch.randn(50, 8), [[3], [4, 5, 6, 6], [49, 0], [3]]
    wanted = [F.normalize(table[row].double().mean(0), dim=0) for row in ids]
    pooled, numbers = train_phase1.pool_texts(ids, table)
    torch.testing.assert_close(pooled.double(), torch.stack(wanted), atol=1e-6, rtol=0)
    assert numbers[0] == numbers[3] and len(set(numbers.tolist())) == 3


@pytest.mark.parametrize("script", [train_phase1, train_phase2])
def test_the_learning_rate_warms_up_then_falls_to_zero(script):
    cfg = config(script, *NEEDED[script], "optim.lr=2.0", "optim.warmup_steps=4").optim
    rates = [script.learning_rate(step, 104, cfg) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[54] == pytest.approx(1.0)
    assert rates[104] == pytest.approx(0, abs=1e-9) and rates[4:] == sorted(rates[4:], reverse=True)
    cfg.schedule = "constant"
    assert script.learning_rate(90, 104, cfg) == 2.0


NEEDED = dict.fromkeys(
    (train_phase1, train_phase2),
    [f"{key}=x" for key in ("cache.dir", "data.train", "data.valid", "llm.name", "run.dir")],
)


def test_augmentation_is_a_function_of_its_seed_and_leaves_the_cache_alone(world):
    settings = config(train_phase1, *NEEDED[train_phase1], "augment.time_masks=2",
                      "augment.time_mask_frames=5",
                      "augment.feature_noise=0.5").augment  # fmt: skip
    frames = torch.ones(400, 64, dtype=torch.float16)
    one = train_phase1.augment(frames, settings, [0, 1, 2])
    assert torch.equal(one, train_phase2.augment(frames, settings, [0, 1, 2]))
    assert not torch.equal(one, train_phase1.augment(frames, settings, [0, 2, 2]))
    masked = one.mean(1) < 0.5
    assert 0 < masked.sum() <= 10 and frames.eq(1).all()
    assert float(one[~masked].std()) == pytest.approx(0.5, rel=0.05)


# ---- training ---------------------------------------------------------------


@BOTH
def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path, script, extra, monkeypatch):
    arguments = [*world["phase"], *extra, "run.resume=true"]
    call(script, *arguments, f"run.dir={tmp_path / 'whole'}")
    real, count = torch.nn.utils.clip_grad_norm_, []

    def die_in_the_fifth_step(*rest):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", die_in_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        call(script, *arguments, f"run.dir={tmp_path / 'killed'}")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", real)
    call(script, *arguments, f"run.dir={tmp_path / 'killed'}")
    assert_equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    with pytest.raises(model.UserError, match="holds a run; give another folder, or resume it"):
        call(script, *arguments, f"run.dir={tmp_path / 'killed'}", "run.resume=false")


def test_kill_9_of_the_real_process_then_resume_equals_the_whole_run(world, tmp_path):
    arguments = [*world["phase"], "loss.ctc_weight=1", "optim.max_steps=40", "run.valid_every=0"]
    arguments += ["run.resume=true", "workers=1"]
    call(train_phase1, *arguments, f"run.dir={tmp_path / 'whole'}")
    command = [
        sys.executable,
        ROOT / "train_phase1.py",
        *arguments,
        f"run.dir={tmp_path / 'killed'}",
    ]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # sums in another order have other last bits
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": one_thread}
    process, deadline = subprocess.Popen(command, **quiet), time.time() + 120
    while not (tmp_path / "killed" / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] >= 2
    call(train_phase1, *arguments, f"run.dir={tmp_path / 'killed'}")
    assert_equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))


@BOTH
def test_two_processes_equal_one_with_the_doubled_batch(world, tmp_path, script, extra):
    arguments = [*world["phase"], *extra, "adaptor.dropout=0", "device=cpu", "run.valid_every=4",
                 "augment.feature_noise=0", "augment.time_masks=0",
                 "optim.max_steps=4"]  # fmt: skip
    arguments += ["llm.lora.dropout=0"] if script is train_phase2 else []
    call(script, *arguments, "batch_clips=6", f"run.dir={tmp_path / 'one'}")
    cfg = config(script, *arguments, "batch_clips=3", f"run.dir={tmp_path / 'two'}")
    run_processes(script.main, cfg)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in one:
        if name.endswith("in_proj_bias"):  # the softmax does not feel the keys' bias: AdamW blows
            for weights in (one, two):  # its gradient, mere rounding, up to steps of full size
                query, _, value = weights[name].chunk(3)
                weights[name] = torch.cat([query, value])
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4, msg=name)
    scores = [{k: v for k, v in metrics(tmp_path / n)[-1].items()} for n in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)  # valid is shared out over them
    with pytest.raises(model.UserError, match="is of 2 processes, this run has 1"):
        call(script, *arguments, f"run.dir={tmp_path / 'two'}", "run.resume=true")


@BOTH
def test_accumulation_equals_one_batch(world, tmp_path, script, extra):
    if script is train_phase1:
        extra = ["loss.ctc_weight=1", "loss.contrastive_weight=0"]  # it adds no negatives
    arguments = [*world["phase"], *extra, "adaptor.dropout=0", "augment.feature_noise=0",
                 "augment.time_masks=0", "optim.max_steps=1", "run.valid_every=0"]  # fmt: skip
    arguments += ["llm.lora.dropout=0"] if script is train_phase2 else []
    for name, clips, accum in (("one", 12, 1), ("two", 6, 2)):
        call(script, *arguments, f"batch_clips={clips}", f"optim.accum={accum}",
             f"run.dir={tmp_path / name}")  # fmt: skip
    one, two = metrics(tmp_path / "one")[0], metrics(tmp_path / "two")[0]
    assert one["ctc"] == pytest.approx(two["ctc"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_clip_0_is_no_clipping_and_zeros_are_refused_by_name(world, tmp_path):
    for clip in ("0", "1e9", "1e-3"):
        call(
            train_phase1,
            *world["phase"],
            *PHASE1,
            f"optim.clip={clip}",
            f"run.dir={tmp_path / clip}",
        )
    assert_equal(weights_of(tmp_path / "0"), weights_of(tmp_path / "1e9"))
    zero, small = weights_of(tmp_path / "0"), weights_of(tmp_path / "1e-3")
    assert not torch.equal(zero["adaptor.norm.weight"], small["adaptor.norm.weight"])
    for zeros, message in {
        "optim.accum=0": "optim.accum: has to be at least 1, got 0",
        "batch_clips=0": "batch_clips: has to be at least 1",
        "workers=-1": "workers: has to be at least 0, got -1",
        "loss.temperature=0": "loss.temperature: has to be at least",
        "adaptor.num_heads=5": r"num_heads=5 has to divide hidden_dim=32",
        "adaptor.stack=0": "stack=0 to be at least 1",
        "optim.schedule=linear": "optim.schedule: expected one of cosine, constant; got 'linear'",
    }.items():
        with pytest.raises(model.UserError, match=message):
            call(train_phase1, *world["phase"], f"run.dir={tmp_path / 'r'}", zeros)


def test_phase_1_lowers_both_losses_and_phase_2_inherits_its_adaptor(world, tmp_path):
    first = f"run.dir={tmp_path / 'one'}"
    call(train_phase1, *world["phase"], "loss.ctc_weight=1", "optim.max_steps=150", first,
         "run.log_every=10", "adaptor.dropout=0", "run.valid_every=150", "augment.time_masks=0",
         "augment.feature_noise=0", "optim.lr=5e-3", "batch_clips=12", "adaptor.pre_norm=true",
         "run.save_every=0")  # fmt: skip
    losses = [row for row in metrics(tmp_path / "one") if "nce" in row]
    assert losses[-1]["nce"] < 0.7 * losses[0]["nce"] and losses[-1]["ctc"] < 0.5 * losses[0]["ctc"]
    plain = [a for a in world["phase"] if not a.startswith("adaptor.")]
    second = [*plain, f"init.dir={tmp_path / 'one'}", "llm.speech=ctc", "loss.ctc_weight=0.1",
              "optim.max_steps=2", "run.valid_clips=3"]  # fmt: skip
    call(train_phase2, *second, f"run.dir={tmp_path / 'two'}")
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert written["adaptor"]["pre_norm"] is True and written["adaptor"]["num_heads"] == 4
    assert written["settings"]["speech"] == "ctc" and written["encoder"]["weights"]
    with pytest.raises(model.UserError, match="another adaptor: num_heads was 4, is 2"):
        call(train_phase2, *second, "adaptor.num_heads=2", f"run.dir={tmp_path / 'three'}")
    with pytest.raises(model.UserError, match="another adaptor: num_heads was 4, is 2"):
        call(train_phase1, *world["phase"], "loss.ctc_weight=1", "adaptor.num_heads=2",
             f"run.dir={tmp_path / 'one'}", "run.resume=true")  # fmt: skip


def test_phase_2_learns_a_few_clips_and_leaves_the_llm_alone(world, tmp_path, qwen3_folder):
    before = model.load_llm(qwen3_folder)[0].state_dict()
    call(train_phase2, *world["phase"], "optim.max_steps=200", "optim.lr=1e-2", "optim.clip=1",
         "augment.time_masks=0", "augment.feature_noise=0", "adaptor.dropout=0", "batch_clips=12",
         "run.valid_every=200", "run.save_every=200", "llm.lora.r=8",
         f"run.dir={tmp_path}")  # fmt: skip
    final = metrics(tmp_path)[-1]
    # a random LLM is harder to steer than a trained one; untouched it scores 0 and over 1
    assert final["valid_acc"] > 0.8 and final["wer"] < 0.7
    assert all("adaptor." in name or "lora_" in name for name in weights_of(tmp_path))
    after = model.load_llm(qwen3_folder)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@BOTH
def test_a_gradient_that_is_not_finite_stops_the_run_and_is_never_saved(
    world, tmp_path, monkeypatch, script, extra
):
    real, steps = torch.nn.utils.clip_grad_norm_, []

    def overflow(parameters, limit):
        steps.append(1)
        parameters = list(parameters)
        if len(steps) == 6:
            parameters[0].grad.fill_(float("nan"))
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(model.UserError, match="step 8: the gradient is not finite"):
        call(script, *world["phase"], *extra, f"run.dir={tmp_path}", "optim.max_steps=20",
             "run.save_every=4", "run.log_every=20", "run.valid_every=0")  # fmt: skip
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 4


class OnGpu(torch.Tensor):
    """Stands for a tensor on a GPU: notes what the CPU would have to wait for."""

    waits = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("item", "tolist", "cpu", "numpy", "nonzero") or name.startswith(
            ("__bool", "__int", "__fl")
        ):
            cls.waits.append(name)
            return out.as_subclass(torch.Tensor) if name == "cpu" else out
        return out


class Gpu(TorchFunctionMode):
    """What is made for a device, or sent there, becomes OnGpu."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sent = getattr(function, "__name__", "") == "to" and isinstance((*args, 0)[1], torch.device)
        made = (kwargs or {}).get("device") is not None
        return out.as_subclass(OnGpu) if torch.is_tensor(out) and (sent or made) else out


@pytest.mark.parametrize("speech", ["frames", "ctc"])
def test_a_step_waits_for_the_gpu_once_at_most(world, qwen3_folder, speech):
    llm, tokenizer = model.load_llm(qwen3_folder)
    table, cache = (
        llm.get_input_embeddings().weight.detach(),
        model.EncoderCache(world["folder"] / "cache"),
    )
    rows = model.cached_clips(str(world["manifest"]), cache, tokenizer, world["folder"] / "m")
    adaptor = model.AudioAdaptor(32, 48, 32, 1, 4, stack=2)
    ctc = model.CTCHead(table, list(range(40, 400)))
    cfg = config(train_phase1, *world["phase"], "run.dir=r")
    phase1 = train_phase1.Phase1(adaptor, ctc, table, tokenizer, cfg)
    cfg = config(
        train_phase2, *world["phase"], "run.dir=r", f"llm.speech={speech}", "loss.ctc_weight=1"
    )
    phase2 = train_phase2.Phase2(adaptor, ctc, llm, tokenizer, cfg)
    for script, phase, most in (
        (train_phase1, phase1, 0),
        (train_phase2, phase2, int(speech == "ctc")),
    ):
        batch = script.Clips(rows, cache, 0, 0, cfg.augment)[0, 0, [[3, 1, 2]]]
        OnGpu.waits.clear()
        with Gpu():
            phase1.table = table.as_subclass(OnGpu)
            sums = phase(batch.enc.to(torch.device("cpu")), batch)
        assert any(isinstance(x, OnGpu) for x in sums.values()) and len(OnGpu.waits) <= most, (
            OnGpu.waits
        )
