"""Put the finished trials of a run into one file, and lose none, whoever else is at the directory meanwhile."""

from typing import NamedTuple

from harness.errors import StoreError
from harness.packs import FOLDER, Packed, as_rows, decode_pack, encode_pack, new_name
from harness.run_folder import RunFolder
from harness.store import RunStore


class Done(NamedTuple):
    """trials: that the new pack holds; removed: files that are in it and are therefore gone; name: None without any."""

    trials: int
    removed: int
    name: str | None


def pack(store: RunStore) -> Done:
    """Write one file of all finished trials, read it back, and remove the files that it replaces.

    Raises StoreError, having removed nothing: while trials of the run are at work, for a record that cannot be
    read, and where what was written does not read back the same.
    """
    if claimed := sorted(store.claim_numbers()):
        raise StoreError(
            f"{store.uri}: trials are at work, or were lost and are to be tried again: {', '.join(claimed[:5])}. Let "
            "`revnet run` come to its end first; where nobody will run it again, remove the folder claims."
        )
    folder = RunFolder(store.uri)
    loose, earlier = store.loose_ids(), store.packs.names()
    packed = {trial_id: _read(store, folder, trial_id) for trial_id in sorted(loose | store.packs.ids())}
    if not loose and len(earlier) < 2:
        return Done(len(packed), 0, earlier[0] if earlier else None)
    data, name = encode_pack(packed), new_name()
    if encode_pack(decode_pack(data)) != data:
        raise StoreError(f"{store.uri}: what would be written does not read back the same. Nothing was changed.")
    folder.write(f"{FOLDER}/{name}", data)
    if folder.read(f"{FOLDER}/{name}") != data:
        raise StoreError(f"{store.uri}/{FOLDER}/{name}: was not written whole. Remove it; nothing else was changed.")
    removed = 0
    for trial_id in sorted(loose):
        # One that was run again meanwhile stays: it is newer than what was packed.
        if folder.read(f"trials/{trial_id}.json") == packed[trial_id].record:
            for file in (f"trials/{trial_id}.json", *_beside(folder, trial_id)):
                folder.remove(file)
                removed += 1
    for old in earlier:
        folder.remove(f"{FOLDER}/{old}")
        removed += 1
    return Done(len(packed), removed, name)


def _read(store: RunStore, folder: RunFolder, trial_id: str) -> Packed:
    store.read_record(trial_id)  # as strictly as anybody reads it
    record = folder.read(f"trials/{trial_id}.json")
    if record is None:
        found = store.packs.find(trial_id)
        assert found is not None
        return found
    return Packed(record, as_rows(store.read_trace(trial_id)), folder.read(f"logs/{trial_id}.log"))


def _beside(folder: RunFolder, trial_id: str) -> list[str]:
    names = (f"traces/{trial_id}.parquet", f"traces/{trial_id}.json", f"logs/{trial_id}.log")
    return [name for name in names if folder.read(name) is not None]
