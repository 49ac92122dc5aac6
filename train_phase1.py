"""Stage 1: align the adaptor with the LLM's embedding space, without running the LLM.

    python train_phase1.py configs/phase1.yaml [key=value ...]
    torchrun --nproc_per_node 4 train_phase1.py configs/phase1.yaml
    python train_phase1.py configs/phase1.yaml run.resume=true              # goes on, to the bit

Two losses, each with a weight, on cached encoder outputs:
  InfoNCE  the mean of a clip's adaptor outputs must be nearer to the mean embedding of its own
           transcript than to those of the other clips of the step, and the other way round;
           learnable temperature; clips with equal transcripts are not each other's negatives; under
           torchrun the other clips are those of all processes, accumulation adds none.
  CTC      every adaptor position is scored against the LLM's own token embeddings and a blank.
           InfoNCE says what is in the clip, CTC also in which order.

Input   the cache of precompute.py, manifests with the same keys, the LLM's embedding table
Output  run.dir/adaptor_cached.pt, ctc_head.pt   plain state dicts, best on valid
        run.dir/config.json                      encoder, LLM and adaptor that they belong to
        run.dir/last.pt to resume; metrics.jsonl and TensorBoard events
Papers  InfoNCE arXiv:1807.03748, as in CLIP arXiv:2103.00020; CTC Graves et al. 2006
Logged  loss (weighted sum), nce and ctc (nats per clip), impossible (clips with more CTC labels
        than positions), r1_a2t, r1_t2a, r5_... (share of valid clips whose own text is the nearest,
        or among the 5 nearest), ctc_wer or ctc_cer (of CTC's greedy read-out), valid_loss, lr,
        grad_norm (mean), temperature, audio_s_per_s
"""

import contextlib
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = """
cache:
  dir: ???               # made by precompute.py
data:
  train: ???             # manifests, commas between; one that is named twice counts twice
  valid: ???
  speed: [1.0]           # copies of train to use, of those that precompute.py has made
  normalize: true        # train on normalised text (lower case, no punctuation), as scoring does
  strip_tags: false      # take tags such as <|zh|> out of targets
  cache_dir: ""          # of tokenised manifests; empty: beside run.dir
llm:
  name: ???              # only its embedding table and tokenizer are read
adaptor:
  dropout: 0.1
  hidden_dim: 2048
  num_layers: 4
  num_heads: 8
  stack: 1               # encoder frames of an LLM position
  pre_norm: false
loss:
  contrastive_weight: 1.0
  ctc_weight: 0.0
  temperature: 0.07      # where it starts
augment:                 # of the cached encoder outputs
  time_masks: 0          # spans of frames set to zero, per clip
  time_mask_frames: 12   # longest span
  feature_noise: 0.0     # standard deviation
batch_clips: 256         # at most, per process: InfoNCE's candidates, times the processes
batch_frames: 40000      # encoder frames of a batch, padding included, per process
optim:
  lr: 1e-4               # peak
  weight_decay: 0.01     # on matrices, not on norms and biases
  warmup_steps: 500
  schedule: cosine       # cosine (to 0) or constant, after the warm-up
  clip: 1.0              # of the gradient's norm; 0: off
  accum: 1               # batches of a step, per process
  epochs: 10
  max_steps: 0           # > 0: exactly so many, whatever epochs says
run:
  dir: ???
  resume: false
  save_every: 500        # steps; 0: never, as of the next two
  valid_every: 500
  log_every: 50
  valid_clips: 2000      # of valid that are scored, spread over it
workers: 2               # processes that read the cache
seed: 0
compile: true            # on a GPU: torch.compile of the adaptor's layers
device: auto
dtype: auto              # of autocast; trainable weights are fp32 always
"""


# ---- data -------------------------------------------------------------------


@dataclass
class Batch:
    enc: torch.Tensor  # (B, T, W) encoder outputs, zeros where padded
    lens: torch.Tensor  # (B,)
    rows: dict  # lists of B: ids (of the transcript), target, seconds
    texts: list  # ids of the transcripts of all processes, this process's from `first` on
    first: int
    sizes: list  # clips of each process
    epoch: int
    used: int  # groups of the epoch that are then behind us

    def pin_memory(self):
        self.enc = self.enc.pin_memory()
        return self


class Clips(torch.utils.data.Dataset):
    """(epoch, number, group of model.length_batches) -> Batch of this process."""

    def __init__(self, rows, cache, rank, seed, augment=None):
        self.rows, self.cache, self.rank, self.seed = rows, cache, rank, seed
        self.augment = augment

    def __getitem__(self, place):
        epoch, number, group = place
        mine = group[self.rank]
        rows = self.rows[mine]
        frames = list(map(self.cache.read, rows["shard"], rows["number"]))  # each (T, W) fp16
        if self.augment is not None:
            seeds = [[self.seed, epoch, clip] for clip in mine]
            frames = [augment(x, self.augment, s) for x, s in zip(frames, seeds, strict=True)]
        sizes = [len(batch) for batch in group]
        return Batch(
            enc=pad_sequence(frames, batch_first=True).float(),
            lens=torch.tensor([len(x) for x in frames]), rows=rows, epoch=epoch, used=number + 1,
            texts=[ids for batch in group for ids in self.rows[batch]["ids"]], sizes=sizes,
            first=sum(sizes[: self.rank]),
        )  # fmt: skip


def augment(frames, settings, seed):
    """Time masks and noise on encoder outputs (T, W): a function of seed, epoch and clip."""
    rng, frames = np.random.default_rng(seed), frames.float().clone()
    for _ in range(settings.time_masks):
        width = min(int(rng.integers(0, settings.time_mask_frames + 1)), len(frames) // 4)
        first = int(rng.integers(0, len(frames) - width + 1))
        frames[first : first + width] = 0.0
    if settings.feature_noise:
        noise = rng.standard_normal(frames.shape, dtype=np.float32)
        frames += settings.feature_noise * torch.from_numpy(noise)
    return frames


# ---- model and losses -------------------------------------------------------


class Phase1(nn.Module):
    """Adaptor, CTC head (or None) and temperature, on the LLM's frozen embeddings table (V, D)."""

    def __init__(self, adaptor, ctc, table, tokenizer, cfg):
        super().__init__()
        self.adaptor, self.ctc, self.table, self.tokenizer = adaptor, ctc, table, tokenizer
        self.log_temperature = nn.Parameter(torch.tensor(math.log(cfg.loss.temperature)))

    def pool(self, enc, lens):
        """emb (B, S, D), lens, and the unit vector (B, D) of each clip's mean."""
        emb, lens = self.adaptor(enc, lens)
        return emb, lens, F.normalize(emb.float().sum(1), dim=-1)  # of the sum, as of the mean

    def forward(self, enc, batch):
        """Sums over this process's clips: InfoNCE and CTC (nats); clips that CTC leaves out."""
        emb, lens, audio = self.pool(enc, batch.lens)
        with torch.autocast(emb.device.type, enabled=False):  # bf16 cosines are off by 0.002
            temperature = self.log_temperature.exp()
            texts = pool_texts(batch.texts, self.table)
            everyone = gather_rows(audio, batch.sizes)
            nce = info_nce(audio, everyone, *texts, batch.first, temperature)
        ctc, impossible = nce.detach() * 0.0, 0
        if self.ctc is not None:
            classes = [self.ctc.classes(row) for row in batch.rows["ids"]]
            ctc, impossible = model.ctc_loss(self.ctc(emb), lens, classes, self.ctc.blank)
        temperature = temperature.detach()
        return {"nce": nce, "ctc": ctc, "impossible": impossible, "temperature": temperature}


def gather_rows(x, sizes):
    """Rows (B_r, D) of all processes; gradients flow back to where a row came from."""
    if len(sizes) == 1:
        return x
    padded = F.pad(x, (0, 0, 0, max(sizes) - len(x)))
    parts = torch.distributed.nn.functional.all_gather(padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def info_nce(audio, all_audio, text, text_ids, first, temperature):
    """Symmetric InfoNCE of this process's clips against those of all processes, summed, in nats.

    Input   audio (B, D), all_audio and text (B_all, D) unit vectors; text_ids (B_all,), equal for
            equal transcripts, which are taken out of each other's denominators; first: where this
            process's clips begin among all.
    """
    own = first + torch.arange(len(audio), device=audio.device)
    same = text_ids[own][:, None] == text_ids
    same = same.scatter(1, own[:, None], False)
    to_text = (audio @ text.T / temperature).masked_fill(same, -torch.inf)
    to_audio = (text[own] @ all_audio.T / temperature).masked_fill(same, -torch.inf)
    losses = [F.cross_entropy(scores, own, reduction="sum") for scores in (to_text, to_audio)]
    return sum(losses) / 2


def pool_texts(ids, table):
    """Unit vectors (B, D) of the mean embeddings of transcripts, and a number for each text."""
    flat = torch.tensor([token for row in ids for token in row])
    starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
    text_ids = torch.tensor([hash(tuple(row)) for row in ids])
    on_cpu = (flat, starts, text_ids)
    flat, starts, text_ids = (x.to(table.device, non_blocking=True) for x in on_cpu)
    return F.normalize(F.embedding_bag(flat, table, starts, mode="mean"), dim=-1), text_ids


def load_embedding(name):
    """The LLM's input embedding table (V, D) fp32 and its tokenizer, without loading the LLM."""
    from safetensors import safe_open

    folder, tensor, file = model.find_model(name), "model.embed_tokens.weight", "model.safetensors"
    if (index := folder / f"{file}.index.json").is_file():  # large models come in several files
        file = json.loads(index.read_text())["weight_map"][tensor]
    if not (folder / file).is_file():
        raise model.UserError(f"{folder}: has no {file}; only safetensors are read")
    with model.loading(folder), safe_open(folder / file, "pt") as weights:
        return weights.get_tensor(tensor).float(), model.load_tokenizer(folder)


def learning_rate(step, total, optim):
    """Linear warm-up, then cosine to 0, or constant."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * done))


# ---- validation -------------------------------------------------------------


@torch.no_grad()
def validate(phase, rows, cache, cfg, device, amp, rank, world):
    """Scores over clips of valid, which the processes share; [error rate, loss], of which the least
    is the best; read-outs [(target, CTC's text)]."""
    phase.eval()
    chosen = np.unique(np.linspace(0, len(rows) - 1, cfg.run.valid_clips).astype(int))
    order = chosen[np.argsort(np.asarray(rows["frames"])[chosen])][rank::world]  # little padding
    found = []
    for first in range(0, len(order), 64):
        batch = Clips(rows, cache, 0, 0)[0, 0, [order[first : first + 64].tolist()]]
        enc, ids = batch.enc.to(device), batch.rows["ids"]
        with amp:
            emb, lens, audio = phase.pool(enc, batch.lens)
        losses, read = [0.0] * len(enc), [""] * len(enc)
        if phase.ctc is not None:
            log_probs = phase.ctc(emb)
            each = zip(log_probs.split(1), lens.split(1), map(phase.ctc.classes, ids), strict=True)
            losses = [float(model.ctc_loss(x, n, [t], phase.ctc.blank)[0]) for x, n, t in each]
            paths = model.ctc_paths(log_probs.argmax(-1), lens, phase.ctc.blank)
            read = phase.tokenizer.batch_decode([phase.ctc.tokens(path) for path in paths])
        found += zip(batch.rows["target"], read, ids, losses, audio.cpu(), strict=True)
    parts = [found] * world
    if world > 1:
        dist.all_gather_object(parts, found)
    phase.train()
    targets, read, ids, losses, audio = zip(*(row for part in parts for row in part), strict=True)
    (text, text_ids), audio = pool_texts(ids, phase.table.cpu()), torch.stack(audio)
    temperature = phase.log_temperature.detach().exp().cpu()
    nce = float(info_nce(audio, audio, text, text_ids, 0, temperature)) / len(ids)
    ctc = sum(losses) / len(losses)
    scores = {"valid_loss": cfg.loss.contrastive_weight * nce + cfg.loss.ctc_weight * ctc}
    for way, matrix in (("a2t", audio @ text.T), ("t2a", text @ audio.T)):
        for k in (1, 5):
            nearest = matrix.topk(min(k, len(matrix)), dim=1).indices  # (N, k)
            right = (text_ids[nearest] == text_ids[:, None]).any(1)
            scores[f"r{k}_{way}"] = float(right.float().mean())
    error = 1 - scores["r1_a2t"]
    if phase.ctc is not None:
        score = model.error_rate(targets, read)
        error = scores[f"ctc_{score['name']}"] = score["rate"]
    return scores, [error, scores["valid_loss"]], list(zip(targets, read, strict=True))


# ---- the run ----------------------------------------------------------------


def check(cfg):
    model.one_of(("cosine", "constant"), cfg, "optim.schedule")
    model.at_least(1, cfg, "batch_clips", "batch_frames", "optim.accum", "run.valid_clips")
    model.at_least(0, cfg, "run.save_every", "run.valid_every", "run.log_every", "workers")
    model.at_least(0, cfg, "optim.clip", "optim.warmup_steps", "augment.time_masks")
    model.at_least(1e-3, cfg, "loss.temperature")


def build(cfg, table, tokenizer, train, width, state):
    """Phase1 from the start, or with the classes of CTC that `state` was trained with."""
    rms = model.embedding_rms(table)
    adaptor = model.AudioAdaptor(width, table.shape[1], **cfg.adaptor, embedding_rms=rms)
    ctc = None
    if cfg.loss.ctc_weight:  # over the tokens of the training transcripts
        ids = train.data.column("ids").combine_chunks().flatten().to_numpy()
        tokens = state["trained"]["ctc.token_ids"] if state else np.unique(ids)
        ctc = model.CTCHead(table, tokens)
    return Phase1(adaptor, ctc, table, tokenizer, cfg).to(table.device)


def main(cfg):
    check(cfg)
    device, dtype, rank, world = model.start(cfg.device, cfg.dtype)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder, cache = Path(cfg.run.dir), model.EncoderCache(cfg.cache.dir)
    torch.manual_seed(cfg.seed)
    table, tokenizer = load_embedding(cfg.llm.name)
    weights = model.hash_tensors({"embed": table.bfloat16()})
    identity = {"encoder": cache.encoder, "llm": {"name": cfg.llm.name, "weights": weights}}
    settings = identity["adaptor"] = {key: v for key, v in cfg.adaptor.items() if key != "dropout"}
    state = model.open_run(folder, cfg, identity, cfg.run.resume, rank, world)
    rest = [cache, tokenizer, cfg.data.cache_dir or folder.parent / "manifests"]
    rest += [cfg.data.normalize, cfg.data.strip_tags]
    train = model.cached_clips(cfg.data.train, *rest, cfg.data.speed)
    valid = model.cached_clips(cfg.data.valid, *rest)

    phase = build(cfg, table.to(device), tokenizer, train, cache.encoder["width"], state)
    if cfg.compile and device.type == "cuda":
        for layer in phase.adaptor.transformer.layers if settings["num_layers"] else ():
            layer.forward = torch.compile(layer.forward, dynamic=True)  # torch's own: by forward
    wrapped = phase
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(phase, broadcast_buffers=False)
    trained = {name: p for name, p in phase.named_parameters() if p.requires_grad}
    matrices = {"params": [p for p in trained.values() if p.ndim > 1]}
    vectors = {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0}
    optim = {"lr": cfg.optim.lr, "betas": (0.9, 0.98), "weight_decay": cfg.optim.weight_decay}
    optimizer = torch.optim.AdamW([matrices, vectors], **optim, fused=True)
    step, epoch, used, best, spent = 0, 0, 0, [math.inf, math.inf], 0.0
    if state:
        missing, unknown = phase.load_state_dict(state["trained"], strict=False)
        if unknown or set(missing) & set(trained):
            raise model.UserError(f"{folder}/last.pt does not fit this configuration")
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, used = state["step"], state["epoch"], state["used"]
        best, spent = state["best"], state["spent"]

    lengths = np.asarray(train["frames"])
    budget = cfg.batch_frames

    def groups_of(epoch):
        return model.length_batches(lengths, budget, world, cfg.seed, epoch, cfg.batch_clips)

    total = cfg.optim.max_steps or cfg.optim.epochs * len(groups_of(0)) // cfg.optim.accum
    loader = iter(torch.utils.data.DataLoader(
        Clips(train, cache, rank, cfg.seed, cfg.augment), batch_size=None,
        sampler=model.endless_groups(groups_of, epoch, used), num_workers=cfg.workers,
        pin_memory=device.type == "cuda",
    ))  # fmt: skip
    writer = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    if rank == 0:
        count = sum(p.numel() for p in trained.values())
        print(
            f"train {len(train)} clips, {sum(train['seconds']) / 3600:.2f} h an epoch, valid "
            f"{len(valid)} | {total} steps of at most {cfg.batch_clips} clips and {budget} padded "
            f"positions x {world} x {cfg.optim.accum} | {count:,} trainable | {device} {dtype}, "
            f"torch {torch.__version__}, seed {cfg.seed}", flush=True,
        )  # fmt: skip
    phase.train()
    started = since = time.time()
    window = Counter()  # sums since the last log
    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    while step < total:
        torch.manual_seed(cfg.seed * 1_000_003 + step * world + rank)  # dropout: by the step alone
        lr = learning_rate(step, total, cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [next(loader) for _ in range(cfg.optim.accum)]
        clips = sum(sum(batch.sizes) for batch in batches)  # of the step, of all processes
        for batch in batches:
            waits = world > 1 and batch is not batches[-1]  # gradients are summed in the last one
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                with amp:
                    sums = wrapped(batch.enc.to(device, non_blocking=True), batch)
                loss = cfg.loss.contrastive_weight * sums["nce"] + cfg.loss.ctc_weight * sums["ctc"]
                (loss / clips * world).backward()  # DDP averages over processes; we want the sum
            window.update(sums | {"nce": sums["nce"].detach(), "ctc": sums["ctc"].detach()})
            window.update(clips=len(batch.lens), audio_s=sum(batch.rows["seconds"]))
        norm = nn.utils.clip_grad_norm_(trained.values(), cfg.optim.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        phase.log_temperature.data.clamp_(math.log(0.01), 0.0)  # as in CLIP: unstable below
        step, epoch, used = step + 1, batch.epoch, batch.used
        window.update(steps=1, grad_norm=norm)
        bar.update()

        if model.due(step, cfg.run.log_every, total):
            row = window_row(window, cfg, lr, time.time() - since)
            model.log_metrics(folder, writer, step, row)
            window, since = Counter(), time.time()
        if model.due(step, cfg.run.valid_every, total):
            scores, score, found = validate(phase, valid, cache, cfg, device, amp, rank, world)
            model.log_metrics(folder, writer, step, scores)
            if rank == 0:
                for target, text, *_ in found[:: max(1, len(found) // 2)]:
                    tqdm.write(f"    said {target!r}, heard {text.strip()!r}")
                if score < best:
                    save_results(phase, cfg, folder, identity)
            best = min(best, score)
        if rank == 0 and model.due(step, cfg.run.save_every, total):
            model.check_gradient(norm, step)
            kept = {*trained, "ctc.token_ids"}
            weights = {name: w for name, w in phase.state_dict().items() if name in kept}
            state = {"format": model.FORMAT, "world": world, "identity": identity, "best": best}
            state |= {"step": step, "epoch": epoch, "used": used, "trained": weights}
            state |= {"optimizer": optimizer.state_dict(), "config": OmegaConf.to_container(cfg)}
            model.save(folder / "last.pt", state | {"spent": spent + time.time() - started})
    bar.close()
    if rank == 0:
        seconds = spent + time.time() - started
        print(f"done: {step} steps, best {best[0]:.4f}, {seconds:.0f} s -> {folder}")


def window_row(window, cfg, lr, seconds):
    """Averages since the last log, of process 0."""
    nce, ctc = float(window["nce"]) / window["clips"], float(window["ctc"]) / window["clips"]
    loss = cfg.loss.contrastive_weight * nce + cfg.loss.ctc_weight * ctc
    row = {"loss": loss, "nce": nce, "ctc": ctc, "impossible": window["impossible"], "lr": lr}
    row |= {"grad_norm": float(window["grad_norm"]) / window["steps"]}
    row |= {"temperature": float(window["temperature"]) / window["steps"] / cfg.optim.accum}
    return row | {"audio_s_per_s": window["audio_s"] / seconds}


def save_results(phase, cfg, folder, identity):
    """Plain state dicts, and config.json: what they belong to."""
    model.save(folder / "adaptor_cached.pt", phase.adaptor.state_dict())
    if phase.ctc is not None:
        model.save(folder / "ctc_head.pt", phase.ctc.state_dict())
    content = {"format": model.FORMAT, "script": "train_phase1"}
    model.save(folder / "config.json", content | identity)


if __name__ == "__main__":
    model.run_main(main, DEFAULTS, __doc__, "batch_frames")
