"""PESO (arXiv 2510.25093) on one screen: LoRA, drift, the anchor, and why its best weight lies between the ends.

    python docs/peso_in_one_file.py                     # torch alone, one core, 20 seconds; other worlds: --alpha 1

A frozen linear model answers with a distribution over items; what it learns goes into one LoRA adapter, here a single
vector v. Many users come at stage 1. At stages 2 and 3 a few come, half of them known, and everybody's taste has
drifted (Eq. 15). The adapter learns each stage from the state before, held near it by the softmax-KL (Eq. 12), and
then two groups are asked: the users of the stage, and those who stayed away. Nothing here is sequential, and there are
no codes and no beam search: the rest of the repository is about those. Letters: n users, K items, r the rank.
"""
import argparse
import math

import torch
from torch import Tensor

FEATURES, ITEMS, RANK, SCALE = 12, 20, 3, 2.0  # d, K, r, s
MANY, FEW, STAGES = 300, 50, 3  # users of stage 1, and of each later one
# v has 96 entries, and a softmax over n of them divides the pull by n: a real module's 10,000 need a larger lambda
LAMBDAS = (0, 0.3, 1, 3, 10, 30, 100, 300, math.inf)  # inf: no adaptation


# -- the adapter ---------------------------------------------------------------------------------------

def factors(v: Tensor) -> tuple[Tensor, Tensor]:
    """The adapter is one vector v (r d + K r,); these are its matrices A (r, d) and B (K, r)."""
    return v[:RANK * FEATURES].view(RANK, FEATURES), v[RANK * FEATURES:].view(ITEMS, RANK)


def log_p(v: Tensor, x: Tensor, W_0: Tensor) -> Tensor:
    """log softmax((W_0 + s B A) x), Eq. 3 and a softmax over the items: users x (n, d) -> (n, K)."""
    A, B = factors(v)
    return (x @ W_0.T + SCALE * x @ A.T @ B.T).log_softmax(-1)


def new_adapter(generator: torch.Generator) -> Tensor:
    """A uniform and B = 0: a new adapter changes nothing. -> v (r d + K r,)"""
    A = torch.rand(RANK * FEATURES, generator=generator, dtype=torch.float64) * 2 - 1
    return torch.cat([A / math.sqrt(FEATURES), A.new_zeros(ITEMS * RANK)])


# -- the anchor ----------------------------------------------------------------------------------------

def softmax_kl(v: Tensor, v_prev: Tensor) -> Tensor:
    """KL(softmax(v) || softmax(v_prev)), the proximal term of Eq. 12, in a form that loses no digits near v = v_prev:
    with d = v - v_prev moved to E_p[d] = 0, KL = E_r[d] - log E_p[e^d]. Its size is about 1/2 Var_p(d) (Cor. 4)."""
    p, d = v_prev.softmax(-1), v - v_prev  # (m,)
    d = d - p @ d
    return v.softmax(-1) @ d - (p @ torch.expm1(d)).log1p()


def stage_loss(v: Tensor, v_prev: Tensor, x: Tensor, y: Tensor, W_0: Tensor, lam: float) -> Tensor:
    """Cross-entropy on what the stage's users took, y (n, K) their shares, + lam KL (Eq. 12)."""
    return -(y * log_p(v, x, W_0)).sum(-1).mean() + lam * softmax_kl(v, v_prev)


def minimise(loss, start: Tensor, steps: int) -> Tensor:
    """The v that LBFGS finds from `start`. A real run takes AdamW and stops early; the theory is about the minimum."""
    v = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([v], max_iter=steps, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        value = loss(v)
        value.backward()
        return value
    optimiser.step(closure)
    return v.detach()


# -- the world -----------------------------------------------------------------------------------------

class World:
    """Users with features x (N, d) and tastes P (N, K); everybody's random numbers come from one seed."""

    def __init__(self, seed: int, alpha: float, events: int = 10):
        self.random, self.alpha, self.events = torch.Generator().manual_seed(seed), alpha, events
        self.x = self.normal(MANY + (STAGES - 1) * FEW, FEATURES) / math.sqrt(FEATURES)
        self.x[:, -1] = 1  # what all users have in common
        self.W_0 = self.normal(ITEMS, FEATURES) * 0  # a base that knows nothing yet
        self.P, self.known = self.tastes(), 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def tastes(self) -> Tensor:
        """A smooth map of rank r from users to distributions over items: (N, K)."""
        return (0.7 * self.x @ self.normal(FEATURES, RANK) @ self.normal(RANK, ITEMS)).softmax(-1)

    def come(self, t: int) -> Tensor:
        """Who comes at stage t (n,): their tastes have drifted, P_t = alpha P_{t-1} + (1 - alpha) Q_t (Eq. 15), where a
        stranger's P_{t-1} is what the taste would have been at stage 1."""
        old = torch.randperm(self.known, generator=self.random)[:FEW // 2] if t > 1 else torch.arange(0)
        fresh = torch.arange(self.known, self.known + (MANY if t == 1 else FEW - len(old)))
        users, self.known = torch.cat([old, fresh]), self.known + len(fresh)
        if t > 1:
            self.P[users] = self.alpha * self.P[users] + (1 - self.alpha) * self.tastes()[users]
        return users

    def take(self, users: Tensor) -> Tensor:
        """The share of each item among those that they take (n, K)."""
        P, each = self.P[users], 1 / self.events
        taken = torch.multinomial(P, self.events, True, generator=self.random)  # (n, events)
        return torch.zeros_like(P).scatter_add_(1, taken, torch.full_like(taken, each, dtype=P.dtype))

    def regret(self, v: Tensor, users: Tensor) -> float:
        """The mean KL(P || model) of these users in nats: cross-entropy above the best there is."""
        P = self.P[users]
        return (P * (P.clamp(min=1e-12).log() - log_p(v, self.x[users], self.W_0))).sum(-1).mean().item()


# -- stages 1, 2, 3 ------------------------------------------------------------------------------------

def learn(world: World, users: Tensor, y: Tensor, v_prev: Tensor, lam: float, steps: int = 40) -> Tensor:
    """One stage, from v_prev and anchored to it (Eq. 4 where lam = 0)."""
    return minimise(lambda v: stage_loss(v, v_prev, world.x[users], y, world.W_0, lam), v_prev, steps)


def live(seed: int, alpha: float, events: int = 10) -> Tensor:
    """(lambdas, 3): the regret of the users of a stage, of those who stayed away, and how far v moved in a stage; means
    over stages 2 and 3. Every lambda has the same world and the same stage 1."""
    world = World(seed, alpha, events)
    users = world.come(1)
    first = learn(world, users, world.take(users), new_adapter(world.random), 0.0)
    adapters, rows = dict.fromkeys(LAMBDAS, first), []
    for t in range(2, STAGES + 1):
        users = world.come(t)
        y = world.take(users)
        away = torch.tensor(sorted(set(range(world.known)) - set(users.tolist())))
        for lam, v_prev in adapters.items():  # v_{t-1} <- v_t: the anchor moves up
            v = learn(world, users, y, v_prev, lam) if lam < math.inf else v_prev
            rows.append([world.regret(v, users), world.regret(v, away), (v - v_prev).norm().item()])
            adapters[lam] = v
    return torch.tensor(rows).view(STAGES - 1, len(LAMBDAS), 3).mean(0)


# -- Proposition 1 -------------------------------------------------------------------------------------

def directions(Sigma: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma q_k = rho_k H q_k with q_i^T H q_j = delta_ij: rho (m - 1,), Q (m, m - 1). The softmax's H does not see a
    constant vector, c; along it the loss is free to choose, which takes c's part out of Sigma (a Schur complement)."""
    h, V = torch.linalg.eigh(H)  # ascending: V[:, 0] is c
    c, W = V[:, :1], V[:, 1:] / h[1:].sqrt()  # (m, 1), (m, m - 1): W^T H W = I
    W = W - c @ (c.T @ Sigma @ W) / (c.T @ Sigma @ c)
    rho, U = torch.linalg.eigh(W.T @ Sigma @ W)
    return rho.clamp(min=0), W @ U


def one_stage(seed: int, lam: float, alpha: float = 0.9) -> tuple[Tensor, ...]:
    """Stage 2 of a world whose users tell their whole taste, in coordinates along q_k, from v_prev on: rho, v_star, the
    minimum of the quadratic loss and metric, the trained adapter. (m - 1,) each."""
    world = World(seed, alpha)
    users = world.come(1)
    v_prev = learn(world, users, world.P[users], new_adapter(world.random), 0.0, 300)
    users = world.come(2)
    y = world.P[users]
    v_star, trained = (learn(world, users, y, v_prev, weight, 300) for weight in (0.0, lam))
    Sigma = torch.autograd.functional.hessian(
        lambda v: stage_loss(v, v_prev, world.x[users], y, world.W_0, 0.0), v_star)  # (m, m)
    e, V = torch.linalg.eigh((Sigma + Sigma.T) / 2)
    Sigma = (V * e.clamp(min=0)) @ V.T  # below zero is rounding, and what LBFGS left
    p = v_prev.softmax(0)
    H = p.diag() - p.outer(p)  # Proposition 3: the softmax-KL is 1/2 d^T H d near the anchor
    quadratic = minimise(lambda v: ((v - v_star) @ Sigma @ (v - v_star) + lam * (v - v_prev) @ H @ (v - v_prev)) / 2,
                         v_prev, 2000)
    rho, Q = directions(Sigma, H)
    return rho, *(Q.T @ H @ (v - v_prev) for v in (v_star, quadratic, trained))


def proposition_1(seeds: int, lam: float, bands: int = 6) -> list[tuple[float, ...]]:
    """Along q_k the minimum of loss + lam * term lies rho / (rho + lam) of the way from v_prev to v_star, where the
    loss alone is minimal (Eq. 10). Per band of directions, over some worlds: rho, that share, and the shares measured:
    where loss and term are quadratic, which must be equal, and of the trained adapter, whose are so only near by."""
    rho, whole, quadratic, trained = (torch.cat(some) for some in zip(*(one_stage(seed, lam) for seed in range(seeds))))
    shares = (rho / (rho + lam) * whole, quadratic, trained)
    return [(rho[k].median().item(), *(((way * whole)[k].sum() / whole[k].square().sum()).item() for way in shares))
            for k in rho.argsort().chunk(bands)]


# -- what it shows -------------------------------------------------------------------------------------

def name(lam: float) -> str:
    return "none" if lam == math.inf else f"{lam:g}"


def draw(curves: dict[str, list[float]], height: int = 14) -> str:
    """Curves over LAMBDAS in letters: one column per lambda."""
    top = max(max(values) for values in curves.values())
    grid = [[" "] * 7 * len(LAMBDAS) for _ in range(height + 1)]
    for letter, values in curves.items():
        for i, value in enumerate(values):
            grid[height - round(height * value / top)][7 * i + 3] = letter
    lines = [f"{top * (height - i) / height:5.2f} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    return "\n".join([*lines, " " * 6 + "+" + "-" * 7 * len(LAMBDAS),
                      " " * 7 + "".join(name(lam).center(7) for lam in LAMBDAS) + " lambda"])


def picture(curves: dict[str, list[float]], path: str) -> None:
    """The same as a PNG, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("(no PNG: matplotlib is not installed)")
    _, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for label, values in curves.items():
        axes.plot([name(lam) for lam in LAMBDAS], values, marker="o", label=label)
    axes.set(xlabel="lambda", ylabel="regret in nats", ylim=(0, None))
    axes.legend(frameon=False)
    plt.savefig(path, dpi=100)
    print(f"the same as a picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=float, default=0.5, help="how much of a taste survives a stage (Eq. 15)")
    parser.add_argument("--events", type=int, default=10, help="items that each user of a stage takes")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--png", default="", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = torch.stack([live(seed, args.alpha, args.events) for seed in range(args.seeds)])  # (seeds, lambdas, 3)
    regret = torch.cat([runs[..., :2], runs[..., :2].mean(-1, keepdim=True)], -1)  # present, away, both
    print(f"Regret in nats (0: the taste is known exactly), mean of stages 2 and 3, ± one s.e. of {args.seeds} seeds\n"
          "lambda       present             away         both        moved")
    for i, lam in enumerate(LAMBDAS):
        cells = [f"{some.mean():.3f} ± {some.std() / len(some) ** 0.5:.3f}" for some in regret[:, i].T]
        print(f"{name(lam):>6}  " + "   ".join(cells) + f"   {runs[:, i, 2].mean():5.2f}")
    for j, group in enumerate(("present", "away", "both")):
        best = int(regret[..., j].mean(0).argmin())
        for i in {0, len(LAMBDAS) - 1} - {best}:
            gain = regret[:, i, j] - regret[:, best, j]  # (seeds,)
            print(f"{group}: lambda {name(LAMBDAS[best])} is {gain.mean():.3f} ± {gain.std() / len(gain) ** 0.5:.3f} "
                  f"better than {name(LAMBDAS[i])}")
    curves = dict(zip(("present", "away", "both"), regret.mean(0).T.tolist()))
    print("\n" + draw({label[0]: values for label, values in curves.items()}) + "\np present, a away, b both\n")
    if args.png:
        picture(curves, args.png)
    for lam in (1.0, 10.0):
        print(f"Proposition 1 at lambda {lam:g}: how much of the way from v_prev to v_star is gone, by rho\n"
              "      rho   rho/(rho+lambda)   quadratic   trained adapter")
        for rho, predicted, exact, real in proposition_1(3, lam):
            print(f"{rho:9.2f} {predicted:18.3f} {exact:11.3f} {real:17.3f}")


if __name__ == "__main__":
    main()
