"""Stage 2: teach the adaptor (and optionally LoRA) to make a frozen LLM write what was said.

    python train_phase2.py configs/phase2.yaml [key=value ...]
    torchrun --nproc_per_node 4 train_phase2.py configs/phase2.yaml
    python train_phase2.py configs/phase2.yaml run.resume=true              # goes on, to the bit

Loss    cross-entropy of the transcript and its end-of-turn token through the frozen LLM, summed
        over the label tokens of the step and divided by their number, with logits on label
        positions only; plus loss.ctc_weight x CTC.
            inputs  [system, user: prompt | speech | assistant: | transcript, end of turn]
            labels  [-100                 | -100   | -100       | transcript, end of turn]
Speech  llm.speech=frames: the adaptor's output, one LLM position each `adaptor.stack` frames.
        llm.speech=ctc: one position for each token that CTC hears, the mean of token embeddings
        weighted by its posterior: a few times fewer, and the better choice with little data.

Input   the cache of precompute.py, manifests with the same keys, init.dir of phase 1
Output  run.dir/adaptor_phase2_final.pt, ctc_head.pt   plain state dicts, best on valid
        run.dir/lora/                                  a PEFT folder, where LoRA trains
        run.dir/config.json                            all else that infer.py needs
        run.dir/last.pt to resume; metrics.jsonl and TensorBoard events
Papers  SLAM-ASR arXiv:2402.08846, LoRA arXiv:2106.09685, CTC-compressed speech arXiv:2102.01757
Logged  ce (nats per label token), acc (share of label tokens predicted right, teacher-forced),
        ctc (nats per clip), impossible (clips with more CTC labels than positions), valid_ce,
        valid_acc, wer or cer (of greedy decoding), ctc_wer or ctc_cer (of CTC's read-out), capped
        (valid clips whose answer ran into decode.tokens_per_s), lr, grad_norm (mean), positions
        (of the LLM, per step), audio_s_per_s
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
init:
  dir: ""                # run.dir of phase 1, with its adaptor's settings; empty: random weights
llm:
  name: ???
  prompt: "Transcribe the speech:"
  system: null           # null: the chat template's own system text; "": an empty one
  speech: frames         # frames or ctc
  lora:
    r: 0                 # 0: the LLM stays as it is
    alpha: 16
    dropout: 0.0
    targets: [q_proj, v_proj]
adaptor:
  train: true            # false: only LoRA trains
  dropout: 0.1
  hidden_dim: 2048       # this and what follows: without init.dir
  num_layers: 4
  num_heads: 8
  stack: 1               # encoder frames of an LLM position
  pre_norm: false
loss:
  ctc_weight: 0.0
augment:                 # of the cached encoder outputs
  time_masks: 0          # spans of frames set to zero, per clip
  time_mask_frames: 12   # longest span
  feature_noise: 0.0     # standard deviation
batch_clips: 64          # at most, per process
batch_tokens: 8192       # LLM positions of a batch, padding included, per process
optim:
  lr: 1e-4               # peak
  weight_decay: 0.01     # on matrices, not on norms and biases
  warmup_steps: 500
  schedule: cosine       # cosine (to 0) or constant, after the warm-up
  clip: 0.5              # of the gradient's norm; 0: off
  accum: 1               # batches of a step, per process
  epochs: 3
  max_steps: 0           # > 0: exactly so many, whatever epochs says
decode:
  tokens_per_s: 12.0     # most tokens that an answer has per second of its clip
run:
  dir: ???
  resume: false
  save_every: 500        # steps; 0: never, as of the next two
  valid_every: 500
  log_every: 20
  valid_clips: 200       # of valid that are scored and decoded, spread over it
workers: 2               # processes that read the cache
seed: 0
compile: true            # on a GPU: torch.compile of the LLM's and the adaptor's layers
device: auto
dtype: auto              # of the frozen LLM and autocast; trainable weights are fp32 always
"""


# ---- data -------------------------------------------------------------------


@dataclass
class Batch:
    enc: torch.Tensor  # (B, T, W) encoder outputs, zeros where padded
    lens: torch.Tensor  # (B,)
    rows: dict  # lists of B: ids (of the transcript), target, language, prompt, hotwords, seconds
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
        return Batch(
            enc=pad_sequence(frames, batch_first=True).float(),
            lens=torch.tensor([len(x) for x in frames]), rows=rows, epoch=epoch, used=number + 1,
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


class Phase2(nn.Module):
    """Adaptor, CTC head (or None) and LLM in one module, so that DDP wraps one forward pass."""

    def __init__(self, adaptor, ctc, llm, tokenizer, cfg):
        super().__init__()
        self.adaptor, self.ctc, self.llm, self.tokenizer = adaptor, ctc, llm, tokenizer
        self.cfg, self.stop_id = cfg, model.end_of_turn(tokenizer)

    def prompts(self, rows):
        """(before, after) token ids of each clip, whose own prompt takes the place of ours."""
        texts = [prompt or self.cfg.llm.prompt for prompt in rows["prompt"]]
        rest = zip(texts, rows["language"], rows["hotwords"], strict=True)
        return [model.build_prompt(self.tokenizer, *row, self.cfg.llm.system) for row in rest]

    def hear(self, enc, lens, read_ctc):
        return model.hear(self.adaptor, self.ctc, enc, lens, self.cfg.llm.speech, read_ctc)

    def forward(self, enc, batch):
        """Sums over the batch: CE (nats), right tokens, CTC (nats); clips that CTC leaves out."""
        heard = self.hear(enc, batch.lens, read_ctc=False)
        ids, embed = batch.rows["ids"], self.llm.get_input_embeddings()
        targets = [[*row, self.stop_id] for row in ids]
        speech = (heard.speech, heard.speech_lens)
        spliced = model.splice(embed, self.prompts(batch.rows), *speech, targets)
        ce, _, right = model.transcript_loss(self.llm, spliced)
        ctc, impossible = ce.detach() * 0.0, 0
        if self.cfg.loss.ctc_weight:
            classes = [self.ctc.classes(row) for row in ids]
            ctc, impossible = model.ctc_loss(heard.log_probs, heard.lens, classes, self.ctc.blank)
        return {"ce": ce, "right": right, "ctc": ctc, "impossible": impossible,
                "positions": spliced.labels.numel()}  # fmt: skip


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
    is the best; read-outs [(target, LLM's text, CTC's or None)]."""
    phase.eval()
    chosen = np.unique(np.linspace(0, len(rows) - 1, cfg.run.valid_clips).astype(int))
    order = chosen[np.argsort(np.asarray(rows["frames"])[chosen])][rank::world]  # little padding
    found, sums = [], Counter()
    decode, embed = phase.tokenizer.batch_decode, phase.llm.get_input_embeddings()
    for first in range(0, len(order), 16):
        batch = Clips(rows, cache, 0, 0)[0, 0, [order[first : first + 16].tolist()]]
        enc = batch.enc.to(device)
        with amp, torch.compiler.set_stance("force_eager"):  # not compiled anew for its cache
            losses = phase(enc, batch)
            heard = phase.hear(enc, batch.lens, read_ctc=True)
            speech = (heard.speech, heard.speech_lens)
            spliced = model.splice(embed, phase.prompts(batch.rows), *speech, pad_left=True)
            counts = [len(path) if cfg.llm.speech == "ctc" else None for path in heard.paths or []]
            counts = zip(batch.rows["seconds"], counts or [None] * len(enc), strict=True)
            caps = [model.token_cap(s, cfg.decode.tokens_per_s, n) for s, n in counts]
            answers = model.greedy_decode(phase.llm, spliced, phase.stop_id, caps)
        sums.update(ce=float(losses["ce"]), right=int(losses["right"]))
        sums.update(labels=sum(len(ids) + 1 for ids in batch.rows["ids"]))
        sums.update(capped=sum(len(a) >= cap for a, cap in zip(answers, caps, strict=True)))
        read = [None] * len(enc)
        if heard.paths is not None:
            read = decode([phase.ctc.tokens(path) for path in heard.paths])
        found += zip(batch.rows["target"], decode(answers), read, strict=True)
    parts = [(found, sums)] * world
    if world > 1:
        dist.all_gather_object(parts, (found, sums))
    phase.train()
    found, sums = [row for part, _ in parts for row in part], Counter()
    for _, part in parts:
        sums.update(part)  # a sum of Counters would leave a NaN out
    targets, answers, read = zip(*found, strict=True)
    scores = {"valid_ce": sums["ce"] / sums["labels"], "valid_acc": sums["right"] / sums["labels"]}
    score = model.error_rate(targets, answers)
    scores |= {score["name"]: score["rate"], "capped": sums["capped"]}
    if read[0] is not None:
        scores[f"ctc_{score['name']}"] = model.error_rate(targets, read)["rate"]
    return scores, [score["rate"], scores["valid_ce"]], found


# ---- the run ----------------------------------------------------------------


def check(cfg):
    model.one_of(("cosine", "constant"), cfg, "optim.schedule")
    model.one_of(("frames", "ctc"), cfg, "llm.speech")
    model.at_least(1, cfg, "batch_clips", "batch_tokens", "optim.accum", "run.valid_clips")
    model.at_least(0, cfg, "run.save_every", "run.valid_every", "run.log_every", "workers")
    model.at_least(0, cfg, "optim.clip", "optim.warmup_steps", "augment.time_masks", "llm.lora.r")


def adaptor_settings(cfg, identity):
    """Settings of the adaptor: those of phase 1, or without it those of this configuration."""
    own = {key: v for key, v in cfg.adaptor.items() if key not in ("train", "dropout")}
    if not cfg.init.dir:
        return own
    found = json.loads((Path(cfg.init.dir) / "config.json").read_text(encoding="utf-8"))
    model.check_identity(found, identity, cfg.init.dir)
    default = OmegaConf.create(DEFAULTS).adaptor
    given = {key: value for key, value in own.items() if value != default[key]}
    model.check_identity({"adaptor": found["adaptor"]}, {"adaptor": given}, cfg.init.dir)
    return found["adaptor"]


def build(cfg, llm, tokenizer, train, settings, width, state):
    """Phase2: adaptor and CTC head of phase 1, of `state` (their classes), or new ones."""
    table, first = llm.get_input_embeddings().weight, Path(cfg.init.dir)
    rms = model.embedding_rms(table)
    rest = settings | {"dropout": cfg.adaptor.dropout, "embedding_rms": rms}
    adaptor = model.AudioAdaptor(width, table.shape[1], **rest)
    if cfg.init.dir:
        path = first / "adaptor_cached.pt"
        model.load_weights(adaptor, model.read_weights(path), path)
    ctc, has_head = None, bool(cfg.init.dir) and (first / "ctc_head.pt").is_file()
    if cfg.llm.speech == "ctc" or cfg.loss.ctc_weight:
        if has_head:
            ctc = model.CTCHead.load(first / "ctc_head.pt", table)
        elif not cfg.loss.ctc_weight:
            raise model.UserError("llm.speech=ctc: needs the init.dir of a phase 1 with CTC")
        else:
            ids = train.data.column("ids").combine_chunks().flatten().to_numpy()
            tokens = state["trained"]["ctc.token_ids"] if state else np.unique(ids)
            ctc = model.CTCHead(table, tokens)
    if not cfg.adaptor.train:
        for part in filter(None, (adaptor, ctc)):
            model.freeze(part)
    phase = Phase2(adaptor, ctc, llm, tokenizer, cfg).to(table.device)
    if not any(p.requires_grad for p in phase.parameters()):
        raise model.UserError("nothing trains: set adaptor.train=true or llm.lora.r > 0")
    return phase


def main(cfg):
    check(cfg)
    device, dtype, rank, world = model.start(cfg.device, cfg.dtype)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder, cache, conf = Path(cfg.run.dir), model.EncoderCache(cfg.cache.dir), cfg.llm.lora
    torch.manual_seed(cfg.seed)
    lora = {"r": conf.r, "lora_alpha": conf.alpha, "lora_dropout": conf.dropout}
    lora = lora | {"target_modules": list(conf.targets)} if conf.r else None
    llm, tokenizer = model.load_llm(cfg.llm.name, dtype, device, lora)
    identity = {"encoder": cache.encoder, "llm": llm.identity}
    settings = identity["adaptor"] = adaptor_settings(cfg, identity)
    state = model.open_run(folder, cfg, identity, cfg.run.resume, rank, world)
    rest = [cache, tokenizer, cfg.data.cache_dir or folder.parent / "manifests"]
    rest += [cfg.data.normalize, cfg.data.strip_tags]
    train = model.cached_clips(cfg.data.train, *rest, cfg.data.speed)
    valid = model.cached_clips(cfg.data.valid, *rest)

    phase = build(cfg, llm, tokenizer, train, settings, cache.encoder["width"], state)
    if cfg.compile and device.type == "cuda":
        for layer in llm.model.layers:
            layer.compile(dynamic=True)
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

    prompts = phase.prompts(train.select_columns(["prompt", "language", "hotwords"])[:])
    around = [len(a) + len(b) + len(c) + 1 for (a, b), c in zip(prompts, train["ids"], strict=True)]
    lengths = phase.adaptor.out_lens(np.asarray(train["frames"])) + np.asarray(around)
    budget = cfg.batch_tokens

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
        counts = [[len(ids) + 1 for ids in batch.rows["ids"]] for batch in batches]
        counts = torch.tensor([sum(map(sum, counts)), sum(map(len, counts))]).float()
        counts = counts.to(device, non_blocking=True)
        if world > 1:
            dist.all_reduce(counts)  # label tokens and clips of the step, of all processes
        for batch in batches:
            waits = world > 1 and batch is not batches[-1]  # gradients are summed in the last one
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                with amp:
                    sums = wrapped(batch.enc.to(device, non_blocking=True), batch)
                loss = sums["ce"] / counts[0] + cfg.loss.ctc_weight * sums["ctc"] / counts[1]
                (loss * world).backward()  # DDP averages over processes; we want the sum
            window.update(sums | {"ce": sums["ce"].detach(), "ctc": sums["ctc"].detach()})
            window.update(labels=sum(len(ids) + 1 for ids in batch.rows["ids"]))
            window.update(clips=len(batch.lens), audio_s=sum(batch.rows["seconds"]))
        norm = nn.utils.clip_grad_norm_(trained.values(), cfg.optim.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
    ce, ctc = float(window["ce"]) / window["labels"], float(window["ctc"]) / window["clips"]
    acc = float(window["right"]) / window["labels"]
    row = {"ce": ce, "acc": acc, "ctc": ctc, "impossible": window["impossible"], "lr": lr}
    row |= {"grad_norm": float(window["grad_norm"]) / window["steps"]}
    row |= {"positions": window["positions"] / window["steps"]}
    return row | {"audio_s_per_s": window["audio_s"] / seconds}


def save_results(phase, cfg, folder, identity):
    """Plain state dicts, LoRA as a PEFT folder, and config.json: what infer.py needs."""
    model.save(folder / "adaptor_phase2_final.pt", phase.adaptor.state_dict())
    if phase.ctc is not None:
        model.save(folder / "ctc_head.pt", phase.ctc.state_dict())
    if cfg.llm.lora.r:
        model.save_lora(phase.llm, folder / "lora")
    settings = OmegaConf.to_container(cfg)["llm"] | {"normalize": cfg.data.normalize}
    content = {"format": model.FORMAT, "script": "train_phase2", "settings": settings}
    model.save(folder / "config.json", content | identity)


if __name__ == "__main__":
    model.run_main(main, DEFAULTS, __doc__, "batch_tokens")
