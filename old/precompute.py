"""Stage 0: run the frozen encoder once over every clip and keep its outputs, so that training never waits for audio.

    python precompute.py configs/precompute.yaml [key=value ...]
    torchrun --nproc_per_node 4 precompute.py configs/precompute.yaml        # GPUs share the work

Input   manifests (`data.train`, `data.valid`, `data.test`; several are separated by commas).
Output  cache.dir/shard-00000.npy   fp16 (frames, W), the clips of one shard one after the other, memory-mappable
        cache.dir/shard-00000.json  lists of the clips' keys, first rows, numbers of frames, seconds; clips left out
        cache.dir/cache.json        the encoder's identity (hash of weights, front end), frame_ms, width
        cache.dir/bad.jsonl         every clip that could not be used, with the reason
A shard is written whole or not at all, and what goes into it is a pure function of the manifests, so a run that was
killed at any moment completes to the same bytes when it is started again.

Cost    2 bytes x W a frame: SenseVoice's 512 x 16.7 Hz makes 11 GB of AISHELL-1's 178 h. Never a file per clip.
Source  the field's usual way is a forward hook, one clip at a time and one .pt file each.
"""

import difflib
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

import model

DEFAULTS = {
    "data.train": "",  # manifest(s): .jsonl, Kaldi folder or data_aishell:train; several separated by commas
    "data.valid": "",
    "data.test": "",
    "data.perturb": "",  # manifests that data.speed applies to; empty: all of data.train
    "data.speed": [1.0],  # training clips are cached once per factor; keys get "@0.9" for factors other than 1
    "data.max_bad": 100,  # stop when more clips than this cannot be used
    "data.min_s": 0.1,  # clips shorter or longer than this are left out and counted
    "data.max_s": 40.0,
    "encoder.name": ...,  # hub name or folder
    "encoder.language": "auto",  # SenseVoice: auto, zh, en, yue, ja, ko
    "encoder.text_norm": "woitn",  # SenseVoice: woitn or withitn
    "encoder.pad_to_30s": False,  # Whisper: pad to 30 s as in its training, instead of clip length
    "adaptor.keep_query_frames": False,  # SenseVoice: keep the 4 query frames, for the published adaptor
    "cache.dir": ...,
    "cache.shard_clips": 2048,  # clips per shard; a killed run repeats at most two shards per process
    "batch_s": 240.0,  # padded seconds of audio per encoder batch
    "workers": 2,  # processes that read audio and compute features
    "seed": 0,  # of the dither, with each clip's key
    "device": "auto",  # auto, cpu, cuda
    "dtype": "auto",  # auto: bf16 on a GPU, fp32 on a CPU
}
MESSAGE = 32  # clips that a worker hands over at once: every message takes its time, however little is in it


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


# ---- what is to be encoded --------------------------------------------------------------------------------------


def list_clips(cfg):
    """Rows of all manifests, training rows once per speed, in a fixed order; a key may have one source only."""
    clips = {}
    perturb = [spec.strip() for spec in (cfg["data.perturb"] or cfg["data.train"]).split(",")]
    for part in ("train", "valid", "test"):
        for spec in (spec.strip() for spec in cfg[f"data.{part}"].split(",") if spec.strip()):
            for row in model.iter_manifest(spec):
                for speed in cfg["data.speed"] if part == "train" and spec in perturb else [1.0]:
                    key = row["key"] if speed == 1.0 else f"{row['key']}@{speed}"
                    clip = {"key": key, "source": row["source"], "speed": speed}
                    if clips.setdefault(key, clip) != clip:
                        raise ValueError(f"{spec}: {row['where']}: key {key!r} also names {clips[key]['source']}")
    if not clips:
        raise ValueError("nothing to encode: give data.train, data.valid or data.test")
    return list(clips.values())


class Clips(torch.utils.data.Dataset):
    """clip -> (clip, features or None, seconds, reason): audio and features are made in worker processes."""

    def __init__(self, clips, encoder, cfg):
        self.clips, self.encoder, self.cfg = clips, encoder, cfg

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip, rate, seconds, cfg = self.clips[index], self.encoder.sample_rate, 0.0, self.cfg
        try:
            wave = model.change_speed(model.load_audio(clip["source"], rate), clip["speed"], rate)
            seconds = len(wave) / rate
            if not cfg["data.min_s"] <= seconds <= cfg["data.max_s"]:
                limits = f"{cfg['data.min_s']:g}..{cfg['data.max_s']:g}"
                raise model.AudioError(f"{seconds:.2f} s is outside data.min_s..max_s ({limits})")
            return clip, self.encoder.features(wave, f"{cfg['seed']}-{clip['key']}"), seconds, ""
        except model.AudioError as error:
            return clip, None, seconds, str(error)


def pack(items):
    """A worker's message: (clip, frames, seconds, reason) of each item, and the features of all in one tensor."""
    features = [feats for _, feats, _, reason in items if not reason]
    rows = [(clip, 0 if reason else len(feats), seconds, reason) for clip, feats, seconds, reason in items]
    return rows, torch.cat(features) if features else None


def load_shards(shards, encoder, cfg, device, bar):
    """Features of one shard after the other, while workers make those of the next: yields lists of messages."""
    if not shards:
        return  # no workers for nothing
    starts = np.cumsum([0, *map(len, shards)]).tolist()
    parts = [[range(first, min(first + MESSAGE, end)) for first in range(start, end, MESSAGE)]
             for start, end in zip(starts, starts[1:])]
    loader = iter(torch.utils.data.DataLoader(
        Clips([clip for shard in shards for clip in shard], encoder, cfg), collate_fn=pack,
        batch_sampler=[part for shard in parts for part in shard], num_workers=cfg["workers"],
        prefetch_factor=4 if cfg["workers"] else None,
        multiprocessing_context="fork" if cfg["workers"] else None,  # workers share the encoder's memory
    ))
    for shard in parts:
        messages = []
        for part in shard:
            rows, feats = next(loader)
            if feats is not None:  # a copy in any case: a worker's tensor holds a file descriptor
                feats = feats.clone() if device.type == "cpu" else model.upload(feats, device)
            messages.append((rows, feats))
            bar.update(len(part))
        yield messages


# ---- encoding ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_shard(messages, encoder, cfg, device, dtype):
    """Encode one shard's clips, messages of `pack`. Output: fp16 (frames, W), index rows in that order, bad rows."""
    bad, clips, first = [], [], 0
    for clip, length, seconds, reason in (row for rows, _ in messages for row in rows):
        if reason:
            bad.append({"key": clip["key"], "source": clip["source"], "reason": reason})
        else:
            clips.append((length, clip, seconds, first))
            first += length
    flat = [feats for _, feats in messages if feats is not None]
    flat = torch.cat(flat) if flat else None  # (mel frames of all clips, F), on the device
    messages.clear()  # of what is there twice now
    clips.sort(key=lambda item: (item[0], item[1]["key"]))  # neighbours of like length: little padding
    outputs, index, first = [], [], 0
    while clips:
        batch = [clips.pop()]
        longest = 30.0 if cfg["encoder.pad_to_30s"] else batch[0][2]
        while clips and (len(batch) + 1) * longest <= cfg["batch_s"]:
            batch.append(clips.pop())
        lens, starts = torch.tensor([item[0] for item in batch]), torch.tensor([item[3] for item in batch])
        steps = torch.arange(batch[0][0])
        places = starts[:, None] + torch.minimum(steps, lens[:, None] - 1)  # (B, T)
        feats = flat[model.upload(places, device)]  # (B, T, F)
        feats = feats.masked_fill(~model.length_mask(lens, len(steps), device)[..., None], 0.0)
        with autocast(device, dtype):
            enc, enc_lens = encoder(feats, lens)  # (B, T', W)
        enc = enc.to(torch.float16)
        finite = (enc.isfinite().all(-1) | ~model.length_mask(enc_lens, enc.shape[1], device)).all(1).tolist()
        for row, length, good, (_, clip, seconds, _) in zip(enc.cpu().numpy(), enc_lens.tolist(), finite, batch):
            if not good:
                bad.append({"key": clip["key"], "source": clip["source"], "reason": "encoder output is not finite"})
                continue
            outputs.append(row[:length])
            index.append({"key": clip["key"], "first": first, "frames": length, "seconds": round(seconds, 3)})
            first += length
    frames = np.concatenate(outputs) if outputs else np.zeros((0, encoder.width), np.float16)
    return frames, index, bad


def encode_shards(shards, paths, encoder, cfg, device, dtype, bar):
    """Encode and write shards, each whole or not at all: one in a thread, while the next is loaded.

    paths: of their indices, .json. Yields the bad rows of each.
    """
    def encode(messages, path):
        frames, index, bad = encode_shard(messages, encoder, cfg, device, dtype)
        shard = {name: [clip[name] for clip in index] for name in ("key", "first", "frames", "seconds")} | {"bad": bad}
        write_atomic(path.with_suffix(".npy"), lambda file: np.save(file, frames))
        write_atomic(path, lambda file: file.write(json.dumps(shard).encode()))  # last: marks it done
        return bad

    with ThreadPoolExecutor(1) as pool:
        job = None
        for messages, path in zip(load_shards(shards, encoder, cfg, device, bar), paths):
            if job is not None:
                yield job.result()
            job = pool.submit(encode, messages, path)
        if job is not None:
            yield job.result()


def check_cache(folder, identity):
    """Refuse to add to a cache that was made with another encoder or front end."""
    path = folder / "cache.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if differing := [k for k in identity if k != "encoder.name" and found.get(k) != identity[k]]:
            raise ValueError(
                f"{folder}: this cache was made with another {', '.join(differing)} (there "
                f"{', '.join(f'{k}={found.get(k)}' for k in differing)}); give another cache.dir or delete this one"
            )


def main(cfg):
    started = time.time()
    device, dtype = pick_device(cfg)
    rank, world = rank_and_world()
    clips = list_clips(cfg)
    encoder = model.load_encoder(cfg["encoder.name"], cfg["encoder.language"], cfg["encoder.text_norm"],
                                 cfg["adaptor.keep_query_frames"], cfg["encoder.pad_to_30s"]).to(device)
    size = cfg["cache.shard_clips"]
    shards = [clips[start : start + size] for start in range(0, len(clips), size)]
    identity = {f"encoder.{key}": value for key, value in encoder.identity.items()}
    sizes = [Path(c["source"]).stat().st_size if Path(c["source"]).is_file() else 0 for c in clips]
    listed = model.hash_text([[c["key"], c["speed"], n_bytes] for c, n_bytes in zip(clips, sizes)])
    identity |= {"format": 2, "list of clips": listed, "shard_clips": size, "seed": cfg["seed"], "dtype": str(dtype),
                 "data.min_s": cfg["data.min_s"], "data.max_s": cfg["data.max_s"]}
    folder = Path(cfg["cache.dir"])
    folder.mkdir(parents=True, exist_ok=True)
    check_cache(folder, identity)
    if rank == 0:
        write_atomic(folder / "cache.json", lambda file: file.write(json.dumps(identity, indent=1).encode()))
        print(f"{len(clips)} clips in {len(shards)} shards -> {folder} | {cfg['encoder.name']} W={encoder.width} "
              f"{encoder.frame_ms:g} ms | {device} {dtype} | torch {torch.__version__}", flush=True)
    if dtype == torch.bfloat16:
        model.store_bf16(encoder)
    paths = {number: folder / f"shard-{number:05d}.json" for number in range(rank, len(shards), world)}
    wanted = [number for number, path in paths.items() if not path.is_file()]
    done = [json.loads(path.read_text(encoding="utf-8"))["bad"] for path in paths.values() if path.is_file()]
    bar = tqdm(total=sum(len(shards[number]) for number in wanted), unit="clip", disable=rank != 0 or None)
    n_bad, encoded = 0, encode_shards([shards[number] for number in wanted], [paths[number] for number in wanted],
                                      encoder, cfg, device, dtype, bar)
    for bad in itertools.chain(done, encoded):
        n_bad += len(bad)
        if n_bad > cfg["data.max_bad"]:
            write_bad(folder, len(shards))
            raise ValueError(f"{n_bad} clips cannot be used, more than data.max_bad={cfg['data.max_bad']}; "
                             f"the last is {bad[-1]['key']}: {bad[-1]['reason']}")
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        finish(folder, len(shards), started)
    if dist.is_initialized():
        dist.destroy_process_group()


def write_bad(folder, n_shards):
    """bad.jsonl from the shards that are there. Output: their indices, and all bad rows."""
    paths = [folder / f"shard-{number:05d}.json" for number in range(n_shards)]
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    bad = [row for part in parts for row in part["bad"]]
    write_atomic(folder / "bad.jsonl", lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in bad))
    return parts, bad


def finish(folder, n_shards, started):
    """Write bad.jsonl and say what the cache holds."""
    parts, bad = write_bad(folder, n_shards)
    hours = sum(sum(part["seconds"]) for part in parts) / 3600
    seconds = time.time() - started
    count, frames = sum(len(part["key"]) for part in parts), sum(sum(part["frames"]) for part in parts)
    print(f"cached {count} clips, {hours:.2f} h, {frames} frames; {len(bad)} left out (bad.jsonl); {seconds:.0f} s, "
          f"{hours * 3600 / seconds:.0f} audio s per s")
    for row in bad[:5]:
        print(f"  left out: {row['key']}: {row['reason']}")


if __name__ == "__main__":
    run_main(main, DEFAULTS, __doc__)
