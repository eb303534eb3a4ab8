"""Semantic IDs: every item its L codes. Fit on the item vectors, break collisions, look up, JSON.

Paper, Section 2 and footnote 1: "(e.g., RQ-VAE) trained on item semantic features", fixed over all stages."""
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipeso.rqvae import RQVAE, assign, collisions, quantise_residuals, squared_distances, train
from minipeso.state import Epochs, every_epoch

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # one per level: <a_k> <b_k> <c_k> <d_k>, as in the Release


@dataclass(frozen=True, eq=False)
class SemanticIDs:
    """Every item's codes, a table of who has which, and the index file."""
    codes: Tensor  # (n_items, L) int64 on the CPU, values 0 .. n_codes - 1
    n_codes: int = 256
    collisions_before: int | None = None  # of the greedy codes; None: not fitted here

    @cached_property
    def items_by_code(self) -> dict[tuple[int, ...], list[int]]:
        table = {}
        for item, code in enumerate(map(tuple, self.codes.tolist())):
            table.setdefault(code, []).append(item)
        return table

    @property
    def tokens(self) -> list[str]:
        """The name of every code, level by level: <a_0>, <a_1>, ... <d_255>."""
        return [f"<{letter}_{code}>" for letter in LETTERS[:self.codes.shape[1]] for code in range(self.n_codes)]

    def item_of(self, code: Sequence[int] | Tensor) -> list[int]:
        """The items with this ID, ascending: one, or several (a collision), or [] for none."""
        return self.items_by_code.get(tuple(int(c) for c in code), [])

    @classmethod
    def fit(cls, vectors: np.ndarray | Tensor, epochs: int = 100, seed: int = 0, unique: bool = True,
            born: Sequence[int] | None = None, epochs_left: Epochs = every_epoch, **shape) -> "SemanticIDs":
        """k-means start, RQ-VAE, greedy codes, collision repair; on the device of `vectors` (n_items, d).

        born: the stage in which each item appears. The tokenizer is fitted on those of the first; the others are
        encoded by it, stage by stage: no ID depends on a later item. Without it, and in the Release: fitted on all.
        An ID depends on the vectors and the seed; the items' order counts only where vectors are *identical*.
        unique: our repair (`move_to_free`); otherwise the Release's (`reassign_groups`). shape: of the RQVAE."""
        x, stage = torch.as_tensor(vectors, dtype=torch.float32), np.array(born or [1] * len(vectors))  # (n,)
        order = canonical_order(x.cpu().numpy(), stage)
        stage = stage[order]
        x = standardise(x[torch.from_numpy(order)], first := int((stage == stage[0]).sum()))  # (n, d)
        generator = torch.Generator().manual_seed(seed)
        model = RQVAE(x.shape[1], **{"hidden": (256, 128)} | shape, generator=generator).to(x.device)
        model.init_codebooks(x[:first], generator)
        train(model, x[:first], epochs, generator, epochs_left=epochs_left)
        z, codebooks = model.encode(x).cpu(), model.codebooks.detach().cpu()  # (n, d), (L, K, d)
        greedy, residuals = quantise_residuals(z, codebooks)  # (n, L), (L + 1, n, d)
        if unique:
            ids = move_to_free(greedy, z, codebooks, stage)
        else:  # later items stay as encoded
            ids = torch.cat([reassign_groups(greedy[:first], residuals[-2][:first], codebooks[-1]), greedy[first:]])
        return cls(ids[np.argsort(order)], codebooks.shape[1], collisions(greedy))  # back in the order of the items

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.json())

    def json(self) -> str:
        """The Release's index file, {"0": ["<a_128>", "<b_72>", "<c_95>", "<d_83>"], "1": ...}."""
        return json.dumps({item: [f"<{letter}_{code}>" for letter, code in zip(LETTERS, row)]
                           for item, row in enumerate(self.codes.tolist())})

    @classmethod
    def load(cls, path: str | Path, n_codes: int = 256, names: Sequence[str] = ()) -> "SemanticIDs":
        """An index file, ours or the Release's, collisions allowed; with `names`, these items' rows, in this order."""
        rows = read_index(Path(path), names)
        levels = [{f"<{letter}_{code}>": code for code in range(n_codes)} for letter in LETTERS]
        for item, row in enumerate(rows):
            if not isinstance(row, list) or not 0 < len(row) == len(rows[0]) <= len(LETTERS):
                raise malformed(path, f"item {item} is {row!r}, item 0 is {rows[0]!r}",
                                'expected ["<a_128>", "<b_72>"], with as many codes for every item')
            for letter, level, token in zip(LETTERS, levels, row):
                if str(token) not in level:
                    raise malformed(path, f"item {item} has {token!r} on level {letter}", f"expected <{letter}_0> .. "
                                    f"<{letter}_{n_codes - 1}>: correct the file, or raise the number of codes")
        return cls(torch.tensor([[level[token] for level, token in zip(levels, row)] for row in rows]), n_codes)

    def report(self) -> dict:
        """Counts; collisions = items - distinct IDs; perplexity = exp(entropy of the use of a level's codes)."""
        shares = [torch.bincount(level, minlength=self.n_codes) / len(level) for level in self.codes.T]  # (n_codes,)
        return {"items": len(self.codes), "distinct": len(self.items_by_code), "collisions": collisions(self.codes),
                "collisions_before_repair": self.collisions_before,
                "largest_group": max(map(len, self.items_by_code.values())),
                "codes_used": [int((share > 0).sum()) for share in shares],
                "perplexity": [float(torch.special.entr(share).sum().exp()) for share in shares]}

    def table(self) -> str:
        """The report in lines; a level that uses under half of the codes it could has collapsed."""
        r = self.report()
        before = "" if self.collisions_before is None else f" ({self.collisions_before:,} before repair)"
        lines = [f"{r['items']:,} items, {r['distinct']:,} semantic IDs, {r['collisions']:,} collisions{before}, "
                 f"largest group {r['largest_group']}"]
        for letter, used, perplexity in zip(LETTERS, r["codes_used"], r["perplexity"]):
            collapsed = "  COLLAPSED" if used < min(self.n_codes, r["items"]) / 2 else ""
            lines.append(f"level {letter}: {used} of {self.n_codes} codes used, perplexity {perplexity:.1f}{collapsed}")
        return "\n".join(lines)


def canonical_order(x: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """The order (n,) by stage, then the bytes of x's rows (n, d), then row number: rows in any order, one list."""
    x = np.ascontiguousarray(x + 0.0)  # -0.0 becomes its equal 0.0
    order = x.view(np.dtype((np.void, x.shape[1] * x.itemsize))).ravel().argsort(kind="stable")  # of (n,)
    return order[stage[order].argsort(kind="stable")]


def standardise(x: Tensor, first: int | None = None, rms: float = 0.05) -> Tensor:
    """Centred, and scaled by one factor: the `first` rows get mean 0 and root mean square `rms`, or are zero if equal.
    (n, d) -> (n, d). Release: as they come. Here: AdamW moves a codeword by about lr per step at any scale, so the
    scale decides whether the codebooks lag behind the encoder (too large) or jitter (too small)."""
    centred = x - x[:first].mean(0)  # (n, d)
    scale = centred[:first].pow(2).mean().sqrt() * (x[:first] != x[0]).any()  # of equal ones only rounding is left
    return centred * (rms / scale) if scale else torch.zeros_like(x)


def reassign_groups(codes: Tensor, residual: Tensor, codebook: Tensor, rounds: int = 20) -> Tensor:
    """The Release's repair: the items on one ID share out new last codes by Sinkhorn; cannot part equal residuals.
    Repeated, since an item can move onto another's ID. codes (n, L); residual (n, d), codebook (K, d) of level L."""
    for _ in range(rounds):
        _, group, size = codes.unique(dim=0, return_inverse=True, return_counts=True)
        by_group = group.argsort(stable=True)  # (n,) as group; size (groups,)
        moved = codes.clone()
        for s in size[size > 1].unique().tolist():  # the groups of one size are one batch
            members = by_group[size[group[by_group]] == s].view(-1, s)  # (groups, s)
            distances = squared_distances(residual[members], codebook)  # (groups, s, K)
            moved[members, -1] = assign(distances, eps=0.003)
        if torch.equal(moved, codes):
            break
        codes = moved
    return codes


def move_to_free(codes: Tensor, z: Tensor, codebooks: Tensor, stage: np.ndarray) -> Tensor:
    """Our repair: of the items on one ID the first stays, each other takes its `nearest_free`; stage by stage (n,), so
    that no ID moves for a later item. codes (n, L), z (n, d), codebooks (L, K, d) -> (n, L)
    Release: what still collides after `reassign_groups` stays so. Here: an ID is one item; a new last code is near."""
    L, K = codebooks.shape[:2]
    if len(codes) > K**L:
        raise ValueError(f"more items than semantic IDs\n{len(codes)} items; {K} codes on {L} levels make {K**L} IDs\n"
                         "use more codes or more levels")
    ids, taken = codes.numpy().copy(), Counter()  # (n, L)
    for now in np.unique(stage):
        items = np.flatnonzero(stage == now)
        first = items[np.unique(ids[items], axis=0, return_index=True)[1]]
        first = [item for item in first if not taken[tuple(ids[item].tolist())]]
        taken.update(tuple(row[:level]) for row in ids[first].tolist() for level in range(1, L + 1))
        for item in np.setdiff1d(items, first):
            ids[item] = row = nearest_free(z[item].numpy(), codebooks.numpy(), taken)
            taken.update(row[:level] for level in range(1, L + 1))
    return torch.from_numpy(ids)


def nearest_free(z: np.ndarray, codebooks: np.ndarray, taken: Counter) -> tuple[int, ...]:
    """Greedy codes of z (d,), at each level the nearest with an ID left below. taken: how many are not, by prefix."""
    prefix: tuple[int, ...] = ()
    for level, codebook in enumerate(codebooks, 1):
        room = len(codebook) ** (len(codebooks) - level)
        nearest = ((codebook - z) ** 2).sum(1).argsort(kind="stable").tolist()  # (K,)
        prefix += (next(code for code in nearest if taken[prefix + (code,)] < room),)
        z = z - codebook[prefix[-1]]
    return prefix


def read_index(path: Path, names: Sequence[str] = ()) -> list:
    """The rows of an index file in the items' order: its keys are "0" .. "n-1", each once, or names, perhaps more."""
    if not path.is_file():
        raise FileNotFoundError(f"no semantic-ID file\n{path} is not a file\nfit the IDs, or correct the path")
    try:  # an object becomes a tuple of its pairs, so that a repeated key is seen
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise malformed(path, str(error), "correct the file, or fetch it anew if cut off") from None
    if not isinstance(pairs, tuple) or not pairs:
        raise malformed(path, f"no items in {str(pairs)[:40]!r}", 'expected {"0": ["<a_1>", "<b_2>"], ...}')
    place = {name: i for i, name in enumerate(names or map(str, range(len(pairs))))}
    pairs = [pair for pair in pairs if pair[0] in place or not names]
    items, keys = Counter([*place]), Counter(key for key, _ in pairs)
    if keys != items:
        faults = [f"no row for item {i}" for i in items - keys][:1] + [f"one too many for {k!r}" for k in keys - items]
        raise malformed(path, ", ".join(faults[:2]), f"expected {'each of the items' if names else '0 .. n - 1'} once")
    return [row for _, row in sorted(pairs, key=lambda pair: place[pair[0]])]


def malformed(path: str | Path, found: str, remedy: str) -> ValueError:
    return ValueError(f"cannot use the semantic-ID file\n{path}: {found}\n{remedy}")
