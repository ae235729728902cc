"""The page of a data set: histograms, players, the oddest utterances (``dsasr data inspect``)."""

from __future__ import annotations

import base64
import io
import itertools
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dsasr.data.audio.measure import CLIPPED
from dsasr.data.audio.resampling import RATE
from dsasr.data.shards.shard_measures import Histogram, ShardMeasures, Utterance, read_audio
from dsasr.data.text.scripts import HAN_CHARACTER
from dsasr.reporting.figures import new, save
from dsasr.reporting.page import Figure, figure, render
from dsasr.reporting.tables import Table
from dsasr.tracking.timeline_plot import COLORS, literal

BARS = 40  # of a histogram, about
NAMES = 12  # languages and speakers of a figure, at most
RARE = 40  # characters of the table
CLIP_SECONDS = 8.0  # of an utterance, that its player has


@dataclass(frozen=True)
class Measure:
    """A measure's name on the page, its unit, and what its ends are called."""

    title: str
    unit: str
    short: str  # the unit beside a value
    digits: int
    low: str
    high: str
    caption: str
    scale: float = 1.0


MEASURES = {
    "seconds": Measure("Length", "seconds", "s", 1, "shortest", "longest", ""),
    "rate": Measure(
        "Characters a second", "characters / s", "characters / s", 1, "fewest", "most",
        "Very many: text that was not spoken, or audio cut off. Very few: words left out, or long "
        "silences.",
    ),
    "level": Measure(
        "Level", "dB of full scale", "dB", 0, "quietest", "loudest",
        "Root mean square of the utterance.",
    ),
    "clipped": Measure(
        "Clipping", "% of samples", "% clipped", 2, "least", "most clipped",
        f"Samples at full scale. Above {100 * CLIPPED:g}% it is audible.", 100.0,
    ),
    "snr": Measure(
        "Signal-to-noise ratio", "dB, estimated", "dB SNR", 0, "noisiest", "cleanest",
        "Of loud to quiet frames of 20 ms: low also where nobody pauses, high also where silence "
        "was cut to zeros.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Player:
    """An utterance on the page; ``sound``: its first seconds in base64, empty if not readable."""

    utterance: Utterance
    sound: str
    kind: str  # MIME type
    about: str


@dataclass(frozen=True)
class Odd:
    """The oddest utterances by one measure, from one end to the other."""

    title: str
    note: str
    players: list[Player]


def page(name: str, found: ShardMeasures, of_shards: int) -> str:
    """The HTML of what was found in ``found.shards`` of ``of_shards`` shards."""
    sounds = _sounds(found)
    with tempfile.TemporaryDirectory() as folder:
        pictures = list(_figures(found, Path(folder)))
    return render(
        "data.html.jinja",
        f"Data: {name}",
        facts=_facts(found, of_shards),
        figures=pictures,
        players=[_player(u, sounds) for u in found.chosen],
        odd=[odd for key in MEASURES if (odd := _odd(key, found, sounds)).players],
        bad=_bad(found),
        characters=_characters(found),
        clip_seconds=CLIP_SECONDS,
    )


def _facts(found: ShardMeasures, of_shards: int) -> list[tuple[str, list[str]]]:
    langs = sorted(found.langs.items(), key=lambda item: -item[1][1])
    speakers = [name for name in found.speakers if name]
    seconds, rate = found.histograms["seconds"], found.histograms["rate"]
    clipped = found.histograms["clipped"]
    loud = clipped.counts[round(CLIPPED / clipped.width) :].sum() / max(clipped.total, 1)
    values = {
        "shards": f"{found.shards:,}" + (f" of {of_shards:,}" if of_shards != found.shards else ""),
        "utterances": f"{found.utterances:,}, {found.seconds / 3600:,.2f} hours",
        "languages": ", ".join(
            f"{lang or 'none given'} {s / 3600:,.2f} h" for lang, (_, s) in langs[:NAMES]
        ),
        "speakers": f"{len(speakers):,}" if speakers else "none given",
        "audio": ", ".join(f"{name} ({n:,})" for name, n in found.formats.most_common(6)),
        "seconds": _quantiles(seconds, 1),
        "characters a second": _quantiles(rate, 1),
        "level in dB of full scale": _quantiles(found.histograms["level"], 0),
        "clipped": f"{loud:.1%} of the utterances",
        "signal-to-noise ratio in dB": f"{_quantiles(found.histograms['snr'], 0)}, estimated",
        "left out": f"{found.bad.total():,}" if found.bad else "none",
    }  # fmt: skip
    return [(key, [value]) for key, value in values.items()]


def _quantiles(histogram: Histogram, digits: int) -> str:
    low, half, high = (f"{histogram.quantile(q):.{digits}f}" for q in (0.05, 0.5, 0.95))
    return f"{half} (90% from {low} to {high})".replace("-", "−")


# -- figures -----------------------------------------------------------------------------------


def _figures(found: ShardMeasures, folder: Path) -> list[Figure]:
    pictures = []
    for key, about in MEASURES.items():
        if key == "clipped" and not found.histograms[key].highest > 0:
            continue  # nothing is
        path = _histogram(found.histograms[key], about, folder / f"{key}.png")
        pictures.append(figure(about.title, path, about.caption))
    langs = {lang or "none given": seconds / 3600 for lang, (_, seconds) in found.langs.items()}
    if len(langs) > 1:
        path = _bars(langs, "hours", folder / "langs.png")
        pictures.append(figure("Languages", path, _others(langs)))
    speakers = {name or "none given": float(n) for name, n in found.speakers.items()}
    if speakers:
        path = _bars(speakers, "utterances", folder / "speakers.png")
        pictures.append(figure("Speakers", path, _others(speakers)))
    return pictures


def _histogram(histogram: Histogram, about: Measure, path: Path) -> Path:
    """Counts between the 0.1% and 99.9% quantiles; what lies beyond is in the outermost bars."""
    plot, axes = new(1, 1, (3.6, 2.3))
    axis = axes[0, 0]
    counts = histogram.counts
    inside = np.flatnonzero(
        (np.cumsum(counts) > 0.001 * histogram.total)
        & (np.cumsum(counts[::-1])[::-1] > 0.001 * histogram.total)
    )
    first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, len(counts))
    step = max(1, -(-(last - first) // BARS))
    edges = np.arange(first, last + step, step)
    sums = [int(counts[a:b].sum()) for a, b in itertools.pairwise(edges)]
    sums[0] += int(counts[:first].sum())
    sums[-1] += int(counts[edges[-1] :].sum())
    lefts = (histogram.low + edges[:-1] * histogram.width) * about.scale
    axis.bar(lefts, sums, width=step * histogram.width * about.scale, align="edge",
             color=COLORS[0], edgecolor="white", linewidth=0.4)  # fmt: skip
    axis.set_xlabel(about.unit)
    axis.set_ylabel("utterances")
    axis.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    return save(plot, path)


def _bars(values: dict[str, float], unit: str, path: Path) -> Path:
    """The largest, one bar each."""
    rows = sorted(values.items(), key=lambda item: (-item[1], item[0]))[:NAMES]
    plot, axes = new(1, 1, (3.6, max(1.3, 0.55 + 0.2 * len(rows))))
    axis = axes[0, 0]
    axis.barh([literal(_short(name)) for name, _ in rows], [n for _, n in rows], color=COLORS[0])
    axis.invert_yaxis()
    axis.yaxis.grid(False)
    axis.set_xlabel(unit)
    axis.xaxis.get_major_locator().set_params(nbins=5)
    axis.margins(y=0.01)
    return save(plot, path)


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _others(values: dict[str, float]) -> str:
    more = len(values) - NAMES
    return f"The {NAMES} with the most, of {len(values):,}." if more > 0 else ""


# -- players -----------------------------------------------------------------------------------


def _sounds(found: ShardMeasures) -> dict[tuple[Path, str], tuple[str, str]]:
    """(shard, key) → (sound in base64, MIME type) of all utterances on the page."""
    wanted = dict.fromkeys([*found.chosen, *(u for rows in found.extremes.values() for u in rows)])
    return {(u.tar, u.key): encode(wave) for u, wave in read_audio(wanted, CLIP_SECONDS)}


def encode(wave: Tensor, rate: int = RATE) -> tuple[str, str]:
    """(``wave`` as MP3 in base64, its MIME type): every browser plays it, in 3 KB a second; FLAC
    where libsndfile (before 1.1) writes no MP3."""
    import soundfile

    samples = wave.clamp(-1, 1).numpy()
    kind = "MP3" if "MP3" in soundfile.available_formats() else "FLAC"
    buffer = io.BytesIO()
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.95} if kind == "MP3" else {}
    soundfile.write(buffer, samples, rate, format=kind, **options)
    mime = {"MP3": "audio/mpeg", "FLAC": "audio/flac"}[kind]
    return base64.b64encode(buffer.getvalue()).decode(), mime


def _player(utterance: Utterance, sounds: dict, key: str = "") -> Player:
    """``key``: the measure by which the utterance is an outlier, shown first."""
    u = utterance
    sound, kind = sounds.get((u.tar, u.key), ("", ""))
    values = {name: _value(name, getattr(u, name)) for name in MEASURES}
    first = [values.pop(key)] if key else []
    if not u.clipped:
        values.pop("clipped", None)
    parts = [*first, u.speaker, u.lang, *values.values(), f"{u.key} in {u.tar.name}"]
    return Player(u, sound, kind, " · ".join(part for part in parts if part))


def _value(key: str, value: float) -> str:
    """As ``9.3 characters / s``."""
    about = MEASURES[key]
    return f"{about.scale * value:.{about.digits}f} {about.short}".replace("-", "−")


def _odd(key: str, found: ShardMeasures, sounds: dict) -> Odd:
    about = MEASURES[key]
    players = [_player(row, sounds, key) for row in found.extremes.get(key, [])]
    ends = f"From the {about.low} to the {about.high}"
    if key == "clipped":
        ends, players = "The most clipped first", players[::-1]
    middle = _value(key, found.histograms[key].quantile(0.5))
    return Odd(about.title, f"{ends}; half of all lie below {middle}.", players)


# -- tables ------------------------------------------------------------------------------------


def _bad(found: ShardMeasures) -> Table | None:
    rows = []
    for cause, count in found.bad.most_common():
        _, shard, key, detail = found.bad_examples[cause]
        rows.append([cause, f"{count:,}", key, Path(shard).name, detail])
    head = ["cause", "utterances", "such as", "in", "why"]
    return Table(head, rows, kind="left") if rows else None


def _characters(found: ShardMeasures) -> Table | None:
    """The rarest: what a vocabulary may lack, and what slipped into transcripts."""
    rarest = found.characters.most_common()[::-1]
    rare = [(c, n) for c, n in rarest if not HAN_CHARACTER.match(c)]
    rows = [[_shown(c), f"U+{ord(c):04X}", f"{n:,}"] for c, n in rare[:RARE]]
    note = f"{len(found.characters):,} different characters"
    if han := len(rarest) - len(rare):
        note += f", {han:,} of them Han"
    return Table(["character", "code", "times"], rows, kind="left", note=note) if rows else None


def _shown(character: str) -> str:
    """A space, a control character and the like by its name."""
    if character.isprintable() and character != " ":
        return character
    return unicodedata.name(character, "control character").lower()
