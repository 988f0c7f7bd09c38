"""Independent statements of the selection methods: whole attention matrices in fp64, plain loops.

Each takes the layers' inputs and returns, for every layer and kv head, the set of kept tokens.
"""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

Q_HEADS, HEADS, DIM, SCALE = 6, 2, 16, 0.25
Layer = tuple[Tensor, Tensor, Tensor]          # q [Hq, T, D], k [H, T, D], v [H, T, D]
Kept = list[list[set[int]]]


def matrix(q: Tensor, k: Tensor) -> Tensor:
    """[H, G, T, T]: causal attention weights."""
    k = k.double().repeat_interleave(Q_HEADS // HEADS, 0)
    logits = q.double() @ k.transpose(-1, -2) * SCALE
    t = q.shape[1]
    logits += torch.full((t, t), -math.inf, dtype=torch.float64).triu(1)
    return logits.softmax(-1).view(HEADS, -1, t, t)


def best(scores, n: int, sure=()) -> set[int]:
    """The n tokens of the largest scores; `sure` ones first, of equals the earlier."""
    order = sorted(range(len(scores)), key=lambda t: (t not in sure, -float(scores[t]), t))
    return set(order[:max(n, len(sure))])


def window_scores(q: Tensor, k: Tensor, w: int, kernel: int = 5, pool: str = "avg",
                  gamma: float = 0.0, visible: bool = False) -> list[list[float]]:
    """[H][T - w] by direct sums."""
    t = q.shape[1]
    a = matrix(q, k)[:, :, t - w :, : t - w]
    if visible:
        a = a * torch.arange(t - w, t, dtype=torch.float64)[:, None]
    s = a.mean(2)
    if gamma:
        s = s + gamma * ((a - a.mean(2, keepdim=True)) ** 2).sum(2) / (w - 1)
    out = []
    for head in s:
        each = []
        for row in head.tolist():
            half, smooth = kernel // 2, []
            for i in range(len(row)):
                near = [row[j] if 0 <= j < len(row) else 0.0 for j in range(i - half, i + half + 1)]
                inside = [row[j] for j in range(i - half, i + half + 1) if 0 <= j < len(row)]
                smooth.append(sum(near) / kernel if pool == "avg" else max(inside))
            each.append(smooth)
        out.append([sum(x) / len(each) for x in zip(*each, strict=True)])
    return out


def snapkv(layers: list[Layer], n: int, w: int, **options) -> Kept:
    t = layers[0][0].shape[1]
    last = set(range(t - w, t))
    return [[best([*s, *[0.0] * w], n, last) for s in window_scores(q, k, w, **options)]
            for q, k, _ in layers]


def pyramidkv(layers: list[Layer], mean: int, w: int, beta: float) -> Kept:
    t, count = layers[0][0].shape[1], len(layers)
    low = (mean - w) // beta
    high = 2 * (mean - w) - low
    if high > t - w:
        high, low = t - w, 2 * (mean - w) - (t - w)
    out = []
    for i, layer in enumerate(layers):
        n = w + round(high - i * (high - low) / (count - 1))
        out += snapkv([layer], n, w)
    return out


def h2o(layers: list[Layer], n: int) -> Kept:
    t = layers[0][0].shape[1]
    return [[best(head.sum((0, 1)), n, set(range(t - n // 2, t))) for head in matrix(q, k)]
            for q, k, _ in layers]


def tova(layers: list[Layer], n: int) -> Kept:
    t = layers[0][0].shape[1]
    return [[best(matrix(q, k)[:, :, -1].mean((0, 1)), n, {t - 1})] * HEADS for q, k, _ in layers]


def scissorhands(layers: list[Layer], n: int, history: int, recent: int) -> Kept:
    out = []
    for q, k, _ in layers:
        heads, t = [], q.shape[1]
        for head in matrix(q, k).mean(1):
            low = [0] * t
            for i in range(max(0, t - history), t):
                for j in range(i + 1):
                    low[j] += bool(head[i, j] < 1 / (i + 1))
            heads.append(best([-x for x in low], n, set(range(t - recent, t))))
        out.append(heads)
    return out


def by(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Kept]:
    """A method that keeps n tokens by a score [T] of k and v [T, D] of a head."""
    def method(layers: list[Layer], n: int) -> Kept:
        return [[best(score(kh.double(), vh.double()), n) for kh, vh in zip(k, v, strict=True)]
                for _, k, v in layers]
    return method


def keydiff_score(k: Tensor, v: Tensor) -> Tensor:
    unit = k / k.norm(dim=-1, keepdim=True)
    anchor = unit.mean(0)
    return -(k @ anchor) / (k.norm(dim=-1) * anchor.norm())


knorm = by(lambda k, v: -k.norm(dim=-1))
keydiff = by(keydiff_score)


def adakv(layers: list[Layer], n: int, w: int, floor: float) -> Kept:
    out = []
    for q, k, _ in layers:
        t = q.shape[1]
        scores = [[*s, *[math.inf] * w] for s in window_scores(q, k, w)]
        sure = [(h, i) for h, s in enumerate(scores) for i in best(s, int(n * floor))]
        pairs = sorted(((h, i) for h in range(HEADS) for i in range(t)),
                       key=lambda p: ((p not in sure), -scores[p[0]][p[1]], p))
        out.append([{i for head, i in pairs[: n * HEADS] if head == h} for h in range(HEADS)])
    return out


def criticalkv(layers: list[Layer], n: int, w: int, weights: list[Tensor]) -> Kept:
    out = []
    for (q, k, v), weight in zip(layers, weights, strict=True):
        heads, t = [], q.shape[1]
        group = Q_HEADS // HEADS
        for h, s in enumerate(window_scores(q, k, w)):
            sure = best([*s, *[math.inf] * w], n // 2) | set(range(t - w, t))
            norms = [sum(float((weight.double()[:, g * DIM : (g + 1) * DIM] @ v[h, i].double())
                               .abs().sum()) for g in range(h * group, (h + 1) * group)) / group
                     for i in range(t)]
            scores = [(x + 1e-4) * norm for x, norm in zip([*s, *[0.0] * w], norms, strict=True)]
            heads.append(best(scores, n, sure))
        out.append(heads)
    return out


def chunkkv(layers: list[Layer], ratio: float, w: int, length: int) -> Kept:
    out = []
    for q, k, _ in layers:
        t = q.shape[1]
        total = [sum(x) for x in zip(*window_scores(q, k, w), strict=True)] + [math.inf] * w
        chunks = [range(i, min(t, i + length)) for i in range(0, t, length)]
        means = [sum(total[i] for i in c) / len(c) for c in chunks]
        kept = best(means, max(1, int(len(chunks) * ratio)),
                    {i for i, m in enumerate(means) if m == math.inf})
        out.append([{i for c in kept for i in chunks[c]}] * HEADS)
    return out


def lag_order(k: Tensor, v: Tensor, part: slice) -> list[int]:
    """The tokens of a part, from that most like the next part to the least like it."""
    length, after = part.stop - part.start, slice(part.stop, 2 * part.stop - part.start)
    total = [0.0] * length
    for x in (k.double(), v.double()):
        low, high = x[after].amin(0), x[after].amax(0)
        spread = ((x[part] - low) / (high - low)).std(-1)
        total = [a + float(b) for a, b in zip(total, (spread - spread.max()).exp()
                                              / (spread - spread.max()).exp().sum(), strict=True)]
    return [part.start + i for i in sorted(range(length), key=lambda i: total[i])]


def lagkv_parts(k: Tensor, v: Tensor, tokens: int, keep: int, length: int, sinks: int) -> list[int]:
    """What a head holds of so many tokens if every part is cut when the next one is complete."""
    gone: set[int] = set()
    for start in range(sinks, tokens - 2 * length + 1, length):
        gone |= {*lag_order(k, v, slice(start, start + length))[: length - keep]}
    return [t for t in range(tokens) if t not in gone]


def lagkv(layers: list[Layer], n: int, length: int, sinks: int) -> Kept:
    out = []
    for _, k, v in layers:
        heads, t = [], k.shape[1]
        parts = (t - sinks) // length
        for kh, vh in zip(k.double(), v.double(), strict=True):
            scores = [math.inf] * t
            for p in range(parts - 1):
                a = slice(sinks + p * length, sinks + (p + 1) * length)
                for rank, i in enumerate(lag_order(kh, vh, a)):
                    scores[i] = rank / length
            heads.append(best(scores, n))
        out.append(heads)
    return out


def finch(layers: list[Layer], ratio: float, w: int, length: int) -> Kept:
    out = []
    for q, k, _ in layers:
        heads, t = [], q.shape[1]
        for s in window_scores(q, k, w, kernel=1, visible=True):
            s, kept = [*s, *[math.inf] * w], set(range(t - w, t))
            for start in range(0, t, length):
                part = s[start : start + length]
                kept |= {start + i for i in best(part, max(1, int(len(part) * ratio)))}
            heads.append(kept)
        out.append(heads)
    return out


def r_kv(layers: list[Layer], n: int, mix: float, w: int, kernel: int, alike: float) -> Kept:
    out = []
    for q, k, _ in layers:
        heads, t = [], q.shape[1]
        for head, keys in zip(q.double().unflatten(0, (HEADS, -1)), k.double(), strict=True):
            logits = torch.stack([x[t - w :] @ keys[: t - w].T * SCALE for x in head])
            weight = logits.max(0).values.softmax(-1).mean(0).tolist()
            half = kernel // 2
            weight = [max(weight[max(0, i - half) : i + half + 1]) for i in range(t - w)]
            unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
            cos = (unit @ unit.T).tolist()
            for i in range(t):
                cos[i][i] = 0.0
                cos[i][max([j for j in range(t) if cos[i][j] > alike], default=0)] = 0.0
            mean = torch.tensor([sum(cos[i][j] for i in range(t)) / t for j in range(t)],
                                dtype=torch.float64)
            red = mean.softmax(0).tolist()
            scores = [mix * a - (1 - mix) * b for a, b in zip(weight, red, strict=False)]
            heads.append(best([*scores, *[0.0] * w], n, set(range(t - w, t))))
        out.append(heads)
    return out


def cake(layers: list[Layer], mean: int, w: int, gamma: float, t1: float, t2: float) -> Kept:
    t, preference = layers[0][0].shape[1], []
    for q, k, _ in layers:
        entropy, variance = 0.0, 0.0
        for head in matrix(q, k)[:, :, t - w :, : t - w].flatten(0, 1):
            entropy -= sum(x * math.log(x + 1e-10) for row in head.tolist() for x in row)
            variance += sum(statistics.variance(column) for column in head.T.tolist())
        preference.append((entropy / Q_HEADS) ** (1 / t1) * (variance / Q_HEADS) ** (1 / t2))
    spare = (mean - w) * len(layers)
    each = [int(spare * own / sum(preference)) for own in preference]
    assert max(each) < t - w                            # no layer takes all: what is left is even
    for i in range(spare - sum(each)):
        each[i] += 1
    return [kept for layer, n in zip(layers, each, strict=True)
            for kept in snapkv([layer], w + n, w, gamma=gamma)]


def simlayerkv(layers: list[Layer], sinks: int, recent: int, above: float) -> Kept:
    out = []
    for q, k, _ in layers:
        t = q.shape[1]
        some = set(range(sinks)) | set(range(t - recent, t))
        mass = float(sum(matrix(q, k)[:, :, -1, i].mean() for i in some))
        out.append([some if mass > above else set(range(t))] * HEADS)
    return out


def expected_attention(layers: list[Layer], n: int, rates: Tensor, future: int, sinks: int) -> Kept:
    """q is taken at positions 0, 1, ..; half-split rotary embedding with these angles a position.
    """
    def turn(at: int) -> Tensor:
        half = len(rates)
        m = torch.zeros(DIM, DIM, dtype=torch.float64)
        for i, rate in enumerate(rates.tolist()):
            c, s = math.cos(rate * at), math.sin(rate * at)
            m[i, i] = m[i + half, i + half] = c
            m[i, i + half], m[i + half, i] = -s, s
        return m

    out = []
    for q, k, v in layers:
        t = q.shape[1]
        average = sum(turn(t + i) for i in range(future)) / future
        heads = []
        for h in range(HEADS):
            total = torch.zeros(t - sinks, dtype=torch.float64)
            for g in range(h * Q_HEADS // HEADS, (h + 1) * Q_HEADS // HEADS):
                plain = torch.stack([turn(i).T @ q[g, i].double() for i in range(sinks, t)])
                mean = average @ plain.mean(0)
                far = plain - plain.mean(0)
                cov = average @ (far.T @ far / len(plain)) @ average.T
                keys = k[h, sinks:].double()
                total += (keys @ mean * SCALE + ((keys @ cov) * keys).sum(-1) * SCALE**2 / 2
                          ).softmax(0)
            scores = total * HEADS / Q_HEADS * v[h, sinks:].double().norm(dim=-1)
            heads.append(best([*[0.0] * sinks, *scores.tolist()], n, set(range(sinks))))
        out.append(heads)
    return out
