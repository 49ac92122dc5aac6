"""Duplex speech-to-speech: an LLM that listens and speaks at once, by the keys of NeMo's SpeechLM2.

    python train_duplex.py configs/duplex.yaml [key=value ...]          # --check: all but training
    torchrun --nproc_per_node 4 train_duplex.py configs/duplex_speech_decoder.yaml
    python infer.py model.dir=RUN call.wav out=answer.wav,turns.jsonl   # what the agent says to it

Time    frames of 80 ms, T of a dialogue. Step t hears the user up to the end of frame t, makes the
        agent's sound of frame t, and the text of frame t + 1:
            s_t  user      causal encoder -> modality adapter -> projection
            x_t  text      PAD ...... BOS  "you" "entered" "five" PAD ....... EOS PAD
            c_t  codes     silence .. sBOS speech speech speech .... speech sEOS silence
            a_t  = c_(t-1), a_0 = DELAY: the codes that step t sees. BOS stands a frame before the
                 first one of speech and EOS behind the last one: control codes replace silence
Model   DuplexS2SModel (speech_decoder: null): the LLM reads w s_t + E(x_t) + sum over K codebooks
        of E_k(a_t); its lm_head predicts x_(t+1), audio_head c_t, K x (V + 3) logits.
        DuplexS2SSpeechDecoderModel: the LLM reads w s_t + E(x_t); a causal transformer behind it
        reads W h_t + mean over k of E_k(a_t), and predicts c_t.
Loss    text_loss_weight x CE of the text (by token_loss_weight) / frames
        + audio_loss_weight x CE of the codes / (frames x K)
        + user_ctc_weight x CTC of the user's words on the encoder, each turn by itself and blanks
          between turns / their tokens,
        over real frames only, and those of the step of all processes
Input   .jsonl of dialogues: `user_audio` and `agent_audio`, or `audio` with the user in its first
        channel and the agent in the second, `turns` of role, start, end (seconds) and text; Shar
        folders, where lhotse is installed. Codes are made once, before training.
Output  exp_manager.explicit_log_dir: duplex.pt and config.json for infer.py, best by
        checkpoint_callback_params; step=N.pt; last.pt to resume; dropped.jsonl; valid.jsonl, what
        was said in the latest validation; control.json, the scores where each dialogue hears the
        user of another one; metrics.jsonl, TensorBoard events
Papers  arXiv:2505.15670 (Duplex S2S), Mimi arXiv:2410.00037
Source  keys and shapes of NeMo's two models. Departures: the place of BOS and EOS, losses over real
        frames, text cut to its turn, CTC on the user's words, an encoder that must be causal.
Logged  text, audio (nats a frame, and a code), ctc (nats a token), lr, grad_norm, audio_s_per_s,
        gpu_gib. Of validation sets, and as means: val_loss (as in training), val_ce_pad, _bos,
        _eos, _text, val_ce_silent and _speaking (codes of these frames); of a free run val_txt_wer
        and _bleu, val_exact (turns with every word right), val_asr_wer and _bleu (scoring_asr hears
        the agent), val_answered (turns begun -0.16 to 1 s behind the user), val_latency_s (median),
        val_stopped (within 1 s of a barge-in), val_stop_s (median), val_spurious (per 100 turns),
        val_user_wer (CTC of the user's words).
"""

import contextlib
import ctypes
import ctypes.util
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = r"""
# A key marked + is not NeMo's, - changes nothing, = has only this value.
name: duplex
model:
  pretrained_llm: ???        # folder or hub name of a causal LLM
  pretrained_asr: ???        # a causal encoder: Nemotron's; + scratch: a small one, random weights
  pretrained_audio_codec: kyutai/mimi  # or its folder; + codec2, or the path of its library
  scoring_asr: ""            # a Whisper that hears the agent in validation; "": none
  pretrained_weights: true   # false: the LLM begins from random ones; of an encoder see scratch
  init_from: ""              # + run of this script to begin with; parts that one lacks are left out
  num_codebooks: 8           # + of Mimi
  <<: {text_bos: "", text_eos: "", text_pad: ""}  # + tokens; "": the tokenizer's own
  duplex_user_channel_weight: 1.0
  <<: {audio_loss_weight: 4.0, text_loss_weight: 3.0}  # both 0: CTC alone, without the LLM
  token_loss_weight: {pad: 1.0, bos: 1.0, eos: 1.0, text: 1.0}
  user_ctc_weight: 0.0       # +
  code_noise: 0.0            # + share of the frames whose codes are random where they are read
  freeze_params: ['^audio_codec\..+$']  # expressions, from the start of a name; this always is
  prevent_freeze_params: []
  lora:                      # null or r=0: none
    {task_type: CAUSAL_LM, r: 0, lora_alpha: 8, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}
  perception:
    target: nemo.collections.speechlm2.modules.perception.AudioPerceptionModule  # =
    output_dim: 0            # = the LLM's width
    preprocessor: {normalize: NA}     # = statistics of a whole call would know its future
    encoder:
      <<: {n_mels: 40, channels: [128, 192, 256]}    # + of scratch
      <<: {hidden: 256, layers: 2, dropout: 0.0}     # + of the GRU of scratch and speech_embedding
      <<: {self_attention_model: "", att_context_size: []}  # - an encoder has its own
      <<: {conv_context_size: null, conv_norm_type: ""}     # - an encoder has its own
    modality_adapter:
      _target_: nemo.collections.asr.modules.ConformerEncoder  # or IdentityConnector
      feat_in: -1                     # the encoder's width, or -1
      <<: {feat_out: -1, n_layers: 2, d_model: 1024, n_heads: 8, ff_expansion_factor: 4}
      subsampling: dw_striding        # - frames are not subsampled
      subsampling_factor: 1           # =
      subsampling_conv_channels: 256  # - frames are not subsampled
      causal_downsampling: true       # - frames are not subsampled
      self_attention_model: rel_pos   # or abs_pos
      att_context_size: [70, 0]       # frames to the left, -1: all; to the right none
      att_context_style: regular      # - without frames to the right both are the same
      <<: {xscaling: true, untie_biases: true}
      pos_emb_max_len: 5000           # - positions are made for the length at hand
      conv_kernel_size: 9
      conv_norm_type: layer_norm      # = the statistics of a batch would know the future
      conv_context_size: causal       # =
      <<: {dropout: 0.0, dropout_pre_encoder: 0.0, dropout_emb: 0.0, dropout_att: 0.0}
  speech_decoder:            # without one of these keys there is none
    target: nemo.collections.speechlm2.modules.speech_generation.TransformerARSpeechDecoder  # =
    <<: {d_model: 768, n_layers: 12, n_heads: 12, d_ff: 3072, max_seq_len: 5000, dropout: 0.1}
    d_kv: 0                  # d_model / n_heads, or 0
    layernorm_epsilon: 1.0e-5
    activation_function: gelu_new
    init_method_std: 0.02
    use_cache: true          # - a free run always has a cache
    <<: {cond_on_prev_audio_tokens: true, detach_input: false}
    <<: {kernel_size: 1, is_causal: true, has_xattn: false, use_learnable_pos_emb: true}  # =
    <<: {apply_norm_out: true, cfg_unconditional_prob: null}  # =
    <<: {p_dropout_out: 0.0, cfg_scale: 2.5, xa_d_memory: 0, xa_n_heads: 0}  # - not needed
    apply_norm_to_cond: false  # - there is no cross-attention
  optimizer:
    _target_: torch.optim.AdamW       # =
    <<: {lr: 3.0e-4, betas: [0.9, 0.98], weight_decay: 0.0}  # no decay of norms and biases
    foreach: true                     # - it is fused
  lr_scheduler:
    _target_: nemo.core.optim.lr_scheduler.CosineAnnealing  # =
    <<: {warmup_steps: 0, min_lr: 1.0e-6, max_steps: "${trainer.max_steps}"}
trainer:
  devices: -1                # processes; -1: as many as torchrun has started
  num_nodes: 1
  accelerator: auto          # gpu, cpu or auto
  strategy: auto             # = DDP of several processes
  precision: bf16-true       # bf16-mixed is the same here; 32-true. A frozen LLM is bf16 on a GPU,
                             # what trains, and the encoder, are fp32 under autocast
  logger: false              # - metrics.jsonl and TensorBoard events are written
  enable_checkpointing: false    # - exp_manager's is used
  replace_sampler_ddp: false     # - batches are shared out in any case
  use_distributed_sampler: false # - batches are shared out in any case
  max_epochs: null           # the end is where the first of the two is reached
  max_steps: 100000          # -1: max_epochs alone
  limit_train_batches: 0     # > 0: so many batches are an epoch of val_check_interval
  num_sanity_val_steps: 0    # not 0: scores before the first step
  log_every_n_steps: 10
  val_check_interval: 2000.0 # batches; up to 1: share of an epoch
  accumulate_grad_batches: 1
  gradient_clip_val: 1.0     # of the gradient's norm; 0: off
exp_manager:
  explicit_log_dir: ""       # "": exp_dir/name/version
  <<: {exp_dir: runs, name: "${name}", version: ""}
  create_wandb_logger: false # =, `wandb sync RUN` uploads the TensorBoard events
  wandb_logger_kwargs: {}    # - see create_wandb_logger
  create_tensorboard_logger: true  # - events are always written
  <<: {resume_if_exists: true, resume_ignore_no_checkpoint: true}
  create_checkpoint_callback: true # false: last.pt alone is kept
  checkpoint_callback_params: {monitor: val_loss, filename: "{step}", save_top_k: 1, mode: min}
data:
  frame_length: 0.08         # =
  source_sample_rate: 16000  # of the user, as the encoder hears
  target_sample_rate: 24000  # of the agent: the codec's
  <<: {input_roles: [user], output_roles: [agent]}
  train_ds:
    manifest_filepath: []    # dialogues, commas between
    input_cfg: []            # [{type: duplex or lhotse_shar, manifest_filepath or shar_path}, ...]
    shar_path: ""            # needs lhotse
    sample_rate: 0           # - see source_sample_rate
    seed: 42
    shard_seed: randomized   # - the order is a function of seed and epoch
    num_workers: 4
    batch_size: 32           # dialogues at most
    batch_duration: 0.0      # > 0: seconds of a batch, padding included
    use_bucketing: true      # - dialogues of like length share a batch
    num_buckets: 1           # - see use_bucketing, as for the next two
    <<: {bucket_buffer_size: 10000, bucket_duration_bins: []}  # - see use_bucketing
    max_dropped: 100         # + stop when more dialogues than this cannot be used
  validation_ds:
    datasets: {}             # NAME: {manifest_filepath, input_cfg or shar_path}
    sample_rate: 0           # - see source_sample_rate
    <<: {batch_size: 32, num_workers: 2}
    <<: {seed: 42, shard_seed: randomized}  # - every set is read as it stands
    <<: {temperature: 0.0, top_k: 0}  # + of codes; 0: the likeliest one
    score_turns: 100         # + of each set, that scoring_asr hears; 0: all
save_every: 500              # + steps between two last.pt
"""
SPELLING = {
    "aliases": {"data.train_ds": "data.train_ds.manifest_filepath"}
    | {f"model.speech_decoder.{theirs}": f"model.speech_decoder.{ours}" for theirs, ours in (
        ("sa_n_heads", "n_heads"), ("d_ffn", "d_ff"), ("p_dropout", "dropout"),
        ("max_length_causal_mask", "max_seq_len"))},
    "optional": ("model.lora", "model.speech_decoder"), "absent": ("model.speech_decoder",),
}  # fmt: skip
FRAME_S = 0.08
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEMOTRON = "nvidia/nemotron-speech-streaming-en-0.6b"
EARLY_S, LATE_S, NEAR_S = -0.16, 1.0, 1.5  # an answer in time; a start that belongs to a turn
KINDS = dict.fromkeys(("key", "where", "reason", "user", "turns"), "string")
KINDS |= {"frames": "int64", "lead": "int64", "codes": "binary", "feats": "binary"}


# ---- codecs -----------------------------------------------------------------


class Mimi:
    """kyutai/mimi of transformers: 24 kHz, 80 ms, K codebooks of 2048. Input and output of a codec:
    wave (N,) of whole frames <-> codes (T, K)."""

    def __init__(self, name, codebooks, device="cpu"):
        from transformers import MimiModel

        folder = model.find_model(name)
        with model.loading(folder):
            self.net = model.freeze(MimiModel.from_pretrained(folder)).to(device)
        self.codebooks, self.size = codebooks, self.net.config.codebook_size
        self.sample_rate = self.net.config.sampling_rate
        weights = model.hash_tensors(self.net.state_dict())
        self.identity = {"weights": weights, "codebooks": codebooks}

    @torch.no_grad()
    def encode(self, wave):
        wave = wave.to(self.net.device)[None, None]
        return self.net.encode(wave, num_quantizers=self.codebooks).audio_codes[0].T.cpu()

    @torch.no_grad()
    def decode(self, codes):
        codes = codes.T[None].to(self.net.device)
        with torch.autocast(self.net.device.type, enabled=False):  # fp32, whoever calls
            return self.net.decode(codes).audio_values[0, 0].cpu()

    def decoder(self):
        return None  # its convolutions have no cache: a whole dialogue is decoded at the end


class Codec2:
    """codec2 at 1200 bit/s: 8 kHz, two of its frames (40 ms, 48 bits) are ours, with K = 12: twice
    three LSP indices (9 bits each), two of pitch and energy (8), and the voicing (4). Its decoder
    draws noise for unvoiced sounds: no two waves of the same codes are equal."""

    codebooks, size, sample_rate, identity = 12, 512, 8000, {"mode": "codec2-1200"}
    # bits in a frame: voicing 2, pitch and energy 8, the same again, LSP 9, 9, 9, one spare
    fields = ((20, 9), (29, 9), (38, 9), (2, 8), (12, 8))
    voicing = (0, 1, 10, 11)

    def __init__(self, name):
        path = name if Path(name).is_file() else ctypes.util.find_library("codec2")
        try:
            self.lib = ctypes.CDLL(path or "libcodec2.so.1.0")
        except OSError as error:
            said = "install Debian's libcodec2-1.0, or give the path of libcodec2.so.1.0"
            raise model.UserError(f"pretrained_audio_codec={name}: {said} ({error})") from error
        self.lib.codec2_create.restype = ctypes.c_void_p

    def open(self, owner):
        """A codec's state, that goes when its owner goes."""
        handle = ctypes.c_void_p(self.lib.codec2_create(5))  # CODEC2_MODE_1200
        weakref.finalize(owner, self.lib.codec2_destroy, handle)
        return handle

    def unpack(self, frames):
        """Bits (F, 6) uint8 -> codes (F, 6)."""
        bits = np.unpackbits(frames, axis=1).astype(np.int64)
        parts = [bits[:, at : at + n] for at, n in self.fields] + [bits[:, list(self.voicing)]]
        return np.stack([p @ (1 << np.arange(p.shape[1])[::-1]) for p in parts], axis=1)

    def pack(self, codes):
        """Codes (F, 6) -> bits (F, 6) uint8."""
        bits = np.zeros((len(codes), 48), np.uint8)
        places = [range(at, at + n) for at, n in self.fields] + [self.voicing]
        for column, place in zip(codes.T, places, strict=True):
            shifts = np.arange(len(place))[::-1]
            bits[:, list(place)] = (column[:, None] >> shifts) & 1
        return np.packbits(bits, axis=1)

    def encode(self, wave):
        pcm = (wave.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
        frames = np.zeros((len(pcm) // 320, 6), np.uint8)
        handle = self.open(frames)
        for n, frame in enumerate(frames):
            part = np.ascontiguousarray(pcm[320 * n : 320 * (n + 1)])
            self.lib.codec2_encode(handle, frame.ctypes, part.ctypes)
        return torch.from_numpy(self.unpack(frames).reshape(-1, 12))

    def decode(self, codes):
        return self.decoder()(codes)

    def decoder(self):
        """codes (t, K) -> wave (640 t,), again and again: it keeps its state."""

        def decode(codes):
            frames = self.pack(codes.reshape(-1, 6).numpy())
            pcm = np.zeros((len(frames), 320), np.int16)
            for frame, part in zip(frames, pcm, strict=True):
                self.lib.codec2_decode(handle, part.ctypes, frame.ctypes)
            return torch.from_numpy(pcm.reshape(-1) / np.float32(32768))

        handle = self.open(decode)
        return decode


def load_codec(conf, device="cpu"):
    name = conf.pretrained_audio_codec
    codec = Codec2(name) if "codec2" in Path(name).name else Mimi(name, conf.num_codebooks, device)
    codec.silence = codec.encode(torch.zeros(round(8 * FRAME_S * codec.sample_rate)))[-1]
    codec.bos, codec.eos, codec.delay = (codec.size + n for n in range(3))
    return codec


# ---- dialogues --------------------------------------------------------------


def text_channel(turns, total, pad, bos, eos):
    """The agent's turns [(first, end, ids)], in frames of speech -> ids of all frames (total,).

    BOS stands at first - 1, text from there, a token a frame, and EOS at `end`, the first frame
    behind; text longer than its turn is cut. Raises ValueError where turns overlap.
    """
    text = [pad] * total
    for n, (first, end, ids) in enumerate(turns):
        if n + 1 < len(turns):
            end = min(end, turns[n + 1][0] - 2)  # in front of the next BOS
        if end <= first:
            raise ValueError("turns of the agent overlap, or are shorter than a frame")
        kept = ids[: min(end, total) - first]
        text[first - 1 : first + len(kept)] = [bos, *kept]
        if end < total:
            text[end] = eos
    return text


def list_dialogues(item, cache_dir):
    """(where, row) of a file of dialogues, or of Shar, whose audio is unpacked into cache_dir."""
    if "shar_path" in item:
        yield from list_shar(item["shar_path"], cache_dir)
        return
    folder = os.path.dirname(item["manifest_filepath"])
    for where, line in model.read_lines(item["manifest_filepath"]):
        try:
            row = json.loads(line)
            row["key"] = str(row.get("key") or row.get("id") or where)
            for channel, name in enumerate(("user", "agent")):
                source = row.get(f"{name}_audio") or row["audio"]
                alone = "mix" if row.get(f"{name}_audio") else channel
                channel = str(row.get(f"{name}_channel", alone))
                row[name] = {"source": os.path.join(folder, source), "channel": channel}
            for turn in row["turns"]:
                turn |= {side: float(turn[side]) for side in ("start", "end")}
                turn["role"], turn["text"] = str(turn["role"]), str(turn["text"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise model.UserError(f"{where}: not a dialogue ({error!r})") from error
        yield where, row


def list_shar(path, cache_dir):
    try:
        import lhotse
    except ImportError:
        said = "pip install lhotse, or write dialogues (see --help)"
        raise model.UserError(f"shar_path={path}: {said}") from None
    folder = Path(cache_dir, "shar", model.hash_text(str(Path(path).absolute())))
    folder.mkdir(parents=True, exist_ok=True)
    for cut in lhotse.CutSet.from_shar(in_dir=path):
        row, own = {"key": cut.id}, model.hash_text(cut.id)
        sides = (cut.recording, cut.load_audio()), (cut.target_audio, cut.load_target_audio())
        for name, (recording, wave) in zip(("user", "agent"), sides, strict=True):
            row[name] = {"source": str(folder / f"{own}-{name}.flac"), "channel": "mix"}
            soundfile.write(row[name]["source"], wave[0], recording.sampling_rate)
        row["turns"] = [
            {"role": s.speaker, "start": s.start, "end": s.end, "text": s.text}
            for s in cut.supervisions
        ]
        yield f"{path}: {cut.id}", row


def to_channels(row, where, cfg, parts):
    """Frames, text, codes and turns of a dialogue: a row of read_dialogues."""
    roles = dict.fromkeys(cfg.data.input_roles, "user")
    roles |= dict.fromkeys(cfg.data.output_roles, "agent")
    if wrong := {turn["role"] for turn in row["turns"]} - roles.keys():
        said = f"is in neither of data.input_roles and output_roles: {[*roles]}"
        raise model.UserError(f"{where}: role {min(wrong)!r} {said}")
    found = {"key": row["key"], "where": where, "reason": "", "user": json.dumps(row["user"])}
    found |= {"turns": "[]", "text": [], "user_ids": [], "codes": b"", "feats": b""}
    found |= {"frames": 0, "lead": 0}
    rate, turns = parts.codec.sample_rate, sorted(row["turns"], key=lambda turn: turn["start"])
    try:
        wave = model.load_audio(rate=rate, **row["agent"])
        seconds = max(len(wave) / rate, model.audio_seconds(row["user"]["source"]))
        frames = math.ceil(seconds / FRAME_S - 1e-6)
        own, lead = [], 0
        for turn in turns:
            turn["role"] = roles[turn["role"]]
            ids = model.text_to_ids(parts.tokenizer, [turn["text"]])[0]
            first = math.floor(turn["start"] / FRAME_S + 1e-6)
            if turn["role"] == "user":
                found["user_ids"].append(ids)
            elif first < frames:
                # x_0 is no label, and BOS has to be one: who begins at once is heard a little
                # later, and the user too
                lead = lead if own else max(0, 2 - first)
                own.append((first + lead, math.ceil(turn["end"] / FRAME_S - 1e-6) + lead, ids))
        for turn in turns:
            turn["start"], turn["end"] = (turn[s] + lead * FRAME_S for s in ("start", "end"))
        frames += lead
        found |= {"frames": frames, "lead": lead, "turns": json.dumps(turns)}
        found["text"] = text_channel(own, frames, *parts.special)
        codes = parts.codec.encode(in_frames(wave, rate, frames, lead))
        found["codes"] = codes.numpy().astype(np.int16).tobytes()
        if parts.encoder.keep_features:
            feats = user_features(parts.encoder, row["user"], frames, lead, row["key"])
            found["feats"] = feats.numpy().tobytes()
    except (model.AudioError, ValueError) as error:
        found["reason"] = str(error)
    return found


def in_frames(wave, rate, frames, lead):
    """A wave with `lead` frames of silence in front, made `frames` long."""
    wave, size = F.pad(wave, (round(lead * FRAME_S * rate), 0)), round(frames * FRAME_S * rate)
    return F.pad(wave, (0, max(0, size - len(wave))))[:size]


def user_features(encoder, user, frames, lead, key):
    """What the encoder reads of a user."""
    wave = model.load_audio(rate=encoder.sample_rate, **user)
    return encoder.features(in_frames(wave, encoder.sample_rate, frames, lead), key)


def read_dialogues(conf, cfg, parts, cache_dir):
    """A memory-mapped Dataset of what to_channels makes of dialogues, once: KINDS, text (T,), codes
    (T, K) and perhaps feats as bytes, and user_ids of each turn of the user."""
    import datasets

    datasets.disable_progress_bars()
    kinds = {name: datasets.Value(kind) for name, kind in KINDS.items()}
    kinds["text"] = datasets.List(datasets.Value("int32"))
    kinds["user_ids"] = datasets.List(kinds["text"])
    paths = model.as_list(conf.get("manifest_filepath", []))
    items = [{"manifest_filepath": path} for path in paths]
    items += [{"shar_path": conf["shar_path"]}] if conf.get("shar_path") else []
    for item in conf.get("input_cfg") or []:
        items.append({key: value for key, value in item.items() if key != "type"})
        if len(items[-1]) != 1 or not items[-1].keys() <= {"manifest_filepath", "shar_path"}:
            raise model.UserError(f"input_cfg: {item}: manifest_filepath or shar_path expected")

    def make(item):
        bar = tqdm(unit="dialogue", desc="codes", disable=None)
        for where, row in list_dialogues(item, cache_dir):
            bar.update()
            yield to_channels(row, where, cfg, parts)

    about = [parts.tokenizer.backend_tokenizer.to_str(), parts.special, parts.codec.identity]
    about += [str(kinds), [*cfg.data.input_roles], [*cfg.data.output_roles]]
    about += [parts.encoder.identity] if parts.encoder.keep_features else []
    tables = []
    for item in items:
        (path,) = item.values()
        if "shar_path" in item:
            files = sorted(map(str, Path(path).glob("*")))
        else:
            named = (row for _, row in list_dialogues(item, cache_dir))
            files = [path, *(row[side]["source"] for row in named for side in ("user", "agent"))]
        stamps = [model.file_stamp(file) for file in files]
        given = {"fingerprint": model.hash_text([path, stamps, about])}
        try:
            kept = datasets.Features(kinds), str(cache_dir)
            rows = datasets.Dataset.from_generator(make, *kept, gen_kwargs={"item": item}, **given)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None
        tables.append(rows)
    if not sum(map(len, tables)):
        raise model.UserError("no dialogues: give manifest_filepath of each set")
    return datasets.concatenate_datasets(tables)


@dataclass
class Batch:
    feats: torch.Tensor  # (B, F, M) of the user
    lens: torch.Tensor  # (B,) on the CPU
    frames: torch.Tensor  # (B,) of 80 ms, on the CPU
    text: torch.Tensor  # (B, T), PAD behind the end
    codes: torch.Tensor  # (B, T, K) with control codes, silence behind the end
    user: list  # of each dialogue, (first frame, end, CTC classes) of the user's turns
    rows: list
    epoch: int
    used: int  # groups of the epoch that are then behind us

    def pin_memory(self):
        for name in ("feats", "text", "codes"):
            setattr(self, name, getattr(self, name).pin_memory())
        return self

    def counts(self):
        """Steps with labels, and tokens of CTC."""
        return [int((self.frames - 1).sum()), sum(len(t[2]) for turns in self.user for t in turns)]


class Dialogues(torch.utils.data.Dataset):
    """(epoch, number, group of model.length_batches) -> Batch of this process."""

    def __init__(self, rows, duplex, rank=0, swapped=None):
        self.rows, self.rank, self.swapped = rows, rank, swapped or {}
        self.encoder, self.codec = duplex.perception.encoder, duplex.codec
        self.special, self.classes = duplex.special, duplex.ctc_class

    def __getitem__(self, place):
        (epoch, number, group), (pad, bos, eos) = place, self.special
        rows, feats, codes, texts, users = [], [], [], [], []
        for n in map(int, group[self.rank]):
            row = self.rows[n]
            feats.append(self.features(n, row))
            code = torch.frombuffer(bytearray(row["codes"]), dtype=torch.int16).long()
            code, text = code.view(-1, self.codec.codebooks), torch.tensor(row["text"])
            code[text == bos], code[text == eos] = self.codec.bos, self.codec.eos
            codes.append(code)
            texts.append(text)
            users.append(self.user_turns(row))
            rows.append({name: row[name] for name in KINDS if name not in ("codes", "feats")})
        frames, lens = (torch.tensor([*map(len, part)]) for part in (codes, feats))
        text = pad_sequence(texts, True, pad).long()
        mask = model.length_mask(frames, text.shape[1])[..., None]
        codes = torch.where(mask, pad_sequence(codes, True), self.codec.silence)
        batch = pad_sequence(feats, True), lens, frames, text, codes
        return Batch(*batch, users, rows, epoch, number + 1)

    def features(self, n, row):
        """What the encoder reads in dialogue n, or, swapped, in place of its user."""
        other = self.rows[self.swapped[n]] if self.swapped else row
        if row["feats"] and other is row:
            feats = torch.frombuffer(bytearray(row["feats"]), dtype=torch.float32)
            return feats.view(row["frames"], -1)
        rest = self.encoder, json.loads(other["user"]), row["frames"], other["lead"], row["key"]
        try:
            return user_features(*rest)
        except model.AudioError as error:  # silence, and no CTC; named by note_dropped
            row["reason"], rate = str(error), self.encoder.sample_rate
            return self.encoder.features(in_frames(torch.zeros(1), rate, row["frames"], 0))

    def user_turns(self, row):
        """(first frame, end, CTC classes) of each turn; 0.24 s behind it a word may still come."""
        turns = [turn for turn in json.loads(row["turns"]) if turn["role"] == "user"]
        firsts, found = [int(turn["start"] / FRAME_S) for turn in turns] + [row["frames"]], []
        for n, (turn, ids) in enumerate(zip(turns, row["user_ids"], strict=True)):
            end = min(math.ceil(turn["end"] / FRAME_S) + 3, firsts[n + 1])
            ids = [self.classes[i] for i in ids if i in self.classes]
            fits = model.ctc_min_frames(ids) <= end - firsts[n]
            if ids and fits and not row["reason"]:
                found.append((firsts[n], end, ids))
        return found

    def load(self, places, workers, device):
        rest = {"num_workers": workers, "pin_memory": device.type == "cuda"}
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=places, **rest)


# ---- model and losses -------------------------------------------------------


class Perception(nn.Module):
    """Causal encoder, adapter, projection: feats (B, F, M), lens -> s (B, T, H), enc (B, T, W)."""

    def __init__(self, encoder, conf, table):
        super().__init__()
        own = OmegaConf.to_container(conf.modality_adapter)
        kind, inner = own["_target_"].rpartition(".")[2], encoder.width
        self.encoder, self.modality_adapter, self.context = encoder, None, 0
        if own["feat_in"] not in (-1, encoder.width):
            said = f"modality_adapter.feat_in={own['feat_in']}: here it has to be {encoder.width}"
            raise model.UserError(f"model.perception.{said}")
        if kind == "ConformerEncoder":
            names = inspect.signature(model.Conformer).parameters.keys() - {"feat_in"}
            rest = {name: own[name] for name in own if name in names}
            self.modality_adapter = model.Conformer(encoder.width, **rest)
            inner, left = self.modality_adapter.width, int(own["att_context_size"][0])
            reach = own["n_layers"] * (left + own["conv_kernel_size"] - 1) + 1
            whole = left < 0 or own["self_attention_model"] == "abs_pos"
            self.context = sys.maxsize if whole else reach  # frames that a frame hears
        elif kind != "IdentityConnector":
            known = "ConformerEncoder, IdentityConnector"
            raise model.UserError(f"modality_adapter._target_: {kind} is none of {known}")
        self.proj = nn.Linear(inner, table.shape[1])
        self.proj.weight.data.mul_(3**0.5 * model.embedding_rms(table))  # as loud as embeddings
        self.proj.bias.data.mul_(model.embedding_rms(table))

    def forward(self, feats, lens):
        trains = any(p.requires_grad for p in self.encoder.parameters())
        with contextlib.nullcontext() if trains else torch.no_grad():
            enc, lens = self.encoder(feats, lens)
        enc = enc.float()
        x = enc if self.modality_adapter is None else self.modality_adapter(enc, lens)[0]
        return self.proj(x), enc, lens

    @torch.no_grad()
    def stream(self, samples, state=None):
        """samples of whole frames -> s (1, k, H), state."""
        (own, past), adapter = state or (None, None), self.modality_adapter
        enc, own = self.encoder.stream(samples, own)
        if adapter is None:
            return self.proj(enc), (own, None)
        past = enc if past is None else torch.cat([past, enc], 1)
        x, _ = adapter(past, torch.tensor([past.shape[1]]))
        keep = past[:, max(0, past.shape[1] - self.context) :]
        return self.proj(x[:, -enc.shape[1] :]), (own, keep)


class SpeechDecoder(nn.Module):
    """A causal transformer from hidden states and the codes before to the codes of the frame."""

    def __init__(self, width, codebooks, size, conf):
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), conf.dropout)
        self.net = GPT2Model(GPT2Config(
            vocab_size=1, bos_token_id=None, eos_token_id=None, n_embd=conf.d_model,
            n_layer=conf.n_layers, n_head=conf.n_heads,
            n_inner=conf.d_ff, n_positions=conf.max_seq_len, **drop,
            layer_norm_epsilon=conf.layernorm_epsilon, initializer_range=conf.init_method_std,
            activation_function=conf.activation_function,
        ))  # fmt: skip
        self.net.wte = nn.Identity()  # it reads no tokens
        self.proj = nn.Linear(width, conf.d_model)
        self.embed = nn.Embedding(codebooks * size, conf.d_model)
        self.head = nn.Linear(conf.d_model, codebooks * size)
        self.detach, self.hears_itself = conf.detach_input, conf.cond_on_prev_audio_tokens
        self.longest = conf.max_seq_len

    def forward(self, hidden, places, cache=None):
        """hidden (B, T, H), places (B, T, K) of the codes in `embed` -> (B, T, K * (V + 3))."""
        x = self.proj(hidden.detach() if self.detach else hidden)
        x = x + self.embed(places).mean(2) * self.hears_itself
        rest = {"cache": cache, "use_cache": True} if cache is not None else {"use_cache": False}
        return self.head(self.net(inputs_embeds=x, **rest).last_hidden_state)


class Duplex(nn.Module):
    """Both models: perception, LLM, codes' embeddings and heads; `codec` lies outside."""

    def __init__(self, perception, llm, tokenizer, codec, special, ctc_tokens, cfg):
        super().__init__()
        conf, width = cfg.model, llm.get_input_embeddings().weight.shape[1]
        self.perception, self.llm, self.tokenizer, self.cfg = perception, llm, tokenizer, cfg
        self.codec, self.special, self.ctc_tokens = codec, special, ctc_tokens
        self.size, self.speech_decoder = codec.size + 3, None
        every = codec.codebooks * self.size
        if conf.speech_decoder:
            rest = codec.codebooks, self.size, conf.speech_decoder
            self.speech_decoder = SpeechDecoder(width, *rest)
        else:
            self.audio_embed, self.audio_head = nn.Embedding(every, width), nn.Linear(width, every)
            loud = model.embedding_rms(llm.get_input_embeddings().weight)
            self.audio_embed.weight.data.mul_(loud / codec.codebooks**0.5)
        self.ctc, self.ctc_class = None, {token: n for n, token in enumerate(ctc_tokens)}
        if conf.user_ctc_weight:
            self.ctc = nn.Linear(perception.encoder.width, len(ctc_tokens) + 1)
        offsets = self.size * torch.arange(codec.codebooks)
        self.register_buffer("offsets", offsets, persistent=False)
        weights = torch.ones(llm.config.vocab_size) * conf.token_loss_weight.text
        for token, name in zip(special, ("pad", "bos", "eos"), strict=True):
            weights[token] = conf.token_loss_weight[name]
        self.register_buffer("text_weights", weights, persistent=False)

    def inputs(self, speech, text, codes):
        """What the LLM reads: s (B, T, H), x (B, T), a (B, T, K) -> (B, T, H)."""
        x = self.cfg.model.duplex_user_channel_weight * speech
        x = x + self.llm.get_input_embeddings()(text)
        return x if self.speech_decoder else x + self.audio_embed(codes + self.offsets).sum(2)

    def audio_logits(self, hidden, codes, cache=None):
        """(B, T, H), a (B, T, K) -> (B, T, K, V + 3)."""
        if self.speech_decoder:
            logits = self.speech_decoder(hidden, codes + self.offsets, cache)
        else:
            logits = self.audio_head(hidden)
        return logits.unflatten(-1, (self.codec.codebooks, self.size)).float()

    def forward(self, feats, batch):
        speech, enc, lens = self.perception(feats, batch.lens)
        if lens.tolist() != batch.frames.tolist():
            raise ValueError(f"frames: {lens.tolist()} of users, {batch.frames.tolist()} of codes")
        return self.losses(speech, enc, batch)

    def losses(self, speech, enc, batch):
        """Sums over the batch: text, audio, ctc as the loss weighs them (nats), and CE and count of
        each kind of token and of code."""
        conf, device, (_, bos, eos) = self.cfg.model, enc.device, self.special
        sums = {"text": enc.sum() * 0.0, "audio": enc.sum() * 0.0, "ctc": enc.sum() * 0.0}
        if self.ctc is not None:
            sums["ctc"] = self.user_ctc(self.ctc(enc).float().log_softmax(-1), batch)
        if not conf.text_loss_weight and not conf.audio_loss_weight:
            return sums
        text, codes = batch.text.to(device), batch.codes.to(device)
        heard = self.shifted(codes)[:, :-1]  # a_0 to a_(T-2)
        if self.training and conf.code_noise:
            noisy = torch.rand(heard.shape[:2], device=device) < conf.code_noise
            random_codes = torch.randint(self.codec.size, heard.shape, device=device)
            heard = torch.where(noisy[..., None], random_codes, heard)
        hidden = model.hidden_states(self.llm, self.inputs(speech[:, :-1], text[:, :-1], heard))
        logits, label = self.llm.lm_head(hidden).float(), text[:, 1:]
        real = model.length_mask(batch.frames - 1, label.shape[1], device)
        ce = F.cross_entropy(logits.transpose(1, 2), label, reduction="none") * real  # (B, T - 1)
        sums["text"] = (ce * self.text_weights[label]).sum()
        logits, label = self.audio_logits(hidden, heard), codes[:, :-1]
        code_ce = F.cross_entropy(logits.permute(0, 3, 1, 2), label, reduction="none").mean(-1)
        sums["audio"] = (code_ce * real).sum()
        turn = (text == bos).cumsum(1) - (text == eos).cumsum(1)
        speaks = ((turn > 0) & (text != bos))[:, :-1]
        is_pad, is_bos, is_eos = (text[:, 1:] == token for token in self.special)
        for name, kind, costs in (
            ("pad", is_pad, ce), ("bos", is_bos, ce), ("eos", is_eos, ce),
            ("text", ~(is_pad | is_bos | is_eos), ce),
            ("silent", ~speaks, code_ce), ("speaking", speaks, code_ce),
        ):  # fmt: skip
            own = kind & real
            sums |= {f"ce_{name}": costs.detach()[own].sum(), f"n_{name}": own.sum()}
        return sums

    def user_ctc(self, log_probs, batch):
        """-log p of the user's words, (B, T, C + 1): CTC inside each turn, blanks between them."""
        blank = len(self.ctc_tokens)
        turns = [(b, *turn) for b, own in enumerate(batch.user) for turn in own]
        between = model.length_mask(batch.frames, log_probs.shape[1])
        for b, first, end, _ in turns:
            between[b, first:end] = False
        total = -log_probs[..., blank][between.to(log_probs.device)].sum()
        if not turns:
            return total
        parts = pad_sequence([log_probs[b, first:end] for b, first, end, _ in turns], True)
        lens = torch.tensor([end - first for _, first, end, _ in turns])
        return total + model.ctc_loss(parts, lens, [ids for *_, ids in turns], blank)[0]

    def shifted(self, codes):
        """a: the codes one frame behind, DELAY first."""
        first = torch.full_like(codes[:, :1], self.codec.delay)
        return torch.cat([first, codes[:, :-1]], 1)

    def begin(self, batch=1):
        """State of a free run: x_0, a_0 and empty caches."""
        from transformers import DynamicCache

        device, pad = self.offsets.device, self.special[0]
        text = torch.full((batch,), pad, device=device)
        codes = torch.full((batch, self.codec.codebooks), self.codec.delay, device=device)
        behind = self.speech_decoder and DynamicCache(config=self.speech_decoder.net.config)
        cache = DynamicCache(config=self.llm.config)
        return SimpleNamespace(text=text, codes=codes, cache=cache, behind=behind)

    @torch.no_grad()
    def step(self, speech, state, temperature=0.0, top_k=0):
        """One frame: s_t (B, H) -> x_(t+1) (B,), c_t (B, K); `state` goes on to the next one."""
        text, codes = state.text[:, None], state.codes[:, None]
        embeds, rest = self.inputs(speech[:, None], text, codes), {"use_cache": True}
        hidden = self.llm.model(inputs_embeds=embeds, cache=state.cache, **rest).last_hidden_state
        state.text = self.llm.lm_head(hidden[:, -1]).float().argmax(-1)
        logits = self.audio_logits(hidden, codes, state.behind)[:, 0]
        state.codes = sample(logits, temperature, top_k)
        return state.text, state.codes

    @torch.no_grad()
    def run_free(self, speech, temperature=0.0, top_k=0):
        """s (B, T, H) -> text (B, T), codes (B, T, K) of the agent who hears it."""
        state, texts, codes = self.begin(len(speech)), [], []
        texts.append(state.text)
        for t in range(speech.shape[1]):
            text, code = self.step(speech[:, t], state, temperature, top_k)
            texts.append(text)
            codes.append(code)
        return torch.stack(texts[:-1], 1), torch.stack(codes, 1)

    def to_wave(self, codes, decode=None):
        """Codes (T, K) of a run -> wave; control codes are silence."""
        codes = codes.cpu()
        codes = torch.where(codes < self.codec.size, codes, self.codec.silence)
        return (decode or self.codec.decode)(codes)

    def turns(self, text):
        """The agent's turns in a text channel: [{start, end (s), text}]."""
        (pad, bos, eos), found = self.special, []
        for t, token in enumerate(text):
            if token == bos:
                found.append({"start": t + 1, "end": len(text), "ids": []})
            elif token == eos and found and found[-1]["end"] == len(text):
                found[-1]["end"] = t
            elif token != pad and found and found[-1]["end"] == len(text):
                found[-1]["ids"].append(token)
        for one, other in itertools.pairwise(found):
            one["end"] = min(one["end"], other["start"] - 1)
        return [{"start": round(turn["start"] * FRAME_S, 2), "end": round(turn["end"] * FRAME_S, 2),
                 "text": self.tokenizer.decode(turn["ids"]).strip()} for turn in found]  # fmt: skip


def sample(logits, temperature, top_k):
    """(..., V) -> (...): the likeliest, or one drawn from the top_k likeliest (0: all)."""
    if not temperature:
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    chances = (logits / temperature).softmax(-1)
    return torch.multinomial(chances.flatten(0, -2), 1).view(logits.shape[:-1])


def learning_rate(step, conf, total):
    """Linear warm-up, then cosine to min_lr at max_steps."""
    peak, own = conf.optimizer.lr, conf.lr_scheduler
    if step < own.warmup_steps:
        return peak * (step + 1) / own.warmup_steps
    end = min(int(own.max_steps), total) if int(own.max_steps) >= 0 else total
    done = min(1.0, (step - own.warmup_steps) / max(1, end - own.warmup_steps))
    return own.min_lr + (peak - own.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


# ---- building ---------------------------------------------------------------


def special_tokens(tokenizer, conf):
    """Ids of PAD, BOS and EOS: three different single tokens."""
    own = {"pad": tokenizer.pad_token or tokenizer.unk_token, "bos": tokenizer.bos_token,
           "eos": tokenizer.eos_token}  # fmt: skip
    names = {name: conf[f"text_{name}"] or token for name, token in own.items()}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    wrong = [n for n, i in ids.items() if i is None or names[n] not in tokenizer.get_vocab()]
    if wrong or len(set(ids.values())) < 3:
        said = f"{names}: three different tokens of the tokenizer are needed"
        first = (wrong or ["pad"])[0]
        raise model.UserError(f"model.text_{first}: {said}; give text_pad, text_bos, text_eos")
    return ids["pad"], ids["bos"], ids["eos"]


def load_parts(cfg, dtype, device):
    """Encoder, LLM, tokenizer, codec, special tokens: what dialogues are read with."""
    conf = cfg.model
    own, rate = conf.perception.encoder, cfg.data.source_sample_rate
    gru = {name: own[name] for name in ("hidden", "layers", "dropout")}
    if conf.pretrained_asr == "scratch":
        encoder = model.ScratchEncoder(rate, own.n_mels, own.channels, **gru)
    elif (Path(conf.pretrained_asr) / "speech_embedding.json").is_file():
        encoder = model.SpeechEmbedding(conf.pretrained_asr, **gru)
    else:
        encoder = model.load_encoder(conf.pretrained_asr)
    if not encoder.causal or encoder.frame_ms != 1000 * FRAME_S:
        said = f"{conf.pretrained_asr} hears the future; nothing that speaks meanwhile can use it"
        raise model.UserError(f"{said}\n      model.pretrained_asr={NEMOTRON}")
    codec = load_codec(conf, device)
    for key, value in (("source", encoder.sample_rate), ("target", codec.sample_rate)):
        if cfg.data[f"{key}_sample_rate"] != value:
            raise model.UserError(f"data.{key}_sample_rate: here it has to be {value}")
    lora = OmegaConf.to_container(conf.lora) if conf.lora and conf.lora.r else None
    lora = lora and {key: value for key, value in lora.items() if key != "task_type"}
    llm, tokenizer = model.load_llm(conf.pretrained_llm, dtype, lora=lora, chat=False)
    for name, module in () if conf.pretrained_weights else llm.named_modules():
        if "lora_" not in name:
            for p in module.parameters(recurse=False):
                p._is_hf_initialized = False  # transformers would leave it as it is loaded
            llm._init_weights(module)
    return SimpleNamespace(encoder=encoder, llm=llm, tokenizer=tokenizer, codec=codec,
                           special=special_tokens(tokenizer, conf))  # fmt: skip


def build(cfg, parts, ctc_tokens, device):
    """Duplex of the parts, with the weights of init_from, frozen as freeze_params says."""
    conf, p = cfg.model, parts
    perception = Perception(p.encoder, conf.perception, p.llm.get_input_embeddings().weight)
    duplex = Duplex(perception, p.llm, p.tokenizer, p.codec, p.special, ctc_tokens, cfg)
    duplex.inherited = set()  # names of what an earlier run has trained
    if conf.init_from:
        config, weights = read_run(conf.init_from)
        left = ["audio_"] if conf.speech_decoder else ["speech_decoder."]  # what this one lacks
        left += ["ctc."] * (duplex.ctc is None or config["ctc_tokens"] != ctc_tokens)
        weights = {k: v for k, v in weights.items() if not k.startswith(tuple(left))}
        load_saved(duplex, weights, conf.init_from)
    patterns = [e for e in conf.freeze_params if not re.match(r"\^?audio_codec", e)]
    keep = [*conf.prevent_freeze_params, *([r"^.+\.lora_.+$"] if conf.lora and conf.lora.r else [])]
    model.freeze_by_name(duplex, patterns, keep)
    for name, p in () if conf.text_loss_weight else duplex.named_parameters():
        if not name.startswith(("perception.encoder.", "ctc.")):
            p.requires_grad_(False)  # no loss reaches it, and DDP would wait for it
    trained = [p for p in duplex.parameters() if p.requires_grad]
    if not trained:
        raise model.UserError("nothing trains: freeze_params matches every weight")
    for p in trained:
        p.data = p.data.float()  # bf16 would round small updates away
    return duplex.to(device)


def read_run(folder):
    """config.json and duplex.pt of a run."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("script") != "train_duplex" or config.get("format") != model.FORMAT:
        raise model.UserError(f"{folder}: no run of train_duplex.py as it is now")
    return config, model.read_weights(Path(folder) / "duplex.pt")


def saved_names(duplex):
    """What makes this model of its encoder and LLM: what trains or has trained, and what is new."""
    trains = {name for name, p in duplex.named_parameters() if p.requires_grad} | duplex.inherited
    parts = ["perception.modality_adapter.", "perception.proj.", "ctc.", "audio_", "speech_dec"]
    parts += ["perception.encoder."] * isinstance(duplex.perception.encoder, model.ScratchEncoder)
    parts += [] if duplex.cfg.model.pretrained_weights else ["llm."]
    return [name for name in duplex.state_dict() if name in trains or name.startswith(tuple(parts))]


def saved_state(duplex):
    state = duplex.state_dict()
    return {name: state[name].detach().cpu() for name in saved_names(duplex)}


def load_saved(duplex, weights, where):
    """Weights of saved_names; what they hold beyond it is saved with it from now on."""
    duplex.inherited |= weights.keys()
    own = duplex.state_dict()
    wrong = [k for k, v in weights.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise model.UserError(f"{where}: does not fit, for one {wrong[0]}")
    duplex.load_state_dict(weights, strict=False)


# ---- validation -------------------------------------------------------------


@torch.no_grad()
def evaluate(duplex, sets, run, swap=False):
    """Scores of every validation set, their means, and a line for each dialogue.

    swap: each hears the user of another dialogue, half a set away.
    """
    duplex.eval()
    conf, scores, means, lines = duplex.cfg.data.validation_ds, {}, {}, []
    most = conf.score_turns // run.world or sys.maxsize
    for name, rows in sets.items():
        count, order = len(rows), np.argsort(rows["frames"], kind="stable").tolist()
        order = order[run.rank :: run.world]  # of like length: little padding
        swapped = {n: (n + count // 2) % count for n in range(count)} if swap else {}
        places = range(0, len(order), conf.batch_size)
        places = [(0, 0, [order[n : n + conf.batch_size]]) for n in places]
        found, sums = [], Counter()
        torch.manual_seed(run.rank)  # of codes that are drawn
        data = Dialogues(rows, duplex, 0, swapped)
        for batch in data.load(places, conf.num_workers, run.device):
            feats = batch.feats.to(run.device)
            with run.amp:
                speech, enc, _ = duplex.perception(feats, batch.lens)
                losses = duplex.losses(speech, enc, batch)
                found += talk(duplex, speech, enc, batch, conf, name)
            sums.update({key: float(value) for key, value in losses.items()})
            sums.update(dict(zip(("frames", "labels"), batch.counts(), strict=True)))
        hear_agents(found, duplex, None if swap else run.scorer, most)
        parts = [(found, sums)] * run.world
        if run.world > 1:
            dist.all_gather_object(parts, (found, sums))
        found, sums = [line for part, _ in parts for line in part], Counter()
        for _, part in parts:
            sums.update(part)
        own = loss_scores(sums, duplex.cfg.model) | dialogue_scores(found)
        scores |= {f"{key}_{name}": value for key, value in own.items()}
        for key, value in own.items():
            means.setdefault(key, []).append(value)
        lines += found
    scores |= {key: sum(values) / len(values) for key, values in means.items()}
    duplex.train()
    return scores, lines


def talk(duplex, speech, enc, batch, conf, name):
    """A free run over a batch: a line for each dialogue, with the turns `wanted` and `found`."""
    lines, paths, talks = [], None, duplex.cfg.model.text_loss_weight > 0
    if duplex.ctc is not None:
        best = duplex.ctc(enc).argmax(-1)
        paths = model.ctc_paths(best, batch.frames, len(duplex.ctc_tokens))
    text, codes = duplex.run_free(speech, conf.temperature, conf.top_k) if talks else (None, None)
    for n, row in enumerate(batch.rows):
        length, line = row["frames"], {"set": name, "key": row["key"], "reason": row["reason"]}
        line["turns"] = json.loads(row["turns"])
        line["wanted"] = duplex.turns(batch.text[n, :length].tolist())
        if paths is not None:
            line["user_ctc"] = duplex.tokenizer.decode([duplex.ctc_tokens[c] for c in paths[n]])
        if talks:
            line["found"] = duplex.turns(text[n, :length].tolist())
            line["codes"] = codes[n, :length].cpu()
        lines.append(line)
    return lines


def loss_scores(sums, conf):
    frames, labels = max(1, sums["frames"]), max(1, sums["labels"])
    loss = conf.text_loss_weight * sums["text"] + conf.audio_loss_weight * sums["audio"]
    scores = {"val_loss": loss / frames + conf.user_ctc_weight * sums["ctc"] / labels}
    for key in (key for key in sums if key.startswith("ce_")):
        scores[f"val_{key}"] = sums[key] / max(1, sums[f"n_{key[3:]}"])
    return scores


def match_turns(wanted, found):
    """{number of a wanted turn: of the one found whose start is nearest}, each used once."""
    pairs, matched = itertools.product(range(len(wanted)), range(len(found))), {}
    apart = {(n, m): abs(wanted[n]["start"] - found[m]["start"]) for n, m in pairs}
    for n, m in sorted(apart, key=apart.get):
        if apart[n, m] <= NEAR_S and n not in matched and m not in matched.values():
            matched[n] = m
    return matched


def judge_turns(line):
    """Each wanted turn of the agent: its text, what was said, latency and stop_s behind the user
    (None where there is nothing to measure), and the number of spurious starts."""
    matched, turns = match_turns(line["wanted"], line["found"]), []
    users = [turn for turn in line["turns"] if turn["role"] == "user"]
    for n, turn in enumerate(line["wanted"]):
        said = line["found"][matched[n]] if n in matched else None
        before = [u["end"] for u in users if u["end"] <= turn["start"] + FRAME_S]
        cut = [u["start"] for u in users if turn["start"] < u["start"] <= turn["end"]]
        cut = [start for start in cut if turn["end"] - start <= LATE_S]  # else it was to speak on
        turns.append({
            "wanted": turn["text"], "text": said["text"] if said else "", "answered": bool(said),
            "latency": said["start"] - before[-1] if said and before else None,
            "interrupted": bool(cut), "stop_s": said["end"] - cut[0] if said and cut else None,
            "heard": said.get("heard") if said else line.get("heard"),
        })  # fmt: skip
    return turns, len(line["found"]) - len(matched)


def dialogue_scores(lines):
    """Pooled over turns: what `Logged` above says."""
    from sacrebleu import corpus_bleu

    scores = {}
    if lines and "user_ctc" in lines[0]:
        known = [line for line in lines if not line["reason"]]
        said = [" ".join(t["text"] for t in x["turns"] if t["role"] == "user") for x in known]
        heard = [line["user_ctc"] for line in known]
        scores["val_user_wer"] = model.error_rate(said, heard)["rate"]
    judged = [judge_turns(line) for line in lines if "found" in line and not line["reason"]]
    turns = [turn for found, _ in judged for turn in found]
    if not turns:
        return scores
    cut = [turn for turn in turns if turn["interrupted"]]
    late, stops = ([t[key] for t in turns if t[key] is not None] for key in ("latency", "stop_s"))
    in_time = [t["answered"] and EARLY_S <= (t["latency"] or 0.0) <= LATE_S for t in turns]
    wanted, text = ([model.normalize_text(turn[k]) for turn in turns] for k in ("wanted", "text"))
    scores |= {"val_txt_wer": model.error_rate(wanted, text)["rate"]}
    scores["val_txt_bleu"] = corpus_bleu(text, [wanted]).score
    scores["val_exact"] = sum(a == b for a, b in zip(wanted, text, strict=True)) / len(turns)
    scores["val_answered"] = sum(in_time) / len(turns)
    scores["val_spurious"] = 100 * sum(extra for _, extra in judged) / len(turns)
    scores |= {"val_latency_s": statistics.median(late)} if late else {}
    scores |= {"val_stop_s": statistics.median(stops)} if stops else {}
    if cut:
        scores["val_stopped"] = sum(-FRAME_S <= s <= LATE_S for s in stops) / len(cut)
    if heard := [turn for turn in turns if turn["heard"] is not None and not turn["interrupted"]]:
        wanted, text = ([spell(turn[key]) for turn in heard] for key in ("wanted", "heard"))
        scores["val_asr_wer"] = model.error_rate(wanted, text)["rate"]
        scores["val_asr_bleu"] = corpus_bleu(text, [wanted]).score
    return scores


def spell(text):
    """Normalised, its digits as words: Whisper writes 315 where "three one five" is said."""
    return model.normalize_text(re.sub(r"\d", lambda d: f" {DIGITS[int(d[0])]} ", text))


def load_scorer(name, device):
    """wave (N,) at 16 kHz -> text, by a Whisper."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = model.find_model(name)
    with model.loading(folder):
        whisper = model.freeze(WhisperForConditionalGeneration.from_pretrained(folder)).to(device)
        processor = WhisperProcessor.from_pretrained(folder)

    def hear(wave):
        feats = processor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features
        ids = whisper.generate(feats.to(device), max_length=100, do_sample=False, num_beams=1)
        return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    return hear


def hear_agents(lines, duplex, scorer, most):
    """What the scoring ASR hears in turns of the agent that are not interrupted, `most` of them."""
    rate = duplex.codec.sample_rate
    for line in random.Random(0).sample(lines, len(lines)):
        codes = line.pop("codes", None)
        if scorer is None or codes is None or most <= 0:
            continue
        users = [turn["start"] for turn in line["turns"] if turn["role"] == "user"]
        line["heard"], wave = "", duplex.to_wave(codes)  # of a turn that is missed
        for turn in line["found"]:
            if not any(turn["start"] < start <= turn["end"] for start in users):
                part = wave[round(turn["start"] * rate) : round((turn["end"] + 0.1) * rate)]
                turn["heard"] = scorer(model.resample(part, rate, 16000)) if len(part) else ""
                most -= 1


# ---- the run ----------------------------------------------------------------


def refusals(cfg):
    """What of a configuration cannot run: [(why, the override that mends it)]."""
    conf, data, found = cfg.model, cfg.data, []
    adapter, asr = conf.perception.modality_adapter, conf.pretrained_asr
    prefix = "model.perception.modality_adapter."
    if asr.startswith("stt_en_") or asr != "scratch" and "/" not in asr and not Path(asr).exists():
        said = f"pretrained_asr={asr}: no folder, and not in transformers; Nemotron's encoder is"
        found.append((said, f"model.pretrained_asr={NEMOTRON}"))
    if (codec := conf.pretrained_audio_codec).endswith(".nemo"):
        said = f"pretrained_audio_codec={codec}: NeMo's codecs are not in transformers; Mimi is"
        found.append((said, "model.pretrained_audio_codec=kyutai/mimi"))
    rate = 8000 if "codec2" in Path(codec).name else 24000
    if data.target_sample_rate != rate:
        said = f"data.target_sample_rate={data.target_sample_rate}: Mimi has 24000 Hz, codec2 8000"
        found.append((said, f"data.target_sample_rate={rate}"))
    if (scorer := conf.scoring_asr) and "/" not in scorer and not Path(scorer).exists():
        said = f"scoring_asr={scorer}: no folder, and no Whisper"
        found.append((said, "model.scoring_asr=openai/whisper-base.en"))
    if adapter._target_.endswith("ConformerEncoder") and int(adapter.att_context_size[-1]) != 0:
        left = int(adapter.att_context_size[0])
        said = f"modality_adapter.att_context_size={[*adapter.att_context_size]}: hears the future"
        found.append((said, f"{prefix}att_context_size=[{left},0]"))
    for key, value in (("conv_context_size", "causal"), ("conv_norm_type", "layer_norm")):
        if adapter[key] != value:
            said = f"modality_adapter.{key}={adapter[key]}: hears the future"
            found.append((said, f"{prefix}{key}={value}"))
    if (normalize := conf.perception.preprocessor.normalize) != "NA":
        said = f"preprocessor.normalize={normalize}: the statistics of a whole call know its future"
        found.append((said, "model.perception.preprocessor.normalize=NA"))
    given = [*(own := data.train_ds).manifest_filepath, *own.input_cfg, own.shar_path]
    if not any(given) or "..." in given:
        found.append(("data.train_ds: no dialogues", "data.train_ds.manifest_filepath=FILE"))
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        found.append(("trainer.accelerator: torch sees no GPU", "trainer.accelerator=cpu"))
    if (precision := cfg.trainer.precision).startswith("16"):
        said = f"trainer.precision={precision}: fp16 overflows in many LLMs"
        found.append((said, "trainer.precision=bf16-true"))
    return found


def check(cfg, say, verbose):
    """Stop at what cannot run; say what changes nothing, with `verbose` what every key does."""
    if found := refusals(cfg):
        lines = [f"\n  {why}\n      {mend}" for why, mend in found]
        counted = f"{len(found)} settings cannot run; below each what mends it:"
        raise model.UserError(counted + "".join(lines))
    model.check_marked(cfg, DEFAULTS, say, verbose, all_keys=True)
    conf, score = cfg.model, "exp_manager.checkpoint_callback_params"
    kinds = "loss" + " user_wer" * (conf.user_ctc_weight > 0)
    if conf.text_loss_weight > 0:
        kinds += """ ce_pad ce_bos ce_eos ce_text ce_silent ce_speaking txt_wer txt_bleu exact
            answered latency_s stopped stop_s spurious"""
        kinds += " asr_wer asr_bleu" * bool(conf.scoring_asr)
    names = [f"val_{kind}" for kind in kinds.split()]
    names += [f"{kind}_{name}" for kind in names for name in cfg.data.validation_ds.datasets]
    for key, allowed in {
        "model.perception.modality_adapter.self_attention_model": ("rel_pos", "abs_pos"),
        "trainer.accelerator": ("auto", "cpu", "gpu", "cuda"),
        "trainer.precision": ("bf16-true", "bf16-mixed", "bf16", "32-true", "32"),
        f"{score}.mode": ("min", "max"), f"{score}.monitor": names,
    }.items():  # fmt: skip
        model.one_of(allowed, cfg, key)
    own = conf.speech_decoder
    if own and (own.d_model % own.n_heads or own.d_kv not in (0, own.d_model // own.n_heads)):
        raise model.UserError("speech_decoder.d_kv: has to be d_model / n_heads")
    if conf.lora and conf.lora.task_type != "CAUSAL_LM":
        raise model.UserError("model.lora.task_type: only CAUSAL_LM")
    talks = conf.text_loss_weight > 0, conf.audio_loss_weight > 0
    if talks[0] != talks[1] or not talks[0] and conf.user_ctc_weight <= 0:
        said = "text_loss_weight and audio_loss_weight go together; without them user_ctc_weight"
        raise model.UserError(f"{said} has to be over 0")
    model.at_least(1, cfg, "data.train_ds.batch_size", "trainer.accumulate_grad_batches",
                   "data.validation_ds.batch_size", "model.num_codebooks")  # fmt: skip


def list_data(cfg, parts, folder, rank):
    """Rows to train on, those left out, and validation sets {name: rows}."""
    rest = cfg, parts, folder.parent / "manifests"
    if rank > 0:
        dist.barrier()  # process 0 makes codes; the others find what it has made
    train, sets = read_dialogues(cfg.data.train_ds, *rest), {}
    for name, conf in cfg.data.validation_ds.datasets.items():
        sets[name] = read_dialogues(conf, *rest)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    conf, dropped, decoder = cfg.data.train_ds, [], cfg.model.speech_decoder
    limits = {"speech_decoder.max_seq_len": decoder.max_seq_len if decoder else math.inf}

    def usable(rows, limits):
        kept = []
        for n, row in enumerate(rows.select_columns(["key", "where", "reason", "frames"])):
            over = [f"longer than {key}" for key, most in limits.items() if row["frames"] > most]
            if reason := row["reason"] or "".join(over[:1]):
                dropped.append({"key": row["key"], "where": row["where"], "reason": reason})
            else:
                kept.append(n)
        return rows.select(kept)

    sets = {name: usable(rows, limits) for name, rows in sets.items()}
    limits["batch_duration"] = conf.batch_duration / FRAME_S or math.inf
    train = usable(train, limits)
    if rank == 0:
        model.save(folder / "dropped.jsonl", dropped)
    if len(dropped) > conf.max_dropped or not all(map(len, (train, *sets.values()))):
        last = f"the last is {dropped[-1]['where']}: {dropped[-1]['reason']}"
        raise model.UserError(f"{len(dropped)} dialogues cannot be used; {last}")
    return train, dropped, sets


def batch_groups(rows, conf, world, epoch):
    """model.length_batches by frames, of at most batch_size dialogues."""
    lengths = np.asarray(rows["frames"])
    budget = int(conf.batch_duration / FRAME_S) or int(lengths.max()) * conf.batch_size
    return model.length_batches(lengths, budget, world, conf.seed, epoch, conf.batch_size)


def train_step(wrapped, optimizer, batches, cfg, run, window):
    """One optimizer step; adds to `window`. Output: the gradient's norm before clipping."""
    conf, counts = cfg.model, torch.tensor([batch.counts() for batch in batches]).sum(0).float()
    counts = counts.to(run.device, non_blocking=True)
    if run.world > 1:
        dist.all_reduce(counts)  # frames, and tokens of CTC, of the step of all processes
    frames, labels = counts.clamp(min=1)
    for batch in batches:
        waits = run.world > 1 and batch is not batches[-1]  # gradients are summed in the last one
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            with run.amp:
                sums = wrapped(batch.feats.to(run.device, non_blocking=True), batch)
            loss = conf.text_loss_weight * sums["text"] + conf.audio_loss_weight * sums["audio"]
            loss = loss / frames + conf.user_ctc_weight * sums["ctc"] / labels
            (loss * run.world).backward()  # DDP averages over processes; we want the sum
        window.update({k: v.detach() for k, v in sums.items() if k in ("text", "audio", "ctc")})
        own = batch.counts()
        window.update(frames=own[0], labels=own[1])
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, cfg.trainer.gradient_clip_val or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    window.update(steps=1, grad_norm=norm)
    return norm


def main(cfg, check_only=False):
    conf, keep = cfg.trainer, cfg.exp_manager
    folder = Path(keep.explicit_log_dir or Path(keep.exp_dir or "runs", keep.name, keep.version))
    check(cfg, print if os.environ.get("RANK", "0") == "0" else lambda *_: None, check_only)
    name = {"auto": "auto", "cpu": "cpu"}.get(conf.accelerator, "cuda")
    dtype, instead = "fp32" if conf.precision[:2] == "32" else "auto", "trainer.precision=32-true"
    device, dtype, rank, world = model.start(name, dtype, timedelta(hours=12), instead)
    if conf.devices not in (-1, world / conf.num_nodes):
        wanted = f"torchrun --nproc_per_node {conf.devices} --nnodes {conf.num_nodes}"
        raise model.UserError(f"trainer.devices: this is {world} processes; use {wanted}, or -1")
    say = print if rank == 0 else lambda *_: None
    torch.manual_seed(cfg.data.train_ds.seed)
    parts = load_parts(cfg, dtype, device)
    scorer = load_scorer(cfg.model.scoring_asr, device) if cfg.model.scoring_asr else None
    if check_only:
        build(cfg, parts, [], device)
        return
    identity = {n: getattr(parts, n).identity for n in ("encoder", "llm", "codec")}
    lacks = not keep.resume_ignore_no_checkpoint and not (folder / "last.pt").exists()
    if keep.resume_if_exists and lacks:
        raise model.UserError(f"{folder}/last.pt: none; set resume_ignore_no_checkpoint=true")
    state = model.open_run(folder, cfg, identity, keep.resume_if_exists, rank, world)
    train, dropped, sets = list_data(cfg, parts, folder, rank)
    said = train["user_ids"] if cfg.model.user_ctc_weight else []
    tokens = sorted({i for turns in said for ids in turns for i in ids})
    duplex = build(cfg, parts, tokens, device)
    for name, part in duplex.named_children():
        count = sum(p.numel() for p in part.parameters() if p.requires_grad)
        say(f"{name}: {count:,} of {sum(p.numel() for p in part.parameters()):,} weights train")
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    run = SimpleNamespace(device=device, amp=amp, rank=rank, world=world, scorer=scorer)
    groups_of = functools.partial(batch_groups, train, cfg.data.train_ds, world)
    groups, accum = len(groups_of(0)), conf.accumulate_grad_batches
    most = conf.max_steps if conf.max_steps >= 0 else sys.maxsize
    total = min(most, int(conf.max_epochs or sys.maxsize) * groups // accum)
    interval = conf.val_check_interval
    interval *= (conf.limit_train_batches or groups) if interval <= 1 else 1
    identity["data"] = {"dialogues": model.hash_text([*train["key"]])}
    names = [name for name, p in duplex.named_parameters() if p.requires_grad]
    identity["freeze_params"] = {"weights that train": model.hash_text(names)}  # Adam's places
    if state:
        model.check_identity(state["identity"], identity, folder / "last.pt")
    begin = {"step": 0, "epoch": 0, "used": 0, "kept": [], "spent": 0.0}
    step, epoch, used, kept, spent = ((state or begin)[name] for name in begin)
    first_step, own = step, cfg.model.optimizer
    if state:
        load_saved(duplex, state["trained"], folder / "last.pt")
    trained = [p for p in duplex.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1]}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    rest = {"lr": own.lr, "betas": tuple(own.betas), "weight_decay": own.weight_decay}
    optimizer = torch.optim.AdamW([matrices, vectors], **rest, fused=True)
    if state:
        now = optimizer.state_dict()["param_groups"]  # as they are configured now
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": now})
    wrapped = duplex
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(duplex, broadcast_buffers=False)
    places, known = model.endless_groups(groups_of, epoch, used), {row["key"] for row in dropped}
    data, seed = Dialogues(train, duplex, rank), cfg.data.train_ds.seed
    loader = iter(data.load(places, cfg.data.train_ds.num_workers, device))
    writer = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    say(f"train {len(train)} dialogues, {sum(train['frames']) * FRAME_S / 3600:.2f} h an epoch, "
        f"{len(dropped)} left out | {total} steps of {accum} x {world} batches | {device} {dtype}, "
        f"torch {torch.__version__}")  # fmt: skip
    if sets and not state and conf.num_sanity_val_steps:
        model.log_metrics(folder, writer, 0, evaluate(duplex, sets, run)[0])
    duplex.train()
    started = since = time.time()
    window = Counter()  # sums since the last log
    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    while step < total:
        torch.manual_seed(seed * 1_000_003 + step * world + rank)  # dropout, noise
        lr = learning_rate(step, cfg.model, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [next(loader) for _ in range(accum)]
        norm = train_step(wrapped, optimizer, batches, cfg, run, window)
        step, epoch, used = step + 1, batches[-1].epoch, batches[-1].used
        bar.update()
        rows = [row for batch in batches for row in batch.rows]
        model.note_dropped(folder, rows, known, cfg.data.train_ds.max_dropped)
        if model.due(step, conf.log_every_n_steps, total):
            model.log_metrics(folder, writer, step, window_row(window, lr, time.time() - since))
            window, since = Counter(), time.time()
        if sets and model.due(step, max(1, int(interval / accum)), total):
            scores, lines = evaluate(duplex, sets, run)
            model.log_metrics(folder, writer, step, scores)
            for line in lines[:: max(1, len(lines) // 2)] if rank == 0 else ():
                tqdm.write(f"    wanted {line['wanted']}\n    said   {line.get('found')}")
            if rank == 0:
                model.save(folder / "valid.jsonl", lines)
            weights = saved_state(duplex)
            publish = functools.partial(save_results, duplex, cfg, folder) if rank == 0 else None
            rest = keep, weights, folder, publish
            kept = model.keep_best(kept, scores | {"step": step}, *rest)
        if model.due(step, cfg.save_every, total) and rank == 0:
            model.check_gradient(norm, step)
            weights = saved_state(duplex)
            state = {"optimizer": optimizer.state_dict()["state"], "trained": weights, "kept": kept}
            state |= {"format": model.FORMAT, "world": world, "step": step, "epoch": epoch}
            state |= {"used": used, "identity": identity, "config": OmegaConf.to_container(cfg)}
            model.save(folder / "last.pt", state | {"spent": spent + time.time() - started})
            if not sets:
                save_results(duplex, cfg, folder, weights)
    bar.close()
    if sets and (step > first_step or not (folder / "control.json").is_file()):
        scores, _ = evaluate(duplex, sets, run, swap=True)
        if rank == 0:
            model.save(folder / "control.json", scores)
            told = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
            say(f"with the user of another dialogue: {told}")
    say(f"done: {step} steps, {spent + time.time() - started:.0f} s -> {folder}")


def window_row(window, lr, seconds):
    """Averages since the last log, of process 0."""
    frames, gib = max(1, window["frames"]), torch.cuda.max_memory_allocated()
    row = {name: float(window[name]) / frames for name in ("text", "audio")}
    row |= {"ctc": float(window["ctc"]) / max(1, window["labels"]), "lr": lr}
    row["grad_norm"] = float(window["grad_norm"]) / window["steps"]
    return row | {"audio_s_per_s": window["frames"] * FRAME_S / seconds, "gpu_gib": gib / 2**30}


# ---- results, and infer.py --------------------------------------------------


def save_results(duplex, cfg, folder, weights):
    """duplex.pt and config.json: what infer.py and init_from need."""
    model.save(folder / "duplex.pt", weights)
    content = {"format": model.FORMAT, "script": "train_duplex", "ctc_tokens": duplex.ctc_tokens}
    content |= {"conf": OmegaConf.to_container(cfg), "codec": duplex.codec.identity}
    content |= {"encoder": duplex.perception.encoder.identity, "llm": duplex.llm.identity}
    model.save(folder / "config.json", content)


def load_run(folder, cfg, device, dtype):
    """Duplex as a run has saved it; cfg: of infer.py, where encoder and LLM lie now."""
    config, weights = read_run(folder)
    own = OmegaConf.create(config["conf"])
    own.model.pretrained_asr = cfg.encoder.name or own.model.pretrained_asr
    own.model.pretrained_llm = cfg.llm.name or own.model.pretrained_llm
    own.model.init_from = ""
    parts = load_parts(own, dtype, device)
    loaded = {name: getattr(parts, name).identity for name in ("encoder", "llm", "codec")}
    model.check_identity(config, loaded, folder)
    duplex = build(own, parts, config["ctc_tokens"], device)
    load_saved(duplex, weights, folder)
    return model.freeze(duplex)


@torch.no_grad()
def answer(duplex, row, cfg, device, dtype):
    """The agent's side of a recording, for infer.py: line of the .jsonl, wave (N,).

    With duplex.live it comes in frame by frame at the pace of the clock, and each step is timed;
    else it is heard at once and answered in steps.
    """
    encoder, conf = duplex.perception.encoder, cfg.duplex
    rate, frame = encoder.sample_rate, round(FRAME_S * encoder.sample_rate)
    torch.manual_seed(cfg.seed)
    wave = model.load_clip(row, rate, cfg.data.channel)
    seconds, turns = len(wave) / rate, []
    frames = math.ceil(len(wave) / frame + conf.tail_s / FRAME_S - 1e-6)
    decoder = duplex.speech_decoder
    if decoder and frames > decoder.longest:
        raise model.AudioError(f"is longer than max_seq_len={decoder.longest} frames of 80 ms")
    wave = F.pad(wave, (0, frames * frame - len(wave)))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if conf.live:
            text, codes, sound, took = run_live(duplex, wave, frames, conf)
        else:
            feats = encoder.features(wave, row["key"])[None].to(device)
            speech, enc, _ = duplex.perception(feats, torch.tensor([feats.shape[1]]))
            text, codes = duplex.run_free(speech, conf.temperature, conf.top_k)
            text, sound, took = text[0], duplex.to_wave(codes[0]), []
            if duplex.ctc is not None:
                turns = user_turns(duplex.ctc(enc)[0].argmax(-1).tolist(), duplex)
    spoken = [{"role": "agent"} | turn for turn in duplex.turns(text.tolist())]
    line = {"key": row["key"], "source": str(row["source"]), "duration_s": round(seconds, 3)}
    line["text"] = " ".join(turn["text"] for turn in spoken)
    line["turns"] = sorted([*turns, *spoken], key=lambda turn: turn["start"])
    if took:
        ranks = {"median": 0.5, "p95": 0.95, "worst": 1.0}
        took = sorted(round(1000 * s, 1) for s in took)
        line["latency_ms"] = {k: took[int(x * (len(took) - 1))] for k, x in ranks.items()}
    return line, sound.numpy()


def user_turns(path, duplex, pause=8):
    """The user's words as CTC spells them: turns of words with less than `pause` frames between."""
    blank, found, before = len(duplex.ctc_tokens), [], None
    for t, c in enumerate(path):
        if c not in (blank, before):
            if not found or t - found[-1]["last"] > pause:
                found.append({"first": t, "ids": []})
            found[-1]["ids"].append(duplex.ctc_tokens[c])
        if c != blank:
            found[-1]["last"] = t
        before = c
    return [{"role": "user", "start": round(turn["first"] * FRAME_S, 2),
             "end": round((turn["last"] + 1) * FRAME_S, 2),
             "text": duplex.tokenizer.decode(turn["ids"]).strip()} for turn in found]  # fmt: skip


def run_live(duplex, wave, frames, conf):
    """A recording at the pace of the clock -> text (T,), codes (T, K), wave, seconds of each frame
    from its last sample to the agent's sound (its codes, where a codec cannot stream)."""
    encoder, decode = duplex.perception.encoder, duplex.codec.decoder()
    size, ahead = round(FRAME_S * encoder.sample_rate), encoder.lookahead
    wave, state, heard = F.pad(wave, (0, ahead)), duplex.begin(), None
    texts, codes, sounds, took, started = [state.text], [], [], [], time.time()
    for t in range(frames):
        due = started + ((t + 1) * size + ahead) / encoder.sample_rate
        time.sleep(max(0.0, due - time.time()))
        first = t * size + ahead * (t > 0)
        speech, heard = duplex.perception.stream(wave[first : (t + 1) * size + ahead], heard)
        text, code = duplex.step(speech[:, -1], state, conf.temperature, conf.top_k)
        code = code.cpu()  # the clock waits for a GPU
        if decode:
            sounds.append(duplex.to_wave(code, decode))
        took.append(time.time() - due)
        texts.append(text)
        codes.append(code)
    codes = torch.cat(codes)
    sound = torch.cat(sounds) if decode else duplex.to_wave(codes)
    return torch.cat(texts[:-1]), codes, sound, took


if __name__ == "__main__":
    model.run_main(main, DEFAULTS, __doc__, "data.train_ds.batch_size", **SPELLING)
