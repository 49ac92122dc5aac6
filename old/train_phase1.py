"""Stage 1: align the adaptor with the LLM's embedding space, without running the LLM.

    python train_phase1.py configs/phase1.yaml [key=value ...]
    torchrun --nproc_per_node 4 train_phase1.py configs/phase1.yaml

Two losses, each with a weight, on cached encoder outputs:
  InfoNCE  the mean of a clip's adaptor outputs must be nearer to the mean embedding of its own transcript than to
           those of the other clips in the batch, and the other way round; learnable temperature; clips with equal
           transcripts are not each other's negatives; under torchrun negatives come from all GPUs.
  CTC      every adaptor position is scored against the LLM's own token embeddings plus a learned blank. InfoNCE
           says what is in the clip, CTC also says in which order; with minutes of speech it makes the difference.

Input   cache of `precompute.py` (cache.dir), manifests with the same keys, the LLM's embedding table and tokenizer.
Output  run.dir/adaptor_cached.pt  plain state dict of the adaptor at its best validation score
        run.dir/ctc_head.pt        plain state dict of the CTC head (if loss.ctc_weight > 0)
        run.dir/identity.json      the encoder and LLM that they belong to; train_phase2.py refuses others
        run.dir/last.pt            everything that resuming needs; run.dir/metrics.jsonl and TensorBoard events
Papers  InfoNCE arXiv:1807.03748, as in CLIP arXiv:2103.00020; CTC Graves et al. 2006.
Logged  loss (weighted sum, nats), nce and ctc (nats per clip), r1_a2t / r1_t2a / r5_* (share of held-out clips whose
        own transcript is the nearest / among the 5 nearest, over `pool` texts), ctc_er (error rate of the greedy CTC
        read-out), temperature, lr, grad_norm, audio_s_per_s.
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
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = {
    "cache.dir": ...,  # made by precompute.py
    "cache.on_device": True,  # hold it in the GPU's memory if it takes at most half of what is free there
    "data.train": ...,  # manifests, separated by commas
    "data.valid": ...,
    "data.repeat": [1],  # how often each training manifest counts per epoch, one number for each
    "data.perturb": "",  # manifests that data.speed applies to; empty: all of data.train
    "data.speed": [1.0],  # use the copies that precompute.py made at these speeds
    "data.normalize": True,  # train on normalised text (lower case, no punctuation), as scoring does
    "llm.name": ...,  # only its embedding table and tokenizer are read
    "adaptor.hidden_dim": 2048,
    "adaptor.num_layers": 4,
    "adaptor.num_heads": 8,
    "adaptor.dropout": 0.1,
    "adaptor.stack": 1,  # encoder frames per LLM position
    "adaptor.pre_norm": False,
    "adaptor.keep_query_frames": False,
    "loss.contrastive_weight": 1.0,
    "loss.ctc_weight": 0.0,
    "loss.temperature": 0.07,  # start value; learned
    "ctc.vocab": "train",  # train: tokens of the training transcripts; all: the LLM's whole vocabulary
    "augment.time_masks": 0,  # spans of encoder frames set to zero, per clip
    "augment.feature_noise": 0.0,  # standard deviation of noise on the cached encoder outputs
    "augment.time_mask_frames": 12,  # longest span
    "batch_clips": 256,  # pairs per process and step; InfoNCE has at most this many (times GPUs) candidates
    "batch_frames": 40000,  # at most so many encoder frames, padding included; batches of long clips get fewer pairs
    "optim.lr": 1e-4,  # peak
    "optim.weight_decay": 0.01,  # on matrices, not on norms and biases
    "optim.warmup_steps": 500,
    "optim.schedule": "cosine",  # cosine (to 0) or constant, after the warm-up
    "optim.clip": 1.0,
    "optim.accum": 1,  # micro-batches per step; they add no negatives
    "optim.epochs": 10,
    "optim.max_steps": 0,  # > 0: exactly so many steps, whatever epochs says
    "run.dir": ...,
    "run.resume": False,
    "run.save_every": 500,  # steps
    "run.valid_every": 500,
    "run.log_every": 50,
    "seed": 0,
    "compile": True,  # on a GPU: torch.compile of the adaptor's layers
    "device": "auto",
    "dtype": "auto",  # autocast; trainable weights are fp32 always
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


# ---- on a GPU ---------------------------------------------------------------------------------------------------


class ResidentCache:
    """The encoder outputs of a cache in the device's memory: a batch is one gather, not a copy for every clip."""

    def __init__(self, cache, device):
        sizes = [len(frames) for frames in cache.shards]
        starts = list(itertools.accumulate(sizes, initial=0))
        self.frames = torch.empty(starts[-1], cache.width, dtype=torch.float16, device=device)
        for start, shard in zip(starts, cache.shards):
            self.frames[start : start + len(shard)] = torch.from_numpy(np.array(shard)).to(device)
        first = [starts[shard] + first for shard, first in zip(cache.shard, cache.first)]
        self.first, self.find, self.lengths = torch.tensor(first), cache.find, torch.tensor(cache.frames)

    def batch(self, keys):
        """enc (B, T, W) fp32 on the device, zeros where padded; lens (B,) on the CPU."""
        numbers = torch.from_numpy(self.find(keys))
        if (numbers < 0).any():
            raise KeyError(keys[int(numbers.argmin())])
        lens = self.lengths[numbers].long()
        steps = torch.arange(int(lens.max()))
        places = model.upload(self.first[numbers][:, None] + steps.clamp(max=lens[:, None] - 1), self.frames.device)
        enc = self.frames[places].float()  # places are (B, T)
        return enc.masked_fill(~model.length_mask(lens, len(steps), enc.device)[..., None], 0.0), lens


def speed_up(cache, cfg, device):
    """The cache in the GPU's memory if it takes at most half of what is free there and cache.on_device allows it."""
    size = sum(shard.nbytes for shard in cache.shards)
    if device.type == "cuda" and cfg["cache.on_device"] and size < torch.cuda.mem_get_info(device)[0] / 2:
        return ResidentCache(cache, device)
    return cache


def prefetch(batches):
    """Get the next batch in a thread while the GPU works on this one. Two CPU cores have no time to spare for it."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = pool.submit(next, batches, None)
            yield batch


# ---- losses -----------------------------------------------------------------------------------------------------


def gather_rows(x):
    """Concatenate rows (B_r, D) of all processes; gradients flow back to where a row came from."""
    rank, world = rank_and_world()
    if world == 1:
        return x, 0
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    sizes = [int(size) for size in sizes]
    padded = F.pad(x, (0, 0, 0, max(sizes) - len(x)))
    parts = torch.distributed.nn.functional.all_gather(padded) if x.requires_grad else gather_plain(padded, world)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)]), sum(sizes[:rank])


def gather_plain(x, world):
    parts = [torch.zeros_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return parts


def info_nce(audio, text, text_ids, temperature):
    """Symmetric InfoNCE of this process's pairs against all processes' pairs.

    Input   audio, text (B, D) unit vectors, text_ids (B, 1) equal for equal transcripts, temperature scalar.
    Output  sum over the B pairs of (audio->text + text->audio) / 2, in nats. Pairs with equal transcripts are taken
            out of each other's denominators.
    """
    all_audio, offset = gather_rows(audio)
    all_text, _ = gather_rows(text)
    all_ids, _ = gather_rows(text_ids)
    own = torch.arange(len(audio), device=audio.device) + offset
    same = text_ids == all_ids.T  # (B, B_all)
    same[torch.arange(len(audio), device=audio.device), own] = False
    to_text = (audio @ all_text.T / temperature).masked_fill(same, -torch.inf)
    to_audio = (text @ all_audio.T / temperature).masked_fill(same, -torch.inf)
    return (F.cross_entropy(to_text, own, reduction="sum") + F.cross_entropy(to_audio, own, reduction="sum")) / 2


class Phase1(nn.Module):
    """Adaptor, CTC head and temperature: everything that trains, so that DDP wraps one module."""

    def __init__(self, adaptor, ctc, temperature):
        super().__init__()
        self.adaptor, self.ctc = adaptor, ctc
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def pool(self, enc, lens):
        """emb (B, S, D), lens, and the unit vector (B, D) of each clip's mean."""
        emb, emb_lens = self.adaptor(enc, lens)
        return emb, emb_lens, F.normalize(emb.float().sum(1), dim=-1)  # of the sum, as of the mean

    def forward(self, enc, lens, text, text_ids, targets):
        emb, emb_lens, audio = self.pool(enc, lens)
        # every parameter takes part in every loss, whatever its weight, since DDP waits for all of them
        temperature = self.log_temperature.exp()
        with torch.autocast(emb.device.type, enabled=False):  # bf16 cosines are off by 0.002, then divided by 0.07
            nce = info_nce(audio, text, text_ids, temperature)
        ctc, impossible = emb.sum() * 0.0, 0
        if self.ctc is not None:
            with torch.autocast(emb.device.type, enabled=False):
                ctc, impossible = self.ctc.loss(self.ctc(emb.float()), emb_lens, targets)
        return nce, ctc, impossible


# ---- validation -------------------------------------------------------------------------------------------------


def recall_at(similarity, text_ids, k):
    """Share of rows whose own column, or one with an equal transcript, is among the k nearest. similarity (N, N)."""
    nearest = similarity.topk(min(k, len(similarity)), dim=1).indices  # (N, k)
    return (text_ids[nearest] == text_ids[:, None]).any(1).float().mean()


@torch.no_grad()
def validate(phase, utterances, cache, table, tokenizer, cfg, device, dtype):
    """Retrieval over the held-out clips, both ways, and the greedy CTC read-out's error rate."""
    phase.eval()
    audio, texts, read = [], [], []
    for start in range(0, len(utterances), 64):
        batch = utterances[start : start + 64]
        enc, lens = load_frames(batch, cache, cfg)
        with autocast(device, dtype):
            emb, emb_lens, vectors = phase.pool(enc.to(device), lens)
        audio.append(vectors.cpu())
        texts.append(pool_texts([u["ids"] for u in batch], table).cpu())
        if phase.ctc is not None:
            paths = model.ctc_greedy(phase.ctc(emb.float()), emb_lens, phase.ctc.blank)
            read += [tokenizer.decode(phase.ctc.tokens(path)).strip() for path in paths]
    phase.train()
    similarity = torch.cat(audio) @ torch.cat(texts).T  # (N, N)
    names = {target: n for n, target in enumerate(dict.fromkeys(u["target"] for u in utterances))}
    text_ids = torch.tensor([names[u["target"]] for u in utterances])
    scores = {f"r{k}_{way}": recall_at(matrix, text_ids, k)
              for way, matrix in (("a2t", similarity), ("t2a", similarity.T)) for k in (1, 5)}
    scores["pool"] = len(names)
    if read:
        scores["ctc_er"] = model.error_rate([u["target"] for u in utterances], read)["rate"]
    return scores, read


def pool_texts(ids, table):
    """Unit vectors (B, D) of the mean embeddings of transcripts, lists of token ids."""
    offsets = list(itertools.accumulate((len(row) for row in ids[:-1]), initial=0))
    flat = list(itertools.chain.from_iterable(ids))
    flat, offsets = (model.upload(torch.tensor(numbers), table.device) for numbers in (flat, offsets))
    return F.normalize(F.embedding_bag(flat, table, offsets, mode="mean").float(), dim=-1)


# ---- the run ----------------------------------------------------------------------------------------------------


def build(cfg, cache, table, train, device):
    adaptor = model.AudioAdaptor(
        cache.width, table.shape[1], cfg["adaptor.hidden_dim"], cfg["adaptor.num_layers"], cfg["adaptor.num_heads"],
        cfg["adaptor.dropout"], cfg["adaptor.stack"], cfg["adaptor.pre_norm"], model.embedding_rms(table))
    ctc = None
    if cfg["ctc.vocab"] not in ("train", "all"):
        raise ValueError(f"ctc.vocab: expected train or all, got {cfg['ctc.vocab']!r}")
    if cfg["loss.ctc_weight"]:
        seen = train.token_counts().nonzero()[0].tolist()
        ctc = model.CTCHead(table.shape[1], embedding=table, token_ids=seen if cfg["ctc.vocab"] == "train" else None)
    return Phase1(adaptor, ctc, cfg["loss.temperature"]).to(device)


def save_results(phase, identity, folder):
    """The plain state dicts that train_phase2.py and others load, and which encoder and LLM they belong to."""
    write_atomic(folder / "identity.json", lambda file: file.write(json.dumps(identity, indent=1).encode()))
    write_atomic(folder / "adaptor_cached.pt", lambda file: torch.save(phase.adaptor.state_dict(), file))
    if phase.ctc is not None:
        write_atomic(folder / "ctc_head.pt", lambda file: torch.save(phase.ctc.state_dict(), file))


def stream(train, cache, cfg, step, epoch, used, first):
    """Endless batches from (epoch, used) on: yields epoch, used, clips of all processes, our utterances, enc, lens.

    first: the batches of epoch 0, whose number the schedule needs in any case.
    """
    rank, world = rank_and_world()
    number = step * cfg["optim.accum"]
    while True:
        batches = first if epoch == 0 else epoch_batches(
            train.frames, cfg["batch_clips"], cfg["batch_frames"], world, cfg["seed"], epoch)
        first = None
        for batch in batches[used:]:
            used += 1
            mine = [train[i] for i in batch[rank::world].tolist()]
            seed = f"{cfg['seed']}-{number // cfg['optim.accum']}"
            yield epoch, used, len(batch), mine, *load_frames(mine, cache, cfg, seed=seed)
            number += 1
        epoch, used = epoch + 1, 0


def main(cfg):
    device, dtype = pick_device(cfg)
    rank, world = rank_and_world()
    torch.manual_seed(cfg["seed"])
    cache = EncoderCache(cfg["cache.dir"])
    if cfg["adaptor.keep_query_frames"] != cache.identity.get("encoder.query_frames", False):
        raise ValueError(f"{cfg['cache.dir']}: was made with adaptor.keep_query_frames="
                         f"{cache.identity.get('encoder.query_frames', False)}; give the same here")
    table, tokenizer = model.load_embedding(cfg["llm.name"])
    identity = {k: v for k, v in cache.identity.items() if k.startswith("encoder.")}
    identity |= {"llm.weights": model.hash_tensors({"embed": table.bfloat16()})}  # as model.load_llm has it
    table = table.to(device)
    train = open_utterances(cfg, cache, tokenizer)
    valid = read_utterances(cfg["data.valid"], cache, tokenizer, cfg["data.normalize"])
    state = open_run(cfg, rank, identity)
    phase = build(cfg, cache, table, train, device)
    optimizer = make_optimizer(phase, cfg, device)
    if cfg["compile"]:
        model.compile_layers(phase.adaptor.layers(), device)
    wrapped = nn.parallel.DistributedDataParallel(phase, broadcast_buffers=False) if world > 1 else phase
    accum = cfg["optim.accum"]
    first = epoch_batches(train.frames, cfg["batch_clips"], cfg["batch_frames"], world, cfg["seed"], 0)
    total = cfg["optim.max_steps"] or cfg["optim.epochs"] * len(first) // accum
    step, epoch, used, best, spent = 0, 0, 0, -math.inf, 0.0
    if state:
        try:
            phase.load_state_dict(state["phase"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{cfg['run.dir']}/last.pt does not fit this configuration: {error}") from error
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, used, best, spent = (state[k] for k in ("step", "epoch", "used", "best", "seconds"))
    folder, metrics = Path(cfg["run.dir"]), Path(cfg["run.dir"]) / "metrics.jsonl"
    writer = None
    if rank == 0:
        trim_metrics(metrics, step)
        writer = SummaryWriter(folder, purge_step=step + 1)
        print_start(cfg, phase, train, valid, total, device, dtype, world)
    phase.train()
    quick = speed_up(cache, cfg, device)
    batches = stream(train, quick, cfg, step, epoch, used, first)
    batches = prefetch(batches) if device.type == "cuda" else batches
    window, norms, started = new_window(), [], time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank != 0 or None)
    while step < total:
        torch.manual_seed(int(model.hash_text([cfg["seed"], step, rank])[:15], 16))  # dropout: a function of the step
        lr = learning_rate(step, total, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro = list(itertools.islice(batches, accum))
        epoch, used = micro[-1][:2]
        clips = sum(count for _, _, count, *_ in micro)  # of all processes: what the loss is averaged over
        for _, _, _, mine, enc, lens in micro:
            text = pool_texts([u["ids"] for u in mine], table)
            text_ids = [[int(model.hash_text(u["target"])[:15], 16)] for u in mine]
            text_ids = model.upload(torch.tensor(text_ids), device)
            targets = [phase.ctc.classes(u["ids"]) for u in mine] if phase.ctc is not None else None
            with autocast(device, dtype):
                nce, ctc, impossible = wrapped(model.upload(enc, device), lens, text, text_ids, targets)
            loss = (cfg["loss.contrastive_weight"] * nce + cfg["loss.ctc_weight"] * ctc) / clips
            (loss * world).backward()  # DDP averages over processes, we want the sum
            window["nce"] += nce.detach()
            window["ctc"] += ctc.detach()
            window["clips"] += len(mine)
            window["impossible"] += impossible
            window["audio_s"] += sum(u["seconds"] for u in mine)
        grad_norm = nn.utils.clip_grad_norm_(phase.parameters(), cfg["optim.clip"])
        norms.append(grad_norm)
        optimizer.step()
        phase.log_temperature.data.clamp_(math.log(0.01), 0.0)  # as in CLIP: below 0.01 the training is unstable
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update(1)
        last = step == total
        if last or any(step % cfg[f"run.{what}_every"] == 0 for what in ("log", "valid", "save")):
            check_gradients(norms, step, folder)
            norms = []
        if rank == 0 and (step % cfg["run.log_every"] == 0 or last):
            log_window(window, cfg, phase, step, total, lr, grad_norm, metrics, writer, bar)
            window = new_window()
        if step % cfg["run.valid_every"] == 0 or last:
            scores, read = validate(phase, valid, quick, table, tokenizer, cfg, device, dtype)
            score = -scores["ctc_er"] if "ctc_er" in scores else (scores["r1_a2t"] + scores["r1_t2a"]).item() / 2
            if rank == 0:
                log_metrics(metrics, writer, step, scores)
                tqdm.write(f"  valid {step}: " + "  ".join(f"{k} {float(v):.3f}" for k, v in scores.items()))
                for utterance, text in list(zip(valid, read))[:3]:
                    tqdm.write(f"    {utterance['target']!r} read as {text!r}")
                if score > best:
                    save_results(phase, identity, folder)
            best = max(best, score)
        if rank == 0 and (step % cfg["run.save_every"] == 0 or last):
            state = {"format": 2, "phase": phase.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                     "epoch": epoch, "used": used, "best": best, "config": cfg,
                     "identity": identity, "seconds": spent + time.time() - started}
            write_atomic(folder / "last.pt", lambda file, state=state: torch.save(state, file))
    bar.close()
    if rank == 0:
        print(f"done: {step} steps, best score {best:.4f}, {spent + time.time() - started:.0f} s -> {folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


def new_window():
    return {"nce": 0.0, "ctc": 0.0, "clips": 0, "impossible": 0, "audio_s": 0.0, "started": time.time()}


def log_window(window, cfg, phase, step, total, lr, grad_norm, metrics, writer, bar):
    """One line per interval: losses averaged over the interval, in nats per clip."""
    nce, ctc = (float(window[name]) / window["clips"] for name in ("nce", "ctc"))
    values = {"loss": cfg["loss.contrastive_weight"] * nce + cfg["loss.ctc_weight"] * ctc, "nce": nce, "ctc": ctc,
              "temperature": phase.log_temperature.detach().exp(), "lr": lr, "grad_norm": grad_norm,
              "audio_s_per_s": window["audio_s"] / (time.time() - window["started"]),
              "impossible": window["impossible"]}
    log_metrics(metrics, writer, step, values)
    bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{lr:.1e}")
    tqdm.write(f"{step:6d}/{total} loss {values['loss']:8.4f} nce {nce:7.4f} ctc {ctc:8.4f} lr {lr:.2e} "
               f"norm {float(grad_norm):7.3f} {values['audio_s_per_s']:7.1f} audio s/s")


def print_start(cfg, phase, train, valid, total, device, dtype, world):
    """Everything derived, once, before the first step."""
    hours = np.sum(train.seconds) / 3600
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in phase.named_children()}
    print(f"train {len(train)} clips, {hours:.2f} h an epoch; valid {len(valid)} clips | {total} steps of at most "
          f"{cfg['batch_clips']} clips and {cfg['batch_frames']} frames x {world} x {cfg['optim.accum']}; a clip's "
          f"candidates are those of its batch, over all processes: at most {cfg['batch_clips'] * world}")
    print(f"trainable: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}; frozen: the LLM's embeddings")
    if phase.ctc is not None:
        counts = valid.token_counts()
        known = counts[[token for token in phase.ctc.token_ids.tolist() if token < len(counts)]].sum()
        print(f"CTC over {phase.ctc.blank} tokens and a blank; {counts.sum() - known} of {counts.sum()} valid tokens "
              "have no CTC class, so that it cannot read them")
    print(f"device {device}, autocast {dtype}, torch {torch.__version__}, seed {cfg['seed']}", flush=True)
    if cfg["compile"] and device.type == "cuda":
        print("the first steps take a minute or more: layers are compiled (compile=false turns that off)", flush=True)


if __name__ == "__main__":
    run_main(main, DEFAULTS, __doc__)
