"""Semantic IDs: every item its L codes. Fit on the item vectors, break collisions, look up, JSON.

Paper, Section 2 and footnote 1: a tokenizer "(e.g., RQ-VAE) trained on item semantic features",
fixed over all stages. It sees the items of *all* stages, so the text of later items leaks into it;
their interactions do not.
"""
from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipeso.rqvae import RQVAE, assign, collisions, quantise_residuals, squared_distances, train

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # one a level: <a_k> <b_k> <c_k> <d_k>, as in the Release
TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]{0,8})>")


@dataclass(frozen=True, eq=False)
class SemanticIDs:
    """codes (n_items, L): torch int64 on the CPU, row = item id, values 0 .. n_codes - 1."""

    codes: Tensor
    n_codes: int = 256
    collisions_before: int | None = None  # of the greedy codes; None: not fitted here

    @cached_property
    def items_by_code(self) -> dict[tuple[int, ...], list[int]]:
        table: dict[tuple[int, ...], list[int]] = {}
        for item, code in enumerate(self.codes.tolist()):
            table.setdefault(tuple(code), []).append(item)
        return table

    @property
    def tokens(self) -> list[str]:
        """The name of every code, level by level: <a_0>, <a_1>, ... <d_255>."""
        return [f"<{LETTERS[level]}_{code}>" for level in range(self.codes.shape[1]) for code in range(self.n_codes)]

    def item_of(self, code: Sequence[int] | Tensor) -> list[int]:
        """The items with this ID, ascending: one, or several (a collision), or [] for none."""
        return self.items_by_code.get(tuple(int(c) for c in code), [])

    @classmethod
    def fit(cls, vectors: np.ndarray | Tensor, levels: int = 4, codes: int = 256,
            d_latent: int = 32, hidden: Sequence[int] = (256, 128), epochs: int = 100,
            seed: int = 0, unique: bool = True, **training) -> SemanticIDs:
        """k-means start, RQ-VAE, greedy codes, collision repair. vectors (n_items, d)

        Runs on the device of `vectors`. An ID depends on the set of vectors and the seed, not on
        the order of the items; only items with *identical* vectors share out theirs by item id.
        unique: True, our repair (`move_to_free`); False, the Release's (`reassign_groups`), which
        leaves identical items on one ID. training: lr, batch, steps, beta, ... of `rqvae.train`.
        The defaults suit `title_vectors` on a CPU; Release: rqvae.RELEASE_HIDDEN, 20,000 epochs.
        """
        x = torch.as_tensor(vectors, dtype=torch.float32)
        order = canonical_order(x.cpu().numpy())
        x = standardise(x[torch.from_numpy(order)])  # (n, d)
        generator = torch.Generator().manual_seed(seed)
        model = RQVAE(x.shape[1], levels, codes, d_latent, hidden, generator).to(x.device)
        model.init_codebooks(x, generator)
        train(model, x, epochs, generator, **training)
        with torch.no_grad():
            z, codebooks = model.encode(x).cpu(), model.codebooks.cpu()  # (n, d), (L, K, d)
            greedy, residuals = quantise_residuals(z, codebooks)  # (n, L), (L + 1, n, d)
            ids = (move_to_free(greedy, z, codebooks) if unique
                   else reassign_groups(greedy, residuals[-2], codebooks[-1]))
        by_item = torch.empty_like(ids)
        by_item[order] = ids
        return cls(by_item, codes, collisions(greedy))

    def save(self, path: str | os.PathLike) -> None:
        """The Release's index file, {"0": ["<a_128>", "<b_72>", "<c_95>", "<d_83>"], "1": ...}."""
        Path(path).write_text(self.json())

    def json(self) -> str:
        return json.dumps({item: [f"<{LETTERS[level]}_{code}>" for level, code in enumerate(row)]
                           for item, row in enumerate(self.codes.tolist())})

    @classmethod
    def load(cls, path: str | os.PathLike, n_codes: int = 256,
             allow_collisions: bool = True) -> SemanticIDs:
        """Read an index file, ours or the Release's.

        ValueError names the item and the value at fault. Released files hold collisions, so these
        are an error only on demand.
        """
        rows = read_index(Path(path))
        table = [parse_row(path, item, rows[str(item)], n_codes) for item in range(len(rows))]
        for item, row in enumerate(table):
            if len(row) != len(table[0]):
                raise malformed(path,
                                f"item {item} has {len(row)} codes, item 0 has {len(table[0])}",
                                "every item needs the same number of codes")
        ids = cls(torch.tensor(table), n_codes)
        shared = next((items for items in ids.items_by_code.values() if len(items) > 1), None)
        if shared and not allow_collisions:
            raise malformed(path, f"items {shared[0]} and {shared[1]} share {rows[str(shared[0])]}",
                            "allow collisions, or fit the IDs anew")
        return ids

    def report(self) -> dict:
        """Counts; collisions = items - distinct IDs; a list has one entry a level.

        perplexity = exp(entropy of the use of the codes): n_codes when all are used alike.
        """
        shares = [torch.bincount(level, minlength=self.n_codes) / len(level)
                  for level in self.codes.T]  # each (n_codes,)
        return {
            "items": len(self.codes),
            "distinct": len(self.items_by_code),
            "collisions_before_repair": self.collisions_before,
            "collisions": len(self.codes) - len(self.items_by_code),
            "largest_group": max(len(items) for items in self.items_by_code.values()),
            "codes_used": [int((share > 0).sum()) for share in shares],
            "perplexity": [float(torch.special.entr(share).sum().exp()) for share in shares],
        }

    def table(self) -> str:
        """The report in lines; a level that uses under half of the codes it could has collapsed."""
        r = self.report()
        before = r["collisions_before_repair"]
        lines = [f"{r['items']:,} items, {r['distinct']:,} semantic IDs, "
                 f"{r['collisions']:,} collisions"
                 + ("" if before is None else f" ({before:,} before repair)")
                 + f", largest group {r['largest_group']}"]
        for level, (used, perplexity) in enumerate(zip(r["codes_used"], r["perplexity"])):
            collapsed = "  COLLAPSED" if used < min(self.n_codes, r["items"]) / 2 else ""
            lines.append(f"level {LETTERS[level]}: {used} of {self.n_codes} codes used, "
                         f"perplexity {perplexity:.1f}{collapsed}")
        return "\n".join(lines)


def canonical_order(x: np.ndarray) -> np.ndarray:
    """Row numbers sorted by the bytes of the rows, ties by row number. (n, d) -> (n,)

    The same sequence of rows whatever order they came in: taken before any random draw.
    """
    rows = np.ascontiguousarray(x + 0.0)  # -0.0 becomes its equal 0.0
    keys = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()  # (n,)
    return np.argsort(keys, kind="stable")


def standardise(x: Tensor, rms: float = 0.05) -> Tensor:
    """Centred and scaled by one factor to a root mean square of `rms`. (n, d) -> (n, d)

    Nearest neighbours stay what they are. Release: as the vectors come. Here: AdamW moves a
    codeword by about lr a step at any scale, so the scale decides whether the codebooks lag behind
    the encoder (too large) or jitter (too small). Greedy collisions of 9,671 titles after 100
    epochs, lr 1e-3: 771 at rms 0.05; 1,475 at 1; 2,644 at 0.01, with a level of 43 codes.
    """
    x = x - x.mean(0)
    scale = x.pow(2).mean().sqrt()
    return x * (rms / scale) if scale > 0 else x


def reassign_groups(codes: Tensor, residual: Tensor, codebook: Tensor, rounds: int = 20,
                    eps: float = 0.003, iterations: int = 50) -> Tensor:
    """The Release's repair: the items on one ID share out new last codes by Sinkhorn. -> (n, L)

    codes (n, L); residual (n, d), codebook (K, d): what the last level quantises, and with what.
    Up to `rounds` times, since an item can move onto another's ID. Cannot part equal residuals.
    """
    for _ in range(rounds):
        _, group, size = codes.unique(dim=0, return_inverse=True, return_counts=True)
        by_group = group.argsort(stable=True)  # (n,) as group; size (groups,)
        moved = codes.clone()
        for s in size[size > 1].unique().tolist():  # the groups of one size are one batch
            members = by_group[size[group[by_group]] == s].view(-1, s)  # (groups, s)
            distances = squared_distances(residual[members], codebook)  # (groups, s, K)
            moved[members, -1] = assign(distances, eps, iterations)
        if torch.equal(moved, codes):
            break
        codes = moved
    return codes


def move_to_free(codes: Tensor, z: Tensor, codebooks: Tensor) -> Tensor:
    """Our repair: of the items on one ID the first stays, each other takes its `nearest_free`.

    codes (n, L), z (n, d), codebooks (L, K, d) -> (n, L). Paper: silent. Release:
    `reassign_groups`, and what still collides stays so. Here: an ID is one item, and the new last
    code keeps a meaning: on 9,671 titles it is, in the median, the 2nd nearest of 256, in the
    Release the 119th. The loop is over colliding items only; each takes a place from the next.
    """
    K, L = codebooks.shape[1], len(codebooks)
    if len(codes) > K**L:
        raise ValueError("more items than semantic IDs\n"
                         f"{len(codes)} items; {K} codes on {L} levels make {K**L} IDs\n"
                         "use more codes or more levels")
    ids = codes.numpy().copy()
    _, first = np.unique(ids, axis=0, return_index=True)
    taken = Counter(tuple(row[:level]) for row in ids[first].tolist() for level in range(1, L + 1))
    for item in np.setdiff1d(np.arange(len(ids)), first):
        row = nearest_free(z[item].numpy(), codebooks.numpy(), taken)
        taken.update(row[:level] for level in range(1, L + 1))
        ids[item] = row
    return torch.from_numpy(ids)


def nearest_free(z: np.ndarray, codebooks: np.ndarray, taken: Counter) -> tuple[int, ...]:
    """Greedy codes of z (d,), at each level the nearest code with an ID left below it.

    taken[prefix]: the IDs taken below a prefix. So the last code gives way first; when the K codes
    below the greedy prefix are all taken, the next nearest code of the level above; and so on up.
    """
    prefix: tuple[int, ...] = ()
    for level, codebook in enumerate(codebooks, 1):
        room = len(codebook) ** (len(codebooks) - level)
        nearest = ((codebook - z) ** 2).sum(1).argsort(kind="stable").tolist()  # K codes
        prefix += (next(code for code in nearest if taken[prefix + (code,)] < room),)
        z = z - codebook[prefix[-1]]
    return prefix


def read_index(path: Path) -> dict[str, object]:
    """The JSON object of an index file; its keys are "0" .. "n-1", each once."""
    if not path.is_file():
        raise FileNotFoundError(f"no semantic-ID file\n{path} is not a file\n"
                                "fit the IDs, or correct the path")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=no_repeats)
    except ValueError as error:  # not JSON, not UTF-8, a repeated item
        raise malformed(path, str(error), "correct the file, or fetch it anew if cut off") from None
    if not isinstance(rows, dict) or not rows:
        raise malformed(path, f"no items in {str(rows)[:40]!r}",
                        'expected {"0": ["<a_1>", "<b_2>"], ...}')
    items = set(map(str, range(len(rows))))
    if items != rows.keys():
        missing = min(items - rows.keys(), key=int)
        strange = next(key for key in rows if key not in items)
        raise malformed(path, f"no row for item {missing}; {len(rows)} rows, one for {strange!r}",
                        'the items are "0" .. "n-1" without a gap')
    return rows


def no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    rows = dict(pairs)
    if len(rows) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"item {repeated!r} has several rows")
    return rows


def parse_row(path: str | os.PathLike, item: int, row: object, n_codes: int) -> list[int]:
    """["<a_128>", "<b_72>", ...] -> [128, 72, ...]"""
    if not isinstance(row, list) or not row:
        raise malformed(path, f"item {item} is {row!r}",
                        'expected a list like ["<a_128>", "<b_72>"]')
    codes = []
    for letter, token in zip(LETTERS, row):
        match = TOKEN.fullmatch(token) if isinstance(token, str) else None
        if not match or match[1] != letter:
            raise malformed(path, f"item {item} has {token!r} on level {len(codes) + 1}",
                            f"expected <{letter}_NUMBER>")
        if int(match[2]) >= n_codes:
            raise malformed(path, f"item {item} has {token!r}, with codes 0 .. {n_codes - 1}",
                            "correct the file, or raise the number of codes")
        codes.append(int(match[2]))
    return codes


def malformed(path: str | os.PathLike, found: str, remedy: str) -> ValueError:
    return ValueError(f"cannot use the semantic-ID file\n{path}: {found}\n{remedy}")
