"""Speed: every stage the usual way and ours, in turns, in one process, on the same work.

    python bench/bench.py                       # the demo's models and speech, after make demo
    python bench/bench.py --size tiny           # random weights, seconds: checks that rows work
    python bench/bench.py --size full --device cuda --repeats 2
                                                # SenseVoice, 207.7 M adaptor, Qwen3-4B in shape
Output  a table, and --out, written after every row: medians and spreads (longest less shortest) of
        both ways, their ratio, equal, peak memory in MiB of an untimed first run of each (of the
        whole process, which takes Linux; on CUDA torch's), seconds of audio per second of ours
Fair    Both ways have the same threads and begin at the same audio files (phase 1 and 2: cached
        encoder outputs). `equal` compares what they return: features, encoder outputs, texts; of
        steps the loss of one common batch and each gradient before clipping. Dropout is off and
        the learning rate 0 (AdamW does all its work), so that all repeats see the same weights.
Usual   one clip at a time, Whisper padded to 30 s (with a mask, or the outputs could not be
        compared), a forward hook, one .pt file a clip; random batches padded to their longest; the
        LLM's weights left trainable, logits at all positions; transformers' `generate`, clip by
        clip. On CUDA both ways compute in bf16, not compiled: it is the method that is compared.
Limits  The encoder's row has random weights in every size. Such weights hardly ever end an answer:
        the cap does. `full` has no drafts of CTC, which would be noise. In bf16 texts are equal if
        the usual way would write our tokens, or some that are level with them but for rounding.
"""

import ctypes
import functools
import gc
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import make_twins  # noqa: E402  (what follows needs the path above)

import finetune_encoder  # noqa: E402
import infer  # noqa: E402
import model  # noqa: E402
import precompute  # noqa: E402
import train_phase1  # noqa: E402
import train_phase2  # noqa: E402

SENSEVOICE = {"output_size": 512, "linear_units": 2048, "num_blocks": 50, "tp_blocks": 20}
# clips: that are cached; words: most, of a clip of random speech; *_step: clips, and how many of
# them in a batch (the usual way's last, where memory takes no more); infer_*: test clips, our
# batch; encoder: its row's shape, clips, frames of 60 ms; names of scripts: their configuration
SIZES = {
    "tiny": {
        "fbank": (), "clips": 4, "words": 8, "workers": 0, "encoder": (make_twins.ENCODER, 2, 17),
        "phase1_step": (4, 2), "phase2_step": (4, 2), "finetune_step": (4, 2),
        "infer_batch1": (4, 1), "infer_batch32": (4, 32),
        "precompute": "encoder.name=DIR/encoder",
        "train_phase1": "llm.name=DIR/llm adaptor.hidden_dim=32",
        "train_phase2": "llm.name=DIR/llm adaptor.hidden_dim=32 llm.speech=ctc loss.ctc_weight=1",
    },
    "demo": {
        "fbank": (), "clips": 32, "workers": 0, "encoder": (SENSEVOICE, 8, 167),
        "phase1_step": (32, 16), "phase2_step": (32, 16), "finetune_step": (32, 16),
        "infer_batch1": (32, 1), "infer_batch32": (None, 32),
        "precompute": "ROOT/demo/configs/precompute.yaml data.test=",
        "train_phase1": "ROOT/demo/configs/phase1.yaml",
        "train_phase2": "ROOT/demo/configs/phase2.yaml init.dir=RUN/phase1",
    },
    "full": {
        "fbank": (), "clips": 512, "words": 28, "workers": 14, "encoder": (SENSEVOICE, 64, 167),
        "phase1_step": (512, 256), "phase2_step": (128, 64, 32),
        "infer_batch1": (16, 1), "infer_batch32": (128, 64),
        "precompute": "encoder.name=DIR/encoder batch_s=1200",
        "train_phase1": "llm.name=DIR/llm", "train_phase2": "llm.name=DIR/llm",
        "llm": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
                "head_dim": 128, "num_hidden_layers": 36, "num_attention_heads": 32,
                "num_key_value_heads": 8, "tie_word_embeddings": True},
    },
}  # fmt: skip
Row = namedtuple("Row", "usual ours equal audio_s")  # equal compares what the two ways return


# ---- models and speech ------------------------------------------------------


class World:
    """What the rows share: where models and speech lie, and the cache of encoder outputs."""

    def __init__(self, args, folder):
        self.size, self.folder, self.phase2 = SIZES[args.size], folder, Path(args.model)
        self.device, self.dtype, _, _ = model.start(args.device)
        self.random, self.exact = "words" in self.size, self.dtype == torch.float32
        self.tolerance = 1e-3 if self.exact else 0.1
        (folder / "cache").mkdir()
        sources = [Path(args.data, f"{name}.jsonl") for name in ("train_real", "test")]
        if self.random:
            wavs = make_twins.wav_files(folder, 2 * self.size["clips"], self.size["words"])
            sources, self.phase2 = [wavs, wavs], folder
        for path in (*sources, self.phase2):
            if not path.exists():
                raise model.UserError(f"{path}: not there; run `make demo`, or use --size tiny")
        parts = ("train", sources[0], self.size["clips"]), ("test", sources[1], None)
        for name, source, count in parts:
            rows = {model.normalize_text(row["target"]): row for row in self.manifest(source)}
            rows = sorted(rows.values(), key=lambda row: model.hash_text(row["key"]))[:count]
            rows = [row | {"source": os.path.abspath(row["source"])} for row in rows]
            model.save(folder / f"{name}.jsonl", rows)  # each text once, in an order by hash
        if self.random:
            self.write_models(folder)

    def write_models(self, folder):
        """Random weights, as the hubs and train_phase2.py have trained ones."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        if sizes := self.size.get("llm"):
            make_twins.sensevoice_folder(folder / "encoder", SENSEVOICE)
            with torch.device(self.device):  # billions of random numbers take a CPU minutes
                llm = Qwen3ForCausalLM._from_config(Qwen3Config(**sizes), dtype=self.dtype)
            llm.save_pretrained(folder / "llm")
            make_twins.tiny_tokenizer().save_pretrained(folder / "llm")
        else:
            make_twins.whisper_folder(folder / "encoder")
            make_twins.qwen3_folder(folder / "llm")
        phase, cfg, _ = build_phase2(self)
        identity = {"encoder": self.cache.encoder, "llm": phase.llm.identity}
        identity["adaptor"] = train_phase2.adaptor_settings(cfg, {})
        train_phase2.save_results(phase, cfg, folder, identity)

    def amp(self):
        return torch.autocast(self.device.type, self.dtype, enabled=not self.exact)

    def config(self, script, more=""):
        """A script's configuration: the demo's, or its defaults, over this folder's files."""
        given = f"{self.size[script.__name__]} {more} data.speed=1.0 cache.dir=DIR/cache "
        given += "data.train=DIR/train.jsonl data.valid=DIR/train.jsonl"
        places = {"DIR": self.folder, "ROOT": ROOT, "RUN": self.phase2.parent}
        fill = functools.partial(re.sub, "DIR|ROOT|RUN", lambda found: str(places[found[0]]))
        return model.load_config(list(map(fill, given.split())), script.DEFAULTS)

    def manifest(self, spec):
        return model.read_manifest(str(spec), self.folder / "manifests")

    @functools.cached_property
    def cache(self):
        """Encoder outputs as both ways keep them: a .pt file a clip, and our shard."""
        row = precompute_row(self, "precompute")
        row.usual()
        row.ours()
        return model.EncoderCache(self.folder / "cache")

    def clips(self, tokenizer, count):
        spec, manifests = f"{self.folder}/train.jsonl", self.folder / "manifests"
        return model.cached_clips(spec, self.cache, tokenizer, manifests).select(range(count))

    def loader(self, dataset, **rest):
        n = self.size["workers"]  # which stay, as they do in a run of hours
        return torch.utils.data.DataLoader(dataset, num_workers=n, persistent_workers=n > 0, **rest)


def whisper_window(encoder):
    """Context in which a Whisper is padded to 30 s as in its training, but with a mask."""
    own, whisper = encoder.forward, isinstance(encoder, model.WhisperEncoder)

    def forward(feats, lens):
        feats = F.pad(feats, (0, 0, 0, 3000 - feats.shape[1]))  # mel frames of 10 ms
        enc, lens = own(feats, lens)
        return enc[:, : int(lens.max())], lens

    return mock.patch.object(encoder, "forward", forward if whisper else own)


# ---- the rows ---------------------------------------------------------------


def close(usual, ours, tolerance):
    """Every pair of tensors equal to `tolerance` times the largest value."""
    pairs = [(a, b, tolerance * float(a.abs().max())) for a, b in zip(usual, ours, strict=True)]
    return all(torch.allclose(a, b, rtol=0.0, atol=atol) for a, b, atol in pairs)


def fbank_row(world, name):
    """funasr's front end against ours; each has its own random numbers, so neither dithers."""
    from funasr.frontends.wav_frontend import WavFrontend

    sources = world.manifest(world.folder / "train.jsonl")["source"]
    waves = [model.load_audio(source, 16000) for source in sources]
    usual = WavFrontend(fs=16000, window="hamming", lfr_m=7, lfr_n=6, dither=0.0)
    return Row(
        lambda: [usual(wave[None], torch.tensor([len(wave)]))[0][0] for wave in waves],
        lambda: [model.wav_frontend(wave, dither=0.0) for wave in waves],
        functools.partial(close, tolerance=1e-4), sum(map(len, waves)) / 16000,
    )  # fmt: skip


def encoder_row(world, name):
    """funasr's encoder of SenseVoice against ours, with the same weights, on one padded batch."""
    from funasr.models.sense_voice.model import SenseVoiceEncoderSmall

    torch.manual_seed(0)
    sizes, clips, frames = world.size[name]
    net = model.freeze(model.SenseVoiceEncoder(**sizes)).to(world.device)
    funasr = SenseVoiceEncoderSmall(560, **sizes).to(world.device).eval()
    funasr.load_state_dict(net.state_dict())
    feats, lens = torch.randn(clips, frames, 560), torch.full((clips,), frames)
    lens[-1] = frames // 2  # one row with padding, so that masks are compared too
    mask, feats = model.length_mask(lens, frames, world.device), feats.to(world.device)

    @torch.inference_mode()
    def encode(net, lens):
        with world.amp():
            return [net(feats.clone(), lens)[0][mask].float()]  # funasr scales its input in place

    ways = functools.partial(encode, funasr, lens.to(world.device)), lambda: encode(net, lens)
    equal = functools.partial(close, tolerance=0.1 * world.tolerance)
    return Row(*ways, equal, clips * frames * 0.06)


def precompute_row(world, name):
    """Encoder outputs of the training clips, from audio files to files on disk."""
    cfg, folder = world.config(precompute), world.folder / "cache"
    encoder = model.freeze(model.load_encoder(**cfg.encoder)).to(world.device)
    manifests, clips = precompute.list_clips(cfg)
    dataset = precompute.Clips(clips, manifests, encoder, cfg)
    loader = world.loader(dataset, batch_size=precompute.MESSAGE, collate_fn=list)

    @torch.inference_mode()
    def usual():
        caught = []
        hook = encoder.register_forward_hook(lambda module, args, output: caught.append(output))
        for number, clip in enumerate(clips):
            feats = torch.from_numpy(dataset[number][0])[None].to(world.device)
            with whisper_window(encoder), world.amp():
                encoder(feats, torch.tensor([feats.shape[1]]))
            enc, lens = caught.pop()
            enc = enc[0, : int(lens)].float().cpu().clone()  # a view would be saved with its 30 s
            torch.save(enc, folder / f"{clip.key}.pt")
        hook.remove()
        return [torch.load(folder / f"{clip.key}.pt") for clip in clips]

    def ours():
        items = [item for message in loader for item in message]
        outputs, reasons = precompute.encode(clips, items, encoder, cfg, world.device, world.amp())
        shard = folder / "shard-00000.safetensors"
        precompute.save_shard(shard, clips, items, outputs, reasons)
        model.save(folder / "cache.json", {"format": model.FORMAT, "encoder": encoder.identity})
        shard = model.open_shard(shard)
        return [shard.get_tensor(str(number)).float() for number in range(len(outputs))]

    equal = functools.partial(close, tolerance=max(2e-3, world.tolerance))
    return Row(usual, ours, equal, sum(dataset[number][1] for number in range(len(clips))))


def training(world, name, phase, dataset, seconds, usual_loss, our_loss):
    """Steps over clips: usual_loss takes their numbers, our_loss a batch of the script's Clips."""
    count, *sizes = world.size[name]
    order = random.Random(0).sample(range(count), count)
    random_batches = [order[at : at + sizes[-1]] for at in range(0, count, sizes[-1])]
    groups = model.length_batches(seconds, math.inf, 1, 0, 0, sizes[0])
    loader = world.loader(dataset, batch_size=None, sampler=[(0, 0, group) for group in groups])
    trained = {name: p for name, p in phase.train().named_parameters() if p.requires_grad}
    plain, fused = (torch.optim.AdamW(trained.values(), lr=0.0, fused=f) for f in (None, True))

    def step(loss, optimizer):
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        phase.zero_grad(set_to_none=True)  # or they would count as the other way's memory
        return loss.detach()

    def usual():  # .item() waits for the device
        return [step(usual_loss(batch), plain).item() for batch in random_batches]

    def ours():
        return [step(our_loss(batch), fused) for batch in loader]

    def gradients(loss):
        loss.backward()
        found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        phase.zero_grad(set_to_none=True)
        return loss.item(), found

    def equal(*_):
        loss, theirs = gradients(usual_loss(random_batches[0]))
        own_loss, own = gradients(our_loss(dataset[0, 0, random_batches[:1]]))
        # a share of all is added, since some are zero but for rounding (of key biases)
        share = 1e-3 * torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        apart = [float((own[n] - g).norm() / (g.norm() + share)) for n, g in theirs.items()]
        return max(abs(own_loss - loss) / abs(loss), *apart) <= world.tolerance

    return Row(usual, ours, equal, sum(seconds))


def usual_frames(world, keys):
    """Encoder outputs from one file each, padded to the longest: enc (B, T, W), lens (B,)."""
    frames = [torch.load(world.folder / f"cache/{key}.pt") for key in keys]
    enc = nn.utils.rnn.pad_sequence(frames, batch_first=True).to(world.device)
    return enc, torch.tensor([len(x) for x in frames])


def phase1_row(world, name):
    """Adaptor with InfoNCE and CTC, from cached encoder outputs."""
    cfg = world.config(train_phase1, "run.dir=DIR adaptor.dropout=0 loss.ctc_weight=1")
    table, tokenizer = train_phase1.load_embedding(cfg.llm.name)
    clips, width = world.clips(tokenizer, world.size[name][0]), world.cache.encoder["width"]
    phase = train_phase1.build(cfg, table.to(world.device), tokenizer, clips, width, None)
    dataset, ctc, weights = train_phase1.Clips(clips, world.cache, 0, 0), phase.ctc, cfg.loss

    def usual_loss(numbers):
        rows = clips[numbers]
        with world.amp():
            emb, lens = phase.adaptor(*usual_frames(world, rows["key"]))
        audio = [x[:n].float().mean(0) for x, n in zip(emb, lens, strict=True)]
        text = [phase.table[ids].mean(0) for ids in rows["ids"]]
        audio, text = (F.normalize(torch.stack(x), dim=-1) for x in (audio, text))
        scores = audio @ text.T / phase.log_temperature.exp()  # (B, B)
        own = torch.arange(len(text), device=world.device)
        nce = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        classes = [ctc.classes(ids) for ids in rows["ids"]]
        ctc_loss, _ = model.ctc_loss(ctc(emb), lens, classes, ctc.blank)
        return weights.contrastive_weight * nce + weights.ctc_weight * ctc_loss / len(text)

    def our_loss(batch):
        with world.amp():
            sums = phase(batch.enc.to(world.device), batch)
        loss = weights.contrastive_weight * sums["nce"] + weights.ctc_weight * sums["ctc"]
        return loss / len(batch.lens)

    return training(world, name, phase, dataset, clips["seconds"], usual_loss, our_loss)


def build_phase2(world):
    cfg = world.config(train_phase2, "run.dir=DIR adaptor.dropout=0")
    lora = next(world.phase2.glob("lora"), None)
    llm, tokenizer = model.load_llm(cfg.llm.name, world.dtype, world.device, lora)
    for name, parameter in llm.named_parameters():  # loaded, LoRA is frozen
        parameter.requires_grad_("lora_" in name)
    clips = world.clips(tokenizer, world.size["phase2_step"][0])
    rest = clips, train_phase2.adaptor_settings(cfg, {}), world.cache.encoder["width"], None
    return train_phase2.build(cfg, llm, tokenizer, *rest), cfg, clips


def phase2_row(world, name):
    """Cross-entropy through the LLM, from cached encoder outputs."""
    phase, cfg, clips = build_phase2(world)
    llm, dataset, cfg.loss.ctc_weight = phase.llm, train_phase2.Clips(clips, world.cache, 0, 0), 0.0
    frozen = nn.ParameterList(p for p in llm.parameters() if not p.requires_grad)

    def usual_loss(numbers):
        rows = clips[numbers]
        frozen.requires_grad_(True)  # the optimizer does not have them, so nobody notices
        with world.amp():
            heard = phase.hear(*usual_frames(world, rows["key"]), read_ctc=False)
            targets = [[*ids, phase.stop_id] for ids in rows["ids"]]
            speech, embed = (heard.speech, heard.speech_lens), llm.get_input_embeddings()
            found = model.splice(embed, phase.prompts(rows), *speech, targets)
            inputs = {"inputs_embeds": found.embeds, "attention_mask": found.mask}
            return llm(**inputs, labels=found.labels.to(world.device)).loss  # with all logits

    def our_loss(batch):
        frozen.requires_grad_(False)
        with world.amp():
            sums = phase(batch.enc.to(world.device), batch)
        return sums["ce"] / sum(len(ids) + 1 for ids in batch.rows["ids"])

    return training(world, name, phase, dataset, clips["seconds"], usual_loss, our_loss)


def finetune_row(world, name):
    """CTC through the whole encoder, all of it trainable, from audio files."""
    script, manifest = finetune_encoder, world.folder / "train.jsonl"
    encoder = model.load_encoder(**world.config(precompute).encoder)
    given = [f"output_dir={world.folder}/finetune", "llm_weight=0", "detach_ctc_decoder=false"]
    cfg = model.load_config([*given, "dataset_conf.batch_type=example"], script.DEFAULTS)
    texts = map(model.normalize_text, world.manifest(manifest)["target"])
    parts = SimpleNamespace(tokenizer=None, ctc_tokenizer=script.SymbolTokenizer("char", texts, []))
    ctc = script.CTCOutput(encoder.width, parts.ctc_tokenizer.classes)
    parts.nano = script.FunASRNano(encoder, ctc=ctc).to(world.device)
    clips = script.read_clips(str(manifest), "telephone", cfg, parts, False)
    tuner, dataset = script.Finetune(parts, cfg), script.Clips(clips, encoder, cfg, 0)

    def usual_loss(numbers):
        with whisper_window(encoder):
            return our_loss(dataset[0, 0, [numbers]])

    def our_loss(batch):
        with world.amp():
            sums = tuner(batch.feats.to(world.device), batch)
        return sums["ctc"] / batch.labels(cfg)["ctc"]

    return training(world, name, tuner, dataset, [c.seconds for c in clips], usual_loss, our_loss)


def infer_row(world, name):
    """Test clips from audio file to text; `batch` clips of mean length fill one of ours."""
    (count, batch), device = world.size[name], world.device
    rows = infer.list_rows([f"{world.folder}/test.jsonl"], world.folder / "manifests")[:count]
    seconds = [infer.header_seconds(row) for row in rows]
    given = [f"model.dir={world.phase2}", *(["decode.tokens_per_s=1.6"] * world.random)]
    cfg = model.load_config(given, infer.DEFAULTS)  # random weights: 8 + 1.6 s tokens are written
    listener = infer.load_listener(cfg, device, world.dtype)
    recordings = infer.Recordings(rows, listener.encoder, math.inf)  # the usual way cuts nothing
    padded_s = 1.001 * statistics.mean(seconds) * batch
    batches = infer.cut_batches(seconds, padded_s if batch > 1 else 0.0)
    loader = world.loader(recordings, batch_sampler=batches, collate_fn=list)
    llm, stop = listener.llm, listener.stop_id
    if not world.exact:  # texts that are numbers of tokens
        listener.tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))

    @torch.no_grad()
    def usual():
        heard = [recordings[number].clips[0] for number in range(len(rows))]
        for clip in heard:
            with whisper_window(listener.encoder), world.amp():
                infer.encode([clip], listener, device)
                infer.build_prompts([clip], listener, cfg)
                found = infer.spliced(llm, [clip], pad_left=True)
                inputs = {"inputs_embeds": found.embeds, "attention_mask": found.mask}
                ends = {"max_new_tokens": clip.cap, "eos_token_id": stop, "pad_token_id": stop}
                ids, answer = llm.generate(**inputs, **ends, do_sample=False)[0].tolist(), []
            # our rule for loops, or the texts could not be compared
            all(model.add_token(answer, token, stop, clip.cap) for token in ids)
            clip.text = listener.tokenizer.decode(answer, skip_special_tokens=True).strip()
        return heard

    @torch.no_grad()
    def ours():
        texts = {}
        for items in loader:
            clips = [clip for item in items for clip in item.clips]
            with world.amp():
                infer.encode(clips, listener, device)
                infer.build_prompts(clips, listener, cfg)
                infer.decode(clips, listener, cfg)
            texts |= {clip.row["key"]: clip.text for clip in clips}
        return texts

    def equal(clips, texts):
        ours = [texts[clip.row["key"]] for clip in clips]
        pairs = [(c, text) for c, text in zip(clips, ours, strict=True) if c.text != text]
        return not pairs or not world.exact and all(level(world, llm, *pair) for pair in pairs)

    return Row(usual, ours, equal, sum(seconds))


@torch.no_grad()
def level(world, llm, clip, text):
    """True if the LLM, reading this clip alone, would write this text's tokens but for rounding."""
    ids = [int(number) for number in text.split()]
    with world.amp():
        hidden = model.hidden_states(llm, infer.spliced(llm, [clip], [ids]).embeds)[0]
        scores = llm.lm_head(hidden[-1 - len(ids) : -1]).float()
    return bool((scores.amax(1) - scores[range(len(ids)), ids] <= world.tolerance).all())


# ---- measuring --------------------------------------------------------------


def peak_of(function, device):
    """Output of a call, and its peak memory in MiB: torch's on CUDA, else the whole process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return function(), torch.cuda.max_memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: it would count as this call's
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    output, status = function(), Path("/proc/self/status")
    return output, int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024


def timed(function, device):
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name, row, repeats, device):
    """One line of the table: each way once for its memory and output, then in turns for time."""
    gc.collect()  # what the row before left
    (usual, usual_mb), (ours, ours_mb) = (peak_of(way, device) for way in (row.usual, row.ours))
    result = {"stage": name, "equal": bool(row.equal(usual, ours))}
    times = [(timed(row.usual, device), timed(row.ours, device)) for _ in range(repeats)]
    for way, spent in zip(("usual", "ours"), zip(*times, strict=True), strict=True):
        result |= {f"{way}_s": statistics.median(spent), f"{way}_spread_s": max(spent) - min(spent)}
    result |= {"ratio": result["usual_s"] / result["ours_s"], "usual_mb": usual_mb}
    return result | {"ours_mb": ours_mb, "audio_s_per_s": row.audio_s / result["ours_s"]}


ROWS = {
    "fbank": fbank_row, "encoder": encoder_row, "precompute": precompute_row,
    "phase1_step": phase1_row, "phase2_step": phase2_row, "finetune_step": finetune_row,
    "infer_batch1": infer_row, "infer_batch32": infer_row,
}  # fmt: skip
LINE = (
    "{stage:14}{usual_s:>8.3f}{usual_spread_s:>8.3f}{ours_s:>8.3f}{ours_spread_s:>8.3f}"
    "{ratio:>7.2f}{equal!s:>6}{usual_mb:>8.0f}{ours_mb:>8.0f}{audio_s_per_s:>8.1f}"
)


def main(args):
    stages = args.stages.split(",") if args.stages else [n for n in ROWS if n in SIZES[args.size]]
    if wrong := set(stages) - set(ROWS):
        raise model.UserError(f"--stages: {min(wrong)!r} is none of {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as folder:
        world = World(args, Path(folder))
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else cpu
        report = vars(args) | {"machine": name, "threads": torch.get_num_threads()}
        report |= {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
        report |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": []}
        print(*(f"{key} {value}" for key, value in report.items() if key != "rows"), sep=" | ")
        print("stage          usual s  spread  ours s  spread  ratio equal     MiB    ours audio/s")
        for name in stages:
            row = measure(name, ROWS[name](world, name), args.repeats, world.device)
            print(LINE.format(**row), flush=True)
            report["rows"].append(row)
            model.save(args.out, report)  # after every row: a crash leaves what was measured
    return report


def parse(arguments):
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo", help="of models and data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--stages", default="", help=f"commas between: {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=5, help="times that each way is timed")
    parser.add_argument("--model", default="runs/demo/run/phase2", help="phase1 lies beside it")
    parser.add_argument("--data", default="runs/demo/data", help="the demo's manifests")
    parser.add_argument("--out", default="runs/bench.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except model.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
