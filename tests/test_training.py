"""precompute.py and both phases as a user meets them: cache, losses, resume, processes, errors."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

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

ADAPTOR = "adaptor.hidden_dim=32 adaptor.num_layers=1 adaptor.num_heads=4 adaptor.stack=2"
EVEN = "adaptor.dropout=0 augment.feature_noise=0 augment.time_masks=0"  # nothing is random
PHASE1 = "loss.ctc_weight=1 optim.max_steps=6"
PHASE2 = "llm.lora.r=2 llm.lora.dropout=0.1 loss.ctc_weight=0.3 optim.max_steps=6"
EVEN_OF = {train_phase1: EVEN, train_phase2: f"{EVEN} llm.lora.dropout=0"}
BOTH = pytest.mark.parametrize(
    ("script", "extra"), [(train_phase1, PHASE1), (train_phase2, PHASE2)], ids=["one", "two"]
)


def config(script, *settings):
    """`settings` hold key=value pairs with spaces between."""
    return model.load_config(" ".join(map(str, settings)).split(), script.DEFAULTS)


def call(script, *settings):
    script.main(config(script, *settings))


def refused(message, script, *settings):
    with pytest.raises(model.UserError, match=message):
        call(script, *settings)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def same_weights(one, two):
    one, two = last(one)["trained"], last(two)["trained"]
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    """12 clips, their cache made with a tiny Whisper, and the settings of short runs on them."""
    folder = tmp_path_factory.mktemp("world")
    manifest = make_twins.wav_files(folder / "wavs", n=12)
    encoder = f"encoder.name={whisper_folder} cache.shard_clips=5 workers=0 device=cpu"
    encode = f"data.train={manifest} {encoder}"
    call(precompute, encode, f"cache.dir={folder / 'cache'}")
    phase = f"""cache.dir={folder / 'cache'} data.train={manifest} data.valid={manifest}
        data.cache_dir={folder / 'manifests'} llm.name={qwen3_folder} {ADAPTOR} batch_clips=4
        augment.time_masks=1 augment.feature_noise=0.1 optim.warmup_steps=2 optim.lr=1e-3
        run.log_every=2 run.valid_every=4 run.save_every=2 workers=0 device=cpu"""
    return SimpleNamespace(
        manifest=manifest, encoder=encoder, encode=encode, cache=folder / "cache", phase=phase
    )


# ---- precompute.py ----------------------------------------------------------


def shards(folder):
    paths = [*Path(folder).glob("shard-*"), *Path(folder).glob("*.json*")]
    return {path.name: path.read_bytes() for path in sorted(paths)}


def test_the_cache_holds_what_the_encoder_says(world, whisper_folder, tmp_path):
    cache = model.EncoderCache(world.cache)
    encoder, index = model.freeze(model.load_encoder(whisper_folder)), cache.index()
    assert len(index) == 12 and {shard for shard, *_ in index.values()} == {0, 1, 2}
    for row in model.read_manifest(world.manifest, tmp_path):
        feats = encoder.features(model.load_audio(row["source"], 16000), f"0-{row['key']}")
        alone, lens = encoder(feats[None], torch.tensor([len(feats)]))
        shard, number, frames, seconds = index[row["key"]]
        cached = cache.read(shard, number)
        assert cached.dtype == torch.float16 and len(cached) == frames == lens[0]
        assert seconds == pytest.approx(soundfile.info(row["source"]).duration, abs=1e-3)
        torch.testing.assert_close(cached.float(), alone[0, :frames], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_readers_messages_and_processes_change_no_byte(world, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(precompute, "MESSAGE", 2)
    cfg = config(precompute, world.encode, f"cache.dir={tmp_path} workers={2 // processes}")
    run_processes(precompute.main, cfg, processes)
    assert shards(tmp_path) == shards(world.cache)


def test_a_killed_precompute_completes_to_the_same_bytes(world, tmp_path, monkeypatch):
    real, count = model.save_atomic, []

    def die_in_the_third_file(path, write):
        count.append(path)
        if len(count) == 3:
            Path(f"{path}.tmp4711").write_bytes(b"half a shard")  # what kill -9 leaves
            raise KeyboardInterrupt
        real(path, write)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "save_atomic", die_in_the_third_file)
        call(precompute, world.encode, f"cache.dir={tmp_path}")
    assert len(shards(tmp_path)) == 3  # one shard, the next half, cache.json
    call(precompute, world.encode, f"cache.dir={tmp_path}")
    assert shards(tmp_path) == shards(world.cache) and not list(tmp_path.glob("*.tmp*"))


def test_a_cache_grows_and_notices_files_that_have_changed(world, tmp_path, capsys):
    manifest, cache = make_twins.wav_files(tmp_path / "w", n=6), tmp_path / "c"
    few = tmp_path / "w" / "few.jsonl"
    few.write_text("".join(manifest.read_text().splitlines(keepends=True)[:4]))
    rest = f"{world.encoder} cache.dir={cache} cache.shard_clips=2 data.train="
    call(precompute, f"{rest}{few}")
    first = shards(cache)
    call(precompute, f"{rest}{manifest}")
    grown = shards(cache)
    assert {name: grown[name] for name in first} == first and len(grown) == len(first) + 1
    clip = tmp_path / "w" / "utt002.wav"
    samples, rate = soundfile.read(clip)
    soundfile.write(clip, samples[::-1].copy(), rate)  # other audio in a file of the same size
    capsys.readouterr()
    call(precompute, f"{rest}{manifest}")
    assert "utt002 has changed" in capsys.readouterr().out
    again = shards(cache)
    assert {name for name in again if again[name] != grown[name]} == {"shard-00001.safetensors"}


def test_what_does_not_belong_to_a_cache_is_refused(world, tmp_path):
    cache, stranger = tmp_path / "cache", make_twins.wav_files(tmp_path / "w", n=1)
    other = make_twins.whisper_folder(tmp_path / "other", seed=1)
    shutil.copytree(world.cache, cache)
    encode = f"{world.encode} cache.dir={cache}"
    for settings, message in (
        (f"encoder.name={other}", "was made with another encoder: weights was"),
        ("data.max_s=5", "another settings: max_s was 40.0, is 5.0"),
        (f"data.valid={stranger}", "utt000 stands for another file elsewhere"),
    ):
        refused(message, precompute, encode, settings)


def test_clips_padded_to_30_s_count_30_s_each(world, tmp_path, monkeypatch):
    real, sizes = model.WhisperEncoder.forward, []

    def forward(self, feats, lens):
        sizes.append(len(feats))
        return real(self, feats, lens)

    monkeypatch.setattr(model.WhisperEncoder, "forward", forward)
    few = world.manifest.with_name("four.jsonl")
    model.save(few, read_lines(world.manifest)[:4])
    call(precompute, world.encoder, f"data.train={few} cache.dir={tmp_path} batch_s=60",
         "encoder.pad_to_30s=true")  # fmt: skip
    assert sizes == [2, 2]


DROPPED = {
    "short": "short.wav: 0.05 s, outside data.min_s..max_s (0.1 to 40)",
    "nan": "nan.wav: holds NaN", "text": "text.wav: not readable as audio",
    "absent": "absent.wav: not readable as audio (No such file",
}  # fmt: skip


def test_clips_that_cannot_be_used_are_named_counted_and_limited(world, tmp_path):
    for rate in (8000, 22050, 48000):
        soundfile.write(tmp_path / f"{rate}.wav", make_twins.spoken(["one", "two"], rate), rate)
    soundfile.write(tmp_path / "short.wav", np.zeros(800, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, "FLOAT")
    (tmp_path / "text.wav").write_text("not audio")
    names = [*sorted(path.name for path in tmp_path.iterdir()), "absent.wav"]
    rows = [{"key": Path(name).stem, "source": name, "target": "one two"} for name in names]
    model.save(tmp_path / "m.jsonl", rows)
    encode = f"{world.encoder} cache.dir={tmp_path / 'c'} data.train={tmp_path / 'm.jsonl'}"
    call(precompute, encode)
    found = {row["key"]: row["reason"] for row in read_lines(tmp_path / "c" / "dropped.jsonl")}
    assert found.keys() == DROPPED.keys() and all(DROPPED[key] in found[key] for key in found)
    assert model.EncoderCache(tmp_path / "c").index().keys() == {"8000", "22050", "48000"}
    many = "4 of 7 clips cannot be used, data.max_dropped=3; the last is "
    refused(many, precompute, encode, "data.max_dropped=3")
    model.save(tmp_path / "m.jsonl", [row for row in rows if row["key"] in DROPPED])
    refused("4 of 4 clips cannot be used", precompute, encode, f"cache.dir={tmp_path / 'd'}")


def test_parts_of_a_recording_are_clips_and_a_moved_one_is_encoded_again(
    world, whisper_folder, tmp_path, capsys
):
    wave, cache = make_twins.spoken(["one", "two", "three"]), tmp_path / "c"
    soundfile.write(tmp_path / "call.wav", np.stack([0 * wave, wave], 1), 16000, "FLOAT")
    row = {"source": "call.wav", "target": "one", "channel": 1}
    starts = {"a": 0.1, "b": 0.4}
    parts = [row | {"key": key, "start": at, "end": at + 0.3} for key, at in starts.items()]
    manifests = tmp_path / "m.jsonl", tmp_path / "n.jsonl"
    encode = f"{world.encoder} cache.dir={cache} cache.shard_clips=1 data.speed=1.0,0.9 data.train="
    for rows, stale in ((parts, ""), ([parts[0], parts[1] | {"start": 0.5}], "b has changed")):
        model.save(manifests[0], rows), model.save(manifests[1], [row | {"key": "c"}])
        call(precompute, f"{encode}{','.join(map(str, manifests))}")
        assert stale in capsys.readouterr().out
        model.EncoderCache.keep_open.cache_clear()  # a shard's place is taken by a new one
        found = model.EncoderCache(cache)
        index = found.index()
        assert index.keys() == {f"{key}{speed}" for key in "abc" for speed in ("", "@0.9")}
        encoder = model.freeze(model.load_encoder(whisper_folder))
        for part in (rows[0], rows[1], row | {"key": "c", "start": 0.0, "end": len(wave) / 16000}):
            samples = wave[round(part["start"] * 16000) : round(part["end"] * 16000)]
            feats = encoder.features(torch.from_numpy(samples), "")
            enc, _ = encoder(feats[None], torch.tensor([len(feats)]))
            shard, number, frames, _ = index[part["key"]]
            cached = found.read(shard, number).float()
            torch.testing.assert_close(cached, enc[0, :frames], atol=2e-3, rtol=2e-3)


def test_a_chat_rows_prompt_and_hotwords_reach_phase_2(world, tokenizer, tmp_path):
    speech, rows = "<|startofspeech|>!utt000.wav<|endofspeech|>", []
    for asked in ("", "Translate:", "热词列表：[<|im_end|>, Bo]\nTranslate:"):
        turns = ("user", f"{asked}{speech}"), ("assistant", "one")
        turns = [{"role": role, "content": text} for role, text in turns]
        rows.append({"key": "utt000", "messages": turns})
    cache, prompts = model.EncoderCache(world.cache), []
    cfg = config(train_phase2, world.phase, "run.dir=r llm.prompt=Say:")
    for n, row in enumerate(rows):
        spec = f"{tmp_path}/{n}.jsonl"
        model.save(spec, [row])
        clips = model.cached_clips(spec, cache, tokenizer, tmp_path / "kept")
        batch = train_phase2.Clips(clips, cache, 0, 0, cfg.augment)[0, 0, [[0]]]
        phase = SimpleNamespace(tokenizer=tokenizer, cfg=cfg)
        (halves,) = train_phase2.Phase2.prompts(phase, batch.rows)
        prompts.append(tokenizer.decode(halves[0]).rpartition("user\n")[2])
        assert halves[0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 0
    assert prompts == ["Say:", "Translate:", "Hotwords: [<|im_end|>, Bo]\nTranslate:"]


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


@BOTH
def test_the_learning_rate_warms_up_then_falls_to_zero(world, script, extra):
    cfg = config(script, world.phase, "run.dir=r optim.lr=2.0 optim.warmup_steps=4").optim
    rates = [script.learning_rate(step, 104, cfg) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[54] == pytest.approx(1.0)
    assert rates[104] == pytest.approx(0, abs=1e-9) and rates[4:] == sorted(rates[4:], reverse=True)
    cfg.schedule = "constant"
    assert script.learning_rate(90, 104, cfg) == 2.0


@BOTH
def test_augmentation_is_a_function_of_its_seed_and_leaves_the_cache_alone(world, script, extra):
    masks = "augment.time_masks=2 augment.time_mask_frames=5 augment.feature_noise=0.5"
    settings = config(script, world.phase, masks, "run.dir=r").augment
    frames = torch.ones(400, 64, dtype=torch.float16)
    seeds = [0, 1, 2], [0, 1, 2], [0, 2, 2]
    one, same, other = (script.augment(frames, settings, seed) for seed in seeds)
    assert torch.equal(one, same) and not torch.equal(one, other)
    masked = one.mean(1) < 0.5
    assert 0 < masked.sum() <= 10 and frames.eq(1).all()
    assert float(one[~masked].std()) == pytest.approx(0.5, rel=0.05)


# ---- training ---------------------------------------------------------------


@BOTH
def test_a_run_killed_in_a_step_resumes_to_the_same_bits(
    world, tmp_path, script, extra, monkeypatch
):
    settings = f"{world.phase} {extra} run.resume=true run.dir="
    call(script, f"{settings}{tmp_path / 'whole'} workers=1")
    real, steps = torch.nn.utils.clip_grad_norm_, []

    def killed_in_the_fifth(*rest):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*rest)

    cfg = config(script, f"{settings}{tmp_path / 'killed'}")
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="SIGKILL"):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", killed_in_the_fifth)
        run_processes(script.main, cfg, 1)
    assert last(tmp_path / "killed")["step"] == 4
    script.main(cfg)
    whole, killed = last(tmp_path / "whole"), last(tmp_path / "killed")
    assert all(whole[name] == killed[name] for name in ("step", "epoch", "used", "best"))
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    message = "holds a run; give another folder, or resume it"
    refused(message, script, f"{settings}{tmp_path / 'killed'} run.resume=false")


@BOTH
def test_two_processes_equal_one_with_the_doubled_batch(world, tmp_path, script, extra):
    settings = f"{world.phase} {extra} {EVEN_OF[script]} optim.max_steps=4 batch_clips="
    call(script, f"{settings}6 run.dir={tmp_path / 'one'}")
    two = f"{settings}3 run.dir={tmp_path / 'two'}"
    run_processes(script.main, config(script, two))
    one_weights, two_weights = (last(tmp_path / name)["trained"] for name in ("one", "two"))
    for name in one_weights:
        found = [one_weights[name], two_weights[name]]
        if name.endswith("in_proj_bias"):  # the softmax does not feel the keys' bias: AdamW blows
            for n, weights in enumerate(found):  # its gradient, mere rounding, up to full steps
                query, _, value = weights.chunk(3)
                found[n] = torch.cat([query, value])
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4, msg=name)
    one, other = (read_lines(tmp_path / name / "metrics.jsonl")[-2:] for name in ("one", "two"))
    assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-3)
    assert one[1] == pytest.approx(other[1], abs=1e-3)  # valid is shared out over them
    refused("is of 2 processes, this run has 1", script, two, "run.resume=true")


@BOTH
def test_accumulation_equals_one_batch(world, tmp_path, script, extra):
    settings = f"{world.phase} {extra} {EVEN_OF[script]} optim.max_steps=1 run.valid_every=0"
    if script is train_phase1:
        settings += " loss.contrastive_weight=0"  # it adds no negatives
    for name, more in (("one", "batch_clips=12"), ("two", "batch_clips=6 optim.accum=2")):
        call(script, settings, more, f"run.dir={tmp_path / name}")
    one, two = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two"))
    assert one["ctc"] == pytest.approx(two["ctc"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_phase_2_divides_by_the_label_tokens_of_the_step(world, tmp_path):
    cfg = config(train_phase2, world.phase, EVEN, f"run.dir={tmp_path} batch_clips=12",
                 "optim.max_steps=1 run.valid_every=0")  # fmt: skip
    train_phase2.main(cfg)
    torch.manual_seed(cfg.seed)
    (llm, tokenizer), cache = model.load_llm(cfg.llm.name), model.EncoderCache(world.cache)
    rows = model.cached_clips(cfg.data.train, cache, tokenizer, cfg.data.cache_dir)
    settings = train_phase2.adaptor_settings(cfg, {})
    phase = train_phase2.build(cfg, llm, tokenizer, rows, settings, cache.encoder["width"], None)
    batch = train_phase2.Clips(rows, cache, 0, 0)[0, 0, [list(range(12))]]
    labels = sum(len(ids) + 1 for ids in batch.rows["ids"])
    (phase(batch.enc, batch)["ce"] / labels).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(phase.parameters(), float("inf")))
    first = read_lines(tmp_path / "metrics.jsonl")[0]
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_clip_0_is_no_clipping(world, tmp_path):
    settings = f"{world.phase} {PHASE1} optim.max_steps=2 run.valid_every=0 optim.clip="
    for clip in ("0", "1e9", "1e-3"):
        call(train_phase1, f"{settings}{clip} run.dir={tmp_path / clip}")
    assert same_weights(tmp_path / "0", tmp_path / "1e9")
    assert not same_weights(tmp_path / "0", tmp_path / "1e-3")


REFUSED = {
    "optim.accum=0": "optim.accum: has to be at least 1, got 0",
    "batch_clips=0": "batch_clips: has to be at least 1",
    "workers=-1": "workers: has to be at least 0, got -1",
    "loss.temperature=0": "loss.temperature: has to be at least",
    "adaptor.num_heads=5": "num_heads=5 has to divide hidden_dim=32",
    "adaptor.stack=0": "stack=0 to be at least 1",
    "optim.schedule=linear": "optim.schedule: expected one of cosine, constant; got 'linear'",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_values_that_cannot_be_are_refused_by_name(world, tmp_path, settings):
    refused(REFUSED[settings], train_phase1, world.phase, f"run.dir={tmp_path}", settings)


def test_phase_1_lowers_both_losses_and_phase_2_inherits_its_adaptor(world, tmp_path):
    first = f"{world.phase} {EVEN} {PHASE1} adaptor.pre_norm=true run.dir={tmp_path / 'one'}"
    call(train_phase1, first, "optim.max_steps=60 optim.lr=1e-2 batch_clips=12 run.log_every=10",
         "run.valid_every=60 run.save_every=0")  # fmt: skip
    losses = [row for row in read_lines(tmp_path / "one" / "metrics.jsonl") if "nce" in row]
    assert losses[-1]["nce"] < 0.7 * losses[0]["nce"] and losses[-1]["ctc"] < 0.5 * losses[0]["ctc"]
    second = " ".join(a for a in world.phase.split() if not a.startswith("adaptor."))
    second += f" init.dir={tmp_path / 'one'} llm.speech=ctc loss.ctc_weight=0.1 run.valid_clips=3"
    call(train_phase2, second, f"optim.max_steps=2 run.dir={tmp_path / 'two'}")
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert written["adaptor"]["pre_norm"] is True and written["adaptor"]["num_heads"] == 4
    assert written["settings"]["speech"] == "ctc" and written["encoder"]["weights"]
    heads, message = "adaptor.num_heads=2", "another adaptor: num_heads was 4, is 2"
    refused(message, train_phase2, second, heads, f"run.dir={tmp_path / 'three'}")
    refused(message, train_phase1, first, heads, "run.resume=true")


def test_phase_2_learns_a_few_clips_and_leaves_the_llm_alone(world, tmp_path, qwen3_folder):
    before = model.load_llm(qwen3_folder)[0].state_dict()
    everywhere = "llm.lora.targets=q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj llm.lora.r=8"
    call(train_phase2, world.phase, EVEN, everywhere, f"run.dir={tmp_path} batch_clips=12",
         "optim.max_steps=80 optim.lr=1e-2 run.valid_every=80 run.save_every=80")  # fmt: skip
    final = read_lines(tmp_path / "metrics.jsonl")[-1]
    # a random LLM is harder to steer than a trained one; untouched it scores 0 and over 1
    assert final["valid_acc"] > 0.75 and final["wer"] < 0.7
    assert all("adaptor." in name or "lora_" in name for name in last(tmp_path)["trained"])
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
        if len(steps) == 4:
            parameters[0].grad.fill_(float("nan"))
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    refused("step 6: the gradient is not finite", script, world.phase, extra, "optim.max_steps=9",
            f"run.dir={tmp_path} run.save_every=3 run.log_every=0 run.valid_every=0")  # fmt: skip
    assert last(tmp_path)["step"] == 3


class OnGpu(torch.Tensor):
    """Stands for a tensor on a GPU: notes what the CPU would have to wait for."""

    waits = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        name = getattr(function, "__name__", "")
        waiting = ("item", "tolist", "cpu", "numpy", "nonzero")
        if name in waiting or name.startswith(("__bool", "__int", "__fl")):
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


@pytest.mark.parametrize(("script", "more", "most"), [
    (train_phase1, "", 0), (train_phase2, "llm.speech=frames", 0),
    (train_phase2, "llm.speech=ctc", 1),
])  # fmt: skip
def test_a_step_waits_for_the_gpu_once_at_most(world, qwen3_folder, tmp_path, script, more, most):
    llm, tokenizer = model.load_llm(qwen3_folder)
    table, cache = llm.get_input_embeddings().weight.detach(), model.EncoderCache(world.cache)
    rows = model.cached_clips(str(world.manifest), cache, tokenizer, tmp_path)
    adaptor = model.AudioAdaptor(32, 48, 32, 1, 4, stack=2)
    cfg = config(script, world.phase, f"run.dir=r loss.ctc_weight=1 {more}")
    kind, base = (script.Phase1, table) if script is train_phase1 else (script.Phase2, llm)
    phase = kind(adaptor, model.CTCHead(table, list(range(40, 400))), base, tokenizer, cfg)
    batch = script.Clips(rows, cache, 0, 0, cfg.augment)[0, 0, [[3, 1, 2]]]
    OnGpu.waits.clear()
    with Gpu():
        phase.table = table.as_subclass(OnGpu)
        sums = phase(batch.enc.to(torch.device("cpu")), batch)
    assert any(isinstance(x, OnGpu) for x in sums.values()) and len(OnGpu.waits) <= most
