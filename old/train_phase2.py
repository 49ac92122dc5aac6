"""Stage 2: teach the adaptor (and optionally LoRA) to make a frozen LLM write what was said.

    python train_phase2.py configs/phase2.yaml [key=value ...]
    torchrun --nproc_per_node 4 train_phase2.py configs/phase2.yaml

Loss    cross-entropy of the transcript and its end-of-turn token through the frozen LLM, summed over the step's
        label tokens and divided by their number; logits on label positions only; plus loss.ctc_weight x CTC.
        inputs  [system, user: prompt | speech | draft, assistant: | transcript, end of turn]
        labels  [-100                 | -100   | -100              | transcript, end of turn]
Speech  llm.speech=frames: the adaptor's output, one LLM position each `adaptor.stack` encoder frames.
        llm.speech=ctc: one position for each token that CTC hears, the posterior-weighted mean of token embeddings;
        a few times fewer positions, already in the LLM's own vocabulary, the better choice with little data.
Draft   llm.draft: share of training clips whose prompt also carries the CTC 1-best as text. It is read from the same
        noisy forward pass (augment.*), so that its errors in training resemble those of unseen speech.

Input   cache of precompute.py, or audio on the fly (data.source=audio, with augmentation); init.dir of phase 1.
Output  run.dir/adaptor_phase2_final.pt, ctc_head.pt, lora.pt (plain state dicts, best on valid), config.json: all that
        infer.py needs; run.dir/last.pt to resume; metrics.jsonl and TensorBoard events
Papers  SLAM-ASR arXiv:2402.08846 (bridge, frozen LLM), LoRA arXiv:2106.09685, CTC-compressed speech arXiv:2102.01757.
Logged  ce (nats per label token), ctc (nats per clip), acc (share of label tokens predicted right, teacher-forced),
        valid_ce, valid_acc, er (WER, or CER for Chinese, of greedy decoding on run.valid_decode clips), ctc_er (the
        same of the CTC read-out), lr, grad_norm, audio_s_per_s, tokens (LLM positions per step incl. padding).
"""

import array
import difflib
import inspect
import itertools
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = {
    "data.source": "cache",  # cache: outputs of precompute.py; audio: encode on the fly, with augmentation
    "cache.dir": "",
    "data.train": ...,  # manifests, separated by commas
    "data.valid": ...,
    "data.repeat": [1],  # how often each training manifest counts per epoch, one number for each
    "data.perturb": "",  # cache: manifests that data.speed applies to; empty: all of data.train
    "data.speed": [1.0],  # cache: copies to use; audio: factors to draw from, for all of data.train
    "data.normalize": True,  # train on normalised text (lower case, no punctuation), as scoring does
    "data.max_s": 30.0,  # audio: longer training clips are left out and counted
    "data.max_bad": 100,  # audio: stop when more clips than this cannot be read
    "workers": 2,  # audio: processes that read and augment
    "encoder.name": "",  # audio: hub name or folder (a cache knows its own)
    "encoder.language": "auto",
    "encoder.text_norm": "woitn",
    "encoder.pad_to_30s": False,
    "init.dir": "",  # run.dir of train_phase1.py; empty: start from random weights
    "llm.name": ...,
    "llm.prompt": "Transcribe the speech:",
    "llm.system": None,  # None: the chat template's own; "" an empty one
    "llm.speech": "frames",  # frames or ctc
    "llm.draft": 0.0,  # share of training clips with the CTC 1-best in the prompt
    "llm.lora.r": 0,  # 0: the LLM stays as it is
    "llm.lora.alpha": 16,
    "llm.lora.targets": ["q_proj", "v_proj"],
    "adaptor.train": True,  # False: only LoRA trains
    "adaptor.hidden_dim": 2048,
    "adaptor.num_layers": 4,
    "adaptor.num_heads": 8,
    "adaptor.dropout": 0.1,
    "adaptor.stack": 1,
    "adaptor.pre_norm": False,
    "adaptor.keep_query_frames": False,
    "loss.ctc_weight": 0.0,
    "augment.time_masks": 0,  # spans of encoder frames set to zero, per clip
    "augment.feature_noise": 0.0,  # standard deviation of noise on the cached encoder outputs
    "augment.time_mask_frames": 12,
    "augment.noise": 0.0,  # audio: probability of white noise at 5 to 30 dB SNR
    "augment.telephone": 0.0,  # audio: probability of a telephone channel (300-3400 Hz, 8 kHz, G.711)
    "augment.specaug": False,  # audio: SpecAugment on the features (2 frequency masks, 2 time masks)
    "batch_tokens": 8192,  # LLM positions per process and micro-batch, padding included
    "batch_clips": 64,  # at most
    "optim.lr": 1e-4,  # peak; the original's 1e-5 is 10-200 x below every published peer
    "optim.weight_decay": 0.01,
    "optim.warmup_steps": 500,
    "optim.schedule": "cosine",  # cosine (to 0) or constant, after the warm-up
    "optim.clip": 0.5,
    "optim.accum": 1,
    "optim.epochs": 3,
    "optim.max_steps": 0,  # > 0: exactly so many steps, whatever epochs says
    "run.dir": ...,
    "run.resume": False,
    "run.save_every": 500,
    "run.valid_every": 500,
    "run.valid_decode": 64,  # clips of valid that are decoded, always the first ones
    "run.log_every": 20,
    "seed": 0,
    "compile": True,  # on a GPU: torch.compile of the LLM's and the adaptor's layers
    "device": "auto",
    "dtype": "auto",  # of the frozen LLM and autocast; trainable weights are fp32 always
}


# ---- configuration (the same lines in every script; tests/test_copies.py) ---------------------------------------


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice; PyYAML itself silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key_node, _ in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if key in seen:
                raise ValueError(f"{mark.name}:{mark.line + 1}: key {key!r} is given twice")
            seen.append(key)
        return super().construct_mapping(node, deep)


def load_config(arguments, defaults):
    """[config.yaml] key=value ... -> flat dict with every key of `defaults`; ValueError names file and nearest key."""
    given = []  # (where, key, value), later ones win
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            # text stays as typed, required keys are text too: YAML minds colons and reads 007 as 7
            text = isinstance(defaults.get(key.strip()), str | type(...)) or not value
            given.append((f"argument {argument}", key.strip(), value if text else yaml.safe_load(value)))
            continue
        if not Path(argument).is_file():
            raise ValueError(f"{argument}: no such config file")
        with open(argument, encoding="utf-8") as file:
            tree = yaml.load(file, UniqueKeyLoader) or {}
        if not isinstance(tree, dict):
            raise ValueError(f"{argument}: expected `section:` or `key: value` lines")
        stack = [("", tree)]
        while stack:  # sections flatten into dotted keys
            prefix, section = stack.pop()
            for name, value in section.items():
                dotted = f"{prefix}{name}"
                if isinstance(value, dict):
                    stack.append((f"{dotted}.", value))
                elif any((where, key) == (argument, dotted) for where, key, _ in given):
                    raise ValueError(f"{argument}: key {dotted!r} is given twice")  # in a section, and spelt with dots
                else:
                    given.append((argument, dotted, value))
    config = dict(defaults)
    for where, key, value in given:
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, 1, 0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest!r}? (--help lists all)")
        config[key] = convert(value, defaults[key], f"{where}: {key}")
    missing = [key for key, value in config.items() if value is ...]
    if missing:
        raise ValueError(f"required key not given: {', '.join(missing)}")
    return config


def convert(value, default, where):
    """Bring a YAML value to the type of its default: PyYAML reads 1e-4 as a string and `no` as False."""
    if value is None and (default is None or default == ""):
        return default
    if value is None:
        raise ValueError(f"{where}: has no value")
    if isinstance(default, list):
        items = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
        return [convert(item, default[0], where) for item in items] if default else items
    kind = str if default is ... or default is None else type(default)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        if kind is bool or isinstance(value, (bool, list, dict)) or kind is int and float(value) % 1:
            raise ValueError
        return kind(value)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r} ({type(value).__name__})") from None


def run_main(main, defaults, doc):
    """Command line of a script: --help, one-line errors for what the user can mend, exit status 2."""
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        width = max(len(key) for key in defaults)
        lines = (f"  {key:{width}}  {'(required)' if value is ... else value!r}" for key, value in defaults.items())
        print(doc.strip(), "\n\nKeys and defaults:", *lines, sep="\n")
        return
    try:
        main(load_config(sys.argv[1:], defaults))
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def pick_device(cfg):
    """Device, dtype of the frozen weights; sets TF32 for the whole process; under torchrun joins the process group."""
    kind = cfg["device"]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {kind!r}")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here; use device=cpu, or check the driver with nvidia-smi")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if kind.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # one rank may have all the work left
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(kind)
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    names["auto"] = torch.bfloat16 if kind.startswith("cuda") else torch.float32
    if cfg["dtype"] not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {cfg['dtype']!r}")
    model.allow_tf32(names[cfg["dtype"]] == torch.bfloat16)  # for what is fp32 beside bf16: CTC, InfoNCE's cosines
    return torch.device(kind), names[cfg["dtype"]]


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def write_atomic(path, write):
    """Call `write(file)` on a temporary file, fsync, then rename: a kill or a full disk leaves the old file whole.

    No reader looks at a temporary file. What kill -9 leaves of one goes when the same file is next written, which the
    same command does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for left_over in path.parent.glob(f".{path.name}.*.tmp"):
            left_over.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save makes a RuntimeError of a disk that fills up
            reason = getattr(error, "strerror", None) or f"{error}; is the disk full?"
            raise OSError(f"{path}: could not be written ({reason}); what was there before is whole") from error
        raise


def autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)


# ---- data: the cache of precompute.py, and the order of batches (the same lines in both phases) --------------------


LARGE = 2**26  # bytes of manifests, some 400,000 rows


class EncoderCache:
    """Encoder outputs by key, memory-mapped: cache[key] -> (T, W) fp16 array."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        if not (folder / "cache.json").is_file():
            raise ValueError(f"{folder}: no cache here; run precompute.py with cache.dir={folder} first")
        self.identity = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        self.width, self.frame_ms = self.identity["encoder.width"], self.identity["encoder.frame_ms"]
        if self.identity.get("format") != 2:
            raise ValueError(f"{folder}: was made by another version of precompute.py; delete it and run that again")
        self.shards, self.bad = [], {}
        self.shard, self.first, self.frames, self.seconds, hashes = (array.array(kind) for kind in "iqidq")
        self.paths = paths = sorted(folder.glob("shard-*.json"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and len(paths) + 32 > hard:
            raise ValueError(f"{folder}: {len(paths)} shards stay open together, but this system allows {hard} files: "
                             "raise that (ulimit -Hn), or precompute with a larger cache.shard_clips")
        if soft != resource.RLIM_INFINITY and len(paths) + 256 > soft:
            wanted = len(paths) + 256
            wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        for path in paths:
            shard = json.loads(path.read_text(encoding="utf-8"))
            try:
                frames = np.load(path.with_suffix(".npy"), mmap_mode="r")
            except (ValueError, OSError) as error:
                raise ValueError(f"{path.with_suffix('.npy')}: unreadable or truncated ({error}); delete {path.name} "
                                 "and run precompute.py again") from error
            if frames.shape != (sum(shard["frames"]), self.width):
                raise ValueError(f"{path.with_suffix('.npy')}: holds {frames.shape}, its index says "
                                 f"{(sum(shard['frames']), self.width)}; delete both and run precompute.py again")
            hashes.extend(map(hash, shard["key"]))
            self.shard.extend(itertools.repeat(len(self.shards), len(shard["key"])))
            for name in ("first", "frames", "seconds"):
                getattr(self, name).extend(shard[name])
            self.bad |= {row["key"]: row["reason"] for row in shard["bad"]}
            self.shards.append(frames)
        if not hashes:
            raise ValueError(f"{folder}: holds no clip; see its bad.jsonl, or run precompute.py again")
        # keys are found by their hashes: a dict of them would take ten times the memory of all else
        self.by_hash = np.argsort(hashes, kind="stable").astype(np.int32)
        self.hashes = np.asarray(hashes)[self.by_hash]
        if (self.hashes[1:] == self.hashes[:-1]).any():  # by chance once in 700,000 starts with 7 million clips
            raise ValueError(f"{folder}: two clips have the same key, or by chance the same hash: start again; if that "
                             "does not help, delete the cache and run precompute.py again")

    def find(self, keys):
        """Places of clips in shard, first, frames and seconds; -1 where there is none."""
        wanted = np.fromiter(map(hash, keys), np.int64, len(keys))
        places = np.searchsorted(self.hashes, wanted).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[places] == wanted, self.by_hash[places], -1)

    def __getitem__(self, key):
        place, = self.find([key]).tolist()
        if place < 0:
            raise KeyError(key)
        return self.shards[self.shard[place]][self.first[place] :][: self.frames[place]]

    def batch(self, keys):
        """Encoder outputs of some clips: enc (B, T, W) fp32, zeros where padded; lens (B,)."""
        rows = [torch.from_numpy(np.array(self[key])) for key in keys]  # a copy: the file is mapped read-only
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float(), torch.tensor([len(row) for row in rows])


def read_utterances(specs, cache, tokenizer, normalize, speeds=(1.0,), repeat=(1,), perturb=""):
    """Manifests -> model.Utterances that the cache holds: key, target, ids (LLM tokens), frames, seconds, ...

    speeds apply to the manifests named in `perturb`, or to all of them if it is empty; repeat has one number for each.

    Clips that precompute.py left out are left out here too and counted; empty transcripts likewise. A key that the
    cache has never seen means that the cache belongs to another manifest: ValueError.
    """
    specs = [spec.strip() for spec in specs.split(",") if spec.strip()]
    perturb = [spec.strip() for spec in perturb.split(",") if spec.strip()] or specs
    if not set(perturb) <= set(specs):
        raise ValueError(f"data.perturb names {', '.join(set(perturb) - set(specs))}, which data.train does not")
    if len(repeat) not in (1, len(specs)):
        raise ValueError(f"data.repeat has {len(repeat)} numbers for {len(specs)} manifests; give one for each")
    utterances, left_out = model.Utterances(), []
    bar = tqdm(desc="reading manifests", unit=" rows", delay=5, disable=rank_and_world()[0] != 0 or None)
    for number, spec in enumerate(specs):
        rows = model.iter_manifest(spec)
        while part := list(itertools.islice(rows, 4096)):  # tokenizers are several times as fast on lists
            bar.update(len(part))
            targets = [model.normalize_text(r["target"]) if normalize else r["target"].strip() for r in part]
            keys = [[row["key"] if speed == 1.0 else f"{row['key']}@{speed}"
                     for speed in (speeds if spec in perturb else [1.0])] for row in part]
            places = iter(cache.find(list(itertools.chain.from_iterable(keys))).tolist())
            for row, target, ids, own in zip(part, targets, model.text_to_ids(tokenizer, targets), keys):
                extra = {k: row[k] for k in ("language", "prompt", "hotwords") if k in row}
                for key, place in zip(own, places):
                    if key in cache.bad or not ids:
                        left_out.append((key, cache.bad.get(key, "empty transcript")))
                        continue
                    if place < 0:
                        raise ValueError(f"{row['where']}: {key} is not in the cache; run precompute.py over this "
                                         "manifest")
                    utterance = {"key": key, "target": target, "ids": ids, "frames": cache.frames[place],
                                 "seconds": cache.seconds[place]} | extra
                    for _ in range(repeat[number % len(repeat)]):
                        utterances.append(utterance)
    bar.close()
    if left_out:
        print(f"{', '.join(specs)}: {len(left_out)} clips left out, first {left_out[0][0]}: {left_out[0][1]}")
    if not utterances:
        raise ValueError(f"{', '.join(specs)}: no usable utterance")
    return utterances


def open_utterances(cfg, cache, tokenizer):
    """read_utterances of data.train. Reading and tokenising millions of rows takes minutes, so it happens only once.

    Of large manifest files the result is kept in a folder beside the cache, whose name changes with the files, the
    settings, the tokenizer and the code. Later starts map it into memory, which all processes of a machine share.
    """
    settings = [cfg["data.normalize"], cfg["data.speed"], cfg["data.repeat"], cfg["data.perturb"]]
    wanted = cfg["data.train"], cache, tokenizer, *settings
    paths = [Path(spec.strip()) for spec in cfg["data.train"].split(",") if spec.strip()]
    backend = getattr(tokenizer, "backend_tokenizer", None)  # None: a tokenizer in Python, which has no identity
    if backend is None or not all(map(Path.is_file, paths)) or sum(path.stat().st_size for path in paths) < LARGE:
        return read_utterances(*wanted)
    made_of = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in [*paths, *cache.paths]]
    code = Path(model.__file__).read_text(encoding="utf-8") + inspect.getsource(read_utterances)
    made_of += [settings, *(model.hash_text(text) for text in (backend.to_str(), code, sys.version))]
    folder = cache.folder / f"utterances-{model.hash_text(made_of)}"
    rank, world = rank_and_world()
    utterances = None
    if rank == 0 and not folder.is_dir():
        utterances = read_utterances(*wanted)
        keep_utterances(utterances, folder)
    if world > 1:
        dist.barrier()
    if folder.is_dir():
        if rank == 0:
            print(f"{cfg['data.train']}: {'kept in' if utterances else 'as kept in'} {folder}", flush=True)
        return model.Utterances.load(folder)
    return utterances or read_utterances(*wanted)  # a cache that others own, or another machine's disk


def keep_utterances(utterances, folder):
    """Write their blocks as .npy files. The folder appears whole or not at all; where it cannot, training goes on."""
    half = folder.with_name(f".{folder.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        half.mkdir()
        for name, block in utterances.blocks().items():
            write_atomic(half / f"{name}.npy", lambda file, block=block: np.save(file, block))
        half.rename(folder)
    except OSError as error:
        shutil.rmtree(half, ignore_errors=True)
        if not folder.is_dir():  # else another run was faster
            print(f"{folder}: cannot be kept ({error}), so the next start reads the manifests again", flush=True)


def cut_batches(order, lengths, size, budget, world):
    """Cut indices (sorted by length) into batches of at most `size` clips and `budget` padded frames, per process."""
    batches, first, most, room = [], 0, size * world, budget * world
    while first < len(order):
        low, high = min(world, len(order) - first), min(most, len(order) - first)  # one clip a process at least
        count = high
        while low < high:  # what fits can be bisected, since clips get longer; mostly all do
            if lengths[order[first + count - 1]] * count <= room:
                low = count
            else:
                high = count - 1
            count = (low + high + 1) // 2
        if batches and low < world:  # too few for every process to have one
            first -= len(batches.pop())
            low = len(order) - first
        batches.append(order[first : first + low])
        first += low
    return batches


def epoch_batches(lengths, size, budget, world, seed, epoch):
    """Batches (arrays of indices) of one epoch, a pure function of seed and epoch: neighbours in length, shuffled.

    The longest batch comes first: if memory does not suffice, the run ends in its first step and not in its last.
    """
    rng, lengths = random.Random(f"{seed}-{epoch}"), np.asarray(lengths, np.int64)
    if len(lengths) < world or lengths.max() > budget:
        raise ValueError(f"{len(lengths)} clips, the longest of {lengths.max(initial=0)} positions, do not fill "
                         f"{world} process(es) of {budget} positions: raise batch_tokens (in phase 1: batch_frames), "
                         "or leave the longest clips out")
    order = np.random.default_rng(rng.getrandbits(64)).permutation(len(lengths)).astype(np.int32)
    ends = [*range(32 * size * world, len(order) - world + 1, 32 * size * world), len(order)]  # no pool below `world`
    batches = []
    for start, end in zip([0, *ends], ends):
        part = order[start:end]
        batches += cut_batches(part[np.argsort(lengths[part], kind="stable")], lengths, size, budget, world)
    rng.shuffle(batches)
    if epoch == 0:
        worst = max(range(len(batches)), key=lambda b: len(batches[b]) * lengths[batches[b][-1]])  # sorted inside
        batches.insert(0, batches.pop(worst))
    return batches


def load_frames(utterances, cache, cfg, seed=None):
    """Cached encoder outputs of one batch: enc (B, T, W) fp32, lens (B,) on the CPU. seed: augment, for training."""
    enc, lens = cache.batch([utterance["key"] for utterance in utterances])
    masks, level = cfg["augment.time_masks"], cfg["augment.feature_noise"]
    if seed is None or not masks and not level:
        return enc, lens
    keep, noise = torch.ones(enc.shape[:2]), torch.zeros(enc.shape if level else 0)
    for row, utterance in enumerate(utterances):
        frames, rng = utterance["frames"], random.Random(f"{seed}-{utterance['key']}")
        for _ in range(masks):
            width = min(rng.randint(0, cfg["augment.time_mask_frames"]), frames // 4)
            first = rng.randint(0, frames - width)
            keep[row, first : first + width] = 0.0
        if level:
            generator = torch.Generator().manual_seed(int(model.hash_text([seed, utterance["key"]])[:15], 16))
            noise[row, :frames] = torch.randn(frames, enc.shape[-1], generator=generator)
    enc *= model.upload(keep[..., None], enc.device)
    return (enc.add_(model.upload(noise, enc.device), alpha=level) if level else enc), lens


# ---- bookkeeping of a training run (the same lines in both training scripts) ----------------------------------------


def learning_rate(step, total, cfg):
    """Linear warm-up over steps 0..warmup-1, then cosine to 0 or constant: a pure function of the step."""
    if cfg["optim.schedule"] not in ("cosine", "constant"):
        raise ValueError(f"optim.schedule: expected cosine or constant, got {cfg['optim.schedule']!r}")
    warmup = cfg["optim.warmup_steps"]
    if step < warmup:
        return cfg["optim.lr"] * (step + 1) / warmup
    if cfg["optim.schedule"] == "constant":
        return cfg["optim.lr"]
    return cfg["optim.lr"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(module, cfg, device):
    """AdamW without weight decay on vectors (norms, biases, scales); fused, which pays on a CPU too."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": cfg["optim.weight_decay"]},
              {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg["optim.lr"], betas=(0.9, 0.98), fused=device.type in ("cuda", "cpu"))


def check_gradients(norms, step, folder):
    """Stop at a gradient that is not finite. Asked from time to time, since every time a GPU runs dry for it.

    Input   norms: of the steps since the last time, on the device; step: the last one.
    """
    if not bool(torch.isfinite(torch.stack(norms)).all()):
        first = step - len(norms) + 1 + [math.isfinite(norm) for norm in norms].index(False)
        raise ValueError(f"step {first}: the gradient is not finite; {folder}/last.pt, if it is there, is from before. "
                         "Lower optim.lr, then resume with run.resume=true")


def check_identity(found, identity, path):
    """Encoder and LLM must be those that `path` was trained with: others of the same width give noise, not an error."""
    differing = [key for key, value in identity.items() if not key.endswith(".name") and found.get(key, value) != value]
    if differing:
        then = ", ".join(f"{key}={found[key]}, now {identity[key]}" for key in differing)
        raise ValueError(f"{path}: belongs to another encoder or LLM ({then}); give the cache and the LLM of then")


def open_run(cfg, rank, identity):
    """Make run.dir, or open it again to resume. Output: content of last.pt, or None.

    A folder with results in it is refused unless run.resume is set: two runs would mix their files.
    """
    folder = Path(cfg["run.dir"])
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.pt"
    if not cfg["run.resume"]:
        if (folder / "metrics.jsonl").exists() or last.exists():
            raise ValueError(f"{folder}: already holds a run; give another run.dir, or run.resume=true to go on")
        state = None
    elif last.exists():
        try:
            state = torch.load(last, map_location="cpu", weights_only=True)
            then = state["config"]
            changed = [f"{k}: {then.get(k, 'not there')!r} -> {v!r}" for k, v in cfg.items() if then.get(k, cfg) != v]
        except Exception as error:  # torn, something else, or a pickle with code in it: weights_only refuses it
            raise ValueError(f"{last}: not a checkpoint of this script ({type(error).__name__}); not loaded") from error
        if state.get("format") != 2:
            raise ValueError(f"{last}: of an earlier version, whose epochs had another order; finish that run with it")
        check_identity(state.get("identity", {}), identity, last)
        if rank == 0:
            print(f"resuming at step {state['step']}; changed: {', '.join(changed) or 'nothing'}")
    else:
        state = None  # killed before its first checkpoint: start again from nothing
    if rank == 0:
        write_atomic(folder / "config.yaml", lambda file: file.write(yaml.safe_dump(cfg, sort_keys=False).encode()))
    return state


def trim_metrics(path, step):
    """Drop the lines that a killed run wrote after its last checkpoint; they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        write_atomic(path, lambda file: file.writelines(line.encode() for line in kept))


def log_metrics(path, writer, step, values):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step} | {k: round(float(v), 6) for k, v in values.items()}) + "\n")
    for name, value in values.items():
        writer.add_scalar(name, value, step)


# ---- audio on the fly -------------------------------------------------------------------------------------------


def header_seconds(path, sample_rate):
    """Duration by the file's header; where that cannot be read, AudioError says what is wrong."""
    try:
        return soundfile.info(path).duration
    except (RuntimeError, OSError, TypeError):  # TypeError: headerless .raw
        return len(model.load_audio(path, sample_rate)) / sample_rate


def read_audio_utterances(cfg, specs, tokenizer, encoder, repeat=(1,)):
    """Manifests -> utterances with `source`, without a cache; lengths come from the files' headers."""
    specs = [spec.strip() for spec in specs.split(",") if spec.strip()]
    utterances, left_out = model.Utterances(), []
    if cfg["data.perturb"]:
        raise ValueError("data.perturb needs data.source=cache; from audio, data.speed applies to all of data.train")
    if len(repeat) not in (1, len(specs)):
        raise ValueError(f"data.repeat has {len(repeat)} numbers for {len(specs)} manifests; give one for each")
    for number, spec in enumerate(specs):
        for row in model.iter_manifest(spec):
            target = row["target"].strip()
            if cfg["data.normalize"]:
                target = model.normalize_text(target)
            ids = model.text_to_ids(tokenizer, target)
            try:
                seconds = header_seconds(row["source"], encoder.sample_rate)
                reason = "" if ids else "empty transcript"
                if not 0.1 <= seconds <= cfg["data.max_s"]:
                    reason = f"{seconds:.2f} s is outside 0.1..data.max_s ({cfg['data.max_s']:g})"
            except model.AudioError as error:
                reason = str(error)
            if reason:
                left_out.append({"key": row["key"], "source": row["source"], "reason": reason})
                continue
            frames = encoder.num_frames(round(seconds * encoder.sample_rate))
            utterance = {"key": row["key"], "source": row["source"], "target": target, "ids": ids, "frames": frames,
                         "seconds": seconds} | {k: row[k] for k in ("language", "prompt", "hotwords") if k in row}
            for _ in range(repeat[number % len(repeat)]):
                utterances.append(utterance)
    if left_out:
        first = left_out[0]
        print(f"{', '.join(specs)}: {len(left_out)} clips left out, first {first['key']}: {first['reason']}")
    if not utterances:
        raise ValueError(f"{', '.join(specs)}: no usable utterance")
    return utterances, left_out


class AudioClips(torch.utils.data.Dataset):
    """utterance -> (features (T, F), reason): read, augment and featurise one clip; random by seed, epoch and key.

    The features are an array: a tensor from a worker holds a file descriptor, and handing that over takes its time.
    """

    def __init__(self, utterances, encoder, cfg, epoch=None):
        self.utterances, self.encoder, self.cfg, self.epoch = utterances, encoder, cfg, epoch

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, index):
        cfg, utterance, rate = self.cfg, self.utterances[index], self.encoder.sample_rate
        try:
            wave = model.load_audio(utterance["source"], rate)
            if self.epoch is not None:
                wave = self.augment(wave, rate, f"{cfg['seed']}-{self.epoch}-{utterance['key']}")
            return self.encoder.features(wave, utterance["key"]).numpy(), ""
        except model.AudioError as error:  # one second of silence without labels takes its place in the batch
            return self.encoder.features(torch.zeros(rate)).numpy(), str(error)

    def augment(self, wave, rate, seed):
        cfg, rng = self.cfg, random.Random(seed)
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        wave = model.change_speed(wave, rng.choice(cfg["data.speed"]), rate)
        if rng.random() < cfg["augment.noise"]:
            level = wave.std() * 10 ** (-rng.uniform(5, 30) / 20)
            wave = wave + level * torch.randn(wave.shape, generator=generator)
        if rng.random() < cfg["augment.telephone"]:
            wave = model.telephone_channel(wave, rate, generator)
        return wave


def encoder_batches(utterances, batches, encoder, cfg, device, dtype, epoch, bad):
    """Encode batches (lists of indices) as they come: yields enc (B, T, W), lens (B,), usable (B,) list of bool."""
    loader = torch.utils.data.DataLoader(
        AudioClips(utterances, encoder, cfg, epoch), batch_sampler=batches, collate_fn=list, num_workers=cfg["workers"],
        multiprocessing_context="fork" if cfg["workers"] else None,
        generator=torch.Generator(),  # its own: the default would draw from the run's random state
    )
    masking = model.SpecAugLFR(
        apply_time_warp=False, freq_mask_width_range=(0, 20), time_mask_width_range=(0, 20), time_mask_max_ratio=0.1,
        lfr_rate=model.LFR_M - 1 if isinstance(encoder, model.KaldiEncoder) else 0)
    for batch, items in zip(batches, loader):
        lens = torch.tensor([len(feats) for feats, _ in items])
        feats = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(feats) for feats, _ in items], batch_first=True)
        if cfg["augment.specaug"] and epoch is not None:
            seed = int(model.hash_text([cfg["seed"], epoch, batch])[:12], 16)
            feats, lens = masking(feats, lens, torch.Generator().manual_seed(seed))
        for index, (_, reason) in zip(batch, items):
            if reason and all(row["source"] != utterances[index]["source"] for row in bad):
                bad.append({"key": utterances[index]["key"], "source": utterances[index]["source"], "reason": reason})
        with torch.no_grad(), autocast(device, dtype):
            enc, enc_lens = encoder(model.upload(feats, device), lens)
        yield enc.float(), enc_lens, [not reason for _, reason in items]


# ---- model ------------------------------------------------------------------------------------------------------


class Phase2(nn.Module):
    """Adaptor, CTC head and LLM in one module, so that DDP wraps one forward pass."""

    def __init__(self, adaptor, ctc, llm, tokenizer, cfg):
        super().__init__()
        self.adaptor, self.ctc, self.llm = adaptor, ctc, llm
        self.tokenizer, self.cfg, self.stop_id = tokenizer, cfg, model.end_of_turn(tokenizer)

    def prompts(self, rows, drafts):
        return [model.build_prompt(self.tokenizer, row.get("prompt") or self.cfg["llm.prompt"], draft,
                                   row.get("language"), row.get("hotwords") or (), self.cfg["llm.system"])
                for row, draft in zip(rows, drafts)]

    def listen(self, enc, lens, rows, with_draft):
        """Speech for the LLM, prompts (with the CTC 1-best where with_draft[i]), CTC scores and their lengths."""
        speech, speech_lens, log_probs, emb_lens = model.speech_for_llm(
            self.adaptor, self.ctc, enc, lens, self.cfg["llm.speech"])
        drafts = [None] * len(enc)
        if any(with_draft):
            paths = model.ctc_greedy(log_probs, emb_lens, self.ctc.blank)
            drafts = [self.tokenizer.decode(self.ctc.tokens(path)).strip() if wanted else None
                      for path, wanted in zip(paths, with_draft)]
        return speech, speech_lens, self.prompts(rows, drafts), log_probs, emb_lens

    def forward(self, enc, lens, rows, ids, with_draft):
        """Sums over the batch: CE (nats), right tokens, CTC (nats), CTC rows left out; a row without ids adds 0."""
        speech, speech_lens, prompts, log_probs, emb_lens = self.listen(enc, lens, rows, with_draft)
        targets = [[*row, self.stop_id] if row else [] for row in ids]
        spliced = model.splice(self.llm.get_input_embeddings(), prompts, speech, speech_lens, targets)
        ce, _, right = model.transcript_loss(self.llm, spliced, model.shared_prefix(prompts))
        ctc, impossible = ce.detach() * 0.0, 0
        if self.cfg["loss.ctc_weight"]:
            ctc, impossible = self.ctc.loss(log_probs, emb_lens, [self.ctc.classes(row) for row in ids])
        return ce, right, ctc, impossible, spliced["labels"].numel()


def build(cfg, width, llm, tokenizer, train, device):
    """Adaptor and CTC head, from phase 1 where init.dir says so."""
    table = llm.get_input_embeddings().weight
    needs_ctc = cfg["llm.speech"] == "ctc" or cfg["llm.draft"] > 0 or cfg["loss.ctc_weight"] > 0
    adaptor = model.AudioAdaptor(
        width, table.shape[1], cfg["adaptor.hidden_dim"], cfg["adaptor.num_layers"], cfg["adaptor.num_heads"],
        cfg["adaptor.dropout"], cfg["adaptor.stack"], cfg["adaptor.pre_norm"], model.embedding_rms(table))
    tokens, head, folder = train.token_counts().nonzero()[0].tolist(), None, Path(cfg["init.dir"])
    if cfg["init.dir"]:
        model.load_weights(adaptor, folder / "adaptor_cached.pt")
        if needs_ctc and (folder / "ctc_head.pt").is_file():
            head = model.read_weights(folder / "ctc_head.pt")
            tokens = head["token_ids"].tolist()
    if needs_ctc and head is None and cfg["loss.ctc_weight"] == 0:
        raise ValueError("llm.speech=ctc and llm.draft need a trained CTC head: give the init.dir of a phase 1 with "
                         "loss.ctc_weight > 0, or set loss.ctc_weight here to train one from scratch")
    ctc = model.CTCHead(table.shape[1], embedding=table, token_ids=tokens) if needs_ctc else None
    if head is not None:
        ctc.load_state_dict(head)
    if not cfg["adaptor.train"]:
        model.freeze(adaptor)
    if ctc is not None and not (cfg["adaptor.train"] and (cfg["loss.ctc_weight"] > 0 or cfg["llm.speech"] == "ctc")):
        model.freeze(ctc)
    phase = Phase2(adaptor, ctc, llm, tokenizer, cfg).to(device)
    if not any(p.requires_grad for p in phase.parameters()):
        raise ValueError("nothing trains: set adaptor.train=true or llm.lora.r > 0")
    return phase


# ---- validation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(phase, utterances, load, cfg, device, dtype):
    """Teacher-forced loss and accuracy on all of valid, greedy error rates on its first run.valid_decode clips.

    load: list of utterances -> those of them that could be read, enc (B, T, W), lens (B,); the others are not scored.
    """
    phase.eval()
    drafted = cfg["llm.draft"] > 0
    sums, said, heard, read = torch.zeros(3), [], [], []
    for start in range(0, len(utterances), 16):
        batch, enc, lens = load(utterances[start : start + 16])
        if not batch:
            continue
        enc = enc.to(device)
        with autocast(device, dtype):
            ce, right, _, _, _ = phase(enc, lens, batch, [u["ids"] for u in batch], [drafted] * len(batch))
        sums += torch.tensor([float(ce), float(right), sum(len(u["ids"]) + 1 for u in batch)])
        if start >= cfg["run.valid_decode"]:
            continue
        with autocast(device, dtype):
            speech, speech_lens, prompts, log_probs, emb_lens = phase.listen(enc, lens, batch, [drafted] * len(batch))
            spliced = model.splice(phase.llm.get_input_embeddings(), prompts, speech, speech_lens, pad_left=True)
            paths = model.ctc_greedy(log_probs, emb_lens, phase.ctc.blank) if phase.ctc is not None else []
            counts = [len(path) for path in paths] if phase.cfg["llm.speech"] == "ctc" else [None] * len(batch)
            caps = [model.token_cap(u["seconds"], count) for u, count in zip(batch, counts)]
            answers, _ = model.greedy_decode(phase.llm, spliced, phase.stop_id, caps)
        said += batch
        heard += [phase.tokenizer.decode(answer).strip() for answer in answers]
        if paths:
            read += [phase.tokenizer.decode(phase.ctc.tokens(path)).strip() for path in paths]
    phase.train()
    if not sums[2]:
        raise ValueError(f"{cfg['data.valid']}: not one of its clips could be read")
    scores = {"valid_ce": sums[0] / sums[2], "valid_acc": sums[1] / sums[2]}
    references = [u["target"] for u in said]
    if said:
        scores["er"] = model.error_rate(references, heard)["rate"]
    if read:
        scores["ctc_er"] = model.error_rate(references, read)["rate"]
    return scores, list(zip(references, heard))[:3]


# ---- the run ----------------------------------------------------------------------------------------------------


def trained_state(phase):
    """What training changes, and the adaptor and CTC head whole, by name; the frozen LLM is not in it."""
    state = {f"adaptor.{k}": v for k, v in phase.adaptor.state_dict().items()}
    state |= {f"ctc.{k}": v for k, v in phase.ctc.state_dict().items()} if phase.ctc is not None else {}
    return state | {f"llm.{k}": v.detach() for k, v in model.lora_parameters(phase.llm).items()}


def load_trained(phase, state, cfg):
    """Weights of last.pt; what is missing must be exactly the frozen LLM."""
    try:
        missing, unknown = phase.load_state_dict(state["trained"], strict=False)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{cfg['run.dir']}/last.pt does not fit this configuration: {error}") from error
    wrong = [*unknown, *(name for name in missing if not name.startswith("llm.") or "lora_" in name)]
    if wrong:
        raise ValueError(f"{cfg['run.dir']}/last.pt does not fit this configuration: {', '.join(wrong[:3])} ...")


def save_results(phase, cfg, identity, folder):
    """Plain state dicts and config.json: everything that infer.py needs besides encoder and LLM."""
    parts = {"adaptor_phase2_final.pt": phase.adaptor.state_dict()}
    if phase.ctc is not None:
        parts["ctc_head.pt"] = phase.ctc.state_dict()
    if lora := model.lora_parameters(phase.llm):
        parts["lora.pt"] = {name: parameter.detach() for name, parameter in lora.items()}
    for name, content in parts.items():
        write_atomic(folder / name, lambda file, content=content: torch.save(content, file))
    kept = {k: v for k, v in cfg.items() if k.split(".")[0] in ("llm", "adaptor", "encoder") or k == "data.normalize"}
    text = json.dumps({"format": 1} | kept | identity, ensure_ascii=False, indent=1)
    write_atomic(folder / "config.json", lambda file: file.write(text.encode()))


def stream(train, lengths, encoder, cache, cfg, device, dtype, epoch, used, first, bad):
    """Endless batches from (epoch, used) on: yields epoch, used, utterances of this process, enc, lens, usable.

    first: the batches of epoch 0, whose number the schedule needs in any case.
    """
    rank, world = rank_and_world()
    while True:
        batches = first if epoch == 0 else epoch_batches(
            lengths, cfg["batch_clips"], cfg["batch_tokens"], world, cfg["seed"], epoch)
        first, mine = None, [batch[rank::world].tolist() for batch in batches[used:]]
        encoded = encoder_batches(train, mine, encoder, cfg, device, dtype, epoch, bad) if cache is None else None
        for batch in mine:
            utterances = [train[i] for i in batch]
            used += 1
            if cache is None:
                enc, lens, usable = next(encoded)
            else:
                enc, lens = load_frames(utterances, cache, cfg, seed=f"{cfg['seed']}-{epoch}-{used}")
                usable = [True] * len(utterances)
            yield epoch, used, utterances, enc, lens, usable
        epoch, used = epoch + 1, 0


def main(cfg):
    device, dtype = pick_device(cfg)
    rank, world = rank_and_world()
    torch.manual_seed(cfg["seed"])
    llm, tokenizer = model.load_llm(cfg["llm.name"], dtype, device, cfg["llm.lora.r"], cfg["llm.lora.alpha"],
                                    cfg["llm.lora.targets"])
    cache, encoder, bad = None, None, []
    if cfg["data.source"] == "cache":
        cache = EncoderCache(cfg["cache.dir"])
        if cfg["adaptor.keep_query_frames"] != cache.identity.get("encoder.query_frames", False):
            raise ValueError(f"{cfg['cache.dir']}: was made with adaptor.keep_query_frames="
                             f"{cache.identity.get('encoder.query_frames', False)}; give the same here")
        width, identity = cache.width, {k: v for k, v in cache.identity.items() if k.startswith("encoder.")}
        train = open_utterances(cfg, cache, tokenizer)
        valid = read_utterances(cfg["data.valid"], cache, tokenizer, cfg["data.normalize"])
    elif cfg["data.source"] == "audio":
        encoder = model.load_encoder(cfg["encoder.name"], cfg["encoder.language"], cfg["encoder.text_norm"],
                                     cfg["adaptor.keep_query_frames"], cfg["encoder.pad_to_30s"]).to(device)
        width, identity = encoder.width, {f"encoder.{key}": value for key, value in encoder.identity.items()}
        train, bad = read_audio_utterances(cfg, cfg["data.train"], tokenizer, encoder, cfg["data.repeat"])
        valid, bad_valid = read_audio_utterances(cfg, cfg["data.valid"], tokenizer, encoder)
        bad += [row for row in bad_valid if all(row["source"] != known["source"] for known in bad)]
    else:
        raise ValueError(f"data.source: expected cache or audio, got {cfg['data.source']!r}")
    identity["llm.weights"] = llm.identity["weights"]
    state = open_run(cfg, rank, identity)
    origin = Path(cfg["init.dir"]) / "identity.json"
    if cfg["init.dir"] and origin.is_file():  # beside an adaptor from elsewhere there is none
        check_identity(json.loads(origin.read_text(encoding="utf-8")), identity, origin)
    phase = build(cfg, width, llm, tokenizer, train, device)
    optimizer, trainable = make_optimizer(phase, cfg, device), [p for p in phase.parameters() if p.requires_grad]
    if cfg["compile"]:
        model.compile_layers([*llm.model.layers, *phase.adaptor.layers()], device)
    wrapped = nn.parallel.DistributedDataParallel(phase, broadcast_buffers=False) if world > 1 else phase
    step, epoch, used, best, spent, accum = 0, 0, 0, math.inf, 0.0, cfg["optim.accum"]
    if state:
        load_trained(phase, state, cfg)
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, used, best, spent = (state[k] for k in ("step", "epoch", "used", "best", "seconds"))
    prompt_tokens = sum(len(part) for part in phase.prompts([{}], [None])[0])
    lengths = phase.adaptor.out_lens(np.asarray(train.frames)) + 2 * train.num_ids + prompt_tokens  # 2: the draft
    first = epoch_batches(lengths, cfg["batch_clips"], cfg["batch_tokens"], world, cfg["seed"], 0)
    total = cfg["optim.max_steps"] or cfg["optim.epochs"] * len(first) // accum
    folder, metrics, writer = Path(cfg["run.dir"]), Path(cfg["run.dir"]) / "metrics.jsonl", None
    if rank == 0:
        trim_metrics(metrics, step)
        writer = SummaryWriter(folder, purge_step=step + 1)
        print_start(cfg, phase, train, valid, total, device, dtype, world, identity)

    def load_valid(utterances):
        if cache is not None:
            return utterances, *load_frames(utterances, cache, cfg)
        enc, lens, usable = next(encoder_batches(utterances, [list(range(len(utterances)))], encoder, cfg, device,
                                                 dtype, None, bad))
        kept = [i for i, good in enumerate(usable) if good]
        return [utterances[i] for i in kept], enc[kept], lens[kept]

    phase.train()
    batches = stream(train, lengths, encoder, cache, cfg, device, dtype, epoch, used, first, bad)
    window, norms, started = new_window(), [], time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank != 0 or None)
    while step < total:
        torch.manual_seed(int(model.hash_text([cfg["seed"], step, rank])[:15], 16))  # dropout: a function of the step
        lr = learning_rate(step, total, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro = [next(batches) for _ in range(accum)]
        epoch, used = micro[-1][:2]
        ids = [[u["ids"] if good else [] for u, good in zip(part[2], part[5])] for part in micro]
        counts = torch.tensor([sum(len(row) + 1 for part in ids for row in part if row),
                               sum(1 for part in ids for row in part if row)], dtype=torch.float64)
        if world > 1:
            counts = model.upload(counts, device)
            dist.all_reduce(counts)
        # label tokens and clips of the whole step, all processes; tensors, so that nobody waits for what others count
        tokens, clips = counts.clamp(min=1).float().unbind()
        for (_, _, utterances, enc, lens, _), part in zip(micro, ids):
            rng = random.Random(f"{cfg['seed']}-{step}-{utterances[0]['key']}")
            with_draft = [rng.random() < cfg["llm.draft"] for _ in utterances]
            with autocast(device, dtype):
                ce, right, ctc, impossible, positions = wrapped(
                    model.upload(enc, device), lens, utterances, part, with_draft)
            loss = ce / tokens + cfg["loss.ctc_weight"] * ctc / clips
            (loss * world).backward()  # DDP averages over processes, we want the sum
            window["ce"] += ce.detach()
            window["ctc"] += ctc.detach()
            window["right"] += right
            window["labels"] += sum(len(row) + 1 for row in part if row)
            window["clips"] += sum(1 for row in part if row)
            window["impossible"] += impossible
            window["tokens"] += positions
            window["audio_s"] += sum(u["seconds"] for u in utterances)
        grad_norm = nn.utils.clip_grad_norm_(trainable, cfg["optim.clip"])
        norms.append(grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        window["steps"] += 1
        bar.update(1)
        last = step == total
        if last or any(step % cfg[f"run.{what}_every"] == 0 for what in ("log", "valid", "save")):
            check_gradients(norms, step, folder)
            norms = []
        if rank == 0 and (step % cfg["run.log_every"] == 0 or last):
            log_window(window, cfg, step, total, lr, grad_norm, len(bad), metrics, writer, bar)
            window = new_window()
        if step % cfg["run.valid_every"] == 0 or last:
            scores, samples = validate(phase, valid, load_valid, cfg, device, dtype)
            score = float(scores.get("er", scores["valid_ce"]))
            if rank == 0:
                log_metrics(metrics, writer, step, scores)
                tqdm.write(f"  valid {step}: " + "  ".join(f"{k} {float(v):.4f}" for k, v in scores.items()))
                for said, heard in samples:
                    tqdm.write(f"    said  {said}\n    heard {heard}")
                if score < best:
                    save_results(phase, cfg, identity, folder)
            best = min(best, score)
        if len(bad) > cfg["data.max_bad"]:
            write_bad(folder, bad)  # as this process knows them; the others are in the next step already
            raise ValueError(f"{len(bad)} clips cannot be used, more than data.max_bad={cfg['data.max_bad']}; "
                             f"the last is {bad[-1]['key']}: {bad[-1]['reason']}")
        if cache is None and (step % cfg["run.save_every"] == 0 or last):
            named = all_bad(bad)
            if rank == 0:
                write_bad(folder, named)
        if rank == 0 and (step % cfg["run.save_every"] == 0 or last):
            state = {"format": 2, "trained": trained_state(phase), "optimizer": optimizer.state_dict(), "step": step,
                     "epoch": epoch, "used": used, "best": best, "config": cfg,
                     "identity": identity, "seconds": spent + time.time() - started}
            write_atomic(folder / "last.pt", lambda file, state=state: torch.save(state, file))
    bar.close()
    if rank == 0:
        print(f"done: {step} steps, best {best:.4f}, {spent + time.time() - started:.0f} s -> {folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


def all_bad(bad):
    """Rows of clips that could not be used, of all processes, each file once."""
    parts = [bad] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, bad)
    return list({row["source"]: row for part in parts for row in part}.values())


def write_bad(folder, bad):
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in bad]
    write_atomic(folder / "bad.jsonl", lambda file: file.writelines(lines))


def new_window():
    return {"ce": 0.0, "ctc": 0.0, "right": 0.0, "labels": 0, "clips": 0, "impossible": 0, "tokens": 0, "audio_s": 0.0,
            "steps": 0, "started": time.time()}


def log_window(window, cfg, step, total, lr, grad_norm, bad, metrics, writer, bar):
    """One line per interval: losses averaged over the interval."""
    labels, clips = max(1, window["labels"]), max(1, window["clips"])  # 0 if no clip of the interval could be read
    values = {"ce": float(window["ce"]) / labels, "ctc": float(window["ctc"]) / clips,
              "acc": float(window["right"]) / labels, "lr": lr, "grad_norm": grad_norm,
              "audio_s_per_s": window["audio_s"] / (time.time() - window["started"]),
              "tokens": window["tokens"] / window["steps"], "impossible": window["impossible"], "bad": bad}
    log_metrics(metrics, writer, step, values)
    bar.set_postfix(ce=f"{values['ce']:.3f}", lr=f"{lr:.1e}")
    memory = f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    tqdm.write(f"{step:6d}/{total} ce {values['ce']:7.4f} acc {values['acc']:.3f} ctc {values['ctc']:8.4f} lr {lr:.2e} "
               f"norm {float(grad_norm):7.3f} {values['audio_s_per_s']:7.1f} audio s/s{memory}")


def print_start(cfg, phase, train, valid, total, device, dtype, world, identity):
    """Everything derived, once, before the first step."""
    hours = np.sum(train.seconds) / 3600
    print(f"train {len(train)} clips, {hours:.2f} h an epoch; valid {len(valid)} clips | {total} steps of at most "
          f"{cfg['batch_clips']} clips and {cfg['batch_tokens']} positions x {world} x {cfg['optim.accum']}")
    for name, part in phase.named_children():
        trains = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"  {name}: {trains:,} trainable, {sum(p.numel() for p in part.parameters()) - trains:,} frozen")
    for name, rows in (("train", train), ("valid", valid)) if phase.ctc is not None else ():
        counts = rows.token_counts()
        known = counts[[token for token in phase.ctc.token_ids.tolist() if token < len(counts)]].sum()
        print(f"  {counts.sum() - known} of {counts.sum()} {name} tokens have no CTC class: CTC neither learns nor "
              "reads them")
    before, after = phase.prompts([{}], [None])[0]
    print(f"prompt: {phase.tokenizer.decode(before)!r} SPEECH {phase.tokenizer.decode(after)!r}")
    print(f"encoder {identity['encoder.name']}, LLM {cfg['llm.name']}, device {device}, {dtype}, "
          f"torch {torch.__version__}, seed {cfg['seed']}", flush=True)
    if cfg["compile"] and device.type == "cuda":
        print("the first steps take a minute or more: layers are compiled (compile=false turns that off)", flush=True)


if __name__ == "__main__":
    run_main(main, DEFAULTS, __doc__)
