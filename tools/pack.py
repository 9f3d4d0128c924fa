"""Pack a folder of images into a few large files that load faster.

    python -m tools.pack IMAGENET --output PACK                       # short side 256, JPEG quality 90
    python -m tools.pack IMAGENET --output PACK --size 384            # nearly all detail, 70 GB for ImageNet-1K
    python -m tools.pack PETS --output PACK --raw                     # pixels: nothing to decode, 5 to 10 times larger
    python -m tools.pack IMAGENET --output PACK --size 0 --quality 0  # copy the files unchanged
    python main_pretrain.py --data_path PACK ...

    python -m tools.pack --verify PACK     # check every hash, and the files of the source if it exists
    python -m tools.pack --detach PACK     # forget the source, which may then change or be deleted

All splits are packed. An interrupted command resumes when it is run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.files import write_json
from data.folders import NoSplit
from data.loader import allowed_bad
from data.packs import (
    MANIFEST,
    PLAN,
    VERIFIED,
    Packing,
    Recipe,
    is_pack,
    open_pack,
    read_manifest,
)
from data.sources import Source, open_source
from tools.command import require_at_least
from util.logging import log_to_terminal

log = logging.getLogger("pack")

SHARDS = 64  # approximate number, for parallel work and little loss on interruption
SHARD_IMAGES = (256, 8192)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data_path", nargs="?", default="", help="the images, as for training")
    parser.add_argument("--output", type=Path, help="folder of the pack, with one folder per split")
    parser.add_argument("--size", type=int, default=256, help="short side in pixels, never enlarged; 0: unchanged")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality; 0, with --size 0: copy the files")
    parser.add_argument("--raw", action="store_true", help="store pixels instead of image files")
    parser.add_argument("--dataset", default="auto", help="how data_path is read, as for training")
    parser.add_argument("--class_list", default="", help="only these classes, as for training")
    parser.add_argument("--in_chans", type=int, default=3, help="channels of the images")
    parser.add_argument(
        "--value_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of images of more than 8 bits, as for training",
    )
    parser.add_argument(
        "--split", nargs="+", choices=["train", "val"], help="splits to pack (default: train, and val if there is one)"
    )
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="maximum share of unreadable images")
    parser.add_argument("--verify", type=Path, metavar="PACK", help="only check a pack and its source")
    parser.add_argument("--detach", type=Path, metavar="PACK", help="make a pack independent of its source")
    given = parser.parse_args(argv)
    log_to_terminal(main=True)
    try:
        if given.verify or given.detach:
            act = verify if given.verify else detach
            for folder in packs_in(given.verify or given.detach):
                act(folder)
        else:
            pack(given)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    except BrokenProcessPool:
        log.error(
            "error: a packing process was killed, usually because of insufficient memory; run the same command again "
            "to resume, with fewer than --num_workers %d to use less memory",
            given.num_workers,
        )
        return 1
    except KeyboardInterrupt:
        log.error("stopped; run the same command again to resume")
        return 130
    return 0


# ---- packing --------------------------------------------------------------------------------------------------------


def pack(given: argparse.Namespace) -> None:
    """Pack the requested splits, or all that exist."""
    if not given.output:
        raise ValueError("--output FOLDER is missing")
    if given.output.is_file():
        raise ValueError(f"--output {given.output} is a file; name a folder")
    require_at_least(given, num_workers=1)
    recipe = Recipe(given.size, given.quality, given.raw, given.in_chans)
    classes: list[str] | None = None
    value_range = list(given.value_range or ())
    for split in given.split or ("train", "val"):
        origin = {
            "dataset": given.dataset,
            "data_path": os.path.abspath(given.data_path) if os.path.exists(given.data_path) else given.data_path,
            "split": split,
            "class_list": given.class_list,
        }
        try:
            source = open_split(origin, recipe.channels, classes, value_range)
        except NoSplit as error:
            if given.split or split == "train":
                raise
            log.info("the split val is not packed: %s", error)
            continue
        classes, value_range = source.classes, list(source.value_range)
        if value_range:  # used for all splits, and stored for images that are later used together with this pack
            origin["value_range"] = value_range
        pack_split(given.output / split, source, origin, recipe, given.num_workers, given.max_bad_fraction)


def open_split(
    origin: dict[str, Any], channels: int, classes: list[str] | None, value_range: Sequence[float] = ()
) -> Source:
    """Open a split, with the class indices of the previous split, if any."""
    of_folders = origin["dataset"] == "folder" or (
        origin["dataset"] == "auto" and os.path.isdir(origin["data_path"]) and not packs_below(origin["data_path"])
    )
    if classes and not origin["class_list"] and of_folders:
        origin["class_list"] = classes
    return open_source(
        origin["dataset"],
        origin["data_path"],
        origin["split"],
        in_chans=channels,
        class_list=origin["class_list"],
        value_range=value_range or origin.get("value_range", ()),
    )


def pack_split(
    folder: Path, source: Source, origin: dict[str, Any], recipe: Recipe, num_workers: int, max_bad_fraction: float
) -> None:
    plan = {
        "recipe": asdict(recipe),
        "source": {**origin, "images": len(source), "fingerprint": source.fingerprint},
    }
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        compare(folder, manifest["recipe"], manifest["source"], plan)
        log.info("%s is packed already (%d images)", folder, manifest["images"])
        return
    packing = prepare(folder, source, plan, recipe)
    missing = packing.missing()
    if len(missing) < packing.shards:
        log.info("%s: resuming, %d of %d shards are complete", folder, packing.shards - len(missing), packing.shards)
    images = sum(len(packing.shard_indices(shard)) for shard in missing)
    with tqdm(total=images, unit=" images", desc=str(folder), disable=None) as bar:
        for count in written(packing, missing, num_workers):
            bar.update(count)
    left_out = packing.left_out()
    if len(left_out) > allowed_bad(max_bad_fraction, len(source)):
        raise ValueError(
            f"{len(left_out)} of {len(source)} images cannot be read, more than --max_bad_fraction "
            f"{max_bad_fraction:g} allows: {': '.join(left_out[0])}"
        )
    packing.finish({**plan["source"], "folders": read_folder_times(source)}, source.classes)
    stored = open_pack(folder)
    size = sum(file["bytes"] for file in stored.manifest["files"].values())
    log.info("%s: %d images, %.3f GB, read back and verified", folder, len(stored.names), size / 1e9)
    for name, reason in left_out:
        log.warning("left out: %s: %s", name, reason)


def prepare(folder: Path, source: Source, plan: dict[str, Any], recipe: Recipe) -> Packing:
    """Prepare a new folder, or one with the same plan. Raises ValueError for other folders."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PLAN).is_file():
        known = read_plan(folder)
        compare(folder, known["recipe"], known["source"], plan)
    elif others := sorted(os.listdir(folder))[:5]:
        raise ValueError(f"{folder} holds other files ({', '.join(others)}); name an empty or a new folder")
    else:
        low, high = SHARD_IMAGES
        known = {**plan, "shard_images": min(max(-(-len(source) // SHARDS), low), high)}
        write_json(folder / PLAN, known)
    return Packing(folder, recipe, known["shard_images"], source.names, source.labels, source.read, source.path)


def read_plan(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / PLAN).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / PLAN} is damaged ({error}); remove {folder} and start again") from error


def compare(folder: Path, recipe: dict[str, Any], source: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ValueError if the folder was packed with other settings or from other images."""
    rows = [
        f"{name} {str(earlier.get(name))[:60]} -> {str(value)[:60]}"
        for earlier, now in ((recipe, plan["recipe"]), (source, plan["source"]))
        for name, value in now.items()
        if earlier.get(name) != value
    ]
    if rows:
        raise ValueError(
            f"{folder} was packed with other settings or images (then -> now): {'; '.join(rows)}. "
            "Remove it, or choose another folder"
        )


_packing: Packing  # in a worker process


def written(packing: Packing, shards: list[int], num_workers: int) -> Iterator[int]:
    """Write the shards; yield the number of images of each completed one."""
    if num_workers == 1 or len(shards) <= 1:
        yield from map(packing.write, shards)
        return
    pool = ProcessPoolExecutor(min(num_workers, len(shards)), initializer=_start_worker, initargs=(packing,))
    try:
        for done in as_completed([pool.submit(_write, shard) for shard in shards]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(packing: Packing) -> None:
    global _packing
    torch.set_num_threads(1)
    _packing = packing
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent process exits; a waiting worker would not detect this otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(shard: int) -> int:
    return _packing.write(shard)


def read_folder_times(source: Source) -> dict[str, int]:
    """Return the modification time of each folder of the source, which changes when files are added or removed."""
    folders: dict[str, int] = {}
    for number in range(len(source)) if source.path else ():
        path, name = source.path(number), source.names[number]  # type: ignore[misc]
        root = path[: len(path) - len(name)].rstrip(os.sep)
        folder = os.path.dirname(path)
        while folder not in folders:
            folders[folder] = os.stat(folder).st_mtime_ns
            if len(folder) <= len(root):
                break
            folder = os.path.dirname(folder)
    return folders


# ---- existing packs -------------------------------------------------------------------------------------------------


def packs_below(folder: str | Path) -> list[Path]:
    return [path for path in (Path(folder), Path(folder) / "train", Path(folder) / "val") if is_pack(path)]


def packs_in(folder: Path) -> list[Path]:
    found = packs_below(folder)
    if not found:
        raise ValueError(f"{folder} is not a pack: there is no {MANIFEST} in it or in its folders train and val")
    return found


def verify(folder: Path) -> None:
    """Verify a pack. Raises ValueError for a wrong hash, or if the source, if it exists, has changed."""
    (folder / VERIFIED).unlink(missing_ok=True)
    stored = open_pack(folder)
    origin = stored.manifest["source"]
    if not origin.get("folders") or not os.path.exists(origin["data_path"]):
        log.info("%s: %d images, all unchanged; the source is not available", folder, len(stored.names))
        return
    open_source("pack", str(folder), in_chans=stored.manifest["recipe"]["channels"])
    source = open_split(dict(origin), stored.manifest["recipe"]["channels"], None)
    number = {name: index for index, name in enumerate(source.names)}
    other = []
    for name, row in zip(stored.names, stored.index, strict=True):
        state = os.stat(source.path(number[name]))  # type: ignore[misc]
        if (state.st_size, state.st_mtime_ns) != (row["source_bytes"], row["source_time"]):
            other.append(name)
    if other:
        raise ValueError(
            f"{len(other)} images of {origin['data_path']} were changed since they were packed: {', '.join(other[:5])}"
        )
    log.info("%s: %d images, all unchanged, also in the source", folder, len(stored.names))


def detach(folder: Path) -> None:
    """Remove the folders of the source from the manifest, so that they are not checked."""
    manifest = read_manifest(folder)
    manifest["source"].pop("folders", None)
    write_json(folder / MANIFEST, manifest)
    log.info("%s no longer depends on its source", folder)


if __name__ == "__main__":
    sys.exit(main())
