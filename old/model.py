"""What must not exist twice: audio, features, encoders, adaptor, CTC, SpecAugment, prompt, splice, scoring.

Every script of earshot imports this file and nothing else of ours. What is here makes results silently wrong
when two copies of it differ; what a reader must see to follow a run (data order, loop, schedule, checkpoint)
stands in the scripts themselves.

    wave (N,) 16 kHz -> features (T, F) -> encoder (B, T, W) -> AudioAdaptor (B, S, D) -> splice -> LLM (B, L, D)

Shapes: B batch, N samples, T encoder frames, S adaptor positions, L LLM positions, W encoder width, D LLM width,
V vocabulary. `x (B, T, W)` travels with `lens (B,)`; a bool mask is True where data is real.
"""

import array
import collections
import copy
import functools
import hashlib
import inspect
import itertools
import json
import marshal
import math
import os
import re
import types
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
import yaml
from rapidfuzz.distance import Levenshtein
from torch import nn
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100  # label that cross-entropy skips, as in transformers
AUDIO_MARK = "<|earshot-audio|>"  # stands for the audio while the chat template is rendered; never tokenised
PASS_COSTS = {"cpu": 64, "cuda": 2000}  # a pass takes about as long as so many positions more (cuda: a guess)
# cuDNN's attention plans anew for every shape, which took FunASR's trainer 1 s a step (FunASR pull request 3705), and
# with a mask it has given NaN gradients on H100 and H200 (pytorch issue 196678); torch's own kernels do neither
torch.backends.cuda.enable_cudnn_sdp(False)  # on import, for all who attend; copy it with what you copy
LFR_M, LFR_N = 7, 6  # FunASR's low frame rate: 7 frames of 10 ms stacked every 6, so 60 ms a frame


def upload(x, device):
    """A tensor of the CPU to the device, without waiting for what a GPU still has to do."""
    if device.type == "cuda" and not x.is_cuda and x.nbytes > 2**16:  # CUDA takes up to 64 KB at once in any case
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def download(x):
    """Start a copy to the CPU, behind what a GPU still has to do. Output: a function that waits for it and gives it."""
    if not x.is_cuda:
        return lambda: x
    there, arrived = x.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(x.device))

    def wait():
        arrived.synchronize()
        return there

    return wait


def allow_tf32(allowed):
    """Whether a GPU may round fp32 matrix products and convolutions to TF32 (10 bits of mantissa); whole process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def length_mask(lens, max_len, device=None):
    """Bool mask (B, max_len), True on real positions; on `device`, by default that of lens.

    Lengths best stay on the CPU: asking a GPU for one means waiting for everything that it still has to do.
    """
    mask = torch.arange(max_len, device=lens.device) < lens[:, None]
    return mask if device is None else upload(mask, device)


def freeze(module):
    """Freeze for good: no gradients, eval mode, and a later `.train()` on any parent leaves it in eval.

    Without the last part `model.train()` silently switches dropout back on inside "frozen" modules.
    """
    module.requires_grad_(False).eval()
    for part in module.modules():
        part.train = lambda mode=True, part=part: part
    return module


# ---- audio ------------------------------------------------------------------------------------------------------


class AudioError(ValueError):
    """One clip cannot be used; the message names the file. Runs count such clips and go on (`data.max_bad`)."""


def resample(wave, rate, new_rate):
    """Resample the last axis with one fixed Kaiser-windowed sinc, so that a file has the same features everywhere.

    The parameters are torchaudio's equivalent of librosa's `kaiser_best`; images above the old Nyquist frequency
    stay below -100 dB, which matters when 8 kHz telephone speech enters a 16 kHz front end.
    """
    if rate == new_rate:
        return wave
    if max(rate, new_rate) // math.gcd(rate, new_rate) > 2000:  # the filter bank would take gigabytes
        raise AudioError(f"cannot resample from {rate} Hz to {new_rate} Hz; convert the file to a usual rate first")
    return torchaudio.functional.resample(
        wave, rate, new_rate, lowpass_filter_width=64, rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser", beta=14.769656459379492,
    )


def load_audio(path, sample_rate):
    """Read one file as mono float32 in [-1, 1] at `sample_rate`.

    Input   any rate, channel count and container that libsndfile reads; channels are averaged.
    Output  wave (N,) float32.
    Raises  AudioError, naming the file, if it is missing, empty, truncated, non-finite or not audio.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(str(path)) as file:
            frames, rate, extra_info = file.frames, file.samplerate, file.extra_info
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:  # TypeError: headerless .raw
        raise AudioError(f"{path}: not readable as audio ({error})") from error
    # libsndfile's note on a data chunk shorter than promised; a writer into a pipe promises 2 or 4 GB
    notes = re.findall(r"(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", extra_info)
    if len(samples) < frames or any(int(found) < int(promised) < 0x7FFFF000 for promised, found in notes):
        raise AudioError(f"{path}: truncated, {len(samples)} samples are left of what its header promises")
    if len(samples) == 0:
        raise AudioError(f"{path}: holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: holds NaN or infinite samples")
    wave = torch.from_numpy(samples).mean(dim=1)  # (N, channels) -> (N,)
    try:
        return resample(wave, rate, sample_rate)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error


def change_speed(wave, factor, sample_rate):
    """Kaldi's speed perturbation: `factor` 1.1 plays 10 % faster and higher. wave (N,) -> (N / factor,)."""
    if factor == 1.0:
        return wave
    return resample(wave, round(sample_rate * factor / 100) * 100, sample_rate)


def telephone_channel(wave, sample_rate, generator):
    """A telephone line: 300-3400 Hz band, 8 kHz, G.711 mu-law and a random level. wave (N,) -> (N,)."""
    narrow = resample(wave, sample_rate, 8000)
    narrow = torchaudio.functional.highpass_biquad(narrow, 8000, 300.0)
    narrow = torchaudio.functional.lowpass_biquad(narrow, 8000, 3400.0)
    level = 10 ** (-1.5 * torch.rand((), generator=generator))  # peak between 0 and -30 dBFS
    narrow = narrow / narrow.abs().max().clamp(min=1e-5) * level
    codes = torchaudio.functional.mu_law_encoding(narrow, 256)
    return resample(torchaudio.functional.mu_law_decoding(codes, 256), 8000, sample_rate)[: len(wave)]


# ---- Kaldi front end of SenseVoice and Fun-ASR-Nano -------------------------------------------------------------


def fbank_frames(num_samples, sample_rate=16000):
    """Number of 25 ms frames every 10 ms, Kaldi's snip_edges=True."""
    window, shift = sample_rate * 25 // 1000, sample_rate // 100
    return 1 + (num_samples - window) // shift if num_samples >= window else 0


def lfr_frames(fbank_len):
    """Low-frame-rate frames: ceil(T / 6)."""
    return -(-fbank_len // LFR_N)


def apply_lfr(feats):
    """Stack 7 frames every 6: (T, 80) -> (ceil(T/6), 560), oldest first, edges repeated."""
    steps = torch.arange(lfr_frames(len(feats)))[:, None] * LFR_N
    index = (steps + torch.arange(LFR_M) - (LFR_M - 1) // 2).clamp(0, len(feats) - 1)  # (ceil(T/6), 7)
    return feats[index].flatten(1)


def load_cmvn(path):
    """Read FunASR's `am.mvn`: (2, 560) float32, row 0 is added, row 1 multiplied."""
    rows = re.findall(r"<LearnRateCoef>\s+\S+\s+\[([^\]]*)\]", Path(path).read_text(encoding="utf-8"))
    if len(rows) < 2:
        raise ValueError(f"{path}: expected <AddShift> and <Rescale> vectors of a Kaldi nnet, found {len(rows)}")
    return torch.tensor([[float(x) for x in row.split()] for row in rows[:2]])


@functools.cache
def mel_filters(sample_rate):
    """Kaldi's 80 triangles from 20 Hz to half the rate, (257, 80) at 16 kHz; torchaudio makes them for every clip."""
    shape = 80, 512 * sample_rate // 16000, float(sample_rate)  # filters, points of the FFT, Hz
    filters, _ = torchaudio.compliance.kaldi.get_mel_banks(*shape, 20.0, 0.0, 100.0, -500.0, 1.0)
    return F.pad(filters, (0, 1)).T.contiguous()


def dither_generator(key):
    """Random numbers of a clip's dither: by its key, so that a clip has the same features in every run."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))


def pre_emphasise(frames):
    """Frames (T, N) without their mean, each sample less 0.97 of the one before it: Kaldi's order of steps."""
    frames = frames - frames.mean(dim=1, keepdim=True)
    emphasised = frames.clone()
    emphasised[:, 1:] -= 0.97 * frames[:, :-1]
    emphasised[:, 0] *= 1 - 0.97
    return emphasised


def kaldi_fbank(wave, sample_rate=16000, key="", dither=1.0):
    """Kaldi's log-mel with a Hamming window (N,) -> (T, 80), 25 ms every 10 ms; of int16-scaled samples.

    Equal to torchaudio.compliance.kaldi.fbank (tested), and faster: filters once, no complex magnitudes.
    """
    size = sample_rate // 40
    frames = (wave.float() * 32768).unfold(0, size, sample_rate // 100)  # (T, size)
    if dither:
        frames = torch.randn(frames.shape, generator=dither_generator(key)).mul_(dither).add_(frames)
    frames = pre_emphasise(frames).mul_(torch.hamming_window(size, periodic=False))
    squares = torch.view_as_real(torch.fft.rfft(frames, 512 * sample_rate // 16000)).square_()  # (T, 257, 2)
    power = squares[..., 0] + squares[..., 1]  # a sum over two numbers takes five times as long
    return (power @ mel_filters(sample_rate)).clamp_(min=torch.finfo(torch.float32).eps).log_()


def wav_frontend(wave, key="", dither=1.0, cmvn=None):
    """FunASR's `WavFrontend`: int16-scaled Kaldi log-mel, LFR 7/6, optional CMVN.

    Input   wave (N,) float32 at 16 kHz, at least 400 samples; key seeds the dither. FunASR dithers with a global
            generator, at inference too.
    Output  feats (ceil(T/6), 560), T = fbank_frames(N), 60 ms a frame.
    Raises  AudioError for a clip shorter than one 25 ms window.
    Source  funasr/frontends/wav_frontend.py; the dither stays on because digital silence without it lies 20 nats
            away from what the encoders were trained on.
    """
    if fbank_frames(len(wave)) == 0:
        raise AudioError(f"{key or 'clip'}: {len(wave) / 16000:.3f} s is shorter than one 25 ms window")
    feats = apply_lfr(kaldi_fbank(wave, 16000, key, dither))
    return feats if cmvn is None else (feats + cmvn[0]) * cmvn[1]


# ---- SANM encoder -----------------------------------------------------------------------------------------------


class SANMAttention(nn.Module):
    """Self-attention with memory: multi-head attention plus a depthwise convolution (FSMN) over the values."""

    def __init__(self, input_size, output_size, heads, kernel_size, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q_k_v = nn.Linear(input_size, 3 * output_size)
        self.linear_out = nn.Linear(output_size, output_size)
        self.fsmn_block = nn.Conv1d(output_size, output_size, kernel_size, groups=output_size, bias=False)
        self.left = (kernel_size - 1) // 2
        self.right = kernel_size - 1 - self.left

    def forward(self, x, mask):  # x (B, T, C), mask (B, T)
        query, key, value = self.linear_q_k_v(x).chunk(3, dim=-1)  # each (B, T, W)
        keep = mask[..., None].to(value.dtype)  # (B, T, 1); multiplied, so that padding never leaks into the memory
        kept = value * keep  # (B, T, W)
        padded = F.pad(kept, (0, 0, self.left, self.right)).transpose(1, 2)[:, :, None]  # (B, W, 1, T + kernel - 1)
        # as an image of height 1 with channels last: conv1d would copy to channels first and back, 5 x slower on a CPU
        memory = F.conv2d(padded, self.fsmn_block.weight[:, :, None], groups=padded.shape[1])  # (B, W, 1, T)
        memory = F.dropout(memory[:, :, 0].transpose(1, 2) + kept, self.dropout, self.training) * keep
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(  # (B, heads, T, W/heads)
            query, key, value, attn_mask=mask[:, None, None], dropout_p=self.dropout if self.training else 0.0
        )
        return self.linear_out(attended.transpose(1, 2).flatten(2)) + memory


class SANMFeedForward(nn.Module):
    def __init__(self, size, hidden, dropout):
        super().__init__()
        self.w_1, self.w_2, self.dropout = nn.Linear(size, hidden), nn.Linear(hidden, size), dropout

    def forward(self, x):
        return self.w_2(F.dropout(F.relu(self.w_1(x), inplace=True), self.dropout, self.training))


class SANMLayer(nn.Module):
    """Pre-norm block. Where input and output sizes differ (block 0) the attention has no residual."""

    def __init__(self, input_size, output_size, heads, hidden, kernel_size, dropout, attention_dropout):
        super().__init__()
        self.self_attn = SANMAttention(input_size, output_size, heads, kernel_size, attention_dropout)
        self.feed_forward = SANMFeedForward(output_size, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(input_size), nn.LayerNorm(output_size)
        self.residual, self.dropout = input_size == output_size, dropout

    def forward(self, x, mask):
        attended = F.dropout(self.self_attn(self.norm1(x), mask), self.dropout, self.training)
        x = x + attended if self.residual else attended
        return x + F.dropout(self.feed_forward(self.norm2(x)), self.dropout, self.training)


class SenseVoiceEncoder(nn.Module):
    """The encoder of SenseVoiceSmall and Fun-ASR-Nano: 50 SANM blocks, a norm, 20 more, a norm (221.1 M).

    Input   feats (B, T, 560) float, 60 ms a frame, not changed; lens (B,) int64, real frames in each row.
    Output  enc (B, T, 512), lens. Rows past lens hold values without meaning; they influence no real row.
    Raises  ValueError if feats is not `input_size` wide.
    Source  funasr's `SenseVoiceEncoderSmall`, whose state-dict names it keeps (strict load). Ours is out of place
            (works under gradient checkpointing), takes any dtype and uses scaled_dot_product_attention.
    """

    def __init__(self, input_size=560, output_size=512, attention_heads=4, linear_units=2048, num_blocks=50,
                 tp_blocks=20, kernel_size=11, dropout_rate=0.1, attention_dropout_rate=0.1):
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.gradient_checkpointing = False
        rest = (output_size, attention_heads, linear_units, kernel_size, dropout_rate, attention_dropout_rate)
        self.encoders0 = nn.ModuleList([SANMLayer(input_size, *rest)])
        self.encoders = nn.ModuleList([SANMLayer(output_size, *rest) for _ in range(num_blocks - 1)])
        self.tp_encoders = nn.ModuleList([SANMLayer(output_size, *rest) for _ in range(tp_blocks)])
        self.after_norm, self.tp_norm = nn.LayerNorm(output_size), nn.LayerNorm(output_size)

    def positions(self, length, device):
        """Sinusoids (length, input_size) counted from 1; sines first, then cosines. They precede the projection."""
        half = self.input_size // 2
        rates = torch.exp(torch.arange(half, device=device) * (-math.log(10000) / (half - 1)))
        angles = torch.arange(1, length + 1, device=device)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, feats, lens):
        if feats.shape[-1] != self.input_size:
            raise ValueError(f"SenseVoiceEncoder takes features {self.input_size} wide, got {tuple(feats.shape)}")
        mask = length_mask(lens, feats.shape[1], feats.device)  # (B, T)
        x = feats * self.output_size**0.5 + self.positions(feats.shape[1], feats.device).to(feats.dtype)
        x = x.masked_fill(~mask[..., None], 0.0)  # NaN in the padding would survive a multiplication by 0
        for layer in [*self.encoders0, *self.encoders]:
            x = self.run(layer, x, mask)
        x = self.after_norm(x)
        for layer in self.tp_encoders:
            x = self.run(layer, x, mask)
        return self.tp_norm(x), lens

    def run(self, layer, x, mask):
        if self.gradient_checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(layer, x, mask, use_reentrant=False)
        return layer(x, mask)


# ---- encoder wrappers -------------------------------------------------------------------------------------------


def store_bf16(module):
    """Keep a frozen module's matrices in bf16, where it runs under bf16 autocast: that would convert them every time.

    Outputs are the same to the bit; half the memory. Norms and embeddings stay fp32.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.MultiheadAttention)):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    return module


def hash_tensors(tensors):
    """Short sha256 over names, shapes and bytes of a state dict: the identity of a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def hash_text(value):
    """Short sha256 of anything JSON can write: the identity of a list or a setting."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


def find_model(name):
    """Folder of a model: `name` itself if it is one, else a download by hub name (only then is the net used)."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or str(name).startswith(".") or name.count("/") != 1:
        raise ValueError(f"{name}: no such folder; give a model folder or a hub name such as openai/whisper-tiny.en")
    try:
        if name.startswith(("iic/", "FunAudioLLM/")):  # the ModelScope copy of Fun-ASR-Nano has the CTC weights
            from modelscope import snapshot_download

            return Path(snapshot_download(name))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # both hubs raise many types; whatever it was, the user needs the same advice
        raise ValueError(
            f"{name}: neither a folder here nor reachable on its hub ({type(error).__name__}: {error}); "
            "download it elsewhere and give the folder's path"
        ) from error


class SpeechEncoder(nn.Module):
    """A frozen speech encoder behind one face.

    Attributes  width (W), frame_ms (ms between frames), sample_rate (Hz), identity (dict that names the weights
                and everything that changes the output; a cache made with another one is refused).
    features    wave (N,), key -> feats (T, F): runs in data workers, on the CPU.
    forward     feats (B, T, F), lens (B,) -> enc (B, T', W), lens (B,). Padding never changes a real frame.
    num_frames  samples -> T', the length formula that batching and checks use; out_lens: T -> T'.
    """

    def __init__(self, net, width, frame_ms, identity):
        super().__init__()
        self.net, self.width, self.frame_ms, self.sample_rate = net, width, frame_ms, 16000
        self.identity = {"weights": hash_tensors(net.state_dict()), "width": width, "frame_ms": frame_ms} | identity

    def out_lens(self, lens):
        return lens


class KaldiEncoder(SpeechEncoder):
    """SenseVoiceSmall or the encoder of Fun-ASR-Nano, from a folder in the release's own layout.

    SenseVoiceSmall puts four query frames [language, event, emotion, text norm] before the speech and applies
    `am.mvn`; Fun-ASR-Nano does neither, so their caches are not interchangeable.
    """

    LANGUAGES = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}  # rows of `embed`
    TEXT_NORMS = {"withitn": 14, "woitn": 15}

    def __init__(self, folder, language="auto", text_norm="woitn", keep_query_frames=False):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True, mmap=True)
        weights = weights.get("state_dict", weights)
        nano = "FunASRNano" in str(config.get("model", ""))
        prefix, conf = ("audio_encoder.", "audio_encoder_conf") if nano else ("encoder.", "encoder_conf")
        names = ("output_size", "attention_heads", "linear_units", "num_blocks", "tp_blocks", "kernel_size",
                 "dropout_rate", "attention_dropout_rate")
        net = SenseVoiceEncoder(560, **{name: config[conf][name] for name in names if name in config[conf]})
        net.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
        identity = {"front_end": "kaldi80-lfr7/6-dither1", "query_frames": keep_query_frames and not nano}
        cmvn = None if nano else load_cmvn(folder / "am.mvn")
        if not nano:
            for value, table in ((language, self.LANGUAGES), (text_norm, self.TEXT_NORMS)):
                if value not in table:
                    raise ValueError(f"SenseVoiceSmall knows no {value!r}; it takes one of {', '.join(table)}")
            rows = torch.tensor([self.LANGUAGES[language], 1, 2, self.TEXT_NORMS[text_norm]])
            queries = weights["embed.weight"][rows].float()  # (4, 560)
            identity |= {"language": language, "text_norm": text_norm, "cmvn": hash_tensors({"cmvn": cmvn}),
                              "queries": hash_tensors({"queries": queries})}
        super().__init__(net, net.output_size, 60.0, identity)
        self.cmvn, self.keep_query_frames, self.ctc_tokenizer = cmvn, keep_query_frames, None
        if not nano:
            self.register_buffer("queries", queries)
            self.ctc_lo = nn.Linear(net.output_size, len(weights["ctc.ctc_lo.bias"]))
            self.ctc_lo.load_state_dict({name: weights[f"ctc.ctc_lo.{name}"].float() for name in ("weight", "bias")})
            import sentencepiece

            models = sorted(folder.glob("*.bpe.model"))
            self.ctc_tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(models[0])) if models else None

    def num_frames(self, num_samples):
        queries = 4 if self.cmvn is not None and self.keep_query_frames else 0
        return lfr_frames(fbank_frames(num_samples)) + queries

    def features(self, wave, key=""):
        return wav_frontend(wave, key, cmvn=self.cmvn)

    def forward(self, feats, lens):
        if self.cmvn is None:
            return self.net(feats, lens)
        queries = self.queries.to(feats.dtype).expand(len(feats), -1, -1)
        enc, lens = self.net(torch.cat([queries, feats], dim=1), lens + 4)  # (B, 4 + T, W)
        return (enc, lens) if self.keep_query_frames else (enc[:, 4:], lens - 4)

    def ctc_best(self, enc):
        """The best class of SenseVoice's own CTC head in each frame: enc (B, T, W) -> (B, T) int64; its blank is 0.

        Raises ValueError where the encoder has no such head, or no tokenizer for it.
        """
        if self.ctc_tokenizer is None:
            raise ValueError("this encoder has no CTC head of its own with a tokenizer; only SenseVoiceSmall has")
        return self.ctc_lo(enc).argmax(-1)

    def ctc_read(self, best, lens):
        """What that head reads: best (B, T) of ctc_best, lens (B,) of the encoder, on the CPU -> list of B strings."""
        if self.keep_query_frames:  # the first four frames predict language, emotion, event and text norm
            best, lens = best[:, 4:], lens - 4
        return [self.ctc_tokenizer.decode(path).strip() for path in ctc_paths(best, lens, blank=0)]


class WhisperEncoder(SpeechEncoder):
    """Any transformers Whisper encoder, at the clip's own length (default) or padded to 30 s as in its training.

    At clip length a 3 s prompt costs 3.2 s of frames instead of 30 (12-14 x faster on the demo's prompts); the
    features differ a little (cosine 0.90-0.96), so an adaptor must be trained with the setting it is used with.
    """

    TAIL_S = 0.2  # silence after a clip: without it the last word is cut, since Whisper learned to see a pause

    def __init__(self, folder, pad_to_30s=False):
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        net = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.encoder
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
        identity = {"front_end": f"whisper-mel{extractor.feature_size}-tail{self.TAIL_S}", "pad_to_30s": pad_to_30s}
        super().__init__(net, net.config.d_model, 20.0, identity)
        self.pad_to_30s, self.hop, self.max_frames = pad_to_30s, extractor.hop_length, net.config.max_source_positions
        self.mel_bins, self.n_fft = extractor.feature_size, extractor.n_fft
        # float32 copy of the extractor's own filters; a plain tensor, so that data workers share it
        self.mel_filters = torch.from_numpy(np.asarray(extractor.mel_filters)).float()  # (201, M)

    def num_frames(self, num_samples):
        padded = num_samples + round(self.TAIL_S * self.sample_rate)
        return self.max_frames if self.pad_to_30s else min(self.max_frames, (padded // self.hop + 1) // 2)

    def features(self, wave, key=""):
        """Whisper's log-mel: (mel frames, M). Equal to transformers' extractor on the same samples (tested)."""
        limit = 2 * self.max_frames * self.hop
        if len(wave) > limit:
            raise AudioError(f"{key or 'clip'}: {len(wave) / 16000:.1f} s is longer than Whisper's 30 s; split it")
        total = limit if self.pad_to_30s else min(limit, len(wave) + round(self.TAIL_S * self.sample_rate))
        wave = F.pad(wave.float(), (0, total - len(wave)))
        spectrum = torch.stft(wave, self.n_fft, self.hop, window=torch.hann_window(self.n_fft), return_complex=True)
        log_mel = (self.mel_filters.T @ spectrum[:, :-1].abs() ** 2).clamp(min=1e-10).log10()  # (M, mel frames)
        log_mel = log_mel.clamp(min=log_mel.max() - 8.0)
        return ((log_mel + 4.0) / 4.0).T

    def out_lens(self, lens):
        return (lens + 1) // 2

    def forward(self, feats, lens):
        net = self.net
        keep = length_mask(lens, feats.shape[1], feats.device)[:, None].to(feats.dtype)  # (B, 1, mel frames)
        x = feats.transpose(1, 2).masked_fill(keep == 0, 0.0)  # (B, M, mel frames)
        x = F.gelu(net.conv1(x)) * keep  # conv2 must see zeros past the end, as it does for a single clip
        x = F.gelu(net.conv2(x)).transpose(1, 2)  # (B, T, W)
        lens = self.out_lens(lens)
        x = x + net.embed_positions.weight[: x.shape[1]]
        mask = None
        if lens.is_cuda or int(lens.min()) < x.shape[1]:
            mask = length_mask(lens, x.shape[1], x.device)[:, None, None].expand(-1, 1, x.shape[1], -1)
        for layer in net.layers:
            x = layer(x, mask)
        return net.layer_norm(x), lens


def load_encoder(name, language="auto", text_norm="woitn", keep_query_frames=False, pad_to_30s=False):
    """Load a frozen encoder by hub name or local folder in the hub's own layout.

    Input   name: iic/SenseVoiceSmall, FunAudioLLM/Fun-ASR-Nano-2512, any Whisper of transformers, or a folder.
            language, text_norm, keep_query_frames concern SenseVoiceSmall; pad_to_30s concerns Whisper.
    Output  SpeechEncoder, fp32, on the CPU, no gradients, in eval mode whatever `.train()` its parents call.
    Raises  ValueError naming what is missing.
    """
    folder = find_model(name)
    if (folder / "config.yaml").is_file():
        encoder = KaldiEncoder(folder, language, text_norm, keep_query_frames)
    elif (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        parakeet = str(kind).startswith("parakeet")
        if kind != "whisper" and not parakeet:
            raise ValueError(f"{name}: model_type {kind!r} is not supported; use a Whisper, SenseVoice or Fun-ASR-Nano")
        encoder = ParakeetEncoder(folder) if parakeet else WhisperEncoder(folder, pad_to_30s)
    else:
        raise ValueError(f"{name}: has neither config.yaml (FunASR) nor config.json (transformers)")
    encoder.identity["name"] = str(name)
    return freeze(encoder)


# ---- adaptor ----------------------------------------------------------------------------------------------------


class AudioAdaptor(nn.Module):
    """Map encoder frames to LLM embeddings: stack, Linear, transformer, Linear, LayerNorm (207.7 M by default).

    Input   enc (B, T, input_dim), enc_lens (B,) int64 real frames in each row.
    Output  emb (B, S, output_dim), S = ceil(T / stack); emb_lens (B,). Rows past emb_lens are zero.
            Padding, even NaN, never reaches a real position.
    Raises  ValueError if enc has another width or a length lies outside 1..T (lengths on a GPU are not looked at).
    Source  the published adaptor's state-dict names and order (input_proj, transformer, output_proj, norm).
            Departures: padding is masked; `norm.weight` can start at the RMS of the LLM's embedding table
            (`embedding_rms`), since a LayerNorm at 1.0 is about 40 x louder than Qwen3's embeddings. Stacking as in
            SLAM-ASR (arXiv:2402.08846), but a ragged tail is padded, not dropped. `num_layers=0` is SLAM-ASR's
            Linear-GELU-Linear with dropout between.
    """

    def __init__(self, input_dim=512, output_dim=2560, hidden_dim=2048, num_layers=4, num_heads=8, dropout=0.1,
                 stack=1, pre_norm=False, embedding_rms=None):
        super().__init__()
        self.input_dim, self.stack = input_dim, stack
        self.input_proj = nn.Linear(input_dim * stack, hidden_dim)
        if num_layers:
            layers = [
                nn.TransformerEncoderLayer(
                    hidden_dim, num_heads, 4 * hidden_dim, dropout, "gelu", batch_first=True, norm_first=pre_norm
                )
                for _ in range(num_layers)
            ]
            self.transformer = nn.TransformerEncoder(layers[0], num_layers, enable_nested_tensor=False)
            self.transformer.layers = nn.ModuleList(layers)  # its own are copies: all would start with equal weights
        else:
            self.transformer, self.activation = None, nn.Sequential(nn.GELU(), nn.Dropout(dropout))
        self.output_proj = nn.Linear(hidden_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim)
        if embedding_rms is not None:
            nn.init.constant_(self.norm.weight, embedding_rms)

    def layers(self):
        """Its transformer layers, for compile_layers."""
        return [] if self.transformer is None else self.transformer.layers

    def out_lens(self, enc_lens):
        """S = ceil(T / stack): positions for a tensor or number of frames."""
        return (enc_lens + self.stack - 1) // self.stack

    def forward(self, enc, enc_lens):
        batch, frames, width = enc.shape
        known = not enc_lens.is_cuda
        if width != self.input_dim or known and not 1 <= int(enc_lens.min()) <= int(enc_lens.max()) <= frames:
            raise ValueError(
                f"AudioAdaptor takes (B, T, {self.input_dim}) and lengths in 1..T, got {tuple(enc.shape)} and "
                f"lengths {int(enc_lens.min())}..{int(enc_lens.max())}"
            )
        emb_lens = self.out_lens(enc_lens)
        enc = enc.masked_fill(~length_mask(enc_lens, frames, enc.device)[..., None], 0.0)
        enc = F.pad(enc, (0, 0, 0, -frames % self.stack))  # (B, S * stack, W)
        x = self.input_proj(enc.reshape(batch, -1, width * self.stack))  # (B, S, hidden)
        mask = length_mask(emb_lens, x.shape[1], x.device)
        x = self.activation(x) if self.transformer is None else self.transformer(x, src_key_padding_mask=~mask)
        emb = self.norm(self.output_proj(x))  # (B, S, D)
        return emb.masked_fill(~mask[..., None], 0.0), emb_lens


def embedding_rms(embedding):
    """Root mean square of an embedding table (V, D): the loudness at which the LLM expects its input."""
    return float(embedding.detach().float().pow(2).mean().sqrt())


# ---- CTC --------------------------------------------------------------------------------------------------------


class CTCHead(nn.Module):
    """CTC over an own vocabulary, or over rows of the LLM's embedding table plus a learned blank.

    CTCHead(width, vocab_size=V)                       own vocabulary: one Linear, classes 0..V-1
    CTCHead(width, embedding=E (V, D), token_ids=ids)  tied: class c scores the frame against E[ids[c]]; D = width
    Input   x (B, S, width), lens (B,).  Output  log-probabilities (B, S, C + 1) fp32; the blank is the last class.
    The tied head makes minutes of speech count: it pulls each position towards the embedding of the token that is
    spoken there, which is just what the LLM reads. Restricting it to the tokens of the training transcripts changes
    nothing that could be learned and saves most of the softmax.
    """

    def __init__(self, width, vocab_size=None, embedding=None, token_ids=None):
        super().__init__()
        if (vocab_size is None) == (embedding is None):
            raise ValueError("CTCHead takes either vocab_size or an embedding table")
        if embedding is None:
            self.proj, self.blank = nn.Linear(width, vocab_size + 1), vocab_size
            self.register_buffer("token_ids", torch.arange(vocab_size))
            return
        token_ids = torch.arange(len(embedding)) if token_ids is None else torch.as_tensor(token_ids)
        self.proj, self.blank = None, len(token_ids)
        self.register_buffer("token_ids", token_ids.to(embedding.device))  # class -> token of the LLM
        table = embedding.detach()[self.token_ids].float()
        # a copy of frozen weights, with rows of zeros up to a multiple of 8: a GPU has slow kernels for odd numbers
        self.register_buffer("rows", F.pad(table, (0, 0, 0, -len(table) % 8)), persistent=False)
        rms = embedding_rms(table)
        self.blank_row = nn.Parameter(torch.randn(width, device=table.device) * rms)
        self.blank_bias = nn.Parameter(torch.zeros(1, device=table.device))
        # scores of unrelated vectors start with standard deviation 1, of a perfect match at sqrt(D)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(rms**2 * width**0.5), device=table.device))

    def forward(self, x, lens=None):
        if self.proj is not None:
            return self.proj(x).float().log_softmax(-1)
        scale = self.log_scale.exp()
        tokens = F.linear(x * scale, self.rows.to(x.dtype))[..., : self.blank]  # (B, S, C)
        blank = F.linear(x * scale, self.blank_row[None].to(x.dtype)) + self.blank_bias
        return torch.cat([tokens, blank.to(tokens.dtype)], dim=-1).float().log_softmax(-1)

    @property
    def table(self):
        """The embeddings of its tokens (C, D)."""
        return self.rows[: self.blank]

    def classes(self, ids):
        """Token ids of the LLM -> classes of this head; ids that the head does not have are left out.

        Training prints how many those are, since nothing else would show them.
        """
        if not hasattr(self, "class_of"):
            self.class_of = {token: index for index, token in enumerate(self.token_ids.tolist())}
        return [self.class_of[token] for token in ids if token in self.class_of]

    def tokens(self, classes):
        if not hasattr(self, "token_of"):  # asking a GPU for each of them would mean waiting for it each time
            self.token_of = self.token_ids.tolist()
        return [self.token_of[c] for c in classes]

    def loss(self, log_probs, lens, targets):
        """Sum over the batch of -log p(target), and how many rows were left out.

        targets: list of class lists. A row with more labels than frames allow has infinite loss; it is left out and
        counted (so is an empty one), because `zero_infinity` would otherwise hide it.
        """
        lens = lens.cpu()
        possible = [i for i, (t, n) in enumerate(zip(targets, lens.tolist())) if ctc_min_frames(t) <= n and t]
        if not possible:
            return log_probs.sum() * 0.0, len(targets)
        if len(possible) < len(targets):  # else no copy of the scores, which are large
            log_probs, lens = log_probs[upload(torch.tensor(possible), log_probs.device)], lens[possible]
        flat = upload(torch.tensor([c for i in possible for c in targets[i]]), log_probs.device)
        target_lens = [len(targets[i]) for i in possible]
        total = F.ctc_loss(log_probs.transpose(0, 1), flat, lens.tolist(), target_lens, self.blank, reduction="sum")
        return total, len(targets) - len(possible)


def ctc_log_prob(log_probs, labels, blank):
    """log p(labels) of one clip by CTC, all paths; -inf if they do not fit. log_probs (S, C)."""
    if ctc_min_frames(labels) > len(log_probs):
        return -math.inf
    if not labels:
        return float(log_probs[:, blank].sum())
    size = (torch.tensor([len(log_probs)]), torch.tensor([len(labels)]))
    return -float(F.ctc_loss(log_probs[:, None].cpu(), torch.tensor([labels]), *size, blank, reduction="sum"))


def ctc_min_frames(labels):
    """Frames that CTC needs: one a label, and one blank between equal neighbours."""
    return len(labels) + sum(a == b for a, b in zip(labels, labels[1:]))


def ctc_greedy(scores, lens, blank):
    """Best path, repeats merged, blanks dropped: scores (B, S, C) -> list of label lists."""
    return ctc_paths(scores.argmax(-1), lens, blank)


def ctc_paths(best, lens, blank):
    """The same from the best class of each position (B, S)."""
    paths = []
    for row, length in zip(best.tolist(), lens.tolist()):
        row = row[:length]
        paths.append([c for i, c in enumerate(row) if c != blank and (i == 0 or c != row[i - 1])])
    return paths


def ctc_beam_search(log_probs, blank, beam=8):
    """Prefix beam search: the most probable label sequences, summed over their paths.

    Input   log_probs (S, C), one clip.  Output  list of (labels, log-probability within the beam), best first.
    Source  Hannun et al. 2014 (arXiv:1408.2873), without a language model; `beam` labels are tried a position.
    """
    beams = {(): (0.0, -math.inf)}  # prefix -> log-probability of ending in a blank, of ending in its last label
    best = log_probs.topk(min(beam, log_probs.shape[1]), dim=1)
    for values, labels, silent in zip(best.values.tolist(), best.indices.tolist(), log_probs[:, blank].tolist()):
        grown = {}

        def add(prefix, place, value, grown=grown):
            ends = grown.setdefault(prefix, [-math.inf, -math.inf])
            ends[place] = float(np.logaddexp(ends[place], value))

        for prefix, (in_blank, in_label) in beams.items():
            total = float(np.logaddexp(in_blank, in_label))
            add(prefix, 0, total + silent)
            for value, label in zip(values, labels):
                if label == blank:
                    continue
                if prefix and prefix[-1] == label:  # without a blank between, it is the same label held on
                    add(prefix, 1, in_label + value)
                    add((*prefix, label), 1, in_blank + value)
                else:
                    add((*prefix, label), 1, total + value)
        beams = dict(sorted(grown.items(), key=lambda item: -np.logaddexp(*item[1]))[:beam])
    scored = [(list(prefix), float(np.logaddexp(*ends))) for prefix, ends in beams.items()]
    return [(labels, score) for labels, score in scored if score > -math.inf]


def ctc_align(log_probs, labels, blank):
    """Forced alignment by torchaudio. log_probs (S, C), labels list -> [(label, first, end, log-prob)] in positions.

    Raises ValueError if there are more labels than positions allow.
    """
    if ctc_min_frames(labels) > len(log_probs):
        raise ValueError(f"{len(labels)} labels do not fit into {len(log_probs)} CTC positions")
    if not labels:
        return []
    classes = sorted({blank, *labels})  # few of many: the others need not leave the GPU
    place = {label: n for n, label in enumerate(classes)}
    scores = log_probs[:, upload(torch.tensor(classes), log_probs.device)].float().cpu()[None]  # (1, S, few)
    target = torch.tensor([[place[label] for label in labels]], dtype=torch.int32)
    path, scores = torchaudio.functional.forced_align(scores, target, blank=place[blank])
    spans = torchaudio.functional.merge_tokens(path[0], scores[0], blank=place[blank])
    return [(classes[span.token], span.start, span.end, span.score) for span in spans]


def word_times(spans, pieces, position_s):
    """Join aligned tokens into words: [(word, start_s, end_s)].

    pieces are the tokens' texts; a piece that starts with a space, or with a CJK character, begins a new word.
    """
    words = []
    for (_, first, end, _), piece in zip(spans, pieces):
        text = piece.strip()
        if not words or piece[:1].isspace() or is_cjk(text[:1]):
            words.append([text, first * position_s, end * position_s])
        else:
            words[-1][0] += text
            words[-1][2] = end * position_s
    return [tuple(word) for word in words if word[0]]


def ctc_soft_speech(log_probs, lens, head):
    """CTC-compressed soft speech: one LLM embedding for each token that CTC hears.

    Each run of equal non-blank best labels becomes the mean, over its positions, of the posterior-weighted token
    embeddings (blank left out). Uncertainty survives: where CTC wavers between two words the LLM gets a mixture.
    Input   log_probs (B, S, C + 1) of a tied head.
    Output  soft (B, K, D), soft_lens (B,), at least 1 (a clip in which CTC hears nothing gives its mean posterior).
            Rows past soft_lens are zero. Padding, even NaN, never reaches a real row.
    """
    best = log_probs.argmax(-1)  # (B, S)
    real = length_mask(lens, best.shape[1], best.device)
    spoken = real & (best != head.blank)
    previous = F.pad(best, (1, 0), value=head.blank)[:, :-1]
    starts = spoken & (best != previous)
    silent = ~spoken.any(dim=1)
    spoken = spoken | (real & silent[:, None])
    starts[:, 0] |= silent
    run = (starts.cumsum(1) - 1).clamp(min=0)  # (B, S), index of the run that a position belongs to
    soft_lens = starts.sum(1)
    weights = F.one_hot(run, int(soft_lens.max())) * spoken[..., None]  # (B, S, K)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    scores = log_probs[..., : head.blank].masked_fill(~real[..., None], 0.0)  # a weight of 0 would not stop a NaN
    posterior = scores.softmax(-1)  # (B, S, C), renormalised without the blank
    mean = torch.einsum("bsk,bsc->bkc", weights.to(posterior.dtype), posterior)
    return mean @ head.table, soft_lens  # (B, K, D)


def speech_for_llm(adaptor, ctc, enc, enc_lens, speech):
    """What the LLM hears, in training and inference alike.

    speech  "frames": the adaptor's output; "ctc": CTC-compressed soft speech made from it.
    Output  speech (B, K, D), its lens, CTC log-probabilities (B, S, C + 1) or None without a head, lens of S.
    """
    if speech not in ("frames", "ctc") or speech == "ctc" and (ctc is None or ctc.proj is not None):
        raise ValueError(f"llm.speech is frames or ctc, and ctc needs a tied CTC head; got {speech!r}")
    emb, emb_lens = adaptor(enc, enc_lens)
    if ctc is None:
        return emb, emb_lens, None, emb_lens
    with torch.autocast(emb.device.type, enabled=False):  # log-probabilities in bf16 would be off by 1 %
        log_probs = ctc(emb.float())
        if speech == "ctc":
            return *ctc_soft_speech(log_probs, emb_lens, ctc), log_probs, emb_lens
    return emb, emb_lens, log_probs, emb_lens


def read_weights(path):
    """A plain state dict of tensors; ValueError for anything else, such as a torn file or a pickle with code in it."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torn file, or a pickle that would run code: weights_only refuses it
        raise ValueError(f"{path}: not a plain state dict of tensors ({type(error).__name__}); not loaded") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path}: not a plain state dict of tensors; not loaded")
    return weights


def load_weights(module, path):
    """Load a plain state dict of exactly this module; ValueError names what does not fit."""
    try:
        module.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit the configured {type(module).__name__}: {error}") from error


# ---- SpecAugment ------------------------------------------------------------------------------------------------


class SpecAugLFR(nn.Module):
    """SpecAugment on stacked (LFR) features, with FunASR's arguments; active in training mode only.

    Input   feats (B, T, 560), lens (B,), an optional torch.Generator.  Output  (masked copy, lens).
    Units   freq_mask_width_range in mel bins (the same bins in all lfr_rate + 1 stacked frames);
            time_mask_width_range in 60 ms frames, upper bound excluded as in FunASR.
    Departures from FunASR, which draws over the padded batch: every utterance has its own length and bound, so that
    short clips are not wiped out, and `time_mask_max_ratio` caps each time mask at a share of the utterance.
    Masks are 0.0, as there. Time warping is per utterance (FunASR's bicubic, left and right part).
    """

    def __init__(self, apply_time_warp=True, time_warp_window=5, time_warp_mode="bicubic", apply_freq_mask=True,
                 freq_mask_width_range=(0, 20), num_freq_mask=2, lfr_rate=0, apply_time_mask=True,
                 time_mask_width_range=None, time_mask_width_ratio_range=None, num_time_mask=2,
                 time_mask_max_ratio=None):
        super().__init__()
        if apply_time_mask and (time_mask_width_range is None) == (time_mask_width_ratio_range is None):
            raise ValueError("SpecAugLFR: give one of time_mask_width_range and time_mask_width_ratio_range")
        self.warp_window = time_warp_window if apply_time_warp else 0
        self.warp_mode = time_warp_mode
        self.freq_range = self.as_range(freq_mask_width_range)
        self.num_freq_mask = num_freq_mask if apply_freq_mask else 0
        self.num_time_mask = num_time_mask if apply_time_mask else 0
        self.time_range = self.as_range(time_mask_width_range) if time_mask_width_range is not None else None
        self.ratio_range = self.as_range(time_mask_width_ratio_range) if time_mask_width_ratio_range else None
        self.groups, self.max_ratio = lfr_rate + 1, time_mask_max_ratio

    @staticmethod
    def as_range(value):
        low, high = (0, value) if isinstance(value, (int, float)) else value
        if not high > low:
            raise ValueError(f"SpecAugLFR: a width range needs high > low, got {value}")
        return low, high

    def forward(self, feats, lens, generator=None):
        if not self.training:
            return feats, lens
        if self.warp_window:
            feats = self.time_warp(feats, lens, generator)
        lens_cpu = lens.cpu()
        hidden = torch.zeros(feats.shape, dtype=torch.bool)
        if self.num_freq_mask:
            bins = feats.shape[2] // self.groups
            size = torch.full_like(lens_cpu, bins)
            widths = torch.randint(*self.freq_range, (len(feats), self.num_freq_mask), generator=generator)
            hidden |= self.mask(widths, size, bins, generator).repeat(1, self.groups)[:, None]
        if self.num_time_mask:
            widths = self.time_widths(lens_cpu, generator)
            hidden |= self.mask(widths, lens_cpu, feats.shape[1], generator)[..., None]
        return feats.masked_fill(hidden.to(feats.device), 0.0), lens

    def time_widths(self, lens, generator):
        shape = (len(lens), self.num_time_mask)
        if self.time_range is not None:
            widths = torch.randint(*self.time_range, shape, generator=generator)
        else:
            low, high = ((lens * ratio).floor().long()[:, None] for ratio in self.ratio_range)
            widths = (low + torch.rand(shape, generator=generator) * (high - low).clamp(min=0)).long()
        if self.max_ratio is not None:
            widths = torch.minimum(widths, (lens * self.max_ratio).floor().long()[:, None])
        return widths

    @staticmethod
    def mask(widths, sizes, max_size, generator):
        """widths (B, n) placed at random within sizes (B,) -> bool (B, max_size), True where hidden."""
        room = (sizes - widths.max(dim=1).values).clamp(min=1)[:, None]  # one bound a row, as FunASR has one a batch
        first = (torch.rand(widths.shape, generator=generator) * room).long()[..., None]
        steps = torch.arange(max_size)
        inside = (steps >= first) & (steps < first + widths[..., None]) & (steps < sizes[:, None, None])
        return inside.any(dim=1)

    def time_warp(self, feats, lens, generator):
        rows, window = [], self.warp_window
        for row, length in zip(feats, lens.tolist()):
            if length > 2 * window:
                center = int(torch.randint(window, length - window, (1,), generator=generator))
                warped = int(torch.randint(center - window, center + window, (1,), generator=generator)) + 1
                parts = ((row[:center], warped), (row[center:length], length - warped))
                parts = [F.interpolate(x[None, None], (n, x.shape[1]), mode=self.warp_mode)[0, 0] for x, n in parts]
                row = torch.cat([*parts, row[length:]])
            rows.append(row)
        return torch.stack(rows)


# ---- LLM: loading, prompt, splice, loss, decoding ---------------------------------------------------------------


def load_llm(name, dtype=torch.float32, device="cpu", lora_r=0, lora_alpha=None, lora_targets=("q_proj", "v_proj")):
    """Load a causal LLM and its tokenizer, frozen and in eval for good; `lora_r` > 0 adds trainable fp32 LoRA.

    Output  (llm, tokenizer). llm.model returns hidden states, llm.lm_head scores them.
    LoRA weights stay fp32 beside bf16 frozen ones; LoRA dropout is 0, since the whole LLM stays in eval.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    llm.identity = {"name": str(name), "weights": hash_tensors({"embed": llm.get_input_embeddings().weight.bfloat16()})}
    if lora_r:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=lora_r, lora_alpha=lora_alpha or 2 * lora_r, target_modules=list(lora_targets))
        llm = inject_adapter_in_model(config, llm)
    fuse_norms(llm)
    freeze(llm)  # after the injection, so that peft's new modules stay in eval too
    for parameter in lora_parameters(llm).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return llm.to(device), tokenizer


def fuse_norms(llm):
    """RMSNorm by torch's own kernel: transformers' is eight, and a layer of Qwen3 has four norms.

    The same formula; in bf16 the weight is multiplied before rounding, not after.
    """
    def forward(norm, x):
        return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)

    for part in llm.modules():
        if type(part).__name__.endswith("RMSNorm") and hasattr(part, "variance_epsilon"):
            part.forward = types.MethodType(forward, part)  # a method, so that a deep copy has its own weights


def compile_layers(layers, device):
    """torch.compile of layers that are all alike, in place: they share one compilation, for every batch and length.

    On a GPU only, where it joins what stands between the matrix products into few kernels (on a CPU it gained nothing).
    What cannot be compiled runs as it is, with a warning; that setting is the whole process's.
    """
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True
        for layer in layers:
            if type(layer).__module__.startswith("torch.nn."):  # a call of torch's own modules is never compiled
                layer.forward = torch.compile(layer.forward, dynamic=True)
            else:
                layer.compile(dynamic=True)


class Graphs:
    """A function as CUDA graphs, one for each set of shapes: the CPU then launches one thing and not thousands.

    Input   tensors on the GPU; the function may not look at their values (no .item(), no sizes that depend on them).
    Output  what the function returns, in memory that the next call writes to again. Every set of shapes keeps memory of
            its own, so lengths should recur; autocast should be the same in all calls.
            On a CPU the function is simply called.
    """

    def __init__(self, function):
        self.function, self.graphs, self.pool = function, {}, None

    def __call__(self, *tensors):
        if not tensors[0].is_cuda:
            return self.function(*tensors)
        shapes = tuple(x.shape for x in tensors)
        with torch.cuda.device(tensors[0].device):
            if shapes not in self.graphs:
                self.graphs[shapes] = self.record([x.clone() for x in tensors])
            graph, inputs, outputs = self.graphs[shapes]
            for own, given in zip(inputs, tensors):
                own.copy_(given)
            graph.replay()
        return outputs

    def record(self, inputs):
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        side, graph, caching = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # of LoRA's weights in bf16: it is gone when the graph is replayed
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate in their first call, which must not be recorded
                for _ in range(2):
                    self.function(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, self.pool):
                outputs = self.function(*inputs)
        finally:
            torch.set_autocast_cache_enabled(caching)
        return graph, inputs, outputs


def load_embedding(name):
    """The LLM's input embedding table (V, D) fp32 and its tokenizer, without loading the LLM."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder, tensor = find_model(name), "model.embed_tokens.weight"
    index = folder / "model.safetensors.index.json"
    file = "model.safetensors"
    if index.is_file():  # large models come in several files
        file = json.loads(index.read_text(encoding="utf-8"))["weight_map"][tensor]
    if not (folder / file).is_file():
        raise ValueError(f"{folder}: has no {file}; earshot reads safetensors only")
    with safe_open(folder / file, framework="pt") as weights:
        return weights.get_tensor(tensor).float(), AutoTokenizer.from_pretrained(folder)


def lora_parameters(llm):
    """{name: parameter} of the LoRA weights, empty if there are none."""
    return {name: parameter for name, parameter in llm.named_parameters() if "lora_" in name}


def end_of_turn(tokenizer):
    """Id of the token that the chat template puts after an answer; trained as a label, so that generation stops."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": AUDIO_MARK}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).split(AUDIO_MARK)[1]
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("this tokenizer's chat template puts no token after an answer; use an instruct model")
    return ids[0]


def join_names(hotwords):
    """Hotwords, a list or one string with commas, as they stand in a prompt."""
    hotwords = re.split(r"[,，]\s*", hotwords) if isinstance(hotwords, str) else map(str, hotwords)
    return ", ".join(filter(None, hotwords))


def build_prompt(tokenizer, prompt, draft=None, language=None, hotwords=(), system=None):
    """The one prompt of training and inference: a chat turn with the audio inside.

    `system | user: prompt AUDIO [draft] | assistant:` is rendered with the tokenizer's own chat template (thinking
    off) and cut at the audio.
    Input   prompt: instruction; `{language}` in it is replaced. draft: a first transcript to be corrected, or None
            for none. hotwords: names that may occur, a list or one string with commas. system: system text ("" for
            an empty one, None for the template's default).
    Output  (before, after): token ids on either side of the audio.
    """
    if "{language}" in prompt:
        prompt = prompt.replace("{language}", language or "")
    if names := join_names(hotwords):
        prompt = ("热词列表：[{}]\n" if is_cjk(prompt[:1]) else "Hotwords: [{}]\n").format(names) + prompt
    prompt, draft = prompt.replace(AUDIO_MARK, ""), draft and draft.replace(AUDIO_MARK, "")
    user = prompt + AUDIO_MARK + ("" if draft is None else f"\n{draft}")
    return render_prompt(tokenizer, user, system)


@functools.lru_cache(1024)  # most clips have the same prompt, and a template takes longer than a clip's share of a GPU
def render_prompt(tokenizer, user, system):
    """Token ids on either side of the audio in a chat turn; not to be changed, since the next caller gets them too."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": user}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False,
    )
    before, after = text.split(AUDIO_MARK)
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))


def text_to_ids(tokenizer, text):
    """Token ids of a transcript, without special tokens; of a list of transcripts (several times as fast), lists.

    Latin text gets a leading space: " press one" and "one" would otherwise have two tokens for the same word, and
    CTC would have to learn both.
    """
    def spaced(one):
        return one if not one or is_cjk(one[0]) else f" {one}"

    if isinstance(text, str):
        return tokenizer(spaced(text), add_special_tokens=False)["input_ids"]
    text, backend = [spaced(one) for one in text], getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    backend.no_truncation()  # a tokenizer.json may ask for it; transformers turns it off in every call, too
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(text, add_special_tokens=False)]


def splice(embed, prompts, emb, emb_lens, targets=None, pad_left=False, shared=0):
    """Put each example's audio between the two halves of its prompt, and the answer behind.

        inputs  [before | audio | after | target       | pad]
        labels  [-100   | -100  | -100  | target       | -100]

    Input   embed: the LLM's input embedding module; prompts: list of (before, after) id lists; emb (B, S, D) with
            emb_lens (B,); targets: list of id lists that end with the end-of-turn token, or None to generate.
            pad_left: the padding stands behind the first `shared` positions (of the prompt), for greedy_decode.
    Output  dict inputs_embeds (B, L, D), attention_mask (B, L), position_ids (B, L), labels (B, L) int64; the labels
            on the CPU, so that nobody has to ask a GPU where they are.
    """
    targets = [[] for _ in prompts] if targets is None else targets
    if not len(prompts) == len(targets) == len(emb) == len(emb_lens) or int(emb_lens.max()) > emb.shape[1]:
        raise ValueError(
            f"splice: {len(prompts)} prompts, {len(targets)} targets, audio {tuple(emb.shape)}, "
            f"longest length {int(emb_lens.max())}"
        )
    lens = emb_lens.tolist()
    sizes = [len(b) + n + len(a) + len(target) for (b, a), n, target in zip(prompts, lens, targets)]
    shape = len(sizes), max(sizes)
    # everything is laid out here, on the CPU, so that a GPU is handed a few tensors and not a few for every row
    ids, real, labels = np.zeros(shape, np.int64), np.zeros(shape, bool), np.full(shape, IGNORE, np.int64)
    source, rows, columns = [], [], []  # of the audio: its positions in (B * S, D), and where they go in (B, L, D)
    for row, ((before, after), target, length, size) in enumerate(zip(prompts, targets, lens, sizes)):
        shift, end = (shape[1] - size) * pad_left, len(before) + length  # end of the audio, without shift
        real[row, :shared] = real[row, shared + shift : size + shift] = True
        ids[row, :shared], ids[row, shared + shift : len(before) + shift] = before[:shared], before[shared:]
        ids[row, end + shift : size + shift] = [*after, *target]
        labels[row, size + shift - len(target) : size + shift] = target
        source.append(row * emb.shape[1] + np.arange(length))
        rows.append(np.full(length, row))
        columns.append(len(before) + shift + np.arange(length))
    ids, real, source, rows, columns = (upload(torch.from_numpy(x), emb.device) for x in (
        ids, real, *map(np.concatenate, (source, rows, columns))))
    words = embed(ids).masked_fill(~real[..., None], 0.0)  # (B, L, D)
    audio = emb.flatten(0, 1).index_select(0, source).to(words.dtype)  # (real positions, D)
    return {
        "inputs_embeds": words.index_put((rows, columns), audio),  # not a view, for which layers compile once more
        "attention_mask": real.long(),
        "position_ids": (real.long().cumsum(1) - 1).clamp(min=0),
        "labels": torch.from_numpy(labels),
    }


def shared_prefix(prompts):
    """How many leading tokens all prompts (list of (before, after) id lists) have in common before the audio."""
    first, *rest = [before for before, _ in prompts]
    count = min(len(before) for before, _ in prompts)
    return next((n for n in range(count) if any(before[n] != first[n] for before in rest)), count)


def hidden_states(llm, embeds, shared=0):
    """Last hidden states of right-padded rows embeds (B, L, D), from position `shared` on: (B, L - shared, D).

    A causal LLM does not look to the right, so such rows need no mask (and attention takes its fastest kernel).
    The first `shared` positions, the same in all rows, run once: their keys and values serve every row. Values and
    gradients are those of the plain pass (tested).
    """
    from transformers import DynamicCache, masking_utils

    if not shared:
        # without a mask transformers asks in every pass whether rows are packed (ours never are): that waits for a GPU,
        # and a CUDA graph, which cannot wait, would take them for packed
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
        return llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    cache = DynamicCache(config=llm.config)
    prefix = embeds[:1, :shared]  # of a frozen table: without gradient, though the rows have one through their speech
    prefix = prefix if llm.get_input_embeddings().weight.requires_grad else prefix.detach()
    cached_pass(llm, cache, inputs_embeds=prefix)
    cache.batch_repeat_interleave(len(embeds))
    return cached_pass(llm, cache, inputs_embeds=embeds[:, shared:])


def cached_pass(llm, cache, **inputs):
    """Last hidden states (B, L, D) of what comes behind the positions in `cache`, which takes it up.

    Input   input_ids (B, L) or inputs_embeds (B, L, D); optional attention_mask (B, cached + L), position_ids (B, L).
    Layers that were compiled run as they are: each would be compiled anew for its own part of the cache.
    """
    with torch.compiler.set_stance("force_eager"):
        inputs[cache_argument(type(llm.model))] = cache
        return llm.model(**inputs, use_cache=True).last_hidden_state


@functools.cache
def cache_argument(kind):
    """What a class of transformers calls its cache: `past_key_values`, since 5.24 `cache`."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def transcript_loss(llm, spliced, shared=0, label_smoothing=0.0):
    """Cross-entropy of the labels through the LLM, logits on label positions only.

    Input   spliced: of `splice`; shared: as in hidden_states, on a CPU (a GPU reads whole rows).
    Output  (sum of CE in nats, on the device; number of label tokens; number of them predicted right, on the device).
    """
    device = spliced["inputs_embeds"].device
    shared = 0 if device.type == "cuda" else shared  # an H200 is faster on whole rows, compiled (README, Speed)
    labels = spliced["labels"][:, shared + 1 :]
    row, column = (labels != IGNORE).nonzero(as_tuple=True)  # position l predicts token l + 1
    target = upload(labels[row, column], device)
    hidden = hidden_states(llm, spliced["inputs_embeds"], shared)
    places = upload(row * hidden.shape[1] + column, device)
    logits = llm.lm_head(hidden.flatten(0, 1).index_select(0, places)).float()  # (label tokens, V)
    loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
    return loss, len(target), (logits.argmax(-1) == target).sum()


@torch.no_grad()
def read_prefix(llm, ids):
    """Keys and values of the token ids with which many prompts begin, for greedy_decode: computed once, one row."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=llm.config)
    if ids:
        cached_pass(llm, cache, input_ids=torch.tensor([ids], device=llm.device))
    return cache


def greedy_decode(llm, spliced, stop_id, max_new_tokens, repetition_penalty=1.0, no_repeat_ngram_size=0, drafts=None,
                  prefix=None):
    """decode_stream of one batch. Output: (list of id lists, list of sums of log-probabilities)."""
    batch = spliced, max_new_tokens, drafts, prefix
    _, answers, scores = zip(*sorted(decode_stream(llm, [batch], stop_id, repetition_penalty, no_repeat_ngram_size)))
    return list(answers), list(scores)


@torch.no_grad()
def decode_stream(llm, batches, stop_id, repetition_penalty=1.0, no_repeat_ngram_size=0, few=0):
    """Greedy decoding from spliced embeddings, batch after batch; rows leave as soon as they are finished.

    Input   batches: iterable of (spliced, max_new_tokens, drafts, prefix), each read in a pass of its own.
            spliced: left-padded; prefix: from read_prefix, of the first `shared` positions that `splice` has put before
            the padding, or None.
            max_new_tokens: list with one cap per row (from the clip's duration). A row that repeats itself (cut_loop)
            is cut back to one copy: a loop is never a transcript.
            drafts: a guess at each answer, list of id lists, or None; for speculative decoding: the LLM reads the guess
            in the same pass as the prompt and keeps it up to the first token that it would not have written itself,
            then next_guess. The answers are those without drafts, in fewer passes. Ignored where repetition is
            penalised.
            few: the next batch is begun when so many rows are left; they go on together with it (continuous batching).
    Output  yields (number of the row, counted over all batches; ids without the stop token; sum of log-probabilities).
    """
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
    from transformers.cache_utils import DynamicLayer

    processors = [RepetitionPenaltyLogitsProcessor(repetition_penalty)] if repetition_penalty != 1.0 else []
    if no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(no_repeat_ngram_size))

    def advance(part):
        """One pass: every row writes a token, and what is right of its guess. Output: the rows that are finished."""
        most = max(1, PASS_COSTS[part.mask.device.type] // len(part.rows))  # in the first pass a guess is whole
        offered = [row.guess[: most if row.answer else None] for row in part.rows]
        ranked = scored = read_pass(llm, part, offered)  # (rows and all that is offered, V)
        for processor in processors:  # they work on logits
            said = [torch.tensor([row.answer], dtype=torch.long, device=ranked.device) for row in part.rows]
            ranked = torch.cat([processor(ids, logits) for ids, logits in zip(said, ranked.split(1))])
        chosen = ranked.argmax(-1)
        gained = scored.gather(1, chosen[:, None])[:, 0] - scored.logsumexp(-1)  # log-probabilities
        finished, going, agreed, written = [], [], [], []
        chosen, gained = iter(chosen.tolist()), iter(gained.tolist())
        for slot, (row, guess) in enumerate(zip(part.rows, offered)):
            tokens, log_probs = ([next(values) for _ in range(1 + len(guess))] for values in (chosen, gained))
            goes_on, right = accept(row, guess, tokens, log_probs, stop_id)
            if goes_on:
                going.append(slot)
                agreed.append(right)
                written.append([tokens[right]])
                row.guess = next_guess(row.answer, row.guess[right:]) if row.drafted else []
            else:
                finished.append((row.number, row.answer, row.score))
        keep_agreed(part, max(map(len, offered)), going, agreed, written)
        return finished

    part, number = None, 0
    for spliced, caps, drafts, prefix in batches:
        rows = []
        for cap, draft in zip(caps, [None] * len(caps) if drafts is None or processors else drafts, strict=True):
            rows.append(SimpleNamespace(number=number, answer=[], score=0.0, cap=cap, drafted=draft is not None,
                                        guess=list(draft or [])))
            number += 1
        cache = copy.deepcopy(prefix) if prefix is not None else read_prefix(llm, [])
        shared = cache.get_seq_length()
        if shared:
            cache.batch_repeat_interleave(len(rows))
        new = SimpleNamespace(
            rows=rows, cache=cache, mask=spliced["attention_mask"], position=spliced["position_ids"][:, shared:],
            inputs={"inputs_embeds": spliced["inputs_embeds"][:, shared:]})
        joinable = all(type(layer) is DynamicLayer for layer in cache.layers)  # a sliding window has its own count
        del spliced, cache
        yield from advance(new)
        part = join_parts(part, new)
        while len(part.rows) > (few if joinable else 0):
            yield from advance(part)
    while part is not None and part.rows:
        yield from advance(part)


def accept(row, guess, tokens, log_probs, stop_id):
    """A row's answer grows by what was guessed right and one token more, all of them the LLM's own choice.

    Input   tokens, log_probs: what the LLM writes in place of each guessed token, and behind the last.
    Output  whether the answer goes on; how many tokens were guessed right.
    """
    for right, (token, log_prob) in enumerate(zip(tokens, log_probs)):
        row.score += log_prob
        if not add_token(row.answer, token, stop_id, row.cap):
            return False, right
        if right == len(guess) or guess[right] != token:
            return True, right


def read_pass(llm, part, guesses):
    """The LLM reads what comes next in each row and the guess behind it (list of id lists).

    Output  logits (N, V) fp32 of each row's last known position and its guess, row after row; padding has none.
    """
    inputs, mask, position = part.inputs, part.mask, part.position
    width = max(map(len, guesses))
    if width:
        inputs, mask, position = append_guesses(llm, inputs, mask, position, guesses)
    hidden = cached_pass(llm, part.cache, **inputs, attention_mask=mask, position_ids=position)
    first = hidden.shape[1] - 1 - width
    places = [(slot, first + n) for slot, guess in enumerate(guesses) for n in range(1 + len(guess))]
    return llm.lm_head(hidden[tuple(torch.tensor(places, device=hidden.device).T)]).float()


def keep_agreed(part, width, going, agreed, written):
    """After a pass over guesses up to `width` long: the rows in the slots `going` stay, with the first `agreed` ids of
    their guesses, and read what they have `written` next.

    What was guessed wrong leaves the cache; where another row was right, the mask has a hole.
    """
    finished = len(going) < len(part.rows)
    part.rows = [part.rows[slot] for slot in going]
    if not going:
        return
    longest = max(agreed)
    keep, agreed = torch.tensor([going, agreed], device=part.mask.device)
    if finished:
        part.cache.batch_select_indices(keep)
        part.mask, part.position = part.mask[keep], part.position[keep]
    if longest < width:
        part.cache.crop(longest - width)
    ones = part.mask.new_ones(len(keep), 1)
    part.mask = torch.cat([part.mask, length_mask(agreed, longest).to(part.mask.dtype), ones], dim=1)
    part.position = part.position[:, -1:] + 1 + agreed[:, None]
    part.inputs = {"input_ids": torch.tensor(written, device=part.mask.device)}


def join_parts(old, new):
    """Unfinished rows of two batches as one, padded on the left to the longer; positions that none needs go."""
    if old is None or not old.rows:
        return new
    if not new.rows:
        return old
    used = old.mask.any(0).nonzero()[:, 0]  # without this the cache would grow for as long as batches come
    gap = new.mask.shape[1] - len(used)

    def joined(first, second, dim):  # padding goes in front of `dim`, counted from the end
        front = (0, 0) * (dim - 1)
        return torch.cat([F.pad(first, (*front, max(gap, 0), 0)), F.pad(second, (*front, max(-gap, 0), 0))])

    for layer, other in zip(old.cache.layers, new.cache.layers):  # the mask's last column is of what is read next
        layer.keys = joined(layer.keys[:, :, used[:-1]], other.keys, 2)
        layer.values = joined(layer.values[:, :, used[:-1]], other.values, 2)
        other.keys = other.values = None
    return SimpleNamespace(
        rows=old.rows + new.rows, cache=old.cache, mask=joined(old.mask[:, used], new.mask, 1),
        position=torch.cat([old.position, new.position]),
        inputs={"input_ids": torch.cat([old.inputs["input_ids"], new.inputs["input_ids"]])})


@torch.no_grad()
def decode_drafted(llm, batches, stop_id, alone=None):
    """decode_stream for a GPU and clips with drafts: the same answers without a key-value cache, in whole passes.

    A pass reads prompt, speech, the answer so far and the guess behind it, as in training, and the answer grows by what
    was guessed right and one token more. What is not finished is read again, all of it, with the clips of the next
    batch. Two passes are under way at a time, so that the GPU has one while the CPU looks at the other.
    To a GPU the hundred positions of a clip cost little more than one (it has to fetch all weights in any case), while
    passes over a cache are many small operations for which it waits.
    Input   batches: iterable of lists of namespaces: prompt (before, after), speech (K, D), guess (list of ids), cap.
            alone: finish each batch, of one clip, before the next one is begun; Graphs of hidden_states for its passes.
    Output  yields (namespace, ids without the stop token, sum of log-probabilities).
    """
    embed, waiting, flying, budget = llm.get_input_embeddings(), [], collections.deque(), 0

    def size(row):
        before, after = row.clip.prompt
        return len(before) + len(row.clip.speech) + len(after) + len(row.answer) + len(row.guess)

    def begin(rows):
        """Start a pass. Output: its rows, and what the LLM writes in place of each guess and behind, on its way."""
        speech = [row.clip.speech for row in rows]
        spliced = splice(embed, [row.clip.prompt for row in rows], pad_sequence(speech, True),
                         torch.tensor(list(map(len, speech))), [row.answer + row.guess for row in rows])
        embeds = spliced["inputs_embeds"]
        if alone is None:
            hidden = hidden_states(llm, embeds)
        else:
            embeds = F.pad(embeds, (0, 0, 0, -embeds.shape[1] % 32))  # to lengths that come again
            hidden = alone(embeds)
        first = [n * embeds.shape[1] + size(row) - len(row.guess) - 1 for n, row in enumerate(rows)]
        places = torch.tensor([at + n for at, row in zip(first, rows) for n in range(1 + len(row.guess))])
        hidden, chosen, gained = hidden.flatten(0, 1).index_select(0, upload(places, hidden.device)), [], []
        for part in hidden.split(256):  # of more, the scores would take more memory than all else but the weights
            scores = llm.lm_head(part).float()
            best = scores.max(-1)
            chosen.append(best.indices)
            gained.append(best.values - scores.logsumexp(-1))  # log-probabilities
        return rows, download(torch.cat(chosen)), download(torch.cat(gained))

    def end(rows, chosen, gained):
        """Yields what a pass has finished; the rest waits."""
        chosen, gained = iter(chosen().tolist()), iter(gained().tolist())
        for row in rows:
            tokens, log_probs = ([next(values) for _ in range(1 + len(row.guess))] for values in (chosen, gained))
            goes_on, right = accept(row, row.guess, tokens, log_probs, stop_id)
            if goes_on:
                row.guess = next_guess(row.answer, row.guess[right:])
                waiting.append(row)
            else:
                yield row.clip, row.answer, row.score

    for batch in itertools.chain(batches, [[]]):  # at the end, what is left
        new = [SimpleNamespace(clip=clip, answer=[], score=0.0, cap=clip.cap, guess=clip.guess) for clip in batch]
        budget = max(budget, len(new) * max(map(size, new), default=0))  # positions of a pass: as the largest batch has
        waiting += new
        at_once = alone is not None or not batch
        del batch, new  # what is finished can leave the memory before more is heard
        while True:
            waiting.sort(key=size, reverse=True)
            if len(flying) < 2 and waiting and (at_once or size(waiting[0]) * len(waiting) >= budget):
                count = max(1, budget // size(waiting[0]))
                flying.append(begin(waiting[:count]))
                del waiting[:count]
            elif len(flying) == 2 or flying and at_once:
                yield from end(*flying.popleft())
            else:
                break  # one pass goes on while the next batch comes


def cut_runs(lengths, pass_cost):
    """Where to cut a descending list of lengths into batches: the least padded positions, a pass costing as many more.

    Output  list of (first, end).
    """
    best, cuts = [0], [0]  # of the first n: the cost, and where their last run begins
    for end in range(1, len(lengths) + 1):
        cost, first = min((best[first] + pass_cost + lengths[first] * (end - first), first) for first in range(end))
        best.append(cost)
        cuts.append(first)
    runs, end = [], len(lengths)
    while end:
        runs.insert(0, (cuts[end], end))
        end = cuts[end]
    return runs


def append_guesses(llm, inputs, mask, position, guesses):
    """Put guesses (list of id lists) behind what the LLM reads next, padded on the right."""
    lens = torch.tensor([len(guess) for guess in guesses], device=mask.device)
    ids = pad_sequence([torch.tensor(guess, dtype=torch.long) for guess in guesses], True).to(mask.device)
    if "input_ids" in inputs:
        inputs = {"input_ids": torch.cat([inputs["input_ids"], ids], dim=1)}
    else:
        embeds = inputs["inputs_embeds"]
        words = llm.get_input_embeddings()(ids).to(embeds.dtype)
        inputs = {"inputs_embeds": torch.cat([embeds, words], dim=1)}
    steps = torch.arange(1, ids.shape[1] + 1, device=mask.device)
    mask = torch.cat([mask, length_mask(lens, ids.shape[1]).to(mask.dtype)], dim=1)
    return inputs, mask, torch.cat([position, position[:, -1:] + steps], dim=1)


def next_guess(answer, rest, longest=16):
    """What may follow the answer. `rest`: what is left of the guess, from the place of the answer's last token on.

    If the guess had that token there, the rest was only not offered yet. Else, where the last two tokens stand in the
    rest, it goes on behind them; or where the last one comes soon, for then the guess had something too much. Where
    the answer has been here before, it may repeat itself (prompt lookup, as transformers calls it); to give up the rest
    of a guess for that takes three equal tokens. Else the guess had another token in this place.
    """
    token, pair, soon, alike = answer[-1], answer[-2:], rest[:4], 3 if rest[1:] else 2
    if token in soon[:1]:
        return rest[1:]
    for n in range(len(rest) - 1):
        if rest[n : n + 2] == pair:
            return rest[n + 2 :]
    if token in soon:
        return rest[soon.index(token) + 1 :]
    for n in range(len(answer) - alike - 1, -1, -1):
        if answer[n : n + alike] == answer[-alike:]:
            return answer[n + alike :][:longest]
    return rest[1:]


@torch.no_grad()
def answer_log_probs(llm, prompt, speech, answers, stop_id):
    """log p(answer, end of turn | prompt, speech) of several answers to one clip, in one forward pass.

    Input   prompt (before, after) id lists, speech (K, D), answers: list of id lists.  Output  (N,) fp32.
    """
    many = [prompt] * len(answers)
    lens = torch.full((len(answers),), len(speech), device=speech.device)
    targets = [[*answer, stop_id] for answer in answers]
    spliced = splice(llm.get_input_embeddings(), many, speech.expand(len(answers), -1, -1), lens, targets)
    shared = len(prompt[0]) + len(speech) + len(prompt[1]) - 1  # all but the last token before the answer
    labels = spliced["labels"][:, shared + 1 :]
    row, column = (labels != IGNORE).nonzero(as_tuple=True)
    hidden = hidden_states(llm, spliced["inputs_embeds"], shared)[row, column]
    target = labels[row, column].to(hidden.device)
    scores = llm.lm_head(hidden).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    return torch.zeros(len(answers), device=scores.device).index_add(0, row.to(scores.device), scores)


def token_cap(seconds, ctc_tokens=None):
    """Most new tokens for a clip: fast speech has about 8 Chinese characters or 5 English words a second.

    Where CTC has counted the tokens it heard, a transcript of half as many again is a runaway, not a correction.
    """
    cap = 8 + math.ceil(12 * seconds)
    return cap if ctc_tokens is None else min(cap, 4 + math.ceil(1.5 * ctc_tokens))


def add_token(answer, token, stop_id, cap):
    """Append a decoded token. False ends the answer: the stop token (left out), a loop (cut back), or the cap."""
    if token == stop_id:
        return False
    answer.append(token)
    if cut_loop(answer):
        return False
    if len(answer) < cap:
        return True
    while cut_loop(answer, least=2, tokens=2):  # it did not end by itself: what it said last may well start a loop
        pass
    return False


def cut_loop(ids, longest=32, least=3, tokens=16):
    """Cut a runaway loop in place: the last n <= 32 ids, repeated 3 times or more, become one copy. True if it did.

    A loop is 16 tokens long at least: "zero zero zero zero" is a phone number. A row that ran into its cap is under
    suspicion: there 2 copies of anything are one too many.
    """
    for n in range(1, longest + 1):
        times = max(least, -(-tokens // n))
        if len(ids) >= n * times and all(ids[-n:] == ids[-n * (k + 1) : -n * k] for k in range(1, times)):
            del ids[len(ids) - n * (times - 1) :]
            return True
    return False


# ---- text and scoring -------------------------------------------------------------------------------------------


def is_cjk(text):
    """True if the first character is Chinese, Japanese or Korean (no spaces between words)."""
    return bool(text) and bool(re.match(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]", text))


class Blanks(dict):
    """For str.translate: punctuation, symbols, spaces and control characters become a space, all else stays."""

    def __missing__(self, code):
        self[code] = " " if unicodedata.category(chr(code))[0] in "PSCZ" and chr(code) != "'" else chr(code)
        return self[code]


BLANKS = Blanks()


def normalize_text(text):
    """The one normaliser of training targets and scoring: NFKC, lower case, no punctuation, single spaces.

    Apostrophes inside words stay ("don't"). Spaces beside Chinese characters go: "打开 wifi 吧" is "打开wifi吧".
    Numbers are left as written: "5" and "five" count as different, so spell your references one way.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'").translate(BLANKS)
    text = " ".join(word for word in (w.strip("'") for w in text.split()) if word)
    return text if text.isascii() else re.sub(r"(?<=[\u3400-\u9fff]) | (?=[\u3400-\u9fff])", "", text)


def score_units(text, language=None):
    """What an error rate counts: characters for Chinese, Japanese and Korean (spaces left out), else words."""
    cjk = language in ("zh", "yue", "ja", "ko") or (language is None and any(is_cjk(c) for c in text))
    return list(text.replace(" ", "")) if cjk else text.split()


def error_rate(references, hypotheses, language=None, normalize=True):
    """Corpus error rate: CER for Chinese, WER otherwise; edits summed over all pairs / reference units.

    Output  dict rate, errors, substitutions, deletions, insertions, units (0 units: rate 0 or inf).
    Raises  ValueError if the lists differ in length.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    total = {"substitutions": 0, "deletions": 0, "insertions": 0, "units": 0}
    for reference, hypothesis in zip(references, hypotheses):
        if normalize:
            reference, hypothesis = normalize_text(reference), normalize_text(hypothesis)
        cjk = language or ("zh" if any(is_cjk(c) for c in reference) else "en")  # the reference decides for both
        reference, hypothesis = score_units(reference, cjk), score_units(hypothesis, cjk)
        total["units"] += len(reference)
        for operation in Levenshtein.editops(reference, hypothesis):
            total[{"replace": "substitutions", "delete": "deletions", "insert": "insertions"}[operation.tag]] += 1
    errors = total["substitutions"] + total["deletions"] + total["insertions"]
    rate = errors / total["units"] if total["units"] else (math.inf if errors else 0.0)
    return {"rate": rate, "errors": errors} | total


# ---- manifests --------------------------------------------------------------------------------------------------


def read_manifest(spec):
    """Read a list of utterances from any of the accepted forms.

    spec    a JSONL file (ours: key, source, target, optional language, prompt, hotwords; FunASR's `messages` too),
            a folder with Kaldi's wav.scp and text, or an AISHELL-1 folder with its part: `data_aishell:train`.
    Output  list of dicts key, source (path), target, where ("train.jsonl:17"), and whatever else a row carries.
    Raises  ValueError naming file, line and field; a source that does not exist is found later, clip by clip.
    """
    return list(iter_manifest(spec))


def iter_manifest(spec):
    """read_manifest row by row: of millions, a training run keeps only what it needs (Utterances)."""
    folder, _, part = str(spec).rpartition(":")
    if folder and Path(folder).is_dir():
        read = functools.partial(read_aishell, Path(folder), part)
    elif Path(spec).is_dir():
        read = functools.partial(read_kaldi, Path(spec))
    elif Path(spec).is_file():
        read = functools.partial(read_jsonl, Path(spec))
    else:
        raise ValueError(f"{spec}: no such manifest; give a .jsonl, a Kaldi folder or data_aishell:train")
    hashes = array.array("q")  # the keys of millions of rows would take a gigabyte
    for row in read():
        hashes.append(hash(row["key"]))
        yield row
    if not hashes:
        raise ValueError(f"{spec}: holds no utterances")
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) < len(hashes):
        twice, first = set(values[counts > 1].tolist()), {}
        for row in (row for row in read() if hash(row["key"]) in twice):
            where = first.setdefault(row["key"], row["where"])
            if where != row["where"]:
                raise ValueError(f"{row['where']}: key {row['key']!r} stands at {where} too; keys are unique")


class Utterances:
    """A list of utterances (dicts key, target, ids, frames, seconds, ...) in flat blocks of memory, or of a folder.

    Less than 240 bytes each (tested), where dicts take several times as much. Forked workers share them, and so do all
    processes of a machine that load them from a folder: each of `blocks` is then a .npy file, mapped into memory.
    """

    def __init__(self):
        # text: all fields that have no array of their own, marshalled, which is four times as fast as JSON
        self.text, self.ends = array.array("B"), array.array("q", [0])
        self.ids, self.id_ends = array.array("i"), array.array("q", [0])
        self.frames, self.seconds = array.array("i"), array.array("d")

    def append(self, utterance):
        rest = dict(utterance)
        self.ids.extend(rest.pop("ids"))
        self.frames.append(rest.pop("frames"))
        self.seconds.append(rest.pop("seconds"))
        self.text.frombytes(marshal.dumps(rest))
        self.ends.append(len(self.text))
        self.id_ends.append(len(self.ids))

    def blocks(self):
        return {name: np.asarray(block) for name, block in vars(self).items()}

    @classmethod
    def load(cls, folder):
        utterances = cls()
        for name in vars(utterances):
            setattr(utterances, name, np.asarray(np.load(Path(folder) / f"{name}.npy", mmap_mode="r")))
        return utterances

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # IndexError past the end, which also ends a loop over all
        utterance = marshal.loads(self.text[self.ends[index] : self.ends[index + 1]])
        utterance["ids"] = self.ids[self.id_ends[index] : self.id_ends[index + 1]].tolist()
        return utterance | {"frames": int(self.frames[index]), "seconds": float(self.seconds[index])}

    @property
    def num_ids(self):
        return np.diff(self.id_ends)

    def token_counts(self):
        """How often each token id occurs: array (largest id + 1,)."""
        ids = np.asarray(self.ids)
        counts = np.zeros(ids.max(initial=-1) + 1, dtype=np.int64)
        for start in range(0, len(ids), 2**22):  # in pieces: bincount copies what it counts
            counts += np.bincount(ids[start : start + 2**22], minlength=len(counts))
        return counts


def read_lines(path):
    """Lines of a UTF-8 file, ended by "\\n" only: str.splitlines also cuts at U+2028 or U+0085 inside a transcript."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); convert it first") from error


def read_jsonl(path):
    folder = os.path.join(os.path.dirname(path), "")
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken JSON ({error.msg} at column {error.colno})") from error
        if isinstance(row, dict) and "messages" in row:
            row = funasr_row(row, where, number)
        for field in ("key", "source", "target"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(f"{where}: {field!r} is missing or not a string; a line needs key, source and target")
        if not os.path.isabs(row["source"]):
            row["source"] = folder + row["source"]  # pathlib takes 10 x as long, which millions of rows feel
        row["where"] = where
        yield row


def funasr_row(row, where, number):
    """FunASR's chat format: the audio is `!path` between <|startofspeech|> and <|endofspeech|>; one turn a line."""
    if not isinstance(row["messages"], list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in row["messages"]):
        raise ValueError(f"{where}: `messages` has to be a list of turns, each with role and content as text")
    roles = [turn.get("role") for turn in row["messages"]]
    turns = {turn.get("role"): turn["content"] for turn in row["messages"]}
    audio = re.findall(r"<\|startofspeech\|>!?(.*?)<\|endofspeech\|>", turns.get("user", ""))
    if roles.count("user") > 1 or roles.count("assistant") > 1 or len(audio) > 1:
        raise ValueError(f"{where}: `messages` has several turns or clips; a line is one clip and its answer: split it")
    if not audio or not audio[0] or "assistant" not in turns:
        raise ValueError(f"{where}: `messages` needs a turn with <|startofspeech|>!path<|endofspeech|> and an answer")
    extra = {k: v for k, v in row.items() if k in ("key", "language", "hotwords", "asr_hotwords", "speech_length")}
    return {"key": f"{Path(audio[0]).stem}-{number}", "source": audio[0], "target": turns["assistant"]} | extra


def read_kaldi(folder):
    tables = {}
    for name in ("wav.scp", "text"):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder}: a Kaldi folder needs wav.scp and text; {name} is not there")
        lines = enumerate(read_lines(path), start=1)
        tables[name] = [(n, *line.strip().split(maxsplit=1)) for n, line in lines if line.strip()]
    texts = {row[1]: row[2] if len(row) > 2 else "" for row in tables["text"]}
    for number, key, *source in tables["wav.scp"]:
        where = f"wav.scp:{number}"
        if not source or source[0].rstrip().endswith("|"):
            raise ValueError(f"{where}: {key} needs a plain path (pipes are not run)")
        if key not in texts:
            raise ValueError(f"{where}: {key} has no line in {folder / 'text'}")
        yield {"key": key, "source": str(folder / source[0]), "target": texts[key], "where": where}


def read_aishell(folder, part):
    """AISHELL-1 as it unpacks. Utterances without a transcript (there are a few) are named and left out."""
    path = folder / "transcript" / "aishell_transcript_v0.8.txt"
    if not path.is_file():
        raise ValueError(f"{folder}: not an AISHELL-1 folder, {path} is not there")
    lines = (line.split(maxsplit=1) for line in read_lines(path) if line.strip())
    texts = {key: "".join(text[0].split()) if text else "" for key, *text in lines}
    waves = sorted((folder / "wav" / part).glob("*/*.wav"))
    without = [wave.stem for wave in waves if not texts.get(wave.stem)]
    if without:
        print(f"{folder}:{part}: {len(without)} of {len(waves)} utterances have no transcript, left out: "
              f"{', '.join(without[:5])}{' ...' if len(without) > 5 else ''}")
    for wave in waves:
        if texts.get(wave.stem):
            yield {"key": wave.stem, "source": str(wave), "target": texts[wave.stem], "language": "zh",
                   "where": str(wave)}


# ---- SteerMoE: Parakeet's encoder, steering, pooling, bridge ----------------------------------------------------


class ParakeetEncoder(SpeechEncoder):
    """The FastConformer encoder of transformers' Parakeet models: 80 ms frames, no final norm.

    Each clip is normalised by its own mean and deviation, so that a batch never changes a clip.
    """

    def __init__(self, folder):
        from transformers import ParakeetEncoder as Net
        from transformers import ParakeetFeatureExtractor

        net = Net.from_pretrained(folder, dtype=torch.float32)
        net.layerdrop = 0.0  # where it is fine-tuned, DDP waits for every layer
        frame_ms = 10.0 * net.config.subsampling_factor
        super().__init__(net, net.config.hidden_size, frame_ms, {"front_end": f"parakeet-mel{net.config.num_mel_bins}"})
        self.extractor = ParakeetFeatureExtractor.from_pretrained(folder)

    def num_frames(self, num_samples):
        return self.out_lens(num_samples // self.extractor.hop_length)

    def out_lens(self, lens):
        """Mel frames -> encoder frames: each halving keeps ceil(n / 2), as a convolution 3 wide, padded by 1, does."""
        for _ in range(int(math.log2(self.net.config.subsampling_factor))):
            lens = (lens + 1) // 2
        return lens

    def features(self, wave, key=""):
        if len(wave) < 2 * self.extractor.hop_length:  # the deviation of a single frame is not defined
            raise AudioError(f"{key or 'clip'}: {len(wave) / 16000:.3f} s is shorter than two frames of 10 ms")
        feats = self.extractor(wave.float().numpy(), sampling_rate=self.sample_rate)["input_features"][0]
        return torch.as_tensor(feats)[: len(wave) // self.extractor.hop_length]  # (mel frames, M)

    def forward(self, feats, lens):
        mask = length_mask(lens, feats.shape[1], feats.device)
        enc = self.net(feats, attention_mask=mask).last_hidden_state  # (B, T, W)
        return enc, self.out_lens(lens)


class Steering(nn.Module):
    """Steering vectors for every layer of a frozen encoder, mixed frame by frame by a softmax router.

        h <- h + s_l * softmax(h @ R_l^T + b_l) @ V_l       after layer l = 0 .. L - 1

    Input   layer number, h (B, T, D): the layer's output; real (B, T) bool, for `watch` only.
    Output  h of the same shape and dtype. With V = 0 it is h to the bit.
    watch   None, or a function that gets (layer, gates (B, T, E) fp32, real): how experts are used.
    Source  SteerMoE (arXiv:2510.13558); names of its parts, initial values and 8 experts are those of its
            documentation. All gates are dense: no top-k, no balancing loss. Its single Linear(D, L * E) computes all
            layers' logits at each layer and keeps one slice; here only the slice is computed.
    """

    def __init__(self, num_layers, num_experts, width, scale=0.1, train_scales=True):
        super().__init__()
        self.vectors = nn.Parameter(0.01 * torch.randn(num_layers, num_experts, width))  # V (L, E, D)
        bound = width**-0.5  # as nn.Linear(D, L * E) starts
        self.router = nn.Parameter(torch.empty(num_layers, num_experts, width).uniform_(-bound, bound))  # R (L, E, D)
        self.router_bias = nn.Parameter(torch.empty(num_layers, num_experts).uniform_(-bound, bound))
        scales = torch.full((num_layers,), float(scale))
        if train_scales:
            self.scales = nn.Parameter(scales)
        else:
            self.register_buffer("scales", scales)
        self.watch = None

    def forward(self, layer, h, real=None):
        gates = F.linear(h, self.router[layer], self.router_bias[layer]).float().softmax(-1)  # (B, T, E)
        if self.watch is not None:
            self.watch(layer, gates.detach(), real)
        update = self.scales[layer] * (gates.to(h.dtype) @ self.vectors[layer].to(h.dtype))  # (B, T, D)
        return h + update.to(h.dtype)


def encoder_layers(encoder):
    """The blocks of a SpeechEncoder in the order in which they run; each is called with (x, mask)."""
    net = encoder.net
    return [*net.encoders0, *net.encoders, *net.tp_encoders] if isinstance(net, SenseVoiceEncoder) else [*net.layers]


def pool_frames(x, real, kernel, kind):
    """Average or maximum of each `kernel` neighbouring frames, over real ones only.

    Input   x (B, T, D), real (B, T) bool; kind "avg" or "max".
    Output  (B, ceil(T / kernel), D), zeros where a window holds no real frame; mask (B, ceil(T / kernel)).
    """
    missing = -x.shape[1] % kernel
    x = F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, kernel))  # (B, S, kernel, D)
    real = F.pad(real, (0, missing)).unflatten(1, (-1, kernel))[..., None]  # (B, S, kernel, 1)
    if kind == "avg":
        pooled = x.masked_fill(~real, 0.0).sum(2) / real.sum(2).clamp(min=1)
    else:
        pooled = x.masked_fill(~real, -torch.inf).amax(2).masked_fill(~real.any(2), 0.0)
    return pooled.to(x.dtype), real.any(2)[..., 0]


class SteerMoE(nn.Module):
    """All that SteerMoE trains: steering, hooked into a frozen encoder, and the bridge from its frames to the LLM.

    After SteerMoE(encoder, ...) the encoder itself gives steered and pooled frames: enc, lens = encoder(feats, lens).
    Input   enc (B, T, D) and lens (B,) of that encoder.  Output  emb (B, S, H), lens (B,), S <= max_prompt_tokens.
    Keys of `settings` are those of train_steermoe.py; steering.num_experts 0 means no steering (linear ablation).
    Pooling stands after layer `pooling_position`, the layers behind it run on pooled frames. 0 or the last layer: on
    the encoder's output, so after its final norm (SteerMoE's code pools just before the norm).
    Raises  ValueError for a position or width that the encoder does not have.
    """

    def __init__(self, encoder, llm_width, settings, embedding_rms=None):
        super().__init__()
        layers = encoder_layers(encoder)
        self.kernel, self.kind = settings["pooling_kernel_size"], settings["pooling_type"]
        self.max_tokens, self.adaptor = settings["max_prompt_tokens"], settings["adaptor"]
        position = settings["pooling_position"] or len(layers)
        if not 1 <= position <= len(layers):
            raise ValueError(f"pooling_position={position}, but the encoder has {len(layers)} layers (0: the last)")
        if self.kernel < 1 or self.kind not in ("avg", "max") or self.adaptor not in ("linear", "stack"):
            raise ValueError(f"pooling_kernel_size >= 1, pooling_type avg or max, adaptor linear or stack; got "
                             f"{self.kernel}, {self.kind!r}, {self.adaptor!r}")
        if position < len(layers) and getattr(encoder, "cmvn", None) is not None:
            raise ValueError("pooling_position: SenseVoiceSmall puts four query frames before the speech, which must "
                             "not be pooled with it; pool after the last layer (0)")
        if self.adaptor == "stack":
            self.bridge = AudioAdaptor(encoder.width, llm_width, settings["stack_hidden"], 0, 1, 0.0,
                                       settings["stack_frames"], embedding_rms=embedding_rms)
        elif settings["use_adapter"]:
            self.bridge = nn.Linear(encoder.width, llm_width)
            if embedding_rms is not None:  # frames of about unit variance then start as loud as the LLM's embeddings
                self.bridge.weight.data.mul_(3**0.5 * embedding_rms)
                self.bridge.bias.data.mul_(embedding_rms)
        elif encoder.width == llm_width:
            self.bridge = None
        else:
            raise ValueError(f"use_adapter=false, but the encoder is {encoder.width} wide and the LLM {llm_width}")
        # after the bridge, which so starts from the same random numbers with and without steering
        experts = settings["steering.num_experts"]
        self.steering = Steering(len(layers), experts, encoder.width, settings["steering.steering_scale"],
                                 settings["steering.use_layer_scales"]) if experts else None
        self.install(encoder, layers, position)

    def install(self, encoder, layers, position):
        """Forward hooks; they work on any transformers version, whether a layer returns a tensor or a tuple."""
        early = position < len(layers)

        def real_frames(args, kwargs, length):
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)  # (B, T) or (B, 1, T, T)
            if mask is None:
                return torch.ones(len(args[0]), length, dtype=torch.bool, device=args[0].device)
            return mask if mask.dim() == 2 else mask[:, 0].diagonal(dim1=1, dim2=2)

        def after_layer(number, args, kwargs, output):
            h = output if torch.is_tensor(output) else output[0]
            real = real_frames(args, kwargs, h.shape[1])
            if self.steering is not None:
                h = self.steering(number, h, real)
            if early and number + 1 == position:
                h, _ = pool_frames(h, real, self.kernel, self.kind)
            return h if torch.is_tensor(output) else (h, *output[1:])

        def behind_pooling(args, kwargs):  # the encoder goes on handing out the mask of the frames before pooling
            given = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            if given is not None:
                real = real_frames(args, kwargs, given.shape[-1])
                real = F.pad(real, (0, -real.shape[1] % self.kernel)).unflatten(1, (-1, self.kernel)).any(-1)  # (B, S)
                mask = real if given.dim() == 2 else real[:, None, None].expand(-1, 1, real.shape[1], -1)
                args, kwargs = (args, kwargs | {"attention_mask": mask}) if "attention_mask" in kwargs else (
                    (args[0], mask, *args[2:]), kwargs)
            if "position_embeddings" in kwargs:  # Parakeet's relative positions
                kwargs = kwargs | {"position_embeddings": encoder.net.encode_positions(args[0])}
            return args, kwargs

        def pool_output(enc, lens):
            if not early:
                enc, _ = pool_frames(enc, length_mask(lens, enc.shape[1], enc.device), self.kernel, self.kind)
            return enc, (lens + self.kernel - 1) // self.kernel

        for number, layer in enumerate(layers):
            if early and number >= position:
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs: behind_pooling(args, kwargs), with_kwargs=True)
            if self.steering is not None or early:
                layer.register_forward_hook(
                    lambda _, args, kwargs, out, n=number: after_layer(n, args, kwargs, out), with_kwargs=True)
        if self.kernel > 1:
            encoder.register_forward_hook(lambda _, args, out: pool_output(*out))

    def forward(self, enc, lens):
        if self.adaptor == "stack":
            emb, lens = self.bridge(enc, lens)
        else:
            emb = enc if self.bridge is None else self.bridge(enc)  # (B, S, H)
        return emb[:, : self.max_tokens], lens.clamp(max=self.max_tokens)


def load_steermoe(module, weights, where):
    """Load a state dict of exactly this SteerMoE; ValueError names both sizes where they differ."""
    name = "steering.vectors"
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if name in own and name in weights and tuple(weights[name].shape) != own[name]:
        sizes = ["{} layers, {} experts, width {}".format(*shape) for shape in (weights[name].shape, own[name])]
        raise ValueError(f"{where}: was trained with {sizes[0]}; this configuration has {sizes[1]}")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{where}: does not fit the configured SteerMoE: {error}") from error


# ---- Fun-ASR-Nano -----------------------------------------------------------------------------------------------

CTC_PREFIXES = ("ctc_decoder.", "ctc.")  # the one branch that a released model.pt may lack (Hugging Face's copy does)
SENSEVOICE_SPECIALS = 1679  # special tokens behind the ranks of multilingual.tiktoken; the blank follows them


def llm_positions(frames):
    """How many adaptor frames the LLM sees, about T / 8: 480 ms a position. Takes and gives a number or a tensor.

    FunASR's `use_low_frame_rate`: nothing is pooled. The adaptor keeps all T frames and the LLM gets the first n, into
    which encoder and adaptor have learned to pack the clip. Feeding all T is out of distribution for the release.
    """
    for _ in range(3):  # three convolutions of stride 2 that were once there: 1 + (T - 3 + 2) // 2 = (T - 1) // 2 + 1
        frames = (frames - 1) // 2 + 1
    return frames


def telephone_fbank(wave, key="", dither=1.0):
    """Log-mel of native 8 kHz speech on the mel axis of a 16 kHz front end: (N,) -> (T, 80), 10 ms a frame.

    FunASR at `fs: 8000` spreads its 80 bins over 0-4 kHz, an axis that the encoder has never seen. But 256 points at
    8 kHz have the same 31.25 Hz bins as 512 points at 16 kHz, so the 16 kHz filters apply to them after a gain per
    bin: the ratio of the two pre-emphasis responses and the square of the ratio of the window sums. Above 4 kHz
    there is nothing to see; an upsampled clip has its dither there, so noise of the dither's power is drawn.
    Departs from upsampling in the lowest bins (DC removal), above 3.8 kHz (the resampler's roll-off) and, with
    dither off, above 4 kHz, where the other path has window leakage and this one the floor.
    """
    half = torch.arange(129) * 31.25  # Hz
    narrow, wide = (torch.hamming_window(n, periodic=False) for n in (200, 400))
    frames = (wave.float() * 32768).unfold(0, 200, 80)  # (T, 200)
    generator = dither_generator(key)
    if dither:  # at half the rate the same noise power a Hz takes half the variance
        frames = frames + dither * 0.5**0.5 * torch.randn(frames.shape, generator=generator)
    power = torch.view_as_real(torch.fft.rfft(pre_emphasise(frames) * narrow, 256)).square().sum(-1)  # (T, 129)

    def pre_emphasis(hz, rate):
        return 1 + 0.97**2 - 2 * 0.97 * torch.cos(2 * math.pi * hz / rate)  # |1 - 0.97 z^-1|^2

    power = power * pre_emphasis(half, 16000) / pre_emphasis(half, 8000) * (wide.sum() / narrow.sum()) ** 2
    above = torch.arange(129, 256) * 31.25
    level = dither**2 * (wide**2).sum() * pre_emphasis(above, 16000)
    uniform = torch.rand(len(frames), len(above), generator=generator)
    noise = level * -uniform.clamp(min=1e-30).log()  # power of Gaussian noise
    energies = torch.cat([power, noise], dim=1) @ mel_filters(16000)[:256]  # (T, 256) x (256, 80)
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


class NanoFrontend:
    """Audio to features of Fun-ASR-Nano, 60 ms a frame, with the face of a SpeechEncoder.

    fs 16000: any input rate, resampled. fs 8000: native telephone speech, on the `pretrained` mel axis (see
    telephone_fbank) or on FunASR's own warped one (`mel_axis="native"`), which the released encoder was not trained on.
    """

    frame_ms = 60.0

    def __init__(self, fs=16000, mel_axis="pretrained", dither=1.0, cmvn=None):
        if fs not in (8000, 16000) or mel_axis not in ("pretrained", "native"):
            raise ValueError(f"frontend_conf: fs is 8000 or 16000, mel_axis pretrained or native; got {fs}, {mel_axis}")
        self.sample_rate, self.mel_axis, self.dither, self.cmvn = fs, mel_axis, dither, cmvn

    def num_frames(self, num_samples):
        return lfr_frames(fbank_frames(num_samples, self.sample_rate))

    def features(self, wave, key=""):
        """(N,) -> (ceil(T/6), 560); `key` seeds the dither, as in wav_frontend."""
        if self.sample_rate == 16000:
            return wav_frontend(wave, key, self.dither, self.cmvn)
        if fbank_frames(len(wave), 8000) == 0:
            raise AudioError(f"{key or 'clip'}: {len(wave) / 8000:.3f} s is shorter than one 25 ms window")
        if self.mel_axis == "pretrained":
            feats = apply_lfr(telephone_fbank(wave, key, self.dither))
        else:
            feats = apply_lfr(kaldi_fbank(wave, 8000, key, self.dither))
        return feats if self.cmvn is None else (feats + self.cmvn[0]) * self.cmvn[1]


class SenseVoiceTokenizer:
    """`multilingual.tiktoken`: text <-> CTC classes; special tokens are never targets and never read out."""

    def __init__(self, path):
        import base64

        import tiktoken

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; it comes with the model's folder (not with funasr), and the CTC "
                             "branch cannot be read or trained without it")
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        pattern = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.coder = tiktoken.Encoding("multilingual", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.ranks, self.classes = len(ranks), len(ranks) + SENSEVOICE_SPECIALS

    def encode(self, text):
        return self.coder.encode_ordinary(text)

    def decode(self, classes):
        return self.coder.decode([c for c in classes if c < self.ranks])


class SymbolTokenizer:
    """Characters or words of the training transcripts as CTC classes, for an encoder without a head of its own."""

    def __init__(self, kind, symbols):
        self.kind, self.symbols, self.classes = kind, list(symbols), len(symbols)
        self.class_of = {symbol: index for index, symbol in enumerate(self.symbols)}

    @classmethod
    def of_texts(cls, kind, texts):
        return cls(kind, sorted({symbol for text in texts for symbol in cls.split(kind, text)}))

    @staticmethod
    def split(kind, text):
        return list(text) if kind == "char" else text.split()

    def encode(self, text):
        """Classes of the symbols that the training transcripts had; others are left out."""
        return [self.class_of[symbol] for symbol in self.split(self.kind, text) if symbol in self.class_of]

    def decode(self, classes):
        return ("" if self.kind == "char" else " ").join(self.symbols[c] for c in classes)


class FunASRAttention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x, mask):
        parts = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for linear in (self.linear_q, self.linear_k, self.linear_v))
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None])  # (B, heads, T, D/heads)
        return self.linear_out(attended.transpose(1, 2).flatten(2))


class FunASRBlock(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.self_attn, self.feed_forward = FunASRAttention(size, heads), SANMFeedForward(size, size // 4, 0.0)
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=1e-12), nn.LayerNorm(size, eps=1e-12)

    def forward(self, x, mask):
        x = x + self.self_attn(self.norm1(x), mask)
        return x + self.feed_forward(self.norm2(x))


class FunASRTransformer(nn.Module):
    """FunASR's adaptor class `Transformer`: Linear-ReLU-Linear, then pre-norm blocks without positions or final norm.

    Input   x (B, T, encoder_dim), lens (B,).  Output  (B, ceil(T / k), llm_dim), lens (B,), k = downsample_rate.
            Rows past lens hold values without meaning; padding, even NaN, never reaches a real one.
    Source  funasr/models/llm_asr/adaptor.py, whose state-dict names it keeps; adaptor and CTC decoder of the release.
    """

    def __init__(self, downsample_rate=1, encoder_dim=512, llm_dim=1024, ffn_dim=2048, n_layer=2, attention_heads=8):
        super().__init__()
        self.stack = downsample_rate
        self.linear1 = nn.Linear(encoder_dim * downsample_rate, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, llm_dim)
        self.blocks = nn.ModuleList([FunASRBlock(llm_dim, attention_heads) for _ in range(n_layer)])

    def forward(self, x, lens):
        x = x.masked_fill(~length_mask(lens, x.shape[1], x.device)[..., None], 0.0)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stack))
        x = x.reshape(len(x), -1, x.shape[2] * self.stack)  # (B, ceil(T/k), k * encoder_dim)
        x = self.linear2(F.relu(self.linear1(x)))  # (B, ceil(T/k), llm_dim)
        lens = (lens - 1) // self.stack + 1
        mask = length_mask(lens, x.shape[1], x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x, lens


class CTCOutput(nn.Module):
    """FunASR's CTC head `ctc.ctc_lo`: one Linear over the vocabulary, the blank last."""

    loss = CTCHead.loss  # sum of -log p over the possible rows, rows left out; needs `blank` only

    def __init__(self, width, size, dropout=0.0):
        super().__init__()
        self.ctc_lo, self.blank, self.dropout = nn.Linear(width, size), size - 1, dropout

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # log-probabilities in bf16 would be off by 1 %
            return self.ctc_lo(F.dropout(x.float(), self.dropout, self.training)).log_softmax(-1)


class FunASRNano(nn.Module):
    """Fun-ASR-Nano: encoder, adaptor, Qwen3; beside them a CTC decoder and its head. 868.9 M with CTC.

    Input of encode: features (B, T, 560), 60 ms a frame, lens (B,).  Any part but the encoder may be None.
    Names   of the state dict are the release's: audio_encoder, audio_adaptor, llm, ctc_decoder, ctc.
    Source  funasr/models/fun_asr_nano/model.py; equal to it within 1e-4 (tests/test_fun_asr_nano.py).
    """

    def __init__(self, audio_encoder, audio_adaptor=None, llm=None, ctc_decoder=None, ctc=None, low_frame_rate=True):
        super().__init__()
        self.audio_encoder, self.audio_adaptor, self.llm = audio_encoder, audio_adaptor, llm
        self.ctc_decoder, self.ctc, self.low_frame_rate = ctc_decoder, ctc, low_frame_rate

    def encode(self, feats, lens):
        """(B, T, F) -> enc (B, T', W) fp32, lens (B,)."""
        enc, lens = self.audio_encoder(feats, lens)
        return enc.float(), lens

    def listen(self, enc, lens):
        """What the LLM hears: the first llm_positions(T) frames of the adaptor's output. -> (B, n, D), (B,)."""
        emb, emb_lens = self.audio_adaptor(enc, lens)
        heard = llm_positions(lens) if self.low_frame_rate else emb_lens
        if bool((heard > emb_lens).any()):
            raise ValueError("the adaptor gives fewer frames than the LLM expects: audio_adaptor_conf.downsample_rate "
                             "other than 1 does not go with use_low_frame_rate")
        return emb[:, : int(heard.max())], heard

    def ctc_log_probs(self, enc, lens):
        """(B, T, W) -> log-probabilities (B, T, V + 1) fp32, lens; the blank is the last class."""
        if self.ctc_decoder is not None:
            enc, lens = self.ctc_decoder(enc, lens)
        return self.ctc(enc), lens


def nano_prompt(tokenizer, language=None, hotwords=(), itn=True):
    """The prompt that FunASR's inference gives to Fun-ASR-Nano, as (before, after) token ids around the audio.

    FunASR trains with another one (MultiContextPrompt's header stands before it always); here training and inference
    share this.
    """
    text = ""
    if names := join_names(hotwords):
        text = "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n"
        text += f"**上下文信息：**\n\n\n热词列表：[{names}]\n"
    text += f"语音转写成{language}" if language else "语音转写"
    text += "：" if itn else "，不进行文本规整："
    before = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{text}"
    parts = before, "<|im_end|>\n<|im_start|>assistant\n"
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)


def unfreeze(module):
    """Undo `freeze`: gradients on, and `.train()` works again."""
    for part in module.modules():
        part.__dict__.pop("train", None)
    return module.requires_grad_(True).train()


def read_nano_weights(path):
    """Tensors of a released or merged `model.pt`, memory-mapped."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give the folder of Fun-ASR-Nano-2512 or its model.pt")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torn file, or a pickle that would run code: weights_only refuses it
        raise ValueError(f"{path}: not a plain state dict of tensors ({type(error).__name__}); not loaded") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        weights = weights[wrapper] if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path}: not a plain state dict of tensors; not loaded")
    return weights


def load_qwen(folder, dtype):
    """Qwen3 with random weights and its tokenizer, from the folder beside model.pt, which holds the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json of the LLM there; llm_conf.init_param_path names its folder, "
                         "relative to that of model.pt")
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if None in ids or len(tokenizer) > config.vocab_size or not set(ends) & set(ids):
        raise ValueError(f"{folder}: the tokenizer is of another vocabulary: {len(tokenizer)} tokens, <|im_end|> "
                         f"{ids[1]}; the LLM has {config.vocab_size} rows and ends with {config.eos_token_id}")
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"), tokenizer


def build_nano(conf, folder=None, llm_dtype=torch.float32, with_llm=True, with_ctc=True, ctc_classes=None):
    """FunASRNano by FunASR's own nested configuration, all weights random. Output: (nano, tokenizer or None).

    conf    sections of config.yaml. `audio_encoder` other than SenseVoiceEncoderSmall is a name for load_encoder: it
            comes with its weights, unfrozen, without adaptor and LLM.
    """
    sanm = conf["audio_encoder"] == "SenseVoiceEncoderSmall"
    llm, adaptor, decoder, ctc, tokenizer = None, None, None, None, None
    if sanm:
        names = ("output_size", "attention_heads", "linear_units", "num_blocks", "tp_blocks", "kernel_size",
                 "dropout_rate", "attention_dropout_rate")
        encoder = SenseVoiceEncoder(560, **{k: v for k, v in conf["audio_encoder_conf"].items() if k in names})
        width = encoder.output_size
    else:
        encoder = unfreeze(load_encoder(conf["audio_encoder"]))
        width = encoder.width

    def transformer(section):
        keys = ("downsample_rate", "ffn_dim", "n_layer", "llm_dim", "attention_heads")
        return FunASRTransformer(encoder_dim=width, **{k: v for k, v in conf[section].items() if k in keys})

    if with_llm and sanm:
        llm, tokenizer = load_qwen(folder / conf["llm_conf"]["init_param_path"], llm_dtype)
        adaptor = transformer("audio_adaptor_conf")
    if with_ctc:
        if conf.get("ctc_decoder"):
            decoder = transformer("ctc_decoder_conf")
            width = decoder.linear2.out_features
        size = ctc_classes + 1 if ctc_classes else conf.get("ctc_vocab_size", 60515)
        ctc = CTCOutput(width, size, conf.get("ctc_conf", {}).get("dropout_rate", 0.0))
    low = conf.get("audio_adaptor_conf", {}).get("use_low_frame_rate", False)
    return FunASRNano(encoder, adaptor, llm, decoder, ctc, low), tokenizer


def load_nano_weights(nano, weights, name, optional=()):
    """Copy a release's tensors into `nano`, strictly. Output: names of parts that the file lacks.

    optional  prefixes that the file may lack, whole or not at all; the weights of parts that were not built are left
              alone. Raises ValueError naming what is missing, unknown or of another size.
    """
    own = nano.state_dict()
    absent = [prefix for prefix in optional if not any(key.startswith(prefix) for key in weights)]
    not_built = {"llm", "audio_adaptor", "ctc_decoder", "ctc"} - {key.split(".")[0] for key in own}
    missing = [key for key in own if key not in weights and not key.startswith(tuple(absent))]
    unknown = [key for key in weights if key not in own and key.split(".")[0] not in not_built]
    wrong = [f"{key} is {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}"
             for key in own if key in weights and weights[key].shape != own[key].shape]
    for problem, keys in (("of another size", wrong), ("missing", missing), ("unknown", unknown)):
        if keys:
            raise ValueError(f"{name}: {len(keys)} of {len(weights)} tensors are {problem}: {'; '.join(keys[:2])}; the "
                             "file does not fit the configuration (audio_encoder_conf.*, audio_adaptor_conf.*, ...)")
    nano.load_state_dict({key: weights[key] for key in own if key in weights}, strict=False)
    return absent


def ctc_tokenizer_of(nano, path):
    """The tokenizer of a release's CTC head, checked against it."""
    tokenizer = SenseVoiceTokenizer(path)
    if tokenizer.classes != nano.ctc.blank:
        raise ValueError(f"{path}: a tokenizer of another vocabulary: {tokenizer.ranks} ranks, {SENSEVOICE_SPECIALS} "
                         f"special tokens and a blank do not make the {nano.ctc.blank + 1} classes of the CTC head")
    return tokenizer


def load_nano(folder, llm_dtype=torch.float32, with_llm=True, base=""):
    """Load a recogniser: the official folder, a merged one, or a run folder of finetune_encoder.py.

    base    where the model.pt (or, for another encoder, the encoder) that a run started from lies now, if it was moved.
    Output  (nano, frontend, LLM tokenizer or None, CTC tokenizer or None), frozen, on the CPU.
    Raises  ValueError naming what is missing, or if the base of a run is not the one it was trained on.
    """
    folder, run = Path(folder), {}
    if (folder / "trained.pt").is_file():
        run = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        conf, with_llm = run["conf"], with_llm and run["with_llm"]
        if base and not run["base"]:
            conf["audio_encoder"] = base
        base = Path(base or run["base"]) if run["base"] else None
        base = base / "model.pt" if base and base.is_dir() else base
    else:
        base = find_model(folder) / "model.pt"
        conf = yaml.safe_load((base.parent / "config.yaml").read_text(encoding="utf-8"))
    symbols = run.get("ctc_symbols")
    if base and not base.is_file():
        trained_on = f", but {folder} was trained on it; if it was moved, give its new place as encoder.name"
        raise ValueError(f"{base}: not there" + (trained_on if run else ""))
    with_ctc = run.get("with_ctc", bool(conf.get("ctc_decoder")))
    nano, tokenizer = build_nano(conf, base and base.parent, llm_dtype, with_llm, with_ctc,
                                 len(symbols) if symbols else None)
    if base:
        weights = read_nano_weights(base)
        absent = load_nano_weights(nano, weights, base, CTC_PREFIXES)
        found = run and hash_tensors(weights)
        if absent and not run:
            nano.ctc_decoder, nano.ctc = None, None  # random: reading it out would be noise
    else:
        found = getattr(nano.audio_encoder, "identity", {"weights": ""})["weights"]  # "": trained from scratch
    if run and run["base_hash"] != found:
        raise ValueError(f"{base or conf['audio_encoder']} is not what {folder} was trained on: its weights' hash is "
                         f"{found}, in training it was {run['base_hash']}")
    if run:
        load_trained_part(nano, read_weights(folder / "trained.pt"), run["lora"], folder / "trained.pt")
    if nano.ctc is None:
        ctc_tokenizer = None
    elif symbols:
        ctc_tokenizer = SymbolTokenizer(run["ctc_kind"], symbols)
    else:
        ctc_tokenizer = ctc_tokenizer_of(nano, run.get("ctc_vocab") or base.parent / "multilingual.tiktoken")
    if conf["audio_encoder"] != "SenseVoiceEncoderSmall":
        return freeze(nano), nano.audio_encoder, tokenizer, ctc_tokenizer
    front = conf["frontend_conf"]
    frontend = NanoFrontend(front.get("fs", 16000), front.get("mel_axis", "native"), front.get("dither", 1.0),
                            load_cmvn(front["cmvn_file"]) if front.get("cmvn_file") else None)
    return freeze(nano), frontend, tokenizer, ctc_tokenizer


def add_lora(llm, r, alpha, dropout, targets):
    """Trainable fp32 LoRA beside the LLM's projections, which stay as they are."""
    from peft import LoraConfig, inject_adapter_in_model

    llm = inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets), llm)
    for parameter in lora_parameters(llm).values():
        parameter.data = parameter.data.float()
    return llm


def load_trained_part(nano, state, lora, name):
    """Put the tensors that a run has changed over those of its base; all of them must be known."""
    if lora:
        add_lora(nano.llm, **lora)
    own = nano.state_dict()
    wrong = [key for key in state if key not in own or own[key].shape != state[key].shape]
    if nano.llm is None:  # loaded for its CTC read-out only
        wrong = [key for key in wrong if not key.startswith(("llm.", "audio_adaptor."))]
    if wrong:
        raise ValueError(f"{name}: does not fit the configuration of its run: {', '.join(wrong[:3])}")
    nano.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
