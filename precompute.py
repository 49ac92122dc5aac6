"""Stage 0: run the frozen encoder once over every clip, so that training never waits for audio.

    python precompute.py configs/precompute.yaml [key=value ...]
    torchrun --nproc_per_node 4 precompute.py configs/precompute.yaml      # GPUs share the work

Input   manifests (data.train, data.valid, data.test; several with commas between)
Output  cache.dir/shard-00000.safetensors   the encoder's output of each clip, (T, W) fp16, under a
                                            number; keys, frames and seconds in the metadata
        cache.dir/cache.json                the encoder's identity: hash of its weights, front end
        cache.dir/dropped.jsonl             every clip that could not be used, with the reason
A shard is written whole or not at all. The same command goes on after a kill, to the same bytes;
later it encodes what is new, and again the shards of files whose path, size or time have changed.

Cost    2 bytes x W a frame: SenseVoice's 512 x 16.7 Hz make 11 GB of AISHELL-1's 178 h. On a GPU
        the processes that read audio are the limit: docs/speed.md.
"""

import functools
import itertools
import json
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model

DEFAULTS = """
data:
  train: ""            # manifests: .jsonl, Kaldi folder, data_aishell:train; commas between
  valid: ""
  test: ""
  perturb: ""          # manifests of train that data.speed applies to; empty: all of them
  speed: [1.0]         # training clips are cached once per factor; keys get "@0.9"
  channel: mix         # of a recording whose row names none: mix, 0 or 1
  min_s: 0.1           # clips shorter or longer are left out and counted
  max_s: 40.0
  max_dropped: 100     # stop when more clips than this cannot be used
encoder:
  name: ???            # hub name or folder
  language: auto       # SenseVoice: auto, zh, en, yue, ja, ko
  text_norm: woitn     # SenseVoice: woitn or withitn
  keep_query_frames: false  # SenseVoice: keep its 4 query frames, for the published adaptor
  pad_to_30s: false    # Whisper: pad as in its training, instead of clip length
cache:
  dir: ???
  shard_clips: 2048    # clips of a file; a killed run repeats one file per process
batch_s: 240.0         # padded seconds of audio in an encoder batch
workers: 2             # processes that read audio and compute features
seed: 0                # of the dither, with each clip's key
device: auto           # auto, cpu, cuda
dtype: auto            # auto: bf16 on a GPU, fp32 on a CPU
"""
MESSAGE = 32  # clips that a worker hands over at once: each message takes its time


# ---- what is to be encoded --------------------------------------------------


@dataclass
class Clip:
    key: str
    stamp: str  # of the file: another path, size or time is another clip
    manifest: int
    row: int
    speed: float


def list_clips(cfg):
    """Manifests (data sets), and the clips of all of them: training clips once per speed."""
    manifests, clips, file_stamp = [], {}, functools.cache(model.file_stamp)
    perturbed = model.as_list(cfg.data.perturb) or model.as_list(cfg.data.train)
    for part in ("train", "valid", "test"):
        for spec in model.as_list(cfg.data[part]):
            rows = model.read_manifest(spec, Path(cfg.cache.dir) / "manifests")
            speeds = cfg.data.speed if part == "train" and spec in perturbed else [1.0]
            names = ("key", "source", "start", "end", "channel")
            columns = zip(*(rows[name] for name in names), strict=True)
            for row, (key, source, *place) in enumerate(columns):
                stamp = f"{rows._fingerprint}-{row}"  # where a table holds the audio
                if source:
                    place = [place] if any(place) else []  # part and channel of the recording
                    stamp = model.hash_text([*file_stamp(source), *place])
                for speed in speeds:
                    name = key if speed == 1.0 else f"{key}@{speed}"
                    clip = Clip(name, stamp, len(manifests), row, speed)
                    if clips.setdefault(name, clip).stamp != stamp:
                        raise model.UserError(f"{spec}: {key} stands for another file elsewhere")
            manifests.append(rows)
    if not clips:
        raise model.UserError("nothing to encode: give data.train, data.valid or data.test")
    return manifests, list(clips.values())


def read_index(path):
    """Rows [key, stamp, ...] of the clips in a shard, and of those left out of it."""
    about = model.open_shard(path).metadata() or {}
    if "rows" not in about:
        raise model.UserError(f"{path}: made by an earlier layout; give another cache.dir")
    rows = json.loads(about["rows"])
    return rows["clips"], rows["dropped"]


def read_stamps(folder):
    """{path of a shard: {key: stamp}} of all that has been done."""
    paths = sorted(folder.glob("shard-*.safetensors"))
    return {path: {row[0]: row[1] for rows in read_index(path) for row in rows} for path in paths}


def remove_stale(clips, folder):
    """Delete shards that hold a clip whose file has changed: all of theirs are encoded again."""
    wanted = {clip.key: clip.stamp for clip in clips}
    for path, stamps in read_stamps(folder).items():
        stale = [key for key, stamp in stamps.items() if wanted.get(key, stamp) != stamp]
        if stale:
            print(f"{path.name}: {stale[0]} has changed, the shard is made again")
            path.unlink()


def plan_shards(clips, folder, size):
    """{path: its clips} of what no shard holds yet, under the first free numbers."""
    done = read_stamps(folder)
    keys = {key for stamps in done.values() for key in stamps}
    pending = [clip for clip in clips if clip.key not in keys]
    paths = (folder / f"shard-{number:05d}.safetensors" for number in itertools.count())
    paths = (path for path in paths if path not in done)
    return {next(paths): pending[at : at + size] for at in range(0, len(pending), size)}


class Clips(torch.utils.data.Dataset):
    """Clip -> (features (T, F) or None, seconds, why it is left out), in a worker process."""

    def __init__(self, clips, manifests, encoder, cfg):
        self.clips, self.manifests, self.encoder, self.cfg = clips, manifests, encoder, cfg

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, number):
        clip, data, rate = self.clips[number], self.cfg.data, self.encoder.sample_rate
        row = self.manifests[clip.manifest][clip.row]
        try:
            wave = model.load_clip(row, rate, data.channel)
            wave = model.change_speed(wave, clip.speed, rate)
            seconds = len(wave) / rate
            if not data.min_s <= seconds <= data.max_s:
                limits = f"{data.min_s:g} to {data.max_s:g}"
                raise model.AudioError(f"{seconds:.2f} s, outside data.min_s..max_s ({limits})")
            feats = self.encoder.features(wave, f"{self.cfg.seed}-{clip.key}")
            return feats.numpy(), seconds, ""  # as an array: a tensor would hold a file descriptor
        except model.AudioError as error:
            return None, 0.0, f"{row.get('source') or row['where']}: {error}"


# ---- encoding ---------------------------------------------------------------


@torch.inference_mode()
def encode(clips, items, encoder, cfg, device, amp):
    """Encode the clips of one shard. Output: tensors by clip, reasons of clips left out."""
    outputs, reasons = {}, {}
    for number, (_, _, reason) in enumerate(items):
        if reason:
            reasons[number] = reason
    order = [number for number in range(len(clips)) if number not in reasons]
    order.sort(key=lambda number: (len(items[number][0]), clips[number].key))  # little padding
    while order:
        longest = 30.0 if cfg.encoder.pad_to_30s else items[order[-1]][1]
        count = max(1, int(cfg.batch_s / longest))
        order, batch = order[:-count], order[-count:]
        feats = [torch.from_numpy(items[number][0]) for number in batch]
        lens = torch.tensor([len(x) for x in feats])
        with amp:
            enc, lens = encoder(pad_sequence(feats, batch_first=True).to(device), lens)
        enc = enc.to(torch.float16).cpu()  # (B, T, W)
        for number, row, length in zip(batch, enc, lens.tolist(), strict=True):
            if not row[:length].isfinite().all():
                reasons[number] = "encoder output is not finite"
            else:
                outputs[number] = row[:length].clone()
    return outputs, reasons


def save_shard(path, clips, items, outputs, reasons):
    """Tensors under their number among the clips that were encoded; all else in the metadata."""
    kept = sorted(outputs)
    rows = [(clips[n].key, clips[n].stamp, len(outputs[n]), round(items[n][1], 3)) for n in kept]
    dropped = [(clips[n].key, clips[n].stamp, reason) for n, reason in sorted(reasons.items())]
    tensors = {str(number): outputs[n] for number, n in enumerate(kept)}
    # one entry: safetensors writes several in an order of its own each time
    metadata = {"rows": json.dumps({"clips": rows, "dropped": dropped})}
    content = safetensors.torch.save(tensors, metadata)
    model.save_atomic(path, lambda file: file.write(content))


def main(cfg):
    started = time.time()
    model.at_least(1, cfg, "cache.shard_clips")
    model.one_of(("mix", "0", "1"), cfg, "data.channel")
    model.at_least(0, cfg, "workers", "data.max_dropped")
    # one process may have all the work left while the others wait for it
    device, dtype, rank, world = model.start(cfg.device, cfg.dtype, timedelta(hours=12))
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder = Path(cfg.cache.dir)
    if rank == 0:
        model.lock_folder(folder)
    manifests, clips = list_clips(cfg)
    encoder = model.freeze(model.load_encoder(**cfg.encoder)).to(device)

    settings = {"seed": cfg.seed, "dtype": str(dtype)}
    settings |= {name: cfg.data[name] for name in ("min_s", "max_s", "channel")}
    identity = {"encoder": encoder.identity, "settings": settings}
    if (folder / "cache.json").exists():
        found = model.EncoderCache(folder).identity
        model.check_identity(found, identity, f"{folder} (give another cache.dir, or delete it)")
    if rank == 0:
        model.save(folder / "cache.json", {"format": model.FORMAT} | identity)
        remove_stale(clips, folder)
    if world > 1:
        dist.barrier()
    shards = plan_shards(clips, folder, cfg.cache.shard_clips)
    if world > 1:
        dist.barrier()  # nobody writes before all have planned the same
    mine = dict(list(shards.items())[rank::world])
    if rank == 0:
        print(
            f"{len(clips)} clips, {sum(map(len, shards.values()))} of them to encode in "
            f"{len(shards)} shards -> {folder} | {cfg.encoder.name}, W={encoder.width}, "
            f"{encoder.frame_ms:g} ms | {device} {dtype} | torch {torch.__version__}", flush=True,
        )  # fmt: skip

    pending = [clip for shard in mine.values() for clip in shard]
    workers = cfg.workers if pending else 0
    starts = itertools.accumulate(map(len, mine.values()), initial=0)
    messages = [
        range(at, min(at + MESSAGE, first + len(shard)))
        for first, shard in zip(starts, mine.values(), strict=False)
        for at in range(first, first + len(shard), MESSAGE)
    ]
    loader = torch.utils.data.DataLoader(
        Clips(pending, manifests, encoder, cfg), batch_sampler=messages, collate_fn=list,
        num_workers=workers, multiprocessing_context="fork" if workers else None,
        # the next shard is read while one is encoded
        prefetch_factor=2 + cfg.cache.shard_clips // MESSAGE // workers if workers else None,
    )  # fmt: skip
    items = itertools.chain.from_iterable(loader)
    bar = tqdm(items, total=len(pending), unit="clip", disable=True if rank else None)
    items, n_dropped, hours = iter(bar), 0, 0.0
    for path, shard in mine.items():
        read = list(itertools.islice(items, len(shard)))
        outputs, reasons = encode(shard, read, encoder, cfg, device, amp)
        save_shard(path, shard, read, outputs, reasons)
        n_dropped, hours = n_dropped + len(reasons), hours + sum(x[1] for x in read) / 3600
        bar.set_postfix_str(f"{hours:.2f} h")
        if n_dropped > cfg.data.max_dropped:
            break
    if world > 1:
        dist.barrier()
    if rank == 0:
        finish(folder, clips, cfg.data.max_dropped, started)


def finish(folder, clips, max_dropped, started):
    """Write dropped.jsonl, say what the cache holds; UserError if too much was left out."""
    wanted, hours, dropped = {clip.key for clip in clips}, 0.0, []
    for path in sorted(folder.glob("shard-*.safetensors")):
        kept, out = read_index(path)
        hours += sum(row[3] for row in kept) / 3600
        dropped += [{"key": key, "reason": reason} for key, _, reason in out if key in wanted]
    model.save(folder / "dropped.jsonl", dropped)
    seconds = time.time() - started
    print(f"{folder}: {hours:.2f} h cached, {len(dropped)} clips left out; {seconds:.0f} s")
    if len(dropped) > max_dropped or len(dropped) == len(clips):
        last = f"{dropped[-1]['key']}: {dropped[-1]['reason']}"
        many = f"{len(dropped)} of {len(clips)} clips cannot be used"
        where = f"the last is {last}; see {folder}/dropped.jsonl"
        raise model.UserError(f"{many}, data.max_dropped={max_dropped}; {where}")


if __name__ == "__main__":
    former = {"adaptor.keep_query_frames": "encoder.keep_query_frames"}
    model.run_main(main, DEFAULTS, __doc__, "batch_s", aliases=former)
