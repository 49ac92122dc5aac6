"""SteerMoE: steer a frozen speech encoder, layer by layer, until a frozen LLM can read it.

    python train_steermoe.py configs/steermoe/layer_wise_whisper_qwen7b_libri_train.yaml
    python train_steermoe.py configs/steermoe/layer_wise_whisper_qwen7b_libri_test.yaml
    torchrun --nproc_per_node 4 train_steermoe.py CONFIG.yaml [key=value ...]
    python train_steermoe.py CONFIG.yaml resume=true                   # goes on, to the bit
    deepspeed --num_gpus 4 train_steermoe.py --config CONFIG.yaml --deepspeed_config ZERO.json

Model   after every encoder layer l: h + s_l * softmax(router_l(h)) @ V_l; then pooling and one
        Linear. Only V, router, s and Linear train: 5.2 M for Whisper-large-v3 and Qwen2.5-7B.
        steering: null is the linear ablation, adaptor=stack the SLAM-ASR bridge, a strong baseline.
Loss    cross-entropy of the text and its end-of-turn token, summed over the label tokens of the
        step, of all processes, and divided by their number.
            inputs  [system, user: prompt | speech | assistant: | text, end of turn]
            labels  [-100                 | -100   | -100       | text, end of turn]

Input   parquet_dirs, eval_dirs: folders of Parquet files or of save_to_disk, or manifests
Output  training.output_dir/steermoe.pt, config.json   what trains, as a plain state dict, best on
        eval_dirs, and all else that infer.py needs; last.pt to resume; metrics.jsonl, TensorBoard
        events, steering.jsonl, gates.png; dropped.jsonl, clips left out; test.jsonl, test.json
Papers  SteerMoE arXiv:2510.13558 (departures: docs/steermoe.md), SLAM-ASR arXiv:2402.08846
Logged  ce (nats per label token), acc (share of label tokens predicted right, teacher-forced),
        eval_ce, eval_acc, wer, cer and wer_raw, cer_raw (as written), error_rate (WER, CER for
        Chinese; task=qa: 1 - exact_match), capped (answers cut at tokens_per_s), eval_dropped,
        lr_*, grad_norm and grad_norm_steering (means, before clipping), scale (of fp16's loss),
        positions (of the LLM, per step), audio_s_per_s. steering.jsonl, of each layer: scale, norm
        of each V_e, mean gate of each expert, entropy of the gates (nats), top (share of frames
        whose highest gate is that of the layer's favourite)
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = """
mode: train              # train, or test: score output_dir/steermoe.pt on all of parquet_dirs
task: asr                # asr, or qa: a clip's question follows the prompt; scored by exact match
whisper_encoder: {model_path: "", feature_dim: 0, num_layers: 0}    # or the next; a hub name or
conformer_encoder: {model_path: "", feature_dim: 0, num_layers: 0}  # folder; 0: unchecked
llm_decoder:
  model_name: ???
  max_length: 512        # most LLM positions of a training clip: prompt, speech and text
  use_cache: true        # decoding keeps a key-value cache, with false too
steering:                # `steering: null`: none, the linear ablation
  num_experts: 8
  steering_scale: 0.1
  use_layer_scales: true # false: all scales stay steering_scale
  use_gradient_clipping: true
  steering_gradient_clip: 1.0   # of the norm of V, router and scales together
training:
  output_dir: ???
  logging_dir: ""        # of TensorBoard; empty: output_dir
  batch_size: 4          # clips, per process
  epochs: 10
  learning_rate: 1e-4    # of the projection; all rates are peaks
  steering_learning_rate: 1e-2  # of V
  router_learning_rate: 1e-3    # of router and layer scales
  weight_decay: 0.01     # on the matrices of router and projection
  warmup_steps: 1000     # then cosine to 0
  gradient_clipping: 1.0 # of the norm of all gradients; 0: off
  fp16: true             # half precision; bf16 for Qwen, which overflows in fp16
  use_deepspeed: true    # where deepspeed_config is given; else PyTorch's DDP
  gradient_checkpointing: false # compute layers twice: less memory, a third slower
parquet_dirs: ???        # data sets: Parquet, save_to_disk, manifests
eval_dirs: []            # empty: no evaluation, steermoe.pt is the last
audio_column: audio      # of Parquet and save_to_disk; manifests have names of their own
text_column: text
question_column: question
sample_rate: 16000       # of the encoder, checked; audio of any rate is resampled
max_audio_length: 30.0   # seconds
max_text_length: 448     # tokens
filter_dataset: true     # leave training clips out that are over one of the three limits
normalize_text: true     # train on lower case without punctuation
strip_tags: false        # take tags such as <|zh|> out of targets
textual_prompt: "please transcribe the audio content into text: "
system_prompt: null      # null: the chat template's own; "": an empty one
adaptor: linear          # linear, or stack: stack_frames frames -> Linear -> GELU -> Linear
stack_frames: 5
stack_hidden: 2048
max_prompt_tokens: 2048  # speech positions; what is longer is cut
use_adapter: true        # false: no projection, for an LLM as wide as the encoder
pooling_kernel_size: 4   # frames; 1: no pooling
pooling_position: 0      # behind the last layer: 0, or its number
pooling_type: avg        # avg or max
pad_to_30s: false        # Whisper: pad clips as in its training, at up to 10 times the cost
max_steps: 0             # > 0: exactly so many, whatever epochs says
logging_steps: 100       # 0: at the end only, as of the next two
eval_steps: 1000
save_steps: 1000
save_total_limit: 2      # copies step-N.pt of last.pt that are kept; 0: last.pt alone
eval_batch_size: 16
eval_clips: 500          # of eval_dirs that are scored and decoded, spread over it; 0: all
tokens_per_s: 12.0       # most tokens that an answer has per second of its clip
log_steering_analysis: true    # steering.jsonl and plots
steering_log_interval: 100
clip_steering_gradients: true  # false, or steering.use_gradient_clipping: no clip of its own
use_early_stopping: true       # where eval_dirs is given
early_stopping_patience: 3     # evaluations without a better one
max_dropped: 100         # stop when more clips than this cannot be read
deepspeed_config: ""     # also --deepspeed_config FILE
cache_dir: ""            # of tokens and durations; empty: beside output_dir
workers: 2               # processes that read audio and compute features
resume: false
seed: 0
device: auto
"""
RATES = "steering_learning_rate", "router_learning_rate"  # the guide has them under steering
SPELLING = {"optional": ("steering",), "aliases": {"fp16": "training.fp16"}}
SPELLING["aliases"] |= {f"steering.{name}": f"training.{name}" for name in RATES}
SETTINGS = (  # what the weights depend on beside their shapes: the same in training and use
    "task", "normalize_text", "textual_prompt", "system_prompt", "adaptor", "stack_frames",
    "stack_hidden", "max_prompt_tokens", "pooling_kernel_size", "pooling_type", "pad_to_30s",
)  # fmt: skip


# ---- data -------------------------------------------------------------------


def list_clips(specs, cfg, steermoe):
    """Data sets -> Clips. Their table is made once for each set, by process 0, and kept: texts,
    their ids, seconds by the header, reason (why a clip cannot be read, or "").
    """
    import datasets

    texts = ("key", "where", "target", "language", "prompt", "hotwords", "question", "reason")
    kinds = {name: datasets.Value("string") for name in texts}
    kinds |= {"ids": datasets.List(datasets.Value("int32")), "seconds": datasets.Value("float64")}
    tokenizer, columns = steermoe.tokenizer, ("audio_column", "text_column", "question_column")
    made_of = [cfg.normalize_text, sorted(kinds), tokenizer.backend_tokenizer.to_str()]
    folder = Path(cfg.cache_dir or Path(cfg.training.output_dir).parent / "manifests")
    folder.mkdir(parents=True, exist_ok=True)

    def tokenize(row):
        clip = {name: row.get(name) for name in (*texts, "seconds")}
        clip["reason"] = row["reason"] and f"{row['where']}: {row['reason']}"
        text = clip["target"] = (row["target"] or "").strip()
        text = model.normalize_text(text) if cfg.normalize_text else text
        return clip | {"ids": model.text_to_ids(tokenizer, [text])[0]}

    rank, manifests, tables = dist.get_rank() if dist.is_initialized() else 0, [], []
    if dist.is_initialized():  # a first look at a corpus takes longer than a step may
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        if rank > 0:
            dist.barrier(group)
    for spec in model.as_list(specs):
        rows = model.read_manifest(spec, folder, [cfg[key] for key in columns], cfg.strip_tags)
        rows = model.with_seconds(rows, folder)
        mark = model.hash_text([rows._fingerprint, made_of])
        table = rows.map(
            tokenize, remove_columns=rows.column_names, features=datasets.Features(kinds),
            new_fingerprint=mark, cache_file_name=str(folder / f"clips-{mark}.arrow"),
        )  # fmt: skip
        if cfg.task == "qa" and (missing := table.data.column("question").null_count):
            raise model.UserError(f"{spec}: {missing} clips have no question; task=qa needs them")
        manifests.append(rows)
        tables.append(table)
    if rank == 0 and dist.is_initialized():
        dist.barrier(group)
    return Clips(manifests, datasets.concatenate_datasets(tables), steermoe.encoder, rank)


@dataclass
class Batch:
    feats: torch.Tensor  # (B, T, F), zeros where padded
    lens: torch.Tensor  # (B,)
    rows: list  # of the table of clips; where the audio cannot be read: a reason, and no ids
    labels: int  # tokens of the texts, each with its end of turn
    epoch: int
    used: int  # groups of the epoch that are then behind us

    def pin_memory(self):
        self.feats = self.feats.pin_memory()
        return self


class Clips(torch.utils.data.Dataset):
    """(epoch, number, group of batches) -> Batch of this process; of a single one, it is all's."""

    def __init__(self, manifests, table, encoder, rank):
        self.manifests, self.table, self.encoder, self.rank = manifests, table, encoder, rank
        self.ends = np.cumsum([len(rows) for rows in manifests])

    def __getitem__(self, place):
        epoch, number, group = place
        rows = [self.table[n] | {"number": n} for n in group[self.rank % len(group)]]
        feats, rate = [], self.encoder.sample_rate
        for row in rows:
            part = int(np.searchsorted(self.ends, row["number"], side="right"))
            source = self.manifests[part][int(row["number"] - self.ends[part])]  # from its end
            try:
                wave = model.load_clip(source | {"seconds": row["seconds"]}, rate)
                feats.append(self.encoder.features(wave, row["key"]))
            except model.AudioError as error:  # silence: every process has a batch in each step
                feats.append(self.encoder.features(torch.zeros(rate)))
                row |= {"ids": [], "reason": f"{row['where']}: {error}"}
        lens, feats = torch.tensor([len(x) for x in feats]), pad_sequence(feats, batch_first=True)
        labels = sum(len(row["ids"]) + 1 for row in rows if row["ids"])
        return Batch(feats, lens, rows, labels, epoch, number + 1)

    def load(self, places, cfg, device):
        rest = {"num_workers": cfg.workers, "pin_memory": device.type == "cuda"}
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=places, **rest)


def select_clips(steermoe, clips, cfg):
    """Numbers of the clips that are trained on, and their LLM positions; rows of those that are
    over a limit, and of those that cannot be read, with the reason.
    """
    rows, encoder = clips.table.to_list(), steermoe.encoder
    samples = [round(row["seconds"] * encoder.sample_rate) for row in rows]
    speech = steermoe.out_lens(np.array([encoder.num_frames(n) for n in samples]))
    speech = np.minimum(speech, cfg.max_prompt_tokens).tolist()
    limits = {key: cfg[key] for key in ("max_audio_length", "max_text_length")}
    limits["llm_decoder.max_length"] = cfg.llm_decoder.max_length
    kept, positions, filtered, dropped = [], [], [], []
    for n, row in enumerate(rows):
        count = len(row["ids"])
        size = speech[n] + sum(map(len, steermoe.prompt(row))) + count + 1
        sizes = zip(limits, (row["seconds"], count, size), strict=True)
        over = [f"{found:g} is over {key}" for key, found in sizes if found > limits[key]]
        if row["reason"]:
            dropped.append(row)
        elif not count or over and cfg.filter_dataset:
            filtered.append({"key": row["key"], "reason": over[0] if over else "empty text"})
        else:
            kept.append(n)
            positions.append(size)
    if not kept:
        raise model.UserError(f"no clip is left to train on: {(filtered + dropped)[-1]['reason']}")
    return np.array(kept), np.array(positions), filtered, dropped


# ---- steering ---------------------------------------------------------------


class Steering(nn.Module):
    """Vectors for every layer of a frozen encoder, mixed frame by frame by a softmax router.

        h <- h + s_l * softmax(h @ R_l^T + b_l) @ V_l        after layer l = 0 .. L - 1

    Input   layer l; h (B, T, D), its output.  Output  h, same shape and dtype; with V = 0 the same.
    seen    None, or a list that gets the gates (B, T, E) of each layer.
    Source  SteerMoE (arXiv:2510.13558), with its initial values. Gates are dense: no top-k, no
            balancing loss. Its one Linear(D, L * E) scores the experts of all layers at each layer
            and keeps a slice; here only the slice is computed, to the same numbers.
    """

    def __init__(self, num_layers, num_experts, width, scale=0.1, train_scales=True):
        super().__init__()
        shape, bound = (num_layers, num_experts), width**-0.5  # as nn.Linear(D, L * E) starts
        self.vectors = nn.Parameter(0.01 * torch.randn(*shape, width))  # V (L, E, D)
        self.router = nn.Parameter(torch.empty(*shape, width).uniform_(-bound, bound))
        self.router_bias = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.scales = nn.Parameter(torch.full((num_layers,), float(scale)), train_scales)
        self.seen = None

    def forward(self, layer, h):
        gates = F.linear(h, self.router[layer], self.router_bias[layer]).float().softmax(-1)
        if self.seen is not None:
            self.seen.append(gates.detach())  # (B, T, E)
        update = gates.to(h.dtype) @ self.vectors[layer].to(h.dtype)  # (B, T, D)
        return h + (self.scales[layer] * update).to(h.dtype)


def gate_usage(steering, lens):
    """What the router did with the batch that `steering.seen` holds: a dict a layer."""
    gates = torch.stack(steering.seen).double().cpu()  # (L, B, T, E)
    lens = lens + gates.shape[2] - lens.max()  # SenseVoice's query frames stand in front
    gates = gates[:, model.length_mask(lens, gates.shape[2])]  # (L, real frames, E)
    columns = {
        "scale": steering.scales, "norms": steering.vectors.norm(dim=-1), "gates": gates.mean(1),
        "entropy": -torch.xlogy(gates, gates).sum(-1).mean(1),
        "top": F.one_hot(gates.argmax(-1), gates.shape[-1]).double().mean(1).amax(-1),
    }  # fmt: skip
    columns = {k: x.detach().double().cpu().round(decimals=6).tolist() for k, x in columns.items()}
    return [{"layer": n} | {k: x[n] for k, x in columns.items()} for n in range(len(gates))]


def pool_frames(x, lens, kernel, kind):
    """Average or maximum ("avg", "max") of each `kernel` neighbouring frames, real ones only.

    Input   x (B, T, D), lens (B,).
    Output  (B, S, D), S = ceil(T / kernel), zeros where no frame is real; lens (B,).
    """
    real, missing = model.length_mask(lens, x.shape[1], x.device), -x.shape[1] % kernel
    x = F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, kernel))  # (B, S, kernel, D)
    real = F.pad(real, (0, missing)).unflatten(1, (-1, kernel))[..., None]  # (B, S, kernel, 1)
    if kind == "avg":
        pooled = x.masked_fill(~real, 0.0).sum(2) / real.sum(2).clamp(min=1)
    else:
        pooled = x.masked_fill(~real, -math.inf).amax(2).masked_fill(~real.any(2), 0.0)
    return pooled.to(x.dtype), -(-lens // kernel)


def make_bridge(width, table, settings):
    """From frames `width` wide to the LLM's, whose embedding table is (V, D); it starts as loud."""
    rms, wide = model.embedding_rms(table), table.shape[1]
    if settings.adaptor == "stack":
        sizes = settings.stack_hidden, 0, 1, 0.0, settings.stack_frames, False
        return model.AudioAdaptor(width, wide, *sizes, rms)
    if not settings.use_adapter and width == wide:
        return nn.Identity()
    if not settings.use_adapter:
        raise model.UserError(f"use_adapter=false: the encoder has {width}, the LLM {wide}")
    bridge = nn.Linear(width, wide)
    bridge.weight.data.mul_(3**0.5 * rms)  # for frames of unit variance
    bridge.bias.data.mul_(rms)
    return bridge


# ---- model, loss and step ---------------------------------------------------


class SteerMoE(nn.Module):
    """Frozen encoder with its steering, pooling, bridge, and frozen LLM: one forward pass for DDP.

    `trained` holds what trains: bridge and, unless settings.steering is None, steering.
    """

    def __init__(self, encoder, llm, tokenizer, settings):
        super().__init__()
        self.__dict__["encoder"] = encoder  # past nn.Module: frozen, and whole in every process
        self.whole = contextlib.nullcontext  # `with whole()`: nor is `trained` in ZeRO-3's pieces
        self.llm, self.tokenizer, self.settings = llm, tokenizer, settings
        self.stop_id, steering = model.end_of_turn(tokenizer), None
        self.identity = {"encoder": encoder.identity, "llm": llm.identity}
        self.identity["settings"] = {key: settings[key] for key in SETTINGS}
        self.stack = settings.stack_frames if settings.adaptor == "stack" else 1
        bridge = make_bridge(encoder.width, llm.get_input_embeddings().weight, settings)
        self.trained = nn.ModuleDict({"bridge": bridge})
        if (own := settings.steering) is not None:  # the bridge starts alike without it
            sizes = len(encoder.layers), own.num_experts, encoder.width
            steering = Steering(*sizes, own.steering_scale, own.use_layer_scales)
            self.trained["steering"] = steering
            for number, layer in enumerate(encoder.layers):  # the encoder itself stays as it is
                layer.register_forward_hook(lambda _, args, h, n=number: steering(n, h))
        self.__dict__["steering"] = steering  # a part of `trained`, not a second one

    def out_lens(self, lens):
        """Encoder frames -> speech positions, before the cut to max_prompt_tokens."""
        pooled = -(-lens // self.settings.pooling_kernel_size)
        return -(-pooled // self.stack)

    def hear(self, feats, lens):
        """feats (B, T, F), lens (B,) -> speech (B, S, D), S <= max_prompt_tokens; lens (B,)."""
        own = self.settings
        enc, lens = self.encoder(feats, lens)
        enc, lens = pool_frames(enc, lens, own.pooling_kernel_size, own.pooling_type)
        bridge, most = self.trained["bridge"], own.max_prompt_tokens
        speech, lens = bridge(enc, lens) if own.adaptor == "stack" else (bridge(enc), lens)
        return speech[:, :most], lens.clamp(max=most)

    def prompt(self, row):
        """Token ids before and after the speech of a clip; its own prompt goes before ours."""
        text = row.get("prompt") or self.settings.textual_prompt
        text += (row.get("question") or "") if self.settings.task == "qa" else ""
        rest = row.get("language"), row.get("hotwords"), self.settings.system_prompt
        return model.build_prompt(self.tokenizer, text, *rest)

    def splice(self, feats, batch, targets=None, pad_left=False):
        embed, prompts = self.llm.get_input_embeddings(), map(self.prompt, batch.rows)
        speech = self.hear(feats, batch.lens)
        return model.splice(embed, list(prompts), *speech, targets, pad_left)

    def forward(self, feats, batch):
        """Sums over the batch: CE (nats), right tokens, LLM positions. No ids: no label."""
        targets = [[*row["ids"], self.stop_id] if row["ids"] else [] for row in batch.rows]
        spliced = self.splice(feats, batch, targets)
        ce, _, right = model.transcript_loss(self.llm, spliced)
        return {"ce": ce, "right": right, "positions": spliced.labels.numel()}


def build(settings, encoder_name, llm_name, dtype, device, llm_device):
    encoder = model.freeze(model.load_encoder(encoder_name, pad_to_30s=settings.pad_to_30s))
    llm, tokenizer = model.load_llm(llm_name, dtype, llm_device)
    steermoe = SteerMoE(encoder.to(device), llm, tokenizer, settings)
    steermoe.trained.to(device)
    return steermoe


def load_trained(steermoe, folder, config):
    """Weights of a training into the same models and settings."""
    model.check_identity(config, steermoe.identity, folder)
    weights = model.read_weights(folder / "steermoe.pt")
    model.load_weights(steermoe.trained, weights, folder / "steermoe.pt")


def read_config(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("format") != model.FORMAT:
        raise model.UserError(f"{folder}: holds no config.json of a training, or an earlier one's")
    return config


def load_listener(folder, cfg, device, dtype):
    """What infer.py hears with; see infer.load_listener."""
    config = read_config(folder)
    names = [cfg[part].name or config[part]["name"] for part in ("encoder", "llm")]
    steermoe = build(OmegaConf.create(config["settings"]), *names, dtype, device, device)
    load_trained(steermoe, folder, config)
    own = {name: cfg[name] for name in ("prompt", "language", "hotwords") if cfg[name]}

    def hear(feats, lens):
        speech, lens = steermoe.hear(feats, lens)
        return model.Heard(speech, lens, lens), None

    return SimpleNamespace(
        encoder=steermoe.encoder, hear=hear, prompt=lambda row: steermoe.prompt(row | own),
        llm=steermoe.llm, tokenizer=steermoe.tokenizer, stop_id=steermoe.stop_id, ctc=None,
        read_ctc=None, about=f"SteerMoE {folder}, encoder {names[0]}, LLM {names[1]}",
    )  # fmt: skip


def parameter_groups(trained, rates):
    """A group for each learning rate, with weight decay (of matrices) or without."""
    peaks = {"steering": rates.steering_learning_rate, "projection": rates.learning_rate}
    peaks["router"] = rates.router_learning_rate  # of scales too: at V's they move 10 % a step
    groups = {}
    for name, parameter in trained.named_parameters():
        kind = "router" if name.startswith("steering.") else "projection"
        kind = "steering" if name == "steering.vectors" else kind
        decays = name == "steering.router" or kind == "projection" and parameter.ndim > 1
        group = {"kind": kind, "peak": peaks[kind], "params": []}
        group["weight_decay"] = rates.weight_decay if decays else 0.0
        if parameter.requires_grad:
            groups.setdefault((kind, decays), group)["params"].append(parameter)
    if not groups:
        raise model.UserError("nothing trains: give steering, or use_adapter=true")
    return list(groups.values())


def learning_rate(step, total, warmup_steps):
    """Share of the peak: linear warm-up, then cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def take_step(loss, steermoe, optimizer, scaler, engine, cfg):
    """Backward pass, clipping of steering, then of all, step. Output: norms before clipping."""
    if engine:
        engine.backward(loss)
        engine.step()  # clips all gradients together
        return {"grad_norm": engine.get_global_grad_norm() or 0.0}
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # the norm of real gradients is clipped, not of scaled ones
    norms, clip = {}, nn.utils.clip_grad_norm_
    if steering := steermoe.steering:
        clips = cfg.clip_steering_gradients and cfg.steering.use_gradient_clipping
        limit = clips and cfg.steering.steering_gradient_clip or math.inf
        norms["grad_norm_steering"] = clip(steering.parameters(), limit)
    limit = cfg.training.gradient_clipping or math.inf
    norms["grad_norm"] = clip(steermoe.trained.parameters(), limit)
    scaler.step(optimizer)  # fp16: a step that overflows is left out, and has no finite norm
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    finite = scaler.is_enabled()
    return {k: norm.nan_to_num(0.0, 0.0) if finite else norm for k, norm in norms.items()}


# ---- evaluation -------------------------------------------------------------


@torch.no_grad()
def evaluate(steermoe, data, count, cfg, device, amp, rank, world):
    """Scores over `count` clips (0: all), spread over a data set, and a line for each of them; one
    that cannot be read counts as an empty answer, so that no set gets easier by being broken.
    """
    last, seconds = len(data.table) - 1, np.asarray(data.table["seconds"])
    chosen = np.unique(np.linspace(0, last, count or last + 1).astype(int))
    order = chosen[seconds[chosen].argsort()][rank::world].tolist()  # little padding
    size, sums, lines = cfg.eval_batch_size, np.zeros(4), []  # ce, right, labels, capped
    places = [(0, 0, [order[n : n + size]]) for n in range(0, len(order), size)]
    for batch in data.load(places, cfg, device):
        feats = batch.feats.to(device)
        with amp:
            losses = steermoe(feats, batch)
            spliced = steermoe.splice(feats, batch, pad_left=True)
            caps = [model.token_cap(row["seconds"], cfg.tokens_per_s) for row in batch.rows]
            answers = model.greedy_decode(steermoe.llm, spliced, steermoe.stop_id, caps)
        capped = sum(len(a) >= cap for a, cap in zip(answers, caps, strict=True))
        sums += [float(losses["ce"]), float(losses["right"]), batch.labels, capped]
        texts = steermoe.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for row, text in zip(batch.rows, texts, strict=True):
            line = {name: row[name] for name in ("number", "key", "target", "reason")}
            lines.append(line | {"text": "" if row["reason"] else text.strip()})
    parts = [(sums, lines)] * world
    if world > 1:
        dist.all_gather_object(parts, (sums, lines))
    ce, right, labels, capped = sum(part for part, _ in parts).tolist()
    lines = sorted((line for _, part in parts for line in part), key=lambda line: line["number"])
    scores = {"eval_ce": ce / max(1, labels), "eval_acc": right / max(1, labels), "capped": capped}
    scores["eval_dropped"] = sum(bool(line["reason"]) for line in lines)
    return scores | text_scores(lines, cfg.task), lines


def text_scores(lines, task):
    """WER and CER, raw and normalised, and the error rate that chooses the best weights."""
    texts = [[line[name] for line in lines] for name in ("target", "text")]
    scores = {"error_rate": model.error_rate(*texts)["rate"]}
    for name, characters in (("wer", False), ("cer", True)):
        for ending, normalize in (("_raw", str), ("", model.normalize_text)):
            found = model.error_rate(*texts, normalize, characters)
            scores[name + ending] = found["rate"]
    if task == "qa":
        texts = [map(model.normalize_text, part) for part in texts]
        scores["exact_match"] = sum(map(str.__eq__, *texts)) / len(lines)
        scores["error_rate"] = 1 - scores["exact_match"]
    return scores


def test(steermoe, cfg, device, amp, rank, world):
    """mode=test: score the trained weights on all of parquet_dirs."""
    folder = Path(cfg.training.output_dir)
    load_trained(steermoe, folder, read_config(folder))
    data = list_clips(cfg.parquet_dirs, cfg, steermoe)
    scores, lines = evaluate(steermoe, data, 0, cfg, device, amp, rank, world)
    summary = {"clips": len(lines), "hours": sum(data.table["seconds"]) / 3600} | scores
    if rank == 0:
        model.save(folder / "test.jsonl", lines)
        model.save(folder / "test.json", summary | {"test": model.as_list(cfg.parquet_dirs)})
        print("  ".join(f"{name} {value:.4g}" for name, value in summary.items()))
    return summary


@torch.no_grad()
def plot_gates(steermoe, data, path, device, amp):
    """Mean gates of each layer over 32 clips, and the gates of the first one over time."""
    import matplotlib.pyplot as plt

    steering, encoder = steermoe.steering, steermoe.encoder
    batch = data[0, 0, [list(range(min(32, len(data.table))))]]
    steering.seen, lens = [], encoder.out_lens(batch.lens)
    with amp:
        encoder(batch.feats.to(device), batch.lens)
    gates = torch.stack(steering.seen)[:, 0, -int(lens.max()) :].float().cpu()  # (L, T, E)
    means, steering.seen = [row["gates"] for row in gate_usage(steering, lens)], None
    frames, layer = int(lens[0]), int(gates.std(1).sum(1).argmax())  # where gates move most
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    figure.colorbar(left.imshow(means, aspect="auto"))
    left.set(xlabel="expert", ylabel="layer", title="mean gate")
    right.plot(np.arange(frames) * encoder.frame_ms / 1000, gates[layer, :frames])
    right.set(xlabel="s", ylabel=f"gates of layer {layer}", title=batch.rows[0]["target"][:60])
    figure.savefig(path)
    plt.close(figure)


def launcher_options(arguments):
    """`--deepspeed_config FILE` as a key; `--local_rank` goes: LOCAL_RANK says the same."""
    text = "\n".join(a for a in arguments if not a.startswith("--local_rank"))
    return re.sub(r"^--deepspeed_config[=\n]", "deepspeed_config=", text, flags=re.M).splitlines()


def zero_settings(cfg):
    """DeepSpeed's settings, of its JSON file and of ours; None: DDP."""
    if not cfg.deepspeed_config or not cfg.training.use_deepspeed or cfg.mode == "test":
        return None
    try:
        import deepspeed  # noqa: F401

        settings = json.loads(Path(cfg.deepspeed_config).read_text(encoding="utf-8"))
    except (ImportError, OSError, ValueError) as error:
        raise model.UserError(f"deepspeed_config={cfg.deepspeed_config}: {error}") from error
    if "RANK" not in os.environ:
        raise model.UserError("deepspeed_config: start with `deepspeed --num_gpus N`, or torchrun")
    own = {"train_micro_batch_size_per_gpu": cfg.training.batch_size}
    own |= {"gradient_accumulation_steps": 1, "gradient_clipping": cfg.training.gradient_clipping}
    return settings | own | {"bf16": {"enabled": cfg.training.fp16}}


def start_deepspeed(steermoe, optimizer, settings):
    import deepspeed

    if settings["zero_optimization"]["stage"] == 3:  # in pieces before it goes to a GPU
        deepspeed.zero.Init(module=steermoe.llm, config_dict_or_path=settings)
    trained = list(steermoe.trained.parameters())
    steermoe.whole = functools.partial(deepspeed.zero.GatheredParameters, trained)
    return deepspeed.initialize(model=steermoe, optimizer=optimizer, config=settings)[0]


# ---- the run ----------------------------------------------------------------


def check(cfg):
    """What one key alone cannot show. Output: section of the encoder that is used."""
    allowed = {"mode": ("train", "test"), "task": ("asr", "qa"), "adaptor": ("linear", "stack")}
    for key, values in (allowed | {"pooling_type": ("avg", "max")}).items():
        model.one_of(values, cfg, key)
    model.at_least(1, cfg, "training.batch_size", "eval_batch_size", "pooling_kernel_size")
    model.at_least(1, cfg, "max_prompt_tokens", "stack_frames", "early_stopping_patience")
    model.at_least(1, cfg, *["steering.num_experts"][: cfg.steering is not None])
    model.at_least(0, cfg, "logging_steps", "eval_steps", "save_steps", "steering_log_interval")
    model.at_least(0, cfg, "training.gradient_clipping", "training.warmup_steps", "eval_clips")
    model.at_least(0, cfg, "save_total_limit", "max_dropped", "workers", "max_steps")
    given = [k for k in ("whisper_encoder", "conformer_encoder") if cfg[k].model_path]
    if len(given) != 1:
        raise model.UserError("give whisper_encoder.model_path or conformer_encoder.model_path")
    if not cfg.llm_decoder.use_cache:
        print("llm_decoder.use_cache=false: decoding keeps its cache; the text is the same")
    return given[0]


def check_encoder(encoder, cfg, section):
    """Keys that describe the encoder have to be true of it; 0: unchecked."""
    layers = len(encoder.layers)  # only behind the last one: none has ever seen pooled frames
    true = {"sample_rate": encoder.sample_rate, "pooling_position": layers}
    true |= {f"{section}.feature_dim": encoder.width, f"{section}.num_layers": layers}
    for key, value in true.items():
        if (given := OmegaConf.select(cfg, key)) not in (0, value):
            raise model.UserError(f"{key}={given}: has to be {value} for this encoder")


def precision(cfg):
    """Dtype of the frozen LLM and of autocast; what trains is fp32 always."""
    if not cfg.training.fp16:
        return "fp32"
    path = model.find_model(cfg.llm_decoder.model_name) / "config.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type", "")
    if not kind.startswith("qwen") and not cfg.deepspeed_config:
        return "fp16"
    print("training.fp16: bf16 is used; Qwen overflows in fp16, DeepSpeed needs no loss scale then")
    return "bf16"


def main(cfg):
    section = check(cfg)
    device, dtype, rank, world = model.start(
        cfg.device, precision(cfg), without_bf16="training.fp16=false"
    )
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder, zero = Path(cfg.training.output_dir), zero_settings(cfg)
    torch.manual_seed(cfg.seed)
    names, where = (cfg[section].model_path, cfg.llm_decoder.model_name), "cpu" if zero else device
    steermoe = build(cfg, *names, dtype, device, where)  # ZeRO-3 takes an LLM that no GPU holds
    encoder, steering = steermoe.encoder, steermoe.steering
    check_encoder(encoder, cfg, section)
    if cfg.mode == "test":
        return test(steermoe, cfg, device, amp, rank, world)
    state = model.open_run(folder, cfg, steermoe.identity, cfg.resume, rank, world)
    train = list_clips(cfg.parquet_dirs, cfg, steermoe)
    valid = list_clips(cfg.eval_dirs, cfg, steermoe) if cfg.eval_dirs else None
    kept, positions, filtered, dropped = select_clips(steermoe, train, cfg)

    count = sum(p.numel() for p in steermoe.trained.parameters() if p.requires_grad)
    wrapped, engine, optimizer, scaler = prepare(steermoe, state, zero, cfg, dtype, world)
    begin = {"step": 0, "epoch": 0, "used": 0, "best": [math.inf, math.inf], "stale": 0}
    step, epoch, used, best, stale = ((state or begin)[name] for name in begin)

    def groups_of(epoch):
        size = cfg.training.batch_size
        limits = size * int(positions.max()), world, cfg.seed, epoch, size
        groups = model.length_batches(positions, *limits)
        return [[kept[batch].tolist() for batch in group] for group in groups]

    total = cfg.max_steps or cfg.training.epochs * len(groups_of(0))
    loader = iter(train.load(model.endless_groups(groups_of, epoch, used), cfg, device))
    writer, known, patience = None, set(), cfg.early_stopping_patience
    if rank == 0:
        writer = SummaryWriter(cfg.training.logging_dir or folder, purge_step=step + 1)
        model.save(folder / "dropped.jsonl", filtered)
        note_dropped(folder, dropped, known, cfg.max_dropped)
        hours = sum(np.asarray(train.table["seconds"])[kept]) / 3600
        print(
            f"train {len(kept)} clips, {hours:.2f} h an epoch, {len(filtered)} over a limit, "
            f"{len(dropped)} not readable | {total} steps of {cfg.training.batch_size} clips x "
            f"{world} | {count:,} trainable | {device} {dtype}, torch {torch.__version__}"
        )
    analysed = bool(steering and writer and not engine and cfg.log_steering_analysis)
    stopped = bool(cfg.use_early_stopping and valid and stale >= patience)
    if stopped:
        print(f"stopped early at step {step}; use_early_stopping=false goes on")
    since, window = time.time(), Counter()  # sums since the last log
    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    while step < total and not stopped:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, cfg.training.warmup_steps) * group["peak"]
        batch = next(loader)
        watched = analysed and model.due(step + 1, cfg.steering_log_interval, total)
        if watched:
            steering.seen = []
        labels = torch.tensor(float(batch.labels)).to(device, non_blocking=True)
        if world > 1:
            dist.all_reduce(labels)  # label tokens of the step, of all processes
        with amp:
            sums = wrapped(batch.feats.to(device, non_blocking=True), batch)
        loss = sums["ce"] / labels.clamp(min=1) * world  # DDP averages; we want the sum
        norms = take_step(loss, steermoe, optimizer, scaler, engine, cfg)
        step, epoch, used = step + 1, batch.epoch, batch.used
        window.update(sums | norms | {"ce": sums["ce"].detach()})
        window.update(steps=1, labels=batch.labels)
        window.update(audio_s=sum(row["seconds"] for row in batch.rows))
        bar.update()

        note_dropped(folder, batch.rows, known, cfg.max_dropped)
        if watched:
            layers = gate_usage(steering, encoder.out_lens(batch.lens))
            model.append(folder / "steering.jsonl", [{"step": step, "layers": layers}])
            steering.seen = None
        if model.due(step, cfg.logging_steps, total):
            row = window_row(window, optimizer, scaler, time.time() - since)
            model.log_metrics(folder, writer, step, row)
            since, window = time.time(), Counter()
        if valid and model.due(step, cfg.eval_steps, total):
            share = (0, 1) if engine else (rank, world)  # ZeRO-3 needs all in each forward pass
            scores, _ = evaluate(steermoe, valid, cfg.eval_clips, cfg, device, amp, *share)
            model.log_metrics(folder, writer, step, scores)
            score = [scores["error_rate"], scores["eval_ce"]]
            stale = 0 if score < best else stale + 1
            best, stopped = min(best, score), cfg.use_early_stopping and stale >= patience
            with steermoe.whole():
                if not stale and rank == 0:
                    save_results(folder, steermoe, cfg)
        if model.due(step, cfg.save_steps, total) or stopped:
            model.check_gradient(norms["grad_norm"], step)
            tag = f"step-{step:07d}"
            if engine:
                engine.save_checkpoint(f"{folder}/deepspeed", tag, exclude_frozen_parameters=True)
            with steermoe.whole():
                if rank > 0:
                    continue
                if not valid:
                    save_results(folder, steermoe, cfg)
                state = {"format": model.FORMAT, "world": world, "identity": steermoe.identity}
                state |= {"step": step, "epoch": epoch, "used": used, "best": best, "stale": stale}
                state |= {"trained": steermoe.trained.state_dict(), "scaler": scaler.state_dict()}
                state |= {"optimizer": {} if engine else optimizer.state_dict()}
                state |= {"config": OmegaConf.to_container(cfg)}
                for name in (tag, "last"):
                    model.save(folder / f"{name}.pt", state)
            copies = sorted(folder.glob("step-*.pt"))
            for old in copies[: max(0, len(copies) - cfg.save_total_limit)]:
                old.unlink()
            for old in set(folder.glob("deepspeed/step-*")) - {folder / "deepspeed" / tag}:
                shutil.rmtree(old)
    bar.close()
    if rank == 0:
        if analysed:
            plot_gates(steermoe, valid or train, folder / "gates.png", device, amp)
        print(f"done: {step} steps -> {folder}")


def prepare(steermoe, state, zero, cfg, dtype, world):
    """What trains: the model under DDP or DeepSpeed, the engine of that, optimizer, scaler."""
    for layer in (*steermoe.encoder.layers, *steermoe.llm.model.layers):
        if cfg.training.gradient_checkpointing:  # transformers' own way is off in eval mode
            again = {"use_reentrant": False, "preserve_rng_state": False}
            layer.forward = functools.partial(checkpoint, layer.forward, **again)
    optimizer = torch.optim.AdamW(parameter_groups(steermoe.trained, cfg.training), fused=True)
    scaler = torch.amp.GradScaler(steermoe.llm.device.type, enabled=dtype == torch.float16)
    if state:
        model.load_weights(steermoe.trained, state["trained"], f"{cfg.training.output_dir}/last.pt")
        scaler.load_state_dict(state["scaler"])
    if zero:
        engine = start_deepspeed(steermoe, optimizer, zero)
        if state:
            folder, tag = f"{cfg.training.output_dir}/deepspeed", f"step-{state['step']:07d}"
            engine.load_checkpoint(folder, tag, load_module_strict=False)
        return engine, engine, optimizer, scaler
    if state:
        optimizer.load_state_dict(state["optimizer"])
    if world > 1:
        steermoe = nn.parallel.DistributedDataParallel(steermoe, broadcast_buffers=False)
    return steermoe, None, optimizer, scaler


def note_dropped(folder, rows, known, most):
    """Name clips that cannot be read, once, in dropped.jsonl; UserError if they are too many."""
    for row in rows:
        if row["reason"] and row["key"] not in known:
            known.add(row["key"])
            line = {"key": row["key"], "reason": row["reason"]}
            model.append(folder / "dropped.jsonl", [line])
            if len(known) > most:
                many = f"more clips than max_dropped={most} cannot be read"
                raise model.UserError(f"{many}; the last is {row['reason']}")


def window_row(window, optimizer, scaler, seconds):
    """Averages since the last log, of process 0."""
    labels, steps = max(1, window["labels"]), window["steps"]
    row = {"ce": float(window["ce"]) / labels, "acc": float(window["right"]) / labels}
    row |= {f"lr_{group['kind']}": group["lr"] for group in optimizer.param_groups}
    names = [name for name in window if name.startswith("grad_norm")]
    row |= {name: float(window[name]) / steps for name in (*names, "positions")}
    scale = {"scale": scaler.get_scale()} if scaler.is_enabled() else {}
    return row | scale | {"audio_s_per_s": window["audio_s"] / seconds}


def save_results(folder, steermoe, cfg):
    """steermoe.pt and config.json: what infer.py needs."""
    settings = OmegaConf.masked_copy(cfg, [*SETTINGS, "use_adapter", "steering"])
    content = {"format": model.FORMAT, "script": "train_steermoe"} | steermoe.identity
    model.save(folder / "steermoe.pt", steermoe.trained.state_dict())
    model.save(folder / "config.json", content | {"settings": OmegaConf.to_container(settings)})


if __name__ == "__main__":
    sys.argv[1:] = launcher_options(sys.argv[1:])
    model.run_main(main, DEFAULTS, __doc__, "training.batch_size", **SPELLING)
