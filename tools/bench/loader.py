"""How fast batches come: ours, the limit, plain webdataset, lhotse; same shards, same output.

    python tools/bench/loader.py --shards FLAC OPUS [--workers 1 2] [--minutes 8] [--device cuda]

Real FLAC: ``dsasr data make-shards MANIFEST --out FLAC --encode flac --shard-size 75``; real
Opus, if that is what the recordings are: without ``--encode``. All sides read the same tar
shards (lhotse: the same audio bytes in its Shar form) and make 80-mel kaldi features and padded
batches under the same frame budget. They run in turn, round after round, for their minutes.
Reported, as medians over rounds: useful (non-padding) seconds of audio per second and worker, and
per second of CPU time of all processes together, which other work on the machine disturbs less; and
of the ratios within each round. ``others`` is the share of the machine that other work took.

The limit decodes and computes features of samples that lie in memory, with our functions, in a bare
loop in as many processes; its CPU time is the loops' alone.
"""

from __future__ import annotations

import argparse
import gc
import glob
import importlib
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
import psutil
import soundfile
import torch

from dsasr.utils.progress import Bar

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import record

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.features import FbankConfig, fbank
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.dataloader.workers import keep_freed_memory
from dsasr.utils.errors import UserError, run_tool

FRAMES = 12_000
WARM, LAST = 0.3, 0.9  # shares of the audio between which the clock runs

# A side yields (useful seconds, padding share) for each batch.
Batches = Iterator[tuple[float, float]]

# Useful seconds per second, per second of CPU time; padding share.
Measured = tuple[float, float, float]


def ours(folder: Path, workers: int, epochs: int, device: str = "") -> Batches:
    """Features made by the workers, or on ``device`` in this process."""
    config = DataLoaderConfig(
        batch=BatchConfig(frames=FRAMES),
        num_workers=workers,
        features="device" if device else "worker",
    )
    datasets = [DatasetConfig("bench", str(folder))]
    with StreamingDataLoader(
        config, datasets=datasets, epochs=epochs, device=device or "cpu"
    ) as stream:
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
    keep_freed_memory()  # as our workers do
    samples, config = _read_share(folder, share, workers), FbankConfig()
    for data in samples[:10]:
        fbank(decode(data), config)
    barrier.wait()
    started, cpu, seconds = time.perf_counter(), time.process_time(), 0.0
    for _ in range(epochs):
        for data in samples:
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
    group, longest = [], 0
    for sample in samples:
        frames = len(sample["features"])
        if group and max(longest, frames) * (len(group) + 1) > FRAMES:
            yield group
            group, longest = [], 0
        group.append(sample)
        longest = max(longest, frames)
    if group:
        yield group


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
            parts_by_key: dict[str, dict] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                kind = "json" if extension == "json" else "audio"
                parts_by_key.setdefault(key, {})[kind] = tar.extractfile(member).read()
        for key, parts in parts_by_key.items():
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
    """A pipeline's rates by the clock and by CPU time, between two shares of the audio."""
    seen = padding = 0.0
    number, marks = 0, []
    batches = make()
    for useful, padded in batches:
        seen += useful
        padding += padded
        number += 1
        if len(marks) < 2 and seen >= (WARM, LAST)[len(marks)] * total:
            marks.append((seen, time.perf_counter(), _cpu()))
    if seen < 0.95 * total:
        raise UserError(f"a side delivered {seen:.0f} of {total:.0f} s")
    (first, started, cpu), (last, ended, cpu_then) = marks
    del batches
    gc.collect()  # ends the workers
    return (last - first) / (ended - started), (last - first) / (cpu_then - cpu), padding / number


def _cpu() -> float:
    """CPU seconds of this process and of the children that run."""
    me = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (me, *me.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="with dataset.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default: 8)")
    parser.add_argument("--epochs", type=int, default=4, help="over the shards, a round")
    parser.add_argument("--device", help="also: features computed there, in the training process")
    parser.add_argument("--without", nargs="*", default=[], choices=["webdataset", "lhotse"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Each side's packages are loaded here, so that no worker spends its time on that.
    for package in ("torchaudio", *({"webdataset", "lhotse"} - set(args.without))):
        importlib.import_module(package)
    cases = [(folder, workers) for folder in args.shards for workers in args.workers]
    with (
        tempfile.TemporaryDirectory(prefix="dsasr-loader-") as temporary,
        Bar(total=round(60 * args.minutes), unit="s", disable=None) as progress,
    ):
        for number, (folder, workers) in enumerate(cases):
            sides = _sides(folder, workers, args, Path(temporary) / str(number))
            _compare(sides, folder, workers, 60 * args.minutes / len(cases), progress)


def _sides(
    folder: Path, workers: int, args: argparse.Namespace, shar: Path
) -> dict[str, Callable[[], Measured]]:
    epochs = args.epochs
    total = json.loads((folder / "dataset.json").read_text())["hours"] * 3600 * epochs

    def pipeline(make: Callable[..., Batches], *given: object) -> Callable[[], Measured]:
        return lambda: measure(lambda: make(*given), total)

    sides = {
        "ours": pipeline(ours, folder, workers, epochs),
        "limit": lambda: limit(folder, workers, epochs),
    }
    if args.device:
        sides["ours_device"] = pipeline(ours, folder, workers, epochs, args.device)
    if "webdataset" not in args.without:
        sides["webdataset"] = pipeline(plain_webdataset, folder, workers, epochs)
    if "lhotse" not in args.without:
        sides["lhotse"] = pipeline(lhotse, write_shar(folder, shar), workers, epochs)
    return sides


def _joined() -> float:
    """CPU seconds of this process and of the children that it has joined."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _machine_busy() -> float:
    """CPU seconds that all processes of the machine have used."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, interrupts, soft = map(int, file.readline().split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def _compare(
    sides: dict[str, Callable[[], Measured]], folder: Path, workers: int, seconds: float, progress
) -> None:
    """Rounds for about so many ``seconds``, at least two, then a line for each side."""
    runs: dict[str, list[Measured]] = {name: [] for name in sides}
    started, busy, used, shown = time.perf_counter(), _machine_busy(), _joined(), 0.0
    elapsed = rounds = 0
    while rounds < 2 or elapsed * (rounds + 0.5) / rounds < seconds:
        for name, run in sides.items():
            runs[name].append(run())
            elapsed = time.perf_counter() - started
            progress.update(round(elapsed - shown, 1))
            shown = elapsed
        rounds += 1
    others = (_machine_busy() - busy - (_joined() - used)) / elapsed / (os.cpu_count() or 1)
    about = json.loads((folder / "dataset.json").read_text())
    for name, measured in runs.items():
        clock, cpu, padding = (statistics.median(column) for column in zip(*measured, strict=True))
        pairs = list(zip(runs["ours"], measured, strict=True))
        ratios = [mine[0] / other[0] for mine, other in pairs]
        record(
            "loader",
            side=name,
            audio=_audio_kind(folder),
            workers=workers,
            frames=FRAMES,
            hours=round(about["hours"], 3),
            rounds=rounds,
            others=round(max(others, 0.0), 3),
            useful_s_per_s_worker=round(clock / workers, 1),
            spread=round((max(r[0] for r in measured) - min(r[0] for r in measured)) / clock, 3),
            useful_s_per_cpu_s=round(cpu, 1),
            padding=round(padding, 4),
            ours_over_this=round(statistics.median(ratios), 3),
            ours_over_this_range=[round(min(ratios), 3), round(max(ratios), 3)],
            ours_over_this_by_cpu=round(statistics.median(m[1] / o[1] for m, o in pairs), 3),
        )


def _audio_kind(folder: Path) -> str:
    with tarfile.open(sorted(glob.glob(f"{folder}/*.tar"))[0]) as tar:
        kinds = {Path(name).suffix for name in tar.getnames()} - {".json"}
    return "+".join(sorted(kind[1:] for kind in kinds))


if __name__ == "__main__":
    sys.exit(run_tool(main))
