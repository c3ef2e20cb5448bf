"""Files with their checksums, and records of finished work, so that what was interrupted is not done twice.

A record is a small JSON file, FOLDER/clean/NAME.json, written last: it holds a key (what the work was made from, and
how) and the size and sha256 of the files that it made. Work counts as done when its record has the wanted key and
the files are still as recorded; anything else is done again.
"""
import hashlib
import json
import os

from batches import check_files


class Output:
    """A binary file that knows its sha256 and size when it is closed."""

    def __init__(self, path):
        self.path, self.file, self.sha256, self.size = path, open(path, "wb"), hashlib.sha256(), 0

    def write(self, data):
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def close(self):
        """Forces the file to the disk -> {"size", "sha256"} as in a manifest."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"size": self.size, "sha256": self.sha256.hexdigest()}


def write(path, data):
    output = Output(path)
    output.write(data)
    return output.close()


def digest(value):
    """sha256 of anything that JSON can hold, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def finish(folder, name, key, files, **told):
    """Records that work `name` is done, with files {path in folder: entry} and what it told. Returns the record."""
    record = {"key": key, "files": files, **told}
    path = folder / "clean" / f"{name}.json"
    write(path.with_suffix(".new"), json.dumps(record).encode())
    os.replace(path.with_suffix(".new"), path)
    return json.loads(json.dumps(record))                  # the same types as when it is read back


def finished(folder, name, key):
    """The record of finished work, or None where it has to be done (again)."""
    try:
        record = json.loads((folder / "clean" / f"{name}.json").read_bytes())
        if record["key"] != key:
            return None
        check_files(folder, record)
    except (OSError, ValueError, KeyError, TypeError):     # there is none, or it is not what it says
        return None
    return record
