"""List, verify or prune the encoders of a snapshot store."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.checkpoint.tensor_fragments import FragmentError
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.progress import Bar


def listing(store: SnapshotStore) -> str:
    """One line a snapshot, oldest first."""
    used = store.in_use()
    rows = [("id", "pretrain step", "cause", "CKA", "reference", "MB", "checksum", "")]
    for held in store.manifests():
        size = sum(f.stat().st_size for f in (store.folder / held["id"]).iterdir())
        cka = f"{held['cka']:.4f}" if "cka" in held else "–"
        users = [run for run, name in used.items() if name == held["id"]]
        rows.append((
            held["id"], f"{held['pretrain']:,}", held["cause"], cka, held.get("reference") or "–",
            f"{size / 1e6:.1f}", held.get("checksum", "–"),
            ", ".join(f"in use: {u}" for u in users),
        ))  # fmt: skip
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    cells = (("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True))).rstrip() for r in rows)
    return "\n".join(cells)


def verify(store: SnapshotStore) -> int:
    """Compare every file with its sha256; returns how many snapshots are not whole."""
    bad = 0
    names = [m["id"] for m in store.manifests()]
    for name in Bar(names, desc="verifying", unit="snapshot", disable=len(names) < 2):
        try:
            tensor_fragments.verify(store.folder / name)
        except FragmentError as error:
            bad += 1
            print(f"bad: {error}")
    print(f"{len(names)} snapshots, {bad} bad")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument("store", type=Path, help="the store's folder (RUN/snapshots)")
    parser.add_argument("--keep", type=int, default=5, help="prune: newest ones kept (default 5)")
    options = parser.parse_args()
    if not options.store.is_dir():
        raise UserError(f"there is no store {options.store}")
    if options.keep < 1:
        raise UserError("--keep must be at least 1")
    store = SnapshotStore(options.store, options.keep)
    if options.action == "list":
        print(listing(store))
    elif options.action == "verify":
        return 1 if verify(store) else 0
    else:
        gone = store.prune()
        print(f"pruned {len(gone)}: {', '.join(gone) or '–'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
