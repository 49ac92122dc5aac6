"""A run of finetune_encoder.py as a model for others: in funasr's layout, or in transformers'.

    python finetune_encoder.py merge RUN_DIR MODEL.pt -o FOLDER [--to hf]

Input   RUN_DIR: output_dir of a finished run; MODEL.pt: the base that it was trained on, or its
        folder, also transformers' (model.safetensors)
Output  FOLDER for funasr's AutoModel: the base's files, the changes in model.pt. --to hf: for
        transformers' FunAsrNanoForConditionalGeneration and its processor: config.json,
        model.safetensors, processor, tokenizer and chat template; what that class has not lies
        beside: the CTC branch (ctc.safetensors). infer.py and a further run read both.
        README.md: the model card
Equal   logits and answers of both layouts, as tests/test_fun_asr_nano.py shows, given the same
        features and audio positions, which plain use of transformers does not give (see LOAD_HF).
        Of the log-mels of 60 recorded 8 kHz prompts it loses 10 % to its floor
"""

import inspect
import shutil
import sys
from pathlib import Path

import torch
import torchaudio
from omegaconf import OmegaConf

import finetune_encoder as ft
import model

CLIPS = 50  # validation clips on which plain use of transformers is compared
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' %}{{ 'SYSTEM' }}{% endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string %}{{ message.content }}{% else -%}
{%- set ns = namespace(context='', words=[], language='', audio='') -%}
{%- for item in message.content -%}
{%- if item.type == 'text' %}{% set ns.context = ns.context + item.text + '\\n' %}{% endif -%}
{%- if item.type == 'keywords' %}{% set ns.words = ns.words + item.keywords %}{% endif -%}
{%- if item.type == 'language' %}{% set ns.language = '成' + item.language %}{% endif -%}
{%- if item.type == 'audio' %}{% set ns.audio = ns.audio + 'AUDIO' %}{% endif -%}
{%- endfor -%}
{%- if ns.words %}{% set ns.context = ns.context + '热词列表：[' + ns.words | join(', ') + ']\\n' %}
{%- endif -%}
{%- if ns.context %}{{ 'CONTEXT' + ns.context }}{% endif -%}
{{- '语音转写' + ns.language + 'ITN：' + ns.audio -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""
AUDIO = "<|object_ref_start|>"  # transformers' place of an audio position
CARD = """\
---
license: other
license_name: that-of-the-base-model
base_model: {base}
library_name: {library}
pipeline_tag: automatic-speech-recognition
tags: [automatic-speech-recognition, telephone, fun-asr-nano, {library}]
---
# Fun-ASR-Nano, adapted to telephone speech

`finetune_encoder.py` of earshot made it of {base} (hash of its weights: {hash}), with
{hours}. Keys that differ from the release's:

{keys}

Before and after, on the run's own validation sets:

{table}

## How to load it

{load}

infer.py of earshot: `python infer.py model.dir=THIS_FOLDER call.wav`, which reads the CTC branch
too; with the run's own folder in place of this one it hears exactly as in training.
"""
LOAD_FUNASR = """\
```python
from funasr import AutoModel

print(AutoModel(model="THIS_FOLDER").generate(input=["call.wav"])[0]["text"])
```
{rate}
For transformers: `python finetune_encoder.py merge RUN_DIR MODEL.pt -o FOLDER --to hf`."""
LOAD_HF = """\
```python
import soundfile
import torch
import torchaudio
from transformers import AutoProcessor, FunAsrNanoForConditionalGeneration


{code}

folder = "THIS_FOLDER"
processor = AutoProcessor.from_pretrained(folder)
# unless attention is named, the adaptor of transformers 5.24 hears the padding of a batch
options = {{"dtype": torch.float32, "attn_implementation": "sdpa"}}
net = FunAsrNanoForConditionalGeneration.from_pretrained(folder, **options)
wave, rate = soundfile.read("call.wav", dtype="float32")
print(transcribe(net, processor, wave, rate))
```
`transcribe` does what the model was trained with and plain transformers does not. The LLM hears the
first eighth of the audio positions, not all of them. Samples are 16 bits wide: taken as -1 to 1,
what is fainter than 20.8 nats over the usual floor would be lost. FunASR's dither is in neither.
{rate}
A clip has at most 122 s. {measured}

For funasr: `python finetune_encoder.py merge RUN_DIR MODEL.pt -o FOLDER`."""
RATES = {  # (frontend_conf.fs, its mel_axis at 8000, layout) -> what to do about it
    (16000, "", "funasr"): "Other rates than 16 kHz are resampled, as they were in training.",
    (8000, "pretrained", "funasr"): """\
Upsample to 16 kHz, as this code does: the run has read calls at 8 kHz natively, on the mel axis of
the release, which only infer.py can. Above 3.8 kHz the features differ a little.""",
    (8000, "native", "funasr"): """\
Set `frontend_conf.fs: 8000` in config.yaml: the run has read calls so.""",
    (8000, "native", "hf"): """\
The run has read calls on a mel axis of 0 to 4 kHz, which transformers lacks: this is another one,
and the errors are more than in the table.""",
}
RATES |= {(*key[:2], "hf"): RATES[key] for key in [*RATES][:2]}


def merge(run_dir, base, out, to="funasr"):
    """Write a folder with the run's changes in the base's weights, and its model card."""
    run, out, base = ft.read_run(run_dir), Path(out), ft.base_file(base)
    if not run or run["conf"]["audio_encoder"] != ft.SANM:
        raise model.UserError(f"{run_dir}: no finished run on a Fun-ASR-Nano; give its output_dir")
    if out.exists() and any(out.iterdir()):
        raise model.UserError(f"{out}: is not empty; give another folder")
    if to == "funasr" and base.suffix == ".safetensors":
        raise model.UserError(f"{base}: only a model.pt becomes funasr's layout; add --to hf")
    weights = dict(ft.read_base(base, run["conf"]))
    trained = model.read_weights(Path(run_dir) / "trained.pt")
    if (found := model.hash_tensors(weights)) != run["base_hash"]:
        said = f"hash {found}, but {run_dir} was trained on {run['base_hash']}"
        raise model.UserError(f"{base}: {said}")
    lora = run["conf"]["llm_conf"]["lora_conf"]
    scale = lora["lora_alpha"] / lora["r"]
    for name, value in trained.items():
        if ".lora_A." in name:  # W + alpha / r * B A, in the base's own dtype
            target = f"{name.split('.lora_A.')[0]}.weight"
            delta = scale * trained[name.replace(".lora_A.", ".lora_B.")] @ value
            weights[target] = (weights[target].float() + delta).to(weights[target].dtype)
        elif ".lora_B." not in name:
            weights[name] = value  # fp32: bf16 would round small updates away
    weights = {name: value.clone() for name, value in weights.items()}  # no longer memory-mapped
    if to == "hf":
        out.mkdir(parents=True, exist_ok=True)
        with model.loading(base.parent):
            write_hf(weights, run["conf"], base, out)
    else:
        leave = shutil.ignore_patterns(base.name, ".git")
        shutil.copytree(base.parent, out, ignore=leave, dirs_exist_ok=True)
        model.save(out / "model.pt", weights)
    print(f"{len(trained)} changed tensors in {len(weights)} -> {out}")
    model.save(out / "README.md", card(run, Path(run_dir), out, to))


# ---- transformers' layout ---------------------------------------------------


def write_hf(weights, conf, base, out):
    """Write what FunAsrNanoForConditionalGeneration and its processor load, and the CTC branch."""
    import transformers as hub
    from safetensors.torch import save

    encoder, adaptor = conf["audio_encoder_conf"], conf["audio_adaptor_conf"]
    if adaptor["downsample_rate"] != 1 or not adaptor["use_low_frame_rate"]:
        raise model.UserError(f"{base}: transformers has no adaptor but the release's")
    tokenizer = model.load_tokenizer(ft.llm_folder(base, conf))
    tokenizer.padding_side = "left"
    text = hub.AutoConfig.from_pretrained(ft.llm_folder(base, conf)).get_text_config()
    text.name_or_path = ""  # it would be a path of this machine
    audio = hub.FunAsrNanoEncoderConfig(
        hidden_size=encoder["output_size"], num_attention_heads=encoder["attention_heads"],
        intermediate_size=encoder["linear_units"], fsmn_kernel_size=encoder["kernel_size"],
        num_hidden_layers=encoder["num_blocks"] + encoder["tp_blocks"],
        num_timestamp_prediction_layers=encoder["tp_blocks"],
    )  # fmt: skip
    width = adaptor["llm_dim"]
    adaptor = hub.FunAsrNanoAdaptorConfig(
        hidden_size=width, intermediate_size=width // 4, num_hidden_layers=adaptor["n_layer"],
        projector_hidden_size=adaptor["ffn_dim"], layer_norm_eps=1e-12,  # 1e-5 by default
    )  # fmt: skip
    config = hub.FunAsrNanoConfig(
        audio_config=audio, adaptor_config=adaptor, text_config=text, dtype="float32",
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["FunAsrNanoForConditionalGeneration"],
    )  # fmt: skip
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = hub.GenerationConfig(eos_token_id=stop, pad_token_id=stop)
    words = {"SYSTEM": ft.SYSTEM, "CONTEXT": ft.CONTEXT, "AUDIO": AUDIO}
    words["ITN"] = "，不进行文本规整" * (not conf["dataset_conf"]["prompt_conf"]["itn"])
    template = TEMPLATE
    for word, stands_for in words.items():
        template = template.replace(word, stands_for.replace("\n", "\\n"))
    extractor = hub.FunAsrNanoFeatureExtractor()
    for part in (config, generation, hub.FunAsrNanoProcessor(extractor, tokenizer, template)):
        part.save_pretrained(out)
    ctc = {name: value for name, value in weights.items() if name.startswith(ft.CTC)}
    if text.tie_word_embeddings:
        weights = {name: w for name, w in weights.items() if name != "llm.lm_head.weight"}
    found = {}
    for name in weights.keys() - ctc.keys():
        names = ft.hf_names(name, encoder)
        found |= zip(names, weights[name].chunk(len(names)), strict=True)
    for path, tensors in (("model.safetensors", found), ("ctc.safetensors", ctc)):
        if tensors:
            content = save(tensors, {"format": "pt"})
            model.save_atomic(out / path, lambda file, content=content: file.write(content))
    for name in ("config.yaml", "multilingual.tiktoken"):  # infer.py reads both
        if (base.parent / name).is_file():
            shutil.copy(base.parent / name, out)


def transcribe(net, processor, wave, rate, keywords=None, plain=False):
    """Text of a mono wave (N,) within -1..1; keywords: list of hotwords.

    plain: as processor and net.generate alone would have it, on all audio positions.
    """
    wave = torchaudio.functional.resample(torch.as_tensor(wave), rate, 16000)
    samples = wave.numpy() * (1 if plain else 32768)
    inputs = processor.apply_transcription_request(samples, keywords=keywords).to(net.device)
    ids, features = inputs["input_ids"], (inputs["input_features"], inputs["input_features_mask"])
    with torch.no_grad():
        speech = net.get_audio_features(*features).pooler_output  # (T, D), 60 ms a frame
        keep = len(speech)
        for _ in range(0 if plain else 3):
            keep = (keep - 1) // 2 + 1  # about T / 8
        places = (ids[0] == net.config.audio_token_id).nonzero()[:, 0]  # (T,)
        embeds = net.get_input_embeddings()(ids)  # (1, L, D)
        embeds[0, places] = speech.to(embeds.dtype)
        used = torch.ones_like(ids[0], dtype=torch.bool)
        used[places[keep:]] = False
        most = 8 + -(-12 * len(wave) // 16000)  # tokens, 12 a second
        said = net.generate(
            inputs_embeds=embeds[:, used], attention_mask=used[used][None].long(),
            do_sample=False, max_new_tokens=most,
        )  # fmt: skip
    return processor.decode(said[0], skip_special_tokens=True).strip()


# ---- the model card ---------------------------------------------------------


def measure(run, run_dir, folder):
    """(error rate as trained, as transformers alone reads, clips) on telephone validation clips."""
    import transformers as hub

    cfg, device = OmegaConf.create(run["conf"]), "cuda" if torch.cuda.is_available() else "cpu"
    cfg.output_dir = str(run_dir)  # whose manifests are cached beside it
    try:
        rows = [row for _, _, row in ft.list_rows(cfg.valid_data_set_list, cfg) if row["target"]]
        waves = [model.load_clip(row, 16000) for row in rows[:CLIPS]]
    except model.UserError:  # it may be another machine
        return None
    if not waves:
        return None
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    net = hub.FunAsrNanoForConditionalGeneration.from_pretrained(folder, **options).to(device)
    processor = hub.AutoProcessor.from_pretrained(folder)
    targets, rates = [row["target"] for row in rows[:CLIPS]], []
    for plain in (False, True):
        texts = [transcribe(net, processor, wave, 16000, None, plain) for wave in waves]
        rates.append(model.error_rate(targets, texts)["rate"])
    return *rates, len(waves)


def card(run, run_dir, out, to):
    """The text of README.md: what this model is made of, how good it is, how to load it."""
    conf, library = run["conf"], "transformers" if to == "hf" else "funasr"
    by_name = not conf["init_param"] and not Path(conf["model"]).is_absolute()
    hours = [f"{hours:.3g} hours of {kind}" for kind, hours in run.get("hours", {}).items()]
    default = OmegaConf.create(ft.DEFAULTS)
    default = model.flatten(OmegaConf.to_container(default, resolve=True, throw_on_missing=False))
    silent = {*model.marked(ft.DEFAULTS, "-"), "model", "init_param", "output_dir", "device"}
    keys = [f"- `{key}`: {Path(value).name if isinstance(value, str) else value}"
            for key, value in model.flatten(conf).items() if value != default[key]
            and key not in silent and not key.endswith("data_set_list")]  # fmt: skip
    front = conf["frontend_conf"]
    rate = RATES[front["fs"], front["mel_axis"] if front["fs"] == 8000 else "", to]
    print(rate)
    load = LOAD_FUNASR.format(rate=rate)
    if to == "hf":
        told = "Its error rate was not measured: no validation clips of calls could be read."
        if found := measure(run, run_dir, out):
            told = "Error rate on {2} validation clips\nof calls: {0:.1%}; plain use: {1:.1%}."
            told = told.format(*found)
        load = LOAD_HF.format(code=inspect.getsource(transcribe), rate=rate, measured=told)
    return CARD.format(
        base=conf["model"] if by_name else Path(run["base"]).parent.name, library=library,
        hash=run["base_hash"], hours=" and ".join(hours) or "hours that it did not note down",
        keys="\n".join(keys), load=load,
        table=(run_dir / "table.md").read_text(encoding="utf-8").strip(),
    )  # fmt: skip


def main(arguments):
    match arguments:
        case [run_dir, base, "-o", out]:
            merge(run_dir, base, out)
        case [run_dir, base, "-o", out, "--to", "hf" | "funasr" as to]:
            merge(run_dir, base, out, to)
        case _:
            sys.exit("error: expected merge RUN_DIR MODEL.pt -o FOLDER [--to hf]")


if __name__ == "__main__":
    sys.exit(__doc__.strip())
