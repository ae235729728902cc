"""How fast batches come: ours, the limit, plain webdataset, lhotse; same shards, same output.

    python tools/bench/loader.py --shards FOLDER [--workers 1 2] [--rounds 3] [--device cuda]

Shards of real FLAC: ``tools/make_shards.py MANIFEST --out FOLDER --encode flac --shard-size 75``.
All sides read the same tar shards (lhotse: the same audio bytes in its Shar form), make 80-mel
kaldi features and padded batches under the same frame budget. Reported, as medians over rounds in
alternation: useful (non-padding) seconds of audio per second and worker, and per second of CPU time
of all processes together, which other work on the machine disturbs less. The limit decodes and
computes features of samples that lie in memory, with our functions, in a bare loop in as many
processes; its CPU time is the loops' alone.
"""

from __future__ import annotations

import argparse
import gc
import glob
import io
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import record

from dsasr.data.audio import FbankConfig, decode, fbank
from dsasr.data.plan import BatchConfig
from dsasr.data.stream import DatasetConfig, Stream, StreamConfig
from dsasr.errors import UserError, run_tool

FRAMES = 12_000
WARM = 0.15  # share of the audio before the clock starts

# A side yields (useful seconds, padding share) for each batch.
Batches = Iterator[tuple[float, float]]

# Useful seconds per second, per second of CPU time; padding share.
Measured = tuple[float, float, float]


def ours(folder: Path, workers: int, epochs: int, device: str = "") -> Batches:
    """Features made by the workers, or on ``device`` in this process."""
    config = StreamConfig(
        batch=BatchConfig(frames=FRAMES), workers=workers, features="device" if device else "worker"
    )
    datasets = [DatasetConfig("bench", str(folder))]
    with Stream(config, datasets=datasets, epochs=epochs, device=device or "cpu") as stream:
        for batch in stream:
            yield float(batch.feature_lengths_B.sum()) / 100, batch.padding_share


def _read_share(folder: Path, share: int, workers: int) -> list[bytes]:
    found = []
    for path in sorted(glob.glob(f"{folder}/*.tar")):
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.isfile() and not m.name.endswith(".json")]
            found += [tar.extractfile(m).read() for m in members]
    return found[share::workers]


def _bare_loop(folder: Path, share: int, workers: int, epochs: int, barrier, queue) -> None:
    torch.set_num_threads(1)
    held, config = _read_share(folder, share, workers), FbankConfig()
    for data in held[:10]:
        fbank(decode(data), config)
    barrier.wait()
    started, cpu, seconds = time.perf_counter(), time.process_time(), 0.0
    for _ in range(epochs):
        for data in held:
            seconds += len(fbank(decode(data), config)) / 100
    queue.put((seconds, time.perf_counter() - started, time.process_time() - cpu))


def limit(folder: Path, workers: int, epochs: int) -> Measured:
    """The bare loop in ``workers`` processes."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_bare_loop, args=(folder, i, workers, epochs, barrier, queue))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    rates = sum(seconds / took for seconds, took, _ in results)
    return rates, sum(r[0] for r in results) / sum(r[2] for r in results), 0.0


def _torchaudio_fbank(wave: np.ndarray, rate: int) -> torch.Tensor:
    import torchaudio

    wave_n = torch.from_numpy(wave if wave.ndim == 1 else wave.mean(1))[None]
    if rate != 16_000:
        wave_n = torchaudio.functional.resample(wave_n, rate, 16_000)
    return torchaudio.compliance.kaldi.fbank(
        wave_n * 32768.0, num_mel_bins=80, dither=0.0, sample_frequency=16_000
    )


def _wds_sample(sample: dict) -> dict:
    extension = next(e for e in ("flac", "wav", "opus", "ogg", "mp3") if e in sample)
    wave, rate = soundfile.read(io.BytesIO(sample[extension]), dtype="float32")
    meta = json.loads(sample["json"])
    return {"features": _torchaudio_fbank(wave, rate), "text": meta["text"]}


def _wds_collate(samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    lengths = torch.tensor([len(s["features"]) for s in samples])
    padded = torch.nn.utils.rnn.pad_sequence([s["features"] for s in samples], batch_first=True)
    return padded, lengths, [s["text"] for s in samples]


def _budget_batches(samples: Iterator[dict]) -> Iterator[list[dict]]:
    """Samples as they come, as many as fit the frame budget with padding: no bucketing."""
    held, longest = [], 0
    for sample in samples:
        frames = len(sample["features"])
        if held and max(longest, frames) * (len(held) + 1) > FRAMES:
            yield held
            held, longest = [], 0
        held.append(sample)
        longest = max(longest, frames)
    if held:
        yield held


def plain_webdataset(folder: Path, workers: int, epochs: int) -> Batches:
    import webdataset as wds

    urls = sorted(glob.glob(f"{folder}/*.tar")) * epochs
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .map(_wds_sample)
        .compose(_budget_batches)
        .map(_wds_collate)
    )
    for padded, lengths, _ in torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=3
    ):
        useful = float(lengths.sum())
        yield useful / 100, 1 - useful / (padded.shape[0] * padded.shape[1])


class _LhotseBatches(torch.utils.data.Dataset):
    """Cuts to padded features and texts, as lhotse's own K2SpeechRecognitionDataset makes them."""

    def __init__(self) -> None:
        from lhotse import Fbank, FbankConfig
        from lhotse.dataset import OnTheFlyFeatures

        self.features = OnTheFlyFeatures(Fbank(FbankConfig(num_mel_bins=80)))

    def __getitem__(self, cuts):
        features, lengths = self.features(cuts)
        return features, lengths, [cut.supervisions[0].text for cut in cuts]


def write_shar(folder: Path, out: Path) -> Path:
    """The shards' audio, byte for byte, in lhotse's Shar form; as many shards."""
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
    from lhotse.shar import SharWriter

    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(glob.glob(f"{folder}/*.tar"))
    cuts = []
    for path in paths:
        with tarfile.open(path) as tar:
            held: dict[str, dict] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                kind = "json" if extension == "json" else "audio"
                held.setdefault(key, {})[kind] = tar.extractfile(member).read()
        for key, parts in held.items():
            recording = Recording.from_bytes(parts["audio"], recording_id=key)
            meta = json.loads(parts["json"])
            span = SupervisionSegment(
                id=key, recording_id=key, start=0, duration=recording.duration, text=meta["text"]
            )
            cuts.append(MonoCut(key, 0, recording.duration, 0, [span], recording=recording))
    size = -(-len(cuts) // len(paths))
    with SharWriter(str(out), fields={"recording": "original"}, shard_size=size) as writer:
        for cut in CutSet.from_cuts(cuts):
            writer.write(cut)
    return out


def lhotse(shar: Path, workers: int, epochs: int) -> Batches:
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler, make_worker_init_fn
    from lhotse.dataset.iterable_dataset import IterableDatasetWrapper

    # As lhotse's guide says for Shar: every worker reads its own shards, endlessly.
    cuts = CutSet.from_shar(in_dir=str(shar), split_for_dataloading=True, shuffle_shards=True)
    sampler = DynamicBucketingSampler(
        cuts.repeat(epochs),
        max_duration=FRAMES / 100,
        num_buckets=30,
        shuffle=True,
        rank=0,
        world_size=1,
        num_cuts_for_bins_estimate=500,
        buffer_size=2000,
    )
    loader = torch.utils.data.DataLoader(
        IterableDatasetWrapper(_LhotseBatches(), sampler),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=3,
        worker_init_fn=make_worker_init_fn(rank=0, world_size=1),
    )
    for features, lengths, _ in loader:
        useful = float(lengths.sum())
        yield useful / 100, 1 - useful / (features.shape[0] * features.shape[1])


def measure(make: Callable[[], Batches], total: float) -> Measured:
    """A pipeline's rates: by the clock after the warm-up, by CPU time over all of it."""
    seen = padding = counted = 0.0
    number, started, cpu = 0, None, _cpu()
    batches = make()
    for useful, padded in batches:
        if started is not None:
            counted += useful
        seen += useful
        padding += padded
        number += 1
        if started is None and seen >= WARM * total:
            started = time.perf_counter()
    if started is None or seen < 0.95 * total:
        raise UserError(f"a side delivered {seen:.0f} of {total:.0f} s")
    took = time.perf_counter() - started
    del batches
    gc.collect()  # joins the workers, whose time counts only then
    return counted / took, seen / (_cpu() - cpu), padding / number


def _cpu() -> float:
    """CPU seconds of this process and of the children that it has joined."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True, help="folder with dataset.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="over the shards, a round")
    parser.add_argument("--device", help="also: features computed there, in the training process")
    parser.add_argument("--without", nargs="*", default=[], choices=["webdataset", "lhotse"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dsasr-loader-") as temporary:
        about = json.loads((args.shards / "dataset.json").read_text())
        total = about["hours"] * 3600 * args.epochs
        kind = sorted({Path(m).suffix for m in _members(args.shards)} - {".json"})[0][1:]
        folder, epochs = args.shards, args.epochs
        sides = {
            "ours": lambda n: measure(lambda: ours(folder, n, epochs), total),
            "limit": lambda n: limit(folder, n, epochs),
        }
        if args.device:
            sides["ours_device"] = lambda n: measure(
                lambda: ours(folder, n, epochs, args.device), total
            )
        if "webdataset" not in args.without:
            sides["webdataset"] = lambda n: measure(
                lambda: plain_webdataset(folder, n, epochs), total
            )
        if "lhotse" not in args.without:
            shar = write_shar(folder, Path(temporary) / "shar")
            sides["lhotse"] = lambda n: measure(lambda: lhotse(shar, n, epochs), total)
        for workers in args.workers:
            _compare(sides, workers, args.rounds, kind, about)


def _members(folder: Path) -> list[str]:
    with tarfile.open(sorted(glob.glob(f"{folder}/*.tar"))[0]) as tar:
        return tar.getnames()


def _compare(sides: dict, workers: int, rounds: int, kind: str, about: dict) -> None:
    runs: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            runs[name].append(run(workers))
    clock, cpu, padding = (
        {name: statistics.median(run[i] for run in held) for name, held in runs.items()}
        for i in range(3)
    )
    for name, held in runs.items():
        rates = [run[0] for run in held]
        record(
            "loader",
            side=name,
            audio=kind,
            workers=workers,
            frames=FRAMES,
            hours=round(about["hours"], 3),
            rounds=rounds,
            useful_s_per_s_worker=round(clock[name] / workers, 1),
            spread=round((max(rates) - min(rates)) / clock[name], 3),
            useful_s_per_cpu_s=round(cpu[name], 1),
            padding=round(padding[name], 4),
            ours_over_this=round(clock["ours"] / clock[name], 3),
            ours_over_this_by_cpu=round(cpu["ours"] / cpu[name], 3),
        )


if __name__ == "__main__":
    sys.exit(run_tool(main))
