"""Small twins of the released models: the hub's exact files and tensor names, random weights.

The released weights live on hubs that tests must not need.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

import model

SENSEVOICE_SPECIALS = 1679  # special tokens behind the ranks of SenseVoice's tiktoken vocabulary
ENCODER = {
    "output_size": 32, "attention_heads": 4, "linear_units": 64, "num_blocks": 3, "tp_blocks": 2,
}  # fmt: skip
RELEASED = {  # the rest of encoder_conf, as both releases have it
    "dropout_rate": 0.1, "positional_dropout_rate": 0.1, "attention_dropout_rate": 0.1,
    "input_layer": "pe", "pos_enc_class": "SinusoidalPositionEncoder", "normalize_before": True,
    "kernel_size": 11, "sanm_shfit": 0, "selfattention_layer_type": "sanm",
}  # fmt: skip
FRONTEND = {
    "fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10,
    "lfr_m": 7, "lfr_n": 6, "cmvn_file": None,
}  # fmt: skip
WORDS = {  # word -> two tones in Hz, so that a twin has something to learn
    "one": (440, 700), "two": (520, 900), "three": (600, 1300), "four": (700, 1700),
    "five": (800, 2100), "please": (350, 1100), "press": (300, 2500), "hold": (950, 1500),
}  # fmt: skip
SENTENCES = [
    "please press one", "please hold", "press two or press three", "for sales press four",
    "thank you for calling", "Transcribe the speech:", "Translate to English:",
    "Hotwords: [earshot, adaptor]", "You are a helpful assistant.", "user assistant system",
    "这是一段中文语音，请转录：", "今天天气很好", "热词列表：[张三, 李四]",
]  # fmt: skip


def randomise(module, seed=0):
    """Give biases and norms random values: a swapped or forgotten one would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def write_cmvn(path, seed=0):
    """`am.mvn`, a Kaldi nnet in text: shifts near minus the mean, rescales near 1 / deviation."""
    generator = np.random.default_rng(seed)
    shift, scale = generator.normal(-9.0, 1.0, 560), generator.uniform(0.1, 0.3, 560)
    rows = [" ".join(f"{x:.6f}" for x in row) for row in (shift, scale)]
    path.write_text(
        "<Nnet> \n<Splice> 560 560\n[ 0 ]\n<AddShift> 560 560 \n"
        f"<LearnRateCoef> 0 [ {rows[0]} ]\n"
        f"<Rescale> 560 560 \n<LearnRateCoef> 0 [ {rows[1]} ]\n</Nnet> \n",
        encoding="utf-8",
    )


def sensevoice_folder(path, encoder=None, seed=0):
    """iic/SenseVoiceSmall: model.pt, config.yaml, am.mvn and the SentencePiece model, whose ids 0,
    1, 2 are blank/unk, sos and eos."""
    import sentencepiece

    path, sizes = Path(path), ENCODER | (encoder or {})
    path.mkdir(parents=True, exist_ok=True)
    bpe = path / "chn_jpn_yue_eng_ko_spectok.bpe.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_prefix=str(bpe.with_suffix("")),
        vocab_size=160, model_type="bpe", character_coverage=1.0, minloglevel=2,
        user_defined_symbols=["<|zh|>", "<|en|>", "<|woitn|>"], hard_vocab_limit=False,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(bpe)).vocab_size()
    torch.manual_seed(seed)
    net = randomise(model.SenseVoiceEncoder(560, **sizes | RELEASED), seed)
    weights = {f"encoder.{name}": value for name, value in net.state_dict().items()}
    weights["embed.weight"] = torch.randn(16, 560)
    weights["ctc.ctc_lo.weight"] = torch.randn(pieces, sizes["output_size"])
    weights["ctc.ctc_lo.bias"] = torch.randn(pieces)
    torch.save(weights, path / "model.pt")
    config = {"model": "SenseVoiceSmall", "encoder_conf": sizes | RELEASED}
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_cmvn(path / "am.mvn", seed)
    return path


def funasr_transformer(prefix, width, ffn, out, layers):
    """State dict of FunASR's adaptor class `Transformer` (audio_adaptor and ctc_decoder)."""
    shapes = {"linear1": (ffn, width), "linear2": (out, ffn)}
    for block in (f"blocks.{n}" for n in range(layers)):
        attention = [f"{block}.self_attn.linear_{part}" for part in ("q", "k", "v", "out")]
        shapes |= dict.fromkeys(attention, (out, out))
        shapes |= {f"{block}.feed_forward.w_1": (out // 4, out)}
        shapes |= {f"{block}.feed_forward.w_2": (out, out // 4)}
        shapes |= dict.fromkeys([f"{block}.norm1", f"{block}.norm2"], (out,))
    weights = {f"{prefix}.{k}.weight": torch.randn(shape) * 0.05 for k, shape in shapes.items()}
    biases = {f"{prefix}.{k}.bias": torch.randn(shape[0]) * 0.05 for k, shape in shapes.items()}
    return weights | biases


def whisper_folder(path, width=32, seed=0):
    """openai/whisper-*: config.json, model.safetensors, preprocessor_config.json."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=width, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
        num_mel_bins=80, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    randomise(WhisperForConditionalGeneration(config), seed).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(path)
    return Path(path)


CHATML = """\
{%- if messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}"""
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(template=CHATML, specials=SPECIALS, eos="<|im_end|>"):
    """Byte-level BPE trained on SENTENCES; `<think>` is a token, not a special one, as in Qwen3."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*SENTENCES, *(f" {word}" for word in WORDS)] * 4, trainer)
    for words, special in ((specials, True), (("<think>", "</think>"), False)):
        words = [AddedToken(word, special=special, normalized=False) for word in words]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(words)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=specials[0])
    fast.chat_template = template
    return fast


def tiny_qwen3(vocab_size, seed=0):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, max_position_embeddings=2048,
        initializer_range=0.2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def qwen3_folder(path, seed=0):
    """Qwen/Qwen3-*: configurations, model.safetensors, tokenizer files with chat template."""
    tokenizer = tiny_tokenizer()
    llm = tiny_qwen3(len(tokenizer), seed)
    llm.config.eos_token_id = llm.generation_config.eos_token_id = tokenizer.eos_token_id
    llm.generation_config.pad_token_id = tokenizer.pad_token_id
    llm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def tiktoken_file(path):
    """`multilingual.tiktoken` in little: all bytes, then the beginnings of WORDS."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in (f"{space}{word}" for word in WORDS for space in ("", " ")):
        parts = [word[:n].encode() for n in range(2, len(word) + 1)]
        tokens += [part for part in parts if part not in tokens]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    Path(path).write_text("\n".join(lines) + "\n")
    return len(tokens)


def official_folder(path, with_ctc=True, seed=0, tiktoken=True):
    """FunAudioLLM/Fun-ASR-Nano-2512 of ModelScope, with all that funasr's AutoModel needs.

    Speech part and LLM are bf16, CTC is fp32, or missing as in the copy on Hugging Face.
    """
    path, width, llm_width = Path(path), ENCODER["output_size"], 48
    tokenizer = tiny_tokenizer(specials=(*SPECIALS, "<|object_ref_start|>"))
    torch.manual_seed(seed)
    net = randomise(model.SenseVoiceEncoder(560, **ENCODER | RELEASED), seed)
    weights = {f"audio_encoder.{name}": value for name, value in net.state_dict().items()}
    weights |= funasr_transformer("audio_adaptor", width, 64, llm_width, 2)
    llm = tiny_qwen3(len(tokenizer), seed)
    llm.config.eos_token_id = tokenizer.eos_token_id
    for part in (llm.config, tokenizer):
        part.save_pretrained(path / "Qwen3-0.6B")
    ranks = tiktoken_file(path / "multilingual.tiktoken")
    classes = ranks + SENSEVOICE_SPECIALS + 1
    weights |= {f"llm.{name}": value for name, value in llm.state_dict().items()}
    weights = {name: value.bfloat16() for name, value in weights.items()}
    if with_ctc:
        weights |= funasr_transformer("ctc_decoder", width, 64, width, 5)
        weights["ctc.ctc_lo.weight"] = torch.randn(classes, width)
        weights["ctc.ctc_lo.bias"] = torch.zeros(classes)
        weights["ctc.ctc_lo.bias"][ranks:-1] = -100.0  # the release never says its special tokens
    torch.save(weights, path / "model.pt")
    adaptor = {"downsample_rate": 1, "ffn_dim": 64, "encoder_dim": width}
    config = {
        "model": "FunASRNano", "model_conf": {"lsm_weight": 0.1, "length_normalized_loss": True},
        "audio_encoder": "SenseVoiceEncoderSmall",
        "audio_encoder_conf":
            ENCODER | RELEASED | {"feat_permute": True, "freeze": True, "freeze_layer_num": -1},
        "llm": "Qwen3-0.6b",
        "llm_conf": {"hub": "hf", "freeze": True, "llm_dtype": "bf16", "use_lora": False,
                     "init_param_path": "Qwen3-0.6B"},
        "audio_adaptor": "Transformer",
        "audio_adaptor_conf": adaptor | {
            "use_low_frame_rate": True, "llm_dim": llm_width, "n_layer": 2, "freeze": True},
        "ctc_decoder": "Transformer", "detach_ctc_decoder": True, "ctc_weight": 1.0,
        "ctc_decoder_conf": adaptor | {"llm_dim": width, "n_layer": 5, "freeze": False},
        "ctc_conf":
            {"dropout_rate": 0.0, "ctc_type": "builtin", "reduce": True, "ignore_nan_grad": True},
        "frontend": "WavFrontend", "frontend_conf": FRONTEND,
        "ctc_vocab_size": classes, "tokenizer": "HuggingfaceTokenizer",
        "tokenizer_conf": {"init_param_path": "Qwen3-0.6B"},
        "dataset_conf": {"ctc_tokenizer": "SenseVoiceTokenizer", "ctc_target_normalize": True},
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    metas = {
        "init_param": "model.pt", "config": "config.yaml",
        "llm_conf": {"init_param_path": "Qwen3-0.6B"},
        "tokenizer_conf": {"init_param_path": "Qwen3-0.6B"},
        "dataset_conf": {"ctc_tokenizer_conf": {"vocab_path": "multilingual.tiktoken"}},
    }  # fmt: skip
    hub = {"framework": "pytorch", "task": "auto-speech-recognition", "model": {"type": "funasr"}}
    (path / "configuration.json").write_text(json.dumps(hub | {"file_path_metas": metas}))
    if not tiktoken:
        (path / "multilingual.tiktoken").unlink()
    return path


def parakeet_folder(path):
    """nvidia/parakeet-ctc-*: the encoder inside, model.safetensors, preprocessor_config.json."""
    import transformers as hub

    torch.manual_seed(0)
    encoder = hub.ParakeetEncoderConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, subsampling_conv_channels=8, dropout=0.1, layerdrop=0.5,
    )  # fmt: skip
    config = hub.ParakeetCTCConfig(vocab_size=20, encoder_config=encoder, pad_token_id=0)
    randomise(hub.ParakeetForCTC(config)).save_pretrained(path)
    hub.ParakeetFeatureExtractor().save_pretrained(path)
    return path


def spoken(words, rate=16000, word_s=0.3, seed=0):
    """Words as pairs of tones in faint noise: (N,) float32. The same word always sounds alike."""
    time = np.arange(round(word_s * rate)) / rate
    fade = np.minimum(1.0, np.minimum(time, time[::-1]) / 0.02) * 0.2
    tones = [sum(np.sin(2 * math.pi * hz * time) for hz in WORDS[word]) * fade for word in words]
    silence = np.zeros(round(0.1 * rate))
    wave = np.concatenate([silence, *tones, silence])
    return (wave + np.random.default_rng(seed).normal(0, 0.001, len(wave))).astype(np.float32)


def wav_files(path, n=8, max_words=4, rate=16000, seed=0):
    """`n` wavs of 1 to `max_words` words and `manifest.jsonl`; returns the manifest's path."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    generator, rows = np.random.default_rng(seed), []
    for index in range(n):
        size = int(generator.integers(1, max_words + 1))
        words = [str(word) for word in generator.choice(list(WORDS), size=size)]
        name = f"utt{index:03d}"
        soundfile.write(path / f"{name}.wav", spoken(words, rate, seed=seed + index), rate)
        rows.append({"key": name, "source": f"{name}.wav", "target": " ".join(words)})
    manifest = path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def nemotron_folder(path):
    """nvidia/nemotron-speech-streaming-*: model.safetensors, preprocessor_config.json."""
    import transformers as hub

    torch.manual_seed(0)
    encoder = hub.NemotronAsrStreamingEncoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        subsampling_conv_channels=8, sliding_window=9, layerdrop=0.5,
    )  # fmt: skip
    rest = {"vocab_size": 20, "decoder_hidden_size": 16, "blank_token_id": 19}
    config = hub.NemotronAsrStreamingConfig(encoder_config=encoder, **rest)
    net = hub.NemotronAsrStreamingForRNNT(config)
    for parameter in randomise(net).encoder.subsampling.parameters():
        parameter.data.mul_(8)  # else what is heard would hardly matter
    net.save_pretrained(path)
    hub.NemotronAsrStreamingFeatureExtractor(feature_size=80).save_pretrained(path)
    return path


def embedding_folder(path):
    """What demo/dialogues.py makes of openWakeWord's speech_embedding, with random weights."""
    import itertools

    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights, norm = {}, torch.nn.BatchNorm2d(24)
    for n, (one, other) in enumerate(itertools.pairwise(model.SpeechEmbedding.widths)):
        kernel = (3, 3) if n == 0 else (1, 3) if n % 2 and n < 19 else (3, 1)
        conv = torch.nn.Conv2d(one, other, kernel)
        weights |= {f"{n}.weight": conv.weight.data * 3, f"{n}.bias": conv.bias.data}
    weights |= {f"norm.{name}": value for name, value in norm.state_dict().items()}
    weights |= {"window": torch.hann_window(512), "bank": torch.rand(257, 32)}
    Path(path).mkdir(exist_ok=True)
    weights["19.weight"] /= 1000  # what comes out is about as large as its GRU expects
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, f"{path}/model.safetensors")
    (Path(path) / "speech_embedding.json").write_text("{}")
    return path


def mimi_folder(path):
    """kyutai/mimi in little, its codebooks filled: they are zeros in a model of random weights."""
    import transformers as hub

    torch.manual_seed(0)
    codec = hub.MimiModel(hub.MimiConfig(
        hidden_size=16, num_filters=4, codebook_dim=8, codebook_size=128, num_quantizers=4,
        num_semantic_quantizers=1, vector_quantization_hidden_dimension=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=32,
        upsample_groups=16, sliding_window=8,
    ))  # fmt: skip
    latents = codec.encoder(torch.randn(1, 1, 24000)).latents
    for name, buffer in codec.named_buffers():
        if name.endswith("embed_sum"):
            buffer.copy_(torch.randn(buffer.shape) * latents.std())
    codec.save_pretrained(path)
    return path
