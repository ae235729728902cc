"""List, verify or prune the encoders of a snapshot store.

``verify`` exits with 1 if a snapshot is torn. ``prune`` spares the snapshots in use.

examples:
  dsasr snapshots list runs/demo/snapshots
  dsasr snapshots prune runs/demo/snapshots --keep 5
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsasr.cli.arguments import command_parser
from dsasr.utils.errors import UserError
from dsasr.utils.progress import Bar

if TYPE_CHECKING:
    from dsasr.checkpoint.snapshot_store import SnapshotStore


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument("store", type=Path, help="the store's folder (RUN/snapshots)")
    parser.add_argument("--keep", type=int, default=5, help="prune: newest ones kept (default 5)")
    args = parser.parse_args(arguments)
    if not args.store.is_dir():
        raise UserError(f"there is no store {args.store}")
    if args.keep < 1:
        raise UserError("--keep must be at least 1")

    from dsasr.checkpoint.snapshot_store import SnapshotStore

    store = SnapshotStore(args.store, args.keep)
    if args.action == "list":
        print(table(store))
    elif args.action == "verify":
        return 1 if verify(store) else 0
    else:
        pruned = store.prune()
        print(f"pruned {len(pruned)}: {', '.join(pruned) or '–'}")
    return 0


def table(store: SnapshotStore) -> str:
    """One line a snapshot, oldest first; then those that are not whole."""
    used = store.in_use()
    rows = [("id", "pretrain step", "cause", "CKA", "reference", "MB", "checksum", "")]
    manifests, problems = store.listing()
    for manifest in manifests:
        name = manifest["id"]
        size = sum(f.stat().st_size for f in (store.folder / name).iterdir())
        cka = f"{manifest['cka']:.4f}" if manifest.get("cka") is not None else "–"
        users = [run for run, snapshot in used.items() if snapshot == name]
        rows.append((
            name, f"{manifest['pretrain']:,}", manifest["cause"], cka,
            manifest.get("reference") or "–", f"{size / 1e6:.1f}", manifest.get("checksum") or "–",
            ", ".join(f"in use: {u}" for u in users),
        ))  # fmt: skip
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    cells = (("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True))).rstrip() for r in rows)
    return "\n".join([*cells, *(f"bad: {reason}" for reason in problems.values())])


def verify(store: SnapshotStore) -> int:
    """Compare every file with its sha256; returns how many snapshots are not whole."""
    from dsasr.checkpoint import tensor_fragments

    manifests, problems = store.listing()
    for reason in problems.values():
        print(f"bad: {reason}")
    bad, names = len(problems), [m["id"] for m in manifests]
    for name in Bar(names, desc="verifying", unit="snapshot", disable=len(names) < 2):
        try:
            tensor_fragments.verify(store.folder / name)
        except tensor_fragments.FragmentError as error:
            bad += 1
            print(f"bad: {error}")
    print(f"{len(names) + len(problems)} snapshots, {bad} bad")
    return bad
