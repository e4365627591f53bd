"""Counts as arrays and on disk: shards of instructions, each whole or absent, each with its
record; resumable.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..paths import short
from ..record import (
    DamagedFile,
    RecordMismatch,
    computing,
    read_record,
    read_tensors,
    refuse_edited,
    sweep,
    verify,
    write_json,
    write_tensors,
)


@dataclass(frozen=True)
class Counts:
    """Integer counts of I instructions. The activation frequency is p = neurons / tokens. (Paper,
    sec. counting.)

    tokens   int32 [I], the counted tokens T of each instruction
    neurons  family -> uint16 [I, L_f, N_f], tokens with A > 0; "expert" has [I, L_f, E, N], tokens
             that were routed to the expert and had A > 0 in it (so p counts all T tokens, p <= f)
    routed   uint16 [I, L_expert, E], tokens routed to the expert, f = routed / tokens; None in a
             dense model
    layers   family -> the L_f layer numbers
    """

    tokens: np.ndarray
    neurons: dict[str, np.ndarray]
    routed: np.ndarray | None
    layers: dict[str, tuple[int, ...]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array under the name it has on disk: tokens, neurons.<family>, routed."""
        named = {"tokens": self.tokens} | {
            f"neurons.{family}": c for family, c in self.neurons.items()
        }
        return named if self.routed is None else named | {"routed": self.routed}

    def family(self, unit: str) -> str:
        """Where a unit's counts are: "neurons" are those of dense MLPs, in a sparse model those of
        routed experts.
        """
        return (
            ("dense" if "dense" in self.neurons and self.routed is None else "expert")
            if unit == "neurons"
            else unit
        )

    def unit(self, unit: str) -> np.ndarray:
        """Counts of one kind of component, [I, L, ...]: "neurons" (see `family`), "shared" or
        "experts" (routing).
        """
        return self.routed if unit == "experts" else self.neurons[self.family(unit)]

    def per_token(self) -> int:
        """K, the experts that a token is sent to."""
        return int(self.routed[0, 0].sum() // self.tokens[0])

    def mask(self, unit: str, members) -> dict[str, np.ndarray]:
        """The component mask (see interventions) of a unit's `members`, bool [M], M = L x ..."""
        return {self.family(unit): np.asarray(members).reshape(self.unit(unit).shape[1:])}

    def room(self, size: int) -> "Counts":
        """Empty counts of `size` instructions, of these components: to be filled by `put`."""
        arrays = self.arrays().items()
        empty = {name: np.empty((size, *a.shape[1:]), a.dtype) for name, a in arrays}
        return Counts.of(empty, self.layers)

    def put(self, rows, part: "Counts") -> None:
        """Write the counts of some instructions in their place."""
        for kept, new in zip(self.arrays().values(), part.arrays().values(), strict=True):
            kept[rows] = new

    @classmethod
    def of(cls, arrays, layers) -> "Counts":
        """The inverse of `arrays`."""
        neurons = {
            name.partition(".")[2]: a for name, a in arrays.items() if name.startswith("neurons.")
        }
        return cls(
            arrays["tokens"],
            neurons,
            arrays.get("routed"),
            {f: tuple(n) for f, n in layers.items()},
        )

    @classmethod
    def join(cls, parts: list["Counts"]) -> "Counts":
        """Instructions of several Counts of one model, one after the other."""
        names = parts[0].arrays()
        return cls.of(
            {n: np.concatenate([p.arrays()[n] for p in parts]) for n in names}, parts[0].layers
        )


class Gathered:
    """Counts of `size` sequences, {position group's name: Counts}, each batch put in its place at
    once: memory holds one table of each group, and no longer those of the batches.
    """

    def __init__(self, size: int):
        self.size, self.counts = size, {}

    def __call__(self, rows, counts: dict[str, Counts]) -> None:
        """One batch, of the sequences `rows`."""
        for name, part in counts.items():
            if name not in self.counts:
                self.counts[name] = part.room(self.size)
            self.counts[name].put(rows, part)


SEAL = {"total": int, "size": int, "layers": dict, "found": list, "shards": list}
SHARD = {"rows": list, "layers": dict, "found": dict, "sha256": str}


@dataclass(frozen=True)
class Shards:
    """A folder of counts: rows 0..total, `size` at a time, in `counts-00000.safetensors`, ...,
    made under `settings`.

    `settings` (JSON-like) is everything that could change a number. A shard made under other
    settings is refused (RecordMismatch), a missing, half-written or damaged one is computed again.
    Which process wrote a shard leaves no trace in it, so any number of processes, killed at any
    time, end with the same bytes. (Ours.)
    """

    folder: Path
    settings: dict
    total: int
    size: int
    _held: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def rows(self, shard: int) -> range:
        """The instructions of one shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.total))

    def path(self, shard: int) -> Path:
        """Its file; the record lies beside it as .json."""
        return self.folder / f"counts-{shard:05d}.safetensors"

    @property
    def _anew(self) -> str:
        """What to do about counts of other settings."""
        return f"Delete {short(self.folder)} to count anew"

    def _expect(self, shard: int) -> dict:
        return self.settings | {"rows": [self.rows(shard).start, self.rows(shard).stop]}

    def _seal(self) -> dict | None:
        """What record.json says once the folder is complete; None where there is none to trust."""
        path = self.folder / "record.json"
        try:
            seal = read_record(path, SEAL)
        except DamagedFile:  # written anew when every shard is there
            return None
        want = self.settings | {"total": self.total, "size": self.size}
        verify(seal, want, path, self._anew)
        whole = len(seal["shards"]) == len(seal["found"]) == len(self)
        return seal if whole else None

    def _record(self, shard: int, seal: dict | None) -> dict:
        """The record of one shard: of these settings, and the one that the seal was put on."""
        path = self.path(shard).with_suffix(".json")
        record = read_record(path, SHARD)
        verify(record, self._expect(shard), path, self._anew)
        sealed = seal and (seal["shards"][shard], seal["found"][shard], seal["layers"])
        if sealed and sealed != (record["sha256"], record["found"], record["layers"]):
            raise DamagedFile(
                f"{short(path)} is not the record that record.json lists: one of them was edited. "
                "Run again: the shard is computed anew."
            )
        refuse_edited(record, path)
        return record

    def read(self, shard: int) -> tuple[Counts, dict]:
        """(counts, record) of one finished shard; raises DamagedFile or RecordMismatch."""
        record = self._record(shard, self._seal())
        arrays, _ = read_tensors(self.path(shard), {"sha256": record["sha256"]})
        families = {f"neurons.{family}" for family in record["layers"]}
        if (
            arrays.keys() - {"routed"} != families | {"tokens"}
            or {array.shape[:1] for array in arrays.values()} != {(len(self.rows(shard)),)}
            or not all(map(_numbers, record["layers"].values()))
        ):
            raise DamagedFile(
                f"{short(self.path(shard))} does not hold the arrays, rows and layers that its "
                "record names. Delete both and run again."
            )
        return Counts.of(arrays, record["layers"]), record

    def at_hand(self, shard: int) -> Counts:
        """The counts of one finished shard; the last one that was asked for stays in memory."""
        if shard not in self._held:
            self._held.clear()  # before the next one takes its place
            self._held[shard] = self.read(shard)[0]
        return self._held[shard]

    def missing(self, shards=None) -> list[int]:
        """The shards that must still be computed, of all or of those given."""

        def done(shard):
            try:
                self.read(shard)
            except DamagedFile:
                return False
            return True

        return [
            shard for shard in (range(len(self)) if shards is None else shards) if not done(shard)
        ]

    def fill(self, work, shards=None) -> None:
        """Compute and write each missing shard, of all or of those given: `work(shard)` -> (counts,
        found), see `write`. Each is held meanwhile: those that another process is at come last, and
        are not computed twice.
        """
        sweep(self.folder)
        left = self.missing(shards)
        for wait in (False, True):
            for shard in list(left):
                with computing(self.path(shard), wait) as mine:
                    if mine:
                        left.remove(shard)
                        if self.missing([shard]):
                            self.write(shard, *work(shard))

    def write(self, shard: int, counts: Counts, found: dict) -> None:
        """Store one shard with what was found on the way (it may not depend on time or process)."""
        self._held.clear()
        layers = {family: list(numbers) for family, numbers in counts.layers.items()}
        write_tensors(
            self.path(shard),
            counts.arrays(),
            self._expect(shard) | {"layers": layers, "found": found},
        )

    def finish(self) -> dict:
        """Write record.json once every shard is there: the settings, what was found, each shard's
        sha256.
        """
        records = [self._record(shard, None) for shard in range(len(self))]
        for what in ("device", "attention"):
            if len(kinds := {str(r["found"].get(what)) for r in records}) > 1:
                raise RecordMismatch(
                    f"{short(self.folder)}: its shards were counted with {what} {sorted(kinds)}, "
                    "expected one kind. Delete the folder and count again on one kind of machine."
                )
        record = self.settings | {
            "total": self.total,
            "size": self.size,
            "layers": records[0]["layers"],
            "found": [r["found"] for r in records],
            "shards": [r["sha256"] for r in records],
        }
        write_json(self.folder / "record.json", record)
        return record

    def finished(self) -> bool:
        """Is the folder complete, every shard of it read and found whole? Raises as `sealed`."""
        return self.sealed() and not self.missing()

    def sealed(self) -> bool:
        """Do its records say that it is complete? Reads no counts, writes nothing. Raises
        RecordMismatch if the folder, or a part of it, was made under other settings.
        """
        seal = self._seal()
        for path in sorted(self.folder.glob("counts-[0-9][0-9][0-9][0-9][0-9].json")):
            try:
                verify(read_record(path), self.settings, path, self._anew)
            except DamagedFile:
                continue  # its shard is computed again
        try:
            return seal is not None and all(self._record(k, seal) for k in range(len(self)))
        except DamagedFile:
            return False

    def load(self) -> Counts:
        """All instructions in one Counts; for tables larger than memory `read` shard by shard."""
        return Counts.join([self.read(shard)[0] for shard in range(len(self))])

    def table(self, family: str) -> "Rows":
        """The counts of one family ("dense", "shared", "expert", or "routed"), row by row, never
        all in memory.
        """
        return Rows(self, family)


def _numbers(layers) -> bool:
    return isinstance(layers, list) and all(type(number) is int for number in layers)


class Rows:
    """Counts [I, ...] on disk behind `shape` and `[i]`, as `top_sets` reads them: one shard is in
    memory at a time, for all families.
    """

    def __init__(self, shards: Shards, family: str):
        self.shards, self.family = shards, family
        self.shape = (shards.total, *self[0].shape)

    def __getitem__(self, row: int) -> np.ndarray:
        shard, place = divmod(row, self.shards.size)
        counts = self.shards.at_hand(shard)
        return (counts.routed if self.family == "routed" else counts.neurons[self.family])[place]
