"""Speed: every stage against the way it is usually done, on the same work in the same run, outputs shown to be equal.

    python bench.py                             # the demo's models and speech, after make demo; `make bench` also keeps
                                                # glibc from giving memory back after every call
    python bench.py --size tiny                 # random weights, seconds: checks that every row works
    python bench.py --size full --device cuda   # SenseVoice-Small + 207.7 M adaptor + Qwen3-4B: shapes, random weights;
                                                # --repeats 3 --baseline-repeats 0 for a GPU that is lent by the minute
    python bench.py --stages encoder,infer_batch1
    python bench.py --scale --out scale.json    # how cost grows with clip length, batch and corpus; also scale.png

Output  a table, and bench.json, written after every row: machine, environment, matmul_tflops (what a bare matmul
        reaches here) and `rows`, each with stage, baseline_s, ours_s (medians), their spreads (longest - shortest),
        ratio, equal, peak_mb and baseline_peak_mb (of the whole process, in an untimed first run of each way; on CUDA
        of torch's allocator), audio_s, audio_s_per_s, usual (what the baseline is); all but fbank tflops and mfu: what
        ours reaches, padding included, and its share of matmul_tflops.
        encoder         transformers_s; with --compile compiled_s: ours under torch.compile
        training steps  apart: by how much losses or gradients differ at most, relative (our cache is fp16)
        inference       rtf, of all clips, while readers work ahead (no latency); identical: share of equal texts
                        (staged: of equal tokens; worst: by how much a different one scores less); usual_share of the
                        clips, by seconds, that the usual way takes (its time is divided by that)
        on CUDA         minutes_aishell of the two phases, of their training steps alone (no validation), beside
                        minutes_original, and of precompute (178 h: scaled from `times` copies of the clips, in shards
                        of 2048, timed once)
        --scale: `scale`, rows of points (size, seconds, MiB), time's exponent, its bound (BOUNDS), whether it holds.
Fair    Baseline and ours run in turns in one process with the same number of threads, after one untimed run each (with
        --baseline-repeats 0 that run of the baseline counts). Both begin at the same audio files (steps of phase 1 and
        2: at cached encoder outputs) and end at the same thing. `equal` compares what they return: features, encoder
        outputs, texts; of training steps the loss of one common batch and each parameter's gradient, before clipping.
        Dropout is off, and the learning rate of the steps is 0 (AdamW does all its work and moves nothing), so that
        every repeat sees the same weights.
Usual   one clip at a time, Whisper padded to 30 s (with a mask, or the outputs could not be compared), a forward hook,
        one .pt file a clip; random batches padded to their longest clip; fp32 without TF32; the LLM's weights left
        trainable, logits at all positions; transformers' `generate` on one clip at a time (in bf16 on a GPU).
Limits  The encoder's row has SenseVoice's shape and random weights in every size. Random weights hardly ever end an
        answer, so both ways end it after as many tokens as the transcript has. On a GPU ours then stages answers and
        CTC's drafts (Staged): passes are as many as with drafts that have every 20th token wrong; `equal` compares what
        the LLM would have written with a plain pass over the clip alone. The usual way of phase2_step has smaller
        batches there; both have its fp32 copy of the LLM in memory.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

import finetune_encoder
import infer
import model
import precompute
import train_phase1
import train_phase2

# clips: that are trained on; phase2_clips: fewer, where the usual way takes long; heard, heard_alone: test clips, and
# every how many of them the usual way hears; batch: clips per training step; usual_batch: the usual way's in phase 2,
# whose memory takes no more; batch_s: of precompute; times: how often the clips are encoded for the time of 178 h;
# encoder, adaptor, llm: shapes of random weights
SIZES = {
    "tiny": {
        "clips": 6, "phase2_clips": 6, "heard": (6, 1), "heard_alone": (6, 1), "phase1_batch": 3, "batch": 3,
        "batch_s": 120.0, "encoder_batch": (2, 1.0), "workers": 0, "times": 2,
        "encoder": {"output_size": 32, "attention_heads": 4, "linear_units": 64, "num_blocks": 3, "tp_blocks": 2},
        "adaptor": {"adaptor.hidden_dim": 32, "adaptor.num_layers": 1, "adaptor.num_heads": 4},
        "llm": {"vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2},
    },
    "demo": {"clips": 32, "phase2_clips": 32, "heard": (None, 1), "heard_alone": (32, 1), "phase1_batch": 16,
             "batch": 16, "batch_s": 120.0, "encoder_batch": (8, 10.0), "workers": 0, "encoder": {}, "times": 1},
    "full": {
        "clips": 512, "phase2_clips": 128, "heard": (768, 48), "heard_alone": (48, 4), "phase1_batch": 256, "batch": 64,
        "usual_batch": 32, "batch_s": 1200.0, "encoder_batch": (64, 10.0), "workers": 14, "encoder": {}, "times": 16,
        "adaptor": {"adaptor.hidden_dim": 2048, "adaptor.num_layers": 4, "adaptor.num_heads": 8},
        "llm": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    },
}  # fmt: skip
WINDOW_S = 30  # Whisper's
AISHELL_S, AISHELL_TRAIN_S = 178 * 3600, 150.85 * 3600
EPOCHS = {"phase1_step": 10, "phase2_step": 3}  # of the original release, and the minutes that it took:
MINUTES = {"phase1_step": 80, "phase2_step": 90}
# of time's exponents in --scale; clip length: attention is quadratic, and the LLM writes as many tokens as are spoken,
# in passes that grow with what they look back at
BOUNDS = {"clip length, s": 2.0, "batch of 5 s clips": 1.1, "corpus, h": 1.1}


# ---- models and speech ------------------------------------------------------------------------------------------


def tokens_in(seconds):
    """Text tokens of a clip as long as this, by AISHELL-1's mean."""
    return max(1, round(seconds * 15 / 4.52))


class NumberTokenizer:
    """Stands in where weights are random: token 17 reads " 17". Its chat turns have the length of Qwen3's."""

    def __call__(self, text, add_special_tokens=False):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [int(number) for number in re.findall(r"\d+", text)]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f" {number}" for number in ids)

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False, **_):
        around = {"system": " 1 2 {} 3", "user": " 1 4 {} 3", "assistant": " 1 5 6 7 {} 3"}
        text = "".join(around[message["role"]].format(message["content"]) for message in messages)
        return text + " 1 5 6 7" * add_generation_prompt


class RandomEncoder(model.KaldiEncoder):
    """SenseVoice's encoder in Fun-ASR-Nano's manner (no query frames, no CMVN) without its files; dropout 0."""

    def __init__(self, **sizes):
        net = model.SenseVoiceEncoder(560, **sizes, dropout_rate=0.0, attention_dropout_rate=0.0)
        model.SpeechEncoder.__init__(self, net, net.output_size, 60.0, {"name": "random"})
        self.cmvn, self.keep_query_frames, self.ctc_tokenizer = None, False, None


def random_world(args, size, device, dtype, folder):
    """Models with random weights, made on the device, and noise as long as AISHELL-1's clips."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        encoder = model.freeze(RandomEncoder(**size["encoder"]))
        config = Qwen3Config(**size["llm"], tie_word_embeddings=True, pad_token_id=None, eos_token_id=None,
                             bos_token_id=None, dtype=dtype)
        llm = model.freeze(Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype))
        model.fuse_norms(llm)
        table = llm.get_input_embeddings().weight
        shape = [size["adaptor"][f"adaptor.{name}"] for name in ("hidden_dim", "num_layers", "num_heads")]
        adaptor = model.AudioAdaptor(encoder.width, table.shape[1], *shape, dropout=0.0,
                                     embedding_rms=model.embedding_rms(table))
    if dtype == torch.bfloat16:
        model.store_bf16(encoder)
        model.store_bf16(adaptor)
    settings = size["adaptor"] | {"adaptor.stack": 1, "adaptor.pre_norm": False, "llm.speech": "frames",
                                  "llm.prompt": "11 12 13 14 15 16 17 18 19 20", "llm.system": None}
    rng, rows = random.Random(0), []
    lengths = [min(14.5, max(1.2, rng.lognormvariate(1.462, 0.3))) for _ in range(8192)]  # mean 4.52 s; 0.3 is a guess
    # to train on, batches as an epoch has them: neighbours in length out of 32 batches of 256
    per, pool = size["phase1_batch"], sorted(lengths)
    count = size["clips"] // per
    starts = [(2 * n + 1) * len(pool) // (2 * count) - per // 2 for n in range(count)]
    trained = [seconds for start in starts for seconds in pool[start : start + per]]
    rng.shuffle(trained)
    for number, seconds in enumerate(trained + lengths[: size["heard"][0]]):
        samples = round(16000 * seconds)
        ids = [rng.randrange(50, min(4000, size["llm"]["vocab_size"])) for _ in range(tokens_in(samples / 16000))]
        path = folder / f"{number}.wav"
        noise = np.random.default_rng(number).normal(0, 0.05, samples)
        soundfile.write(path, noise.astype(np.float32), 16000, subtype="PCM_16")
        rows.append({"key": str(number), "source": str(path), "target": " ".join(map(str, ids)), "ids": ids})
    tokenizer = NumberTokenizer()  # no CTC head: `inference` gives it one
    listener = SimpleNamespace(
        encoder=encoder, adaptor=model.freeze(adaptor), ctc=None, nano=None, replays=None, llm=llm, tokenizer=tokenizer,
        stop_id=model.end_of_turn(tokenizer), draft=False, settings=settings, device=device, dtype=dtype,
        position_s=0.06)
    return listener, rows[: size["clips"]], rows[size["clips"] :]


def demo_world(args, size, device, dtype):
    """What `make demo` trained, its training clips, and the held-out ones to be heard."""
    for path in (f"{args.model}/config.json", f"{args.data}/test.jsonl"):
        if not Path(path).is_file():
            raise ValueError(f"{path}: not there; run `make demo` first, or give --model and --data, or --size tiny")
    listener = infer.load_listener(infer.load_config([f"model.dir={args.model}"], infer.DEFAULTS), device, dtype)
    parts = []
    for name in ("train_real", "test"):
        unique = {model.normalize_text(r["target"]): r for r in model.read_manifest(f"{args.data}/{name}.jsonl")}
        rows = [row | {"ids": model.text_to_ids(listener.tokenizer, text)} for text, row in unique.items()]
        order = sorted(range(len(rows)), key=lambda i: model.hash_text(rows[i]["key"]))
        parts.append([rows[i] for i in (order if name == "test" else order[: size["clips"]])])
    return listener, *parts


def make_world(args, folder):
    """Everything that stages share: listener, training and test clips with their lengths."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU here")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = SIZES[args.size]
    if args.size == "demo":
        listener, train, test = demo_world(args, size, device, dtype)
    else:
        listener, train, test = random_world(args, size, device, dtype, folder)
    for row in train + test:
        row |= {"seconds": soundfile.info(row["source"]).duration, "speed": 1.0}
        row["frames"] = listener.encoder.num_frames(round(row["seconds"] * listener.encoder.sample_rate))
    return SimpleNamespace(
        size=size, device=device, dtype=dtype, folder=folder, listener=listener, train=train, test=test,
        encoder=listener.encoder, tolerance=1e-3 if dtype == torch.float32 else 0.1, random=args.size != "demo",
        whisper=isinstance(listener.encoder, model.WhisperEncoder), args=args)


def window_features(world, row):
    """Features (1, T, F) and their real number (1,): Whisper's padded to 30 s, as its own extractor gives them."""
    wave = model.load_audio(row["source"], world.encoder.sample_rate)
    feats = world.encoder.features(wave, f"0-{row['key']}")
    lens = torch.tensor([len(feats)], device=world.device)
    if world.whisper:
        feats = F.pad(feats, (0, 0, 0, WINDOW_S * 100 - len(feats)))  # 10 ms a mel frame
    return feats[None].to(world.device), lens


def plainly(function):
    """The usual way runs without torch.compile and without TF32."""
    def run():
        allowed = torch.get_float32_matmul_precision() == "high"
        model.allow_tf32(False)
        try:
            with torch.compiler.set_stance("force_eager"):
                return function()
        finally:
            model.allow_tf32(allowed)
    return run


def close(ours, theirs, tolerance):
    """Every pair of tensors equal to `tolerance` times the largest value."""
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and bool(((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()).item())
        for a, b in zip(ours, theirs))


def stage(usual, ours, equal, audio_s, what, more=None, **extra):
    """A row to be measured: two functions without arguments, and one that compares what they returned.

    more    other ways to be timed, by name. extra: usual_share (of the clips that the usual way takes), many and
            many_s (ours over many clips, and their seconds of audio), warm (what is not to be timed of the usual way),
            identical (share of equal texts), worst (by how much another token scores less at most), apart (by how much
            losses or gradients differ, relative).
    """
    return SimpleNamespace(usual=usual, ours=ours, equal=equal, audio_s=audio_s, what=what, more=more or {}, **extra)


# ---- features, encoder, precompute ------------------------------------------------------------------------------


def fbank(world):
    from funasr.frontends.wav_frontend import WavFrontend

    waves = [model.load_audio(row["source"], 16000) for row in world.train[:64]]
    usual = WavFrontend(fs=16000, window="hamming", n_mels=80, frame_length=25, frame_shift=10, lfr_m=7, lfr_n=6,
                        dither=0.0)  # each way has its own random numbers, so neither dithers here
    return stage(
        lambda: [usual(wave[None], torch.tensor([len(wave)]))[0][0] for wave in waves],
        lambda: [model.wav_frontend(wave, dither=0.0) for wave in waves],
        lambda a, b: close(b, a, 1e-4), sum(map(len, waves)) / 16000, "funasr's WavFrontend")


def transformers_names(state, num_blocks):
    """FunASR's names -> those of transformers' fun_asr_nano encoder, which has all blocks in one list."""
    parts = {
        "self_attn.linear_out": "self_attn.o_proj", "self_attn.fsmn_block": "self_attn.fsmn.conv",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
        "feed_forward.w_1": "mlp.fc1", "feed_forward.w_2": "mlp.fc2",
    }  # fmt: skip
    first_block = {"encoders0": 0, "encoders": 1, "tp_encoders": num_blocks}
    tp_blocks = len({name.split(".")[1] for name in state if name.startswith("tp_encoders.")})
    norm_of = {"after_norm": num_blocks - 1, "tp_norm": num_blocks + tp_blocks - 1}
    renamed = {}
    for name, value in state.items():
        stack, *rest = name.split(".")
        if stack in norm_of:
            renamed[f"layers.{norm_of[stack]}.final_layernorm.{rest[0]}"] = value
            continue
        block, part, kind = first_block[stack] + int(rest[0]), ".".join(rest[1:-1]), rest[-1]
        if part == "self_attn.linear_q_k_v":
            for letter, piece in zip("qkv", value.chunk(3)):
                renamed[f"layers.{block}.self_attn.{letter}_proj.{kind}"] = piece
        else:
            renamed[f"layers.{block}.{parts[part]}.{kind}"] = value
    return renamed


def encoder(world):
    """One padded batch through SenseVoice's encoder (in tiny: a small one), three implementations, same weights."""
    from funasr.models.sense_voice.model import SenseVoiceEncoderSmall
    from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoEncoder, FunAsrNanoEncoderConfig

    torch.manual_seed(0)
    sizes = {"output_size": 512, "attention_heads": 4, "linear_units": 2048, "num_blocks": 50, "tp_blocks": 20}
    sizes |= world.size["encoder"]
    with torch.device(world.device):
        net = model.freeze(model.SenseVoiceEncoder(**sizes))
    usual = SenseVoiceEncoderSmall(560, **sizes).to(world.device).eval()
    usual.load_state_dict(net.state_dict())
    port = FunAsrNanoEncoder(FunAsrNanoEncoderConfig(
        hidden_size=sizes["output_size"], num_attention_heads=sizes["attention_heads"],
        intermediate_size=sizes["linear_units"], num_hidden_layers=sizes["num_blocks"] + sizes["tp_blocks"],
        num_timestamp_prediction_layers=sizes["tp_blocks"])).to(world.device).eval()
    port.load_state_dict(transformers_names(net.state_dict(), sizes["num_blocks"]))
    clips, seconds = world.size["encoder_batch"]
    frames = model.lfr_frames(model.fbank_frames(round(16000 * seconds)))
    feats = torch.randn(clips, frames, 560, device=world.device)
    lens = torch.full((clips,), frames, device=world.device)
    lens[-1] = frames // 2  # one row with padding, so that masks are compared too
    mask = model.length_mask(lens, frames)

    no_grad = torch.inference_mode()
    theirs = no_grad(lambda: usual(feats.clone(), lens)[0][mask])  # funasr scales its input in place
    transformers = no_grad(lambda: port(feats, mask.long()).last_hidden_state[mask])

    @no_grad
    def ours(net=net):
        with precompute.autocast(world.device, world.dtype):
            return net(feats, lens)[0][mask]

    more = {"transformers": plainly(transformers)}
    if world.dtype == torch.bfloat16:
        model.store_bf16(net)
    if world.args.compile:
        compiled = torch.compile(net)
        more["compiled"] = lambda: ours(compiled)

    def equal(a, b):
        limit = 1e-4 if world.dtype == torch.float32 else 0.1
        return all(bool((other - b).abs().max() <= limit) for other in (a, *(way() for way in more.values())))

    return stage(theirs, ours, equal, clips * seconds, "funasr's SenseVoiceEncoderSmall", more)


def precompute_stage(world):
    """Encoder outputs of the training clips, from audio files to files on disk."""
    rows, folder, times = world.train, world.folder, world.size["times"]
    encoder = world.encoder if world.dtype == torch.float32 else copy.deepcopy(world.encoder).float()  # the usual way's
    cfg = precompute.DEFAULTS | {"data.max_s": 100.0} | {key: world.size[key] for key in ("workers", "batch_s")}
    last = encoder.net.layer_norm if world.whisper else encoder.net.tp_norm  # its output is the encoder's

    @torch.inference_mode()
    def usual():
        caught = {}
        hook = last.register_forward_hook(lambda module, inputs, output: caught.update(enc=output))
        for row in rows:
            encoder(*window_features(world, row))
            frames = caught["enc"][0, : row["frames"]].cpu().clone()  # a view would be saved with all of its 30 s
            torch.save(frames, folder / f"{row['key']}.pt")
        hook.remove()
        return [torch.load(folder / f"{row['key']}.pt", weights_only=True) for row in rows]

    def encode(shards, folder):
        bar = SimpleNamespace(update=lambda count: None)
        paths = [folder / f"shard-{number:05d}.json" for number in range(len(shards))]
        for bad in precompute.encode_shards(shards, paths, world.encoder, cfg, world.device, world.dtype, bar):
            assert not bad, bad

    def many():
        copies = [row | {"key": f"{row['key']}-{n}"} for n in range(times) for row in rows]
        with tempfile.TemporaryDirectory(dir=folder) as other:
            encode([copies[start : start + 2048] for start in range(0, len(copies), 2048)], Path(other))

    def ours():
        encode([rows], folder)
        identity = {f"encoder.{key}": value for key, value in encoder.identity.items()} | {"format": 2}
        (folder / "cache.json").write_text(json.dumps(identity))
        cache = train_phase1.EncoderCache(folder)
        return [torch.from_numpy(cache[row["key"]].astype(np.float32)) for row in rows]

    what = f"one clip at a time{', padded to 30 s' if world.whisper else ''}, forward hook, fp32, a .pt file each"
    extra = {"many": many, "many_s": times * total_s(rows)} if times > 1 else {}
    return stage(usual, ours, lambda a, b: close(b, a, max(2e-3, world.tolerance)), total_s(rows), what, **extra)


def total_s(rows):
    return sum(row["seconds"] for row in rows)


# ---- training steps ---------------------------------------------------------------------------------------------


def random_batches(rows, size):
    """The usual order: shuffled, cut into batches of `size`."""
    order = random.Random(0).sample(range(len(rows)), len(rows))
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def bucketed_batches(rows, size):
    """Our order: as many batches, of neighbours in length."""
    lengths = [row["frames"] for row in rows]
    return [[rows[i] for i in batch] for batch in train_phase1.epoch_batches(lengths, size, 10**9, 1, 0, 0)]


def training(world, rows, size, module, usual_loss, our_loss, what, our_batches=bucketed_batches, usual_module=None,
             usual_size=None):
    """Steps over all rows in batches of the same size; `equal`: loss and gradients of one batch, by both ways.

    Every loss takes what its way's batches consist of. usual_module: where the usual way has a copy of the model;
    usual_size: where it has smaller batches.
    """
    usual_size = usual_size or size
    cfg = {"optim.lr": 0.0, "optim.weight_decay": 0.0}
    ways = {"usual": (usual_module or module, usual_loss, random_batches), "ours": (module, our_loss, our_batches)}
    trainable = {way: {name: p for name, p in owner.train().named_parameters() if p.requires_grad}
                 for way, (owner, *_) in ways.items()}

    def backward(way, batch):
        owner, loss_of, _ = ways[way]
        owner.zero_grad(set_to_none=True)
        loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    def run(way):
        owner, _, cut = ways[way]
        weights, losses = list(trainable[way].values()), []
        adam = torch.optim.AdamW(weights, lr=0.0) if way == "usual" else (
            train_phase1.make_optimizer(owner, cfg, world.device))
        for batch in cut(rows, usual_size if way == "usual" else size):
            loss = backward(way, batch)
            nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            losses.append(loss.item() if way == "usual" else loss)  # .item() waits for the device
        owner.zero_grad(set_to_none=True)  # or they would count as the other way's memory
        return losses

    def equal(*_):
        found = {}
        for way, (_, _, cut) in ways.items():
            [batch] = cut(rows[:usual_size], usual_size)
            loss = (plainly(lambda batch=batch: backward("usual", batch))() if way == "usual"
                    else backward(way, batch))
            found[way] = loss, {name: p.grad for name, p in trainable[way].items() if p.grad is not None}
        (loss, theirs), (our_loss, ours) = found.values()
        if ours.keys() != theirs.keys():
            return False
        share = 1e-3 * torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        # a share of all is added, since some are zero but for rounding (of key biases)
        apart = [(ours[name] - gradient).norm() / (gradient.norm() + share) for name, gradient in theirs.items()]
        row.apart = max((our_loss - loss).abs().item() / abs(loss.item()), *map(float, apart))
        return row.apart <= world.tolerance

    row = stage(lambda: run("usual"), lambda: run("ours"), equal, total_s(rows), what)
    return row


def need_cache(world):
    """The two caches that precompute makes, for the stages that read them."""
    if not (world.folder / "cache.json").is_file():
        made = precompute_stage(world)
        made.usual()
        made.ours()
    return train_phase1.EncoderCache(world.folder)


def usual_frames(world, batch):
    """Encoder outputs from one file each, fp32, padded to the longest: enc (B, T, W), lens (B,)."""
    frames = [torch.load(world.folder / f"{row['key']}.pt", weights_only=True) for row in batch]
    enc = pad_sequence(frames, batch_first=True).to(world.device)
    return enc, torch.tensor([len(x) for x in frames], device=world.device)


def phase1_step(world):
    """Adaptor with InfoNCE and CTC, from cached encoder outputs."""
    cache, rows = need_cache(world), world.train
    quick = train_phase1.speed_up(cache, train_phase1.DEFAULTS, world.device)
    table = world.listener.llm.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    ctc = model.CTCHead(table.shape[1], embedding=table, token_ids=sorted({i for row in rows for i in row["ids"]}))
    adaptor = model.unfreeze(copy.deepcopy(world.listener.adaptor)).float()
    phase = train_phase1.Phase1(adaptor, ctc, 0.07).to(world.device)
    places = {row["key"]: torch.tensor([number]) for number, row in enumerate(rows)}
    model.compile_layers(adaptor.layers(), world.device)

    def usual_loss(batch):
        enc, lens = usual_frames(world, batch)
        emb, emb_lens = phase.adaptor(enc, lens)
        audio = F.normalize(torch.stack([row[:n].mean(0) for row, n in zip(emb, emb_lens)]), dim=-1)
        text = [table[torch.tensor(row["ids"], device=world.device)].float().mean(0) for row in batch]
        text = F.normalize(torch.stack(text), dim=-1)
        scores = audio @ text.T / phase.log_temperature.exp()  # (B, B)
        own = torch.arange(len(batch), device=world.device)
        nce = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        return nce + phase.ctc.loss(phase.ctc(emb), emb_lens, [ctc.classes(r["ids"]) for r in batch])[0] / len(batch)

    def our_loss(batch):
        enc, lens = train_phase1.load_frames(batch, quick, train_phase1.DEFAULTS)
        text = train_phase1.pool_texts([row["ids"] for row in batch], table)
        text_ids = model.upload(torch.stack([places[row["key"]] for row in batch]), world.device)
        with precompute.autocast(world.device, world.dtype):
            nce, ctc_loss, _ = phase(model.upload(enc, world.device), lens, text, text_ids,
                                     [ctc.classes(row["ids"]) for row in batch])
        return (nce + ctc_loss) / len(batch)

    return training(world, rows, world.size["phase1_batch"], phase, usual_loss, our_loss,
                    "a .pt file a clip, random batches padded to their longest, fp32")


def phase2_step(world):
    """Cross-entropy through the LLM, from cached encoder outputs."""
    cache, rows, old = need_cache(world), world.train[: world.size["phase2_clips"]], world.listener
    lora = model.lora_parameters(old.llm)
    adaptor = copy.deepcopy(old.adaptor).float()
    adaptor = model.freeze(adaptor) if lora else model.unfreeze(adaptor)  # the demo trains LoRA only
    cfg = train_phase2.DEFAULTS | {k: v for k, v in old.settings.items() if k in train_phase2.DEFAULTS}
    ctc = old.ctc if cfg["llm.speech"] == "ctc" or cfg["llm.draft"] > 0 else None
    phase = train_phase2.Phase2(adaptor, ctc, old.llm, old.tokenizer, cfg).to(world.device)
    careless = phase
    if world.dtype != torch.float32:
        llm = copy.deepcopy(old.llm).float()
        for part in llm.modules():
            part.__dict__.pop("forward", None)  # transformers' own norms
        careless = train_phase2.Phase2(adaptor, ctc, llm, old.tokenizer, cfg).to(world.device)
    model.compile_layers([*old.llm.model.layers, *adaptor.layers()], world.device)
    frozen = [p for name, p in careless.llm.named_parameters() if name not in lora]
    drafted = cfg["llm.draft"] > 0

    def usual_loss(batch):
        enc, lens = usual_frames(world, batch)
        for parameter in frozen:  # the optimizer does not have them, so nobody notices
            parameter.requires_grad_(True)
        speech, speech_lens, prompts, _, _ = careless.listen(enc, lens, batch, [drafted] * len(batch))
        targets = [[*row["ids"], phase.stop_id] for row in batch]
        spliced = model.splice(careless.llm.get_input_embeddings(), prompts, speech, speech_lens, targets)
        inputs = {name: spliced[name].to(world.device) for name in ("inputs_embeds", "attention_mask", "labels")}
        return careless.llm(**inputs).loss  # logits at all positions

    def our_loss(batch):
        for parameter in frozen:
            parameter.requires_grad_(False)
        enc, lens = train_phase1.load_frames(batch, cache, train_phase1.DEFAULTS)
        ids = [row["ids"] for row in batch]
        with precompute.autocast(world.device, world.dtype):
            ce, *_ = phase(model.upload(enc, world.device), lens, batch, ids, [drafted] * len(batch))
        return ce / sum(len(row) + 1 for row in ids)

    what = "random batches padded to their longest, fp32, LLM weights left trainable, logits at all positions"
    return training(world, rows, world.size["batch"], phase, usual_loss, our_loss, what, usual_module=careless,
                    usual_size=world.size.get("usual_batch"))


def finetune_step(world):
    """CTC through the whole encoder, all of it trainable, from audio files; ours are finetune_encoder.py's own
    batches, features and loss."""
    classes = {token: number for number, token in enumerate(sorted({i for row in world.train for i in row["ids"]}))}
    rows = [row | {"kind": "telephone", "length": row["frames"], "classes": [classes[token] for token in row["ids"]]}
            for row in world.train[: world.size["phase2_clips"]]]
    net = model.unfreeze(copy.deepcopy(world.encoder)).float()
    nano = model.FunASRNano(net, ctc=model.CTCOutput(net.width, len(classes) + 1)).to(world.device)
    conf = "dataset_conf."
    cfg = finetune_encoder.DEFAULTS | {
        "llm_weight": 0.0, "detach_ctc_decoder": False, "audio_encoder_conf.freeze": False,
        conf + "num_workers": world.size["workers"], conf + "batch_type": "example",
        conf + "batch_size": world.size["batch"]}
    finetune_encoder.freeze_parts(nano, cfg)  # Whisper's sinusoids
    parts = {"nano": nano, "original": None, "tokenizer": None, "frontend": net}
    tuner = finetune_encoder.Finetune(parts, cfg)

    def usual_loss(batch):
        pairs = [window_features(world, row) for row in batch]
        feats = pad_sequence([feats[0] for feats, _ in pairs], batch_first=True)
        enc, lens = nano.encode(feats, torch.cat([lens for _, lens in pairs]))
        targets = [row["classes"] for row in batch]
        return nano.ctc.loss(nano.ctc(enc), lens, targets)[0] / sum(map(len, targets))

    def our_batches(rows, _):
        order = finetune_encoder.epoch_batches(rows, 0, cfg, 1, 0)
        return finetune_encoder.batches_of(rows, order, parts, cfg, 0, [])

    def our_loss(batch):
        with finetune_encoder.amp(world.device, world.dtype):
            sums = tuner(finetune_encoder.to_device(batch, world.device))
        return sums["ctc"] / finetune_encoder.count_labels(batch, cfg)[1]

    window = "padded to 30 s" if world.whisper else "padded to their longest"
    return training(world, rows, world.size["batch"], tuner, usual_loss, our_loss, f"random batches {window}, fp32",
                    our_batches)


# ---- inference --------------------------------------------------------------------------------------------------


def hear_all(world, rows, batch_size):
    """Texts of rows, by infer.py's own batches: each has as many padded seconds as batch_size clips of mean length."""
    heard = [row | {"key": f"0-{row['key']}", "speech": row["source"]} for row in rows]  # the key decides the dither
    padded_s = statistics.mean(row["frames"] for row in rows) * world.encoder.frame_ms / 1000
    cfg = infer.DEFAULTS | {"workers": world.size["workers"], "data.batch_s": 1.001 * padded_s * batch_size,
                            "vad.threshold_s": math.inf}  # the usual way hears whole clips, too
    cfg["data.batch_s"] *= batch_size > 1  # 0: every clip alone
    bad = []
    batches = infer.read_batches(heard, world.encoder, cfg, {}, bad)
    texts = {index: segment["text"] for index, _, segment in infer.transcribe(batches, heard, world.listener, cfg)}
    assert not bad, bad
    return [texts[index] for index in range(len(rows))]


class Staged:
    """What stands for training where weights are random, on a GPU: a CTC head (its scores cost what they cost) that
    seems to read the transcripts with every 20th token wrong (SenseVoice's reads AISHELL-1 at 3 %), and an LLM that
    seems to write the transcripts. What it would have written itself, passes of any kind, is kept in `choices`.
    """

    def __init__(self, world, rows):
        table, listener, rng = world.listener.llm.get_input_embeddings().weight, world.listener, random.Random(0)
        listener.ctc = model.freeze(model.CTCHead(table.shape[1], embedding=table,
                                                  token_ids=range(50, min(4050, len(table)))))  # as AISHELL-1 has
        listener.read_ctc = lambda path: listener.tokenizer.decode(listener.ctc.tokens(path))
        listener.replays = None  # they have another head in them
        self.rows, self.choices, self.hear, self.accept = rows, {}, infer.hear, model.accept
        self.drafts = [" ".join(str(rng.randrange(50, 400) if rng.random() < 0.05 else token) for token in row["ids"])
                       for row in rows]

    def heard(self, *rest):
        for clips in self.hear(*rest):
            for clip in clips:
                clip.draft = self.drafts[clip.index]
            yield clips

    def accepted(self, row, guess, tokens, log_probs, stop_id):
        said, at = self.rows[row.clip.index]["ids"], len(row.answer)
        for n, token in enumerate(tokens[: len(said) - at]):
            if guess[:n] == said[at : at + n]:  # else this token stands behind a wrong one
                self.choices.setdefault(row.clip.index, {})[at + n] = token
        return self.accept(row, guess, (said[at:] + tokens)[: len(tokens)], log_probs, stop_id)

    def on(self):
        """Context in which this is so."""
        stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.object(infer, "hear", self.heard))
        stack.enter_context(mock.patch.object(model, "accept", self.accepted))
        return stack

    def shortfalls(self, world, index):
        """By how much the LLM, reading a clip alone and in one plain pass, prefers its own tokens to `choices`."""
        listener, row = world.listener, self.rows[index]
        with torch.no_grad(), infer.autocast(world.device, world.dtype):
            enc, lens = listener.encoder(*window_features(world, row))
            emb, emb_lens = listener.adaptor(enc.float(), lens)
            prompt = infer.make_prompt(row, None, listener, infer.DEFAULTS)
            spliced = model.splice(listener.llm.get_input_embeddings(), [prompt], emb, emb_lens, [row["ids"]])
            hidden = listener.llm.model(inputs_embeds=spliced["inputs_embeds"], use_cache=False).last_hidden_state[0]
            scores = listener.llm.lm_head(hidden[-1 - len(row["ids"]) : -1]).float()
        chosen = torch.tensor([self.choices[index][n] for n in range(len(row["ids"]))], device=world.device)
        return (scores.max(1).values - scores.gather(1, chosen[:, None])[:, 0]).tolist()


def inference(world, batch_size):
    """Held-out clips from audio file to text, greedy; one at a time only the first of them, or it would take long.

    `equal` is equality of the texts. With random weights on a GPU answers are staged; there what the LLM would have
    written at every position must be what it would write in a plain pass over that clip alone, or be level with that
    but for rounding: in bf16 the order of sums decides between such tokens. `identical`: share of equal ones.
    """
    listener, cfg, get = world.listener, infer.DEFAULTS, world.listener.settings.get
    count, step = world.size["heard" if batch_size > 1 else "heard_alone"]
    rows, llm, tokenizer = world.test[:count], listener.llm, listener.tokenizer
    cap_of = (lambda seconds, _=None: tokens_in(seconds)) if world.random else model.token_cap
    staged = Staged(world, rows) if world.random and infer.is_gpu(world.device) else None
    if world.args.compile:
        model.compile_layers(llm.model.layers, world.device)
    stance = "default" if world.args.compile else "force_eager"  # phase2_step may have left its layers compiled

    @mock.patch.object(model, "token_cap", cap_of)
    @torch.inference_mode()
    def usual(rows=rows[::step]):
        texts = []
        for row in rows:
            with infer.autocast(world.device, world.dtype):
                enc, lens = listener.encoder(*window_features(world, row))
                enc = enc[:, : row["frames"]].float()
                speech, speech_lens, log_probs, emb_lens = model.speech_for_llm(
                    listener.adaptor, listener.ctc, enc, lens, get("llm.speech"))
                draft, count = None, None
                if listener.ctc is not None:
                    path = model.ctc_greedy(log_probs, emb_lens, listener.ctc.blank)[0]
                    draft = listener.read_ctc(path) if listener.draft else None
                    count = len(path) if get("llm.speech") == "ctc" else None
                prompt = infer.make_prompt(row, draft, listener, cfg)
                spliced = model.splice(llm.get_input_embeddings(), [prompt], speech, speech_lens)
                cap = model.token_cap(row["seconds"], count)
                ids = llm.generate(
                    inputs_embeds=spliced["inputs_embeds"], attention_mask=spliced["attention_mask"], do_sample=False,
                    max_new_tokens=cap, eos_token_id=listener.stop_id, pad_token_id=listener.stop_id)[0].tolist()
            answer = []
            for token in ids:  # our rule for loops, or the texts could not be compared
                if not model.add_token(answer, token, listener.stop_id, cap):
                    break
            texts.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
        return texts

    @mock.patch.object(model, "token_cap", cap_of)
    def ours():
        if staged is not None:
            staged.choices.clear()
        with contextlib.nullcontext() if staged is None else staged.on(), torch.compiler.set_stance(stance):
            return hear_all(world, rows, batch_size)

    def equal(theirs, ours):
        indices = range(0, len(rows), step)
        if staged is None:
            row_of.identical = statistics.mean(text == ours[index] for text, index in zip(theirs, indices, strict=True))
            row_of.worst = 0.0
            return row_of.identical == 1
        short = [plainly(functools.partial(staged.shortfalls, world, index))() for index in indices]
        flat = [value for values in short for value in values]
        row_of.identical, row_of.worst = statistics.mean(value == 0 for value in flat), max(flat)
        return row_of.worst <= world.tolerance

    window = ", padded to 30 s" if world.whisper else ""
    row_of = stage(usual, ours, equal, total_s(rows), f"one clip at a time{window}, transformers' generate",
                   usual_share=total_s(rows[::step]) / total_s(rows), warm=lambda: usual(rows[:1]))
    return row_of


# ---- measuring --------------------------------------------------------------------------------------------------


def process_peak_mb():
    """Most resident memory of this process since it started, or peak_of looked; NaN where there is no /proc."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else math.nan


def peak_of(function, device):
    """Output of one call, its peak memory in MiB (torch's on CUDA, else that of the whole process), its seconds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():  # Linux
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc, which keeps what was freed: it would count as this call's
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    results = []
    seconds = timed(lambda: results.append(function()), device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else process_peak_mb()
    return results[0], peak, seconds


def timed(function, device):
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_tflops(device, dtype):
    """The ceiling for mfu: what a large matmul reaches here at its best."""
    size, times = (8192, 20) if device.type == "cuda" else (2048, 1)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return times * 2 * size**3 / min(timed(lambda: [a @ a for _ in range(times)], device) for _ in range(10)) / 1e12


def count_flops(function):
    """Operations of one call's matrix products and convolutions, forward and backward.

    torch's counter does not know attention's kernel for CPUs, and refuses heads that share keys.
    """
    def attention(products, query):  # place of the query (B, H, L, D) among a kernel's arguments; the key is the next
        return lambda *shapes, **_: products * 2 * math.prod(shapes[query]) * shapes[query + 1][2]

    known = {}
    for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
        kernel = f"_scaled_dot_product_{kind}"  # backward the scores are made again
        known |= {getattr(torch.ops.aten, kernel): attention(2, 0),
                  getattr(torch.ops.aten, f"{kernel}_backward"): attention(5, 1)}
    # what runs in a thread, a graph or a compiled function, the counter would not see
    at_once = SimpleNamespace(submit=lambda *call: SimpleNamespace(result=functools.partial(*call)))
    with torch.compiler.set_stance("force_eager"), mock.patch.object(
            model.Graphs, "__call__", lambda self, *tensors: self.function(*tensors)), mock.patch.object(
                precompute, "ThreadPoolExecutor", lambda _: contextlib.nullcontext(at_once)), FlopCounterMode(
                    display=False, custom_mapping=known) as counter:
        function()
    return counter.get_total_flops()


def measure(name, row, args, device, ceiling):
    """One line of the table: each way once for its memory and output, then all of them in turns for their time."""
    outputs, peaks, seconds = {}, {}, {}
    ways = {"baseline": plainly(row.usual), "ours": row.ours} | row.more
    if hasattr(row, "warm"):  # what happens once only would be divided by usual_share, too
        plainly(row.warm)()
    for way, function in ways.items():
        outputs[way], peaks[way], first = peak_of(function, device)
        seconds[way] = [] if way != "baseline" or args.baseline_repeats else [first]
    result = {"stage": name, "equal": bool(row.equal(outputs["baseline"], outputs["ours"]))}
    for number in range(args.repeats):
        for way, function in ways.items():
            if way != "baseline" or number < args.baseline_repeats:
                seconds[way].append(timed(function, device))
    if hasattr(row, "apart"):
        result["apart"] = row.apart
    if hasattr(row, "usual_share"):
        result |= {"identical": row.identical, "worst": row.worst, "usual_share": row.usual_share}
        seconds["baseline"] = [one / row.usual_share for one in seconds["baseline"]]
    for way, spent in seconds.items():
        result |= {f"{way}_s": statistics.median(spent), f"{way}_spread_s": max(spent) - min(spent)}
    result |= {"ratio": result["baseline_s"] / result["ours_s"], "peak_mb": peaks["ours"],
               "baseline_peak_mb": peaks["baseline"], "audio_s": row.audio_s,
               "audio_s_per_s": row.audio_s / result["ours_s"], "usual": row.what}
    if name != "fbank":  # a Fourier transform, which is not counted
        result["tflops"] = count_flops(row.ours) / result["ours_s"] / 1e12
        result["mfu"] = result["tflops"] / ceiling
    if device.type == "cuda" and name in EPOCHS:
        result["minutes_aishell"] = EPOCHS[name] * AISHELL_TRAIN_S / result["audio_s_per_s"] / 60
        result["minutes_original"] = MINUTES[name]
    if hasattr(row, "many"):
        result["minutes_aishell"] = AISHELL_S / row.many_s * timed(row.many, device) / 60
    if name.startswith("infer"):
        result["rtf"] = result["ours_s"] / row.audio_s
    return result


def print_row(result):
    extra = "".join(f"  {key} {result[key]:.3g}" for key in (
        "transformers_s", "compiled_s", "minutes_aishell", "minutes_original", "rtf", "identical") if key in result)
    reached = f"{result['tflops']:8.3g} {result['mfu']:5.2f}" if "mfu" in result else f"{'-':>8} {'-':>5}"
    print(f"{result['stage']:14} {result['baseline_s']:10.3f} {result['baseline_spread_s']:7.3f} "
          f"{result['ours_s']:9.3f} {result['ours_spread_s']:7.3f} {result['ratio']:6.2f} "
          f"{'yes' if result['equal'] else 'NO':>5} {result['baseline_peak_mb']:8.0f} {result['peak_mb']:8.0f} "
          f"{result['audio_s_per_s']:9.1f} {reached}{extra}", flush=True)


def machine(device):
    """Where the numbers come from."""
    cpu = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpu.read_text())[1] if cpu.exists() else platform.processor()
    environment = {key: value for key, value in os.environ.items() if re.match("MALLOC_|OMP_NUM_THREADS$", key)}
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else name,
            "threads": torch.get_num_threads(), "environment": environment, "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"), "command": "python bench.py " + " ".join(sys.argv[1:])}


def save(report, path):
    train_phase1.write_atomic(path, lambda file: file.write(json.dumps(report, indent=1).encode() + b"\n"))


# ---- how cost grows ---------------------------------------------------------------------------------------------


def exponent(points):
    """Least-squares slope of log(cost) over log(size), from the larger half: small sizes are all overhead."""
    points = np.log(np.array(sorted(points)[len(points) // 2 - (len(points) < 4) :]))
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0])


def scale_rows(world, speech, ids, seconds, batch):
    """`batch` clips, all of one length: cut from the test clips joined end to end, each beginning elsewhere."""
    rows = []
    for number in range(batch):
        path = world.folder / f"scale-{seconds}-{number}.wav"
        wave = np.resize(np.roll(speech, -number * len(speech) // 32), 16000 * seconds)
        soundfile.write(path, wave, 16000, subtype="PCM_16")
        rows.append({"key": path.stem, "source": str(path), "seconds": seconds, "speed": 1.0,
                     "frames": world.encoder.num_frames(16000 * seconds),
                     "ids": np.resize(np.roll(ids, -number), tokens_in(seconds)).tolist()})
    return rows


def scale_stage(world, name, rows):
    """Seconds and peak memory of our way over one batch: the memory of a first run, the median time of three more."""
    world.train = world.test = rows
    (world.folder / "cache.json").unlink(missing_ok=True)  # the step then makes the cache of these clips
    world.size |= {"batch": len(rows), "batch_s": math.inf, "phase2_clips": None, "heard": (len(rows), 1),
                   "heard_alone": (len(rows), 1)}
    row = inference(world, len(rows)) if name == "inference" else BUILD[name](world)
    _, peak, _ = peak_of(row.ours, world.device)
    return statistics.median(timed(row.ours, world.device) for _ in range(3)), peak


def write_corpus(folder, count):
    """A manifest of `count` clips of 5 s, and the index of a cache that holds them; its frames are holes in files.

    About 15 tokens of SmolLM2's a text, no two the same; every second text is Chinese.
    """
    frames, shard_clips, rng = 250, 4096, random.Random(0)
    words = re.findall("[a-z]{2,}", Path(__file__).with_name("README.md").read_text(encoding="utf-8").lower())
    characters, texts = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)], []
    for _ in range(25000):
        texts += [("en", " ".join(rng.choices(words, k=6))), ("zh", "".join(rng.choices(characters, k=4)))]
    folder.mkdir(exist_ok=True)
    (folder / "cache.json").write_text(json.dumps({"encoder.width": 1, "encoder.frame_ms": 20.0, "format": 2}))
    with open(folder / "all.jsonl", "w", encoding="utf-8") as file:
        for first in range(0, count, shard_clips):
            keys, numbers = [], range(first, min(first + shard_clips, count))
            for n in numbers:
                key, (language, text) = f"BAC009S{n:09d}", texts[n % len(texts)]
                file.write(f'{{"key": "{key}", "source": "wav/train/S{n // 400:05d}/{key}.wav", '
                           f'"language": "{language}", "target": "{text} {n}"}}\n')
                keys.append(key)
            path, lengths = folder / f"shard-{first // shard_clips:05d}.json", [frames - n % 200 for n in numbers]
            starts = [0, *itertools.accumulate(lengths)]
            path.write_text(json.dumps({"key": keys, "first": starts[:-1], "frames": lengths, "bad": [],
                                        "seconds": [5.0] * len(keys)}))
            np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.float16, (starts[-1], 1))


def start_training(folder, tokenizer):
    """What phase 1 does before its first step, but for models; phase 2's extra: {part: (seconds, peak MiB so far)}.

    "" is the whole start of phase 1, with the peak of this process at its end.
    """
    cfg = train_phase1.DEFAULTS | {"data.train": str(folder / "all.jsonl"), "run.dir": str(folder)}
    train_phase1.LARGE = 0  # what is read is kept, however small it is
    found, times = {}, [time.perf_counter()]

    def done(part):
        times.append(time.perf_counter())
        found[part] = times[-1] - times[-2], process_peak_mb()

    cache = train_phase1.EncoderCache(folder)
    done("index of the cache")
    train = train_phase1.open_utterances(cfg, cache, tokenizer)
    train.token_counts().nonzero()[0].tolist()  # CTC's vocabulary
    np.sum(train.seconds)
    done("texts")
    first = train_phase1.epoch_batches(train.frames, cfg["batch_clips"], cfg["batch_frames"], 1, 0, 0)
    next(train_phase1.stream(train, cache, cfg, 0, 0, 0, first))
    done("order, first batch")
    whole, adaptor = times[-1] - times[0], model.AudioAdaptor(1, 8, 8, 1, 1)
    adaptor.out_lens(np.asarray(train.frames)) + 2 * train.num_ids + 20
    done("phase 2's lengths")
    return found | {"": (whole, process_peak_mb())}


def scale_points(world):
    """What is measured, one by one: stage, against what, how much of it, seconds, MiB."""
    speech = np.concatenate([model.load_audio(row["source"], 16000) for row in world.test])
    ids = [token for row in world.test for token in row["ids"]]
    lengths = [s for s in (1, 2, 5, 10, 20, 30, 60) if not (world.whisper and s > WINDOW_S)]
    sizes = [("clip length, s", s, s, 4) for s in lengths]
    sizes += [("batch of 5 s clips", clips, 5, clips) for clips in (1, 2, 4, 8, 16, 32)]
    for name in ("precompute", "phase2_step", "inference"):
        for against, size, seconds, clips in sizes:
            yield name, against, size, *scale_stage(world, name, scale_rows(world, speech, ids, seconds, clips))
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]  # the processes below start as a user's training does, not as `make bench` does
    for h in (1, 10, 100, 1000, 10000):
        if h > max(10, world.args.scale_hours):  # an exponent takes two
            break
        folder = world.folder / f"corpus-{h}"
        write_corpus(folder, 720 * h)
        for start in ("first start", "later start"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # without models in its memory
                found = pool.submit(start_training, folder, world.listener.tokenizer).result()
            for part, costs in found.items():
                yield f"{start}: {part}".removesuffix(": "), "corpus, h", h, *costs
        shutil.rmtree(folder)


def scale(world, args, report):
    """Table and picture of time and memory (the whole process's peak) against clip length, batch and corpus size.

    The first start with a corpus reads and tokenises the manifest, the later one maps what the first has kept (but not
    with random models, whose tokenizer is in Python); both find their files, just written, in the system's cache.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    world.size, rows = dict(world.size), {}
    for name, against, *point in scale_points(world):
        row = rows.setdefault((name, against), {"stage": name, "against": against, "points": []})
        row["points"].append(point)
        report["scale"] = list(rows.values())
        save(report, args.out)
    print(f"{'stage':31} {'against':18} {'from':>5} {'to':>6} {'seconds at the ends':>20} {'MiB at the ends':>15} "
          f"{'exponent':>8} {'bound':>5} {'holds':>5}")
    figure, axes = plt.subplots(2, 3, figsize=(13, 8))
    for row in rows.values():
        sizes, seconds, mebibytes = zip(*row["points"])
        slope, bound = exponent(list(zip(sizes, seconds))), BOUNDS[row["against"]]
        row |= {"exponent": slope, "bound": bound, "holds": slope <= bound}
        print(f"{row['stage']:31} {row['against']:18} {sizes[0]:5} {sizes[-1]:6} {seconds[0]:9.3f} "
              f"{seconds[-1]:10.3f} {mebibytes[0]:7.0f} {mebibytes[-1]:7.0f} {slope:8.2f} {bound:5} "
              f"{'yes' if row['holds'] else 'NO':>5}")
        if ":" not in row["stage"]:  # a start as a whole
            upper, lower = axes[:, list(BOUNDS).index(row["against"])]
            upper.loglog(sizes, seconds, "o-", label=f"{row['stage']}, exponent {slope:.2f}")
            lower.semilogx(sizes, mebibytes, "o-")
            upper.set(xlabel=row["against"], ylabel="seconds")
            lower.set(xlabel=row["against"], ylabel="MiB, colours as above")
            upper.legend(fontsize=7)
    for axis in axes[1]:  # last: limits once set stay
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(Path(args.out).with_suffix(".png"), dpi=120)
    save(report, args.out)


# ---- the run ----------------------------------------------------------------------------------------------------

BUILD = {
    "fbank": fbank, "encoder": encoder, "precompute": precompute_stage, "phase1_step": phase1_step,
    "phase2_step": phase2_step, "finetune_step": finetune_step,
    "infer_batch1": lambda world: inference(world, 1), "infer_batch32": lambda world: inference(world, 32),
    "infer_batch64": lambda world: inference(world, 64),
}  # fmt: skip


def main(args):
    other = "infer_batch32" if args.size == "full" else "infer_batch64"
    args.stages = args.stages or [name for name in BUILD if name != other]
    wrong = [name for name in args.stages if name not in BUILD]
    if wrong:
        raise ValueError(f"--stages: {wrong[0]!r} is none of {', '.join(BUILD)}")
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(args, Path(folder))
        if world.dtype == torch.bfloat16:
            model.allow_tf32(True)  # as the scripts do
        ceiling = matmul_tflops(world.device, world.dtype)
        report = machine(world.device) | {"size": args.size, "repeats": args.repeats, "matmul_tflops": ceiling}
        print(" | ".join(f"{key} {value}" for key, value in report.items()))
        report["rows"] = []
        if args.scale:
            scale(world, args, report)
        else:
            print(f"{'stage':14} {'baseline s':>10} {'spread':>7} {'ours s':>9} {'spread':>7} {'ratio':>6} {'equal':>5}"
                  f" {'peak MiB':>8} {'ours MiB':>8} {'audio s/s':>9} {'TFLOP/s':>8} {'mfu':>5}", flush=True)
            for name in args.stages:
                try:
                    report["rows"].append(measure(name, BUILD[name](world), args, world.device, ceiling))
                    print_row(report["rows"][-1])
                except (torch.OutOfMemoryError, ModuleNotFoundError) as error:  # other stages may still do: on a small
                    problem = str(error).splitlines()[0]  # GPU, or where funasr is not installed
                    print(f"{name}: {problem}", flush=True)
                    report["rows"].append({"stage": name, "error": problem})
                save(report, args.out)  # after every row: a crash leaves what was measured
    return report


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo", help="of models and data, see above")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--stages", type=lambda text: text.split(","), help=f"separated by commas, of "
                        f"{', '.join(BUILD)}; by default all but infer_batch64 (--size full: infer_batch32)")
    parser.add_argument("--compile", action="store_true", help="time our encoder under torch.compile, too")
    parser.add_argument("--repeats", type=int, default=5, help="times that each way is timed")
    parser.add_argument("--baseline-repeats", type=int, help="the same for the usual way; 0: its untimed run counts")
    parser.add_argument("--model", default="demo/run/phase2", help="folder of train_phase2.py, for --size demo")
    parser.add_argument("--data", default="demo/data", help="folder of demo_data.py's manifests, for --size demo")
    parser.add_argument("--scale", action="store_true", help="instead: how time and memory grow; also writes a .png")
    parser.add_argument("--scale-hours", type=int, default=10000, help="largest corpus of --scale (>= 10)")
    parser.add_argument("--out", default="bench.json")
    args = parser.parse_args(arguments)
    args.baseline_repeats = args.repeats if args.baseline_repeats is None else args.baseline_repeats
    return args


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
