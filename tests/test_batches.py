"""Order of batches, and the cache of encoder outputs as training reads it."""

import itertools
import json

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch

import model

RNG = np.random.default_rng(0)
AISHELL = (np.clip(RNG.lognormal(1.462, 0.3, 12000), 1.2, 14.5) / 0.06).astype(int)  # frames
LONG_TAIL = np.clip(RNG.lognormal(4.0, 1.0, 6000), 3, 2000).astype(int)


def size(batch, lengths):
    return len(batch) * max(lengths[clip] for clip in batch)


@pytest.mark.parametrize("lengths", [AISHELL, LONG_TAIL], ids=["AISHELL", "long tail"])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_no_batch_exceeds_the_budget_and_little_is_padding(lengths, world):
    epochs = [model.length_batches(lengths, 4000, world, 7, epoch) for epoch in range(5)]
    for groups in epochs:
        assert all(len(group) == world for group in groups)
        batches = list(itertools.chain.from_iterable(groups))
        clips = list(itertools.chain.from_iterable(batches))
        assert len(clips) == len(set(clips)) > 0.9 * len(lengths)
        sizes = [size(batch, lengths) for batch in batches]
        assert max(sizes) <= 4000 and 1 - sum(lengths[clips]) / sum(sizes) < 0.05
        longest = [[max(lengths[batch]) for batch in group] for group in groups]
        alike = [min(group) / max(group) for group in longest]
        assert np.mean(alike) > 0.75, "processes of a step wait for each other's long clips"
    seen = {clip for groups in epochs for group in groups for batch in group for clip in batch}
    assert len(seen) == len(lengths)
    largest = [max(size(batch, lengths) for batch in group) for group in epochs[0]]
    assert largest[0] == max(largest), "what may not fit into memory comes first"
    assert epochs[1] == model.length_batches(list(lengths), 4000, world, 7, 1)
    others = [model.length_batches(lengths, 4000, world, *how) for how in ((8, 1), (7, 2))]
    assert epochs[1] not in others


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 3, 16, 17, 129])
def test_few_clips_are_shared_out_or_refused(count, world):
    lengths, seen = list(range(1, count + 1)), set()
    with pytest.raises(model.UserError, match="a clip has 999 positions, a batch at most 998"):
        model.length_batches([*lengths, 999], 998, world, 0, 0)
    if count < world:
        with pytest.raises(model.UserError, match=f"{count} clips do not fill a batch for each"):
            model.length_batches(lengths, 998, world, 0, 0)
        return
    for epoch in range(5):
        groups = model.length_batches(lengths, count, world, 0, epoch, most=3)
        batches = list(itertools.chain.from_iterable(groups))
        assert len(batches) == world * len(groups) and all(batches)
        assert all(size(b, lengths) <= count and len(b) <= 3 for b in batches)
        seen |= set(itertools.chain.from_iterable(batches))
    assert seen == set(range(count))


def test_groups_go_on_for_ever_from_where_a_run_stopped():
    def groups_of(epoch):
        return [f"{epoch}{name}" for name in "abc"]

    whole = list(itertools.islice(model.endless_groups(groups_of, 0, 0), 10))
    assert whole[2:5] == [(0, 2, "0c"), (1, 0, "1a"), (1, 1, "1b")]
    for at, (epoch, number, _) in enumerate(whole):
        again = itertools.islice(model.endless_groups(groups_of, epoch, number), 10 - at)
        assert list(again) == whole[at:]


TEXTS = {"a": "Press one!", "b": "今天 天气", "c": "hold", "d": "?!", "e": "not cached"}
SHARDS = [[("a", 5), ("a@0.9", 6), ("b", 4)], [("c", 3), ("c@0.9", 4), ("d", 2)]]


@pytest.fixture
def cache(tmp_path):
    """A cache in precompute.py's layout; every value of a clip is its own number."""
    for shard, clips in enumerate(SHARDS):
        tensors = {str(n): torch.full((frames, 8), 10.0 * shard + n).half()
                   for n, (_, frames) in enumerate(clips)}  # fmt: skip
        rows = {"clips": [(key, "stamp", frames, frames * 0.06) for key, frames in clips]}
        path = tmp_path / f"shard-{shard:05d}.safetensors"
        safetensors.torch.save_file(tensors, path, {"rows": json.dumps(rows | {"dropped": []})})
    model.save(tmp_path / "cache.json", {"format": model.FORMAT, "encoder": {"weights": "x"}})
    lines = [{"key": key, "source": f"{key}.wav", "target": text} for key, text in TEXTS.items()]
    model.save(tmp_path / "m.jsonl", lines)
    return model.EncoderCache(tmp_path)


def test_clips_are_found_by_key_with_their_tokens(cache, tokenizer, tmp_path, capsys):
    manifest = str(tmp_path / "m.jsonl")
    clips = model.cached_clips(manifest, cache, tokenizer, tmp_path / "kept")
    assert f"{manifest}: 2 of 5 clips are not cached, or have no text" in capsys.readouterr().out
    assert clips["key"][:] == ["a", "b", "c"] and clips["frames"][:] == [5, 4, 3]
    assert clips["target"][:] == ["press one", "今天天气", "hold"]
    assert clips["ids"][:] == model.text_to_ids(tokenizer, clips["target"][:])
    for clip in clips:
        enc = cache.read(clip["shard"], clip["number"])
        assert enc.shape == (clip["frames"], 8) and enc.dtype == torch.float16
        assert (enc == 10 * clip["shard"] + clip["number"]).all()
        assert clip["seconds"] == pytest.approx(clip["frames"] * 0.06)
    both = f"{manifest}, {manifest}"
    fast = model.cached_clips(both, cache, tokenizer, tmp_path / "kept", speeds=[1.0, 0.9])
    assert fast["key"][:] == ["a", "a@0.9", "b", "c", "c@0.9"] * 2
    plain = model.cached_clips(manifest, cache, tokenizer, tmp_path / "kept", normalize=False)
    assert plain["target"][:] == ["Press one!", "今天 天气", "hold", "?!"]


def test_tags_are_tokens_unless_they_are_stripped(cache, tokenizer, tmp_path):
    spec = str(tmp_path / "t.jsonl")
    model.save(spec, [{"key": "a", "source": "a.wav", "target": "<|en|><|HAPPY|>Press one!"}])
    for strip, said in ((False, "en happy press one"), (True, "press one")):
        clips = model.cached_clips(spec, cache, tokenizer, tmp_path / "kept", strip_tags=strip)
        assert clips["target"][:] == [said]
        assert clips["ids"][:] == model.text_to_ids(tokenizer, [said])


@pytest.mark.parametrize("form", ["jsonl", "parquet", "save_to_disk"])
def test_a_manifest_is_tokenised_once_and_never_in_its_own_folder(cache, tokenizer, tmp_path, form):
    spec = tmp_path / "m.jsonl"
    if form != "jsonl":
        spec = tmp_path / "set"
        audio = [{"bytes": b"", "path": None}] * len(TEXTS)
        table = {"key": list(TEXTS), "text": [*TEXTS.values()][:-1] + [None], "audio": audio}
        table = datasets.Dataset.from_dict(table)
        parquet = form == "parquet"
        table.to_parquet(spec / "0.parquet") if parquet else table.save_to_disk(spec)
    before = sorted(tmp_path.rglob("*"))

    def read():
        clips = model.cached_clips(str(spec), cache, tokenizer, tmp_path / "kept")
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.arrow")}
        return clips.to_list(), kept, clips.cache_files

    rows, kept, files = read()
    assert [row["key"] for row in rows] == ["a", "b", "c"] and rows[0]["language"] is None
    assert read() == (rows, kept, files) and files, "read again, not from the file"
    assert [path for path in sorted(tmp_path.rglob("*")) if "kept" not in path.parts] == before


def test_what_is_no_cache_is_refused_by_name(cache, tokenizer, tmp_path):
    model.save(tmp_path / "other.jsonl", [{"key": "z", "source": "z.wav", "target": "z"}])
    with pytest.raises(model.UserError, match="other.jsonl: not one clip with text is in the"):
        model.cached_clips(str(tmp_path / "other.jsonl"), cache, tokenizer, tmp_path / "kept")
    torn = tmp_path / "shard-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(model.UserError, match="shard-00001.safetensors: torn .*run precompute.py"):
        model.EncoderCache(tmp_path).index()
    model.save(tmp_path / "cache.json", {"format": 2})
    with pytest.raises(model.UserError, match="made by an earlier layout; run precompute.py again"):
        model.EncoderCache(tmp_path)
    with pytest.raises(model.UserError, match="no cache; run precompute.py with cache.dir="):
        model.EncoderCache(tmp_path / "kept")
