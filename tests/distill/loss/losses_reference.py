"""The losses once more, as plain loops over Python floats: slow, and independent of the library's code.

Logit losses take rows `z[n][c]` (one per position that counts), feature losses maps `x[b][c][p]` (channels by
positions)."""
import math

mean = lambda xs: sum(xs)/len(xs)
dot = lambda a, b: sum(x*y for x, y in zip(a, b))
norm = lambda a, p=2: sum(abs(x)**p for x in a)**(1/p)
scaled = lambda a, p=2: [x/norm(a, p) for x in a] if any(a) else list(a)
columns = lambda m: [list(c) for c in zip(*m)]


def softmax(z, T=1.):
    top = max(z)
    e = [math.exp((x-top)/T) for x in z]
    return [x/sum(e) for x in e]


def kl(p, q): return sum(a*(math.log(a)-math.log(b)) for a, b in zip(p, q) if a > 0)
def drop(xs, i): return [x for j, x in enumerate(xs) if j != i]


# Logits

def soft_target(zs, zt, T=5.): return T*T*mean([kl(softmax(t, T), softmax(s, T)) for s, t in zip(zs, zt)])
def logits(zs, zt): return mean([(a-b)**2 for s, t in zip(zs, zt) for a, b in zip(s, t)])
def mutual(zs, zt): return soft_target(zs, zt, 1.)


def dkd(zs, zt, ys, T=4., alpha=1., beta=8.):
    terms = []
    for s, t, y in zip(zs, zt, ys):
        ps, pt = softmax(s, T), softmax(t, T)
        target = kl([pt[y], sum(drop(pt, y))], [ps[y], sum(drop(ps, y))])
        terms.append(T*T*(alpha*target + beta*kl(softmax(drop(t, y), T), softmax(drop(s, y), T))))
    return mean(terms)


def nkd(zs, zt, ys, T=1., gamma=1.5, alpha=1.):
    terms = []
    for s, t, y in zip(zs, zt, ys):
        rest = zip(softmax(drop(t, y), T), softmax(drop(s, y), T))
        terms.append(-alpha*softmax(t)[y]*math.log(softmax(s)[y]) - gamma*T*T*sum(p*math.log(q) for p, q in rest))
    return mean(terms)


def rld(zs, zt, ys, T=4., alpha=1., beta=8., T_alpha=1.):
    terms = []
    for s, t, y in zip(zs, zt, ys):
        ps, pt, top = softmax(s, T_alpha), softmax(t, T_alpha), t.index(max(t))
        sure = kl([pt[top], sum(drop(pt, top))], [ps[y], sum(drop(ps, y))])
        below = [i for i, v in enumerate(t) if v < t[y]]
        order = kl(*(softmax([z[i] for i in below], T) for z in (t, s))) if below else 0.
        terms.append(alpha*T_alpha**2*sure + beta*T*T*order)
    return mean(terms)


def hard_target(zs, zt): return mean([-math.log(softmax(s)[t.index(max(t))]) for s, t in zip(zs, zt)])


def pearson(a, b):
    a, b = [x-mean(a) for x in a], [x-mean(b) for x in b]
    return dot(a, b)/(norm(a)*norm(b))


def dist(zs, zt, T=1., beta=1., gamma=1.):
    q, p = [softmax(s, T) for s in zs], [softmax(t, T) for t in zt]
    inter = mean([1-pearson(a, b) for a, b in zip(q, p)])
    intra = mean([1-pearson(a, b) for a, b in zip(columns(q), columns(p))]) if len(q) > 1 else 0.
    return T*T*(beta*inter + gamma*intra)


def ttm(zs, zt, gamma=0.1, weighted=False):
    terms = []
    for s, t in zip(zs, zt):
        power = [p**gamma for p in softmax(t)]
        terms.append((sum(power) if weighted else 1)*kl([x/sum(power) for x in power], softmax(s)))
    return mean(terms)


def wttm(zs, zt, gamma=0.1): return ttm(zs, zt, gamma, True)


def binary_kd(zs, zt, T=1.):
    coin = lambda z: [1/(1+math.exp(-z/T)), 1/(1+math.exp(z/T))]
    return T*T*mean([kl(coin(b), coin(a)) for s, t in zip(zs, zt) for a, b in zip(s, t)])


def ranking(zs, zt):
    terms = []
    for s, t in zip(zs, zt):
        s = [s[i] for i in sorted(range(len(t)), key=lambda i: -t[i])]
        terms.append(sum(-math.log(softmax(s[k:])[0]) for k in range(len(s))))
    return mean(terms)


def z_score(z):
    std = (sum((x-mean(z))**2 for x in z)/(len(z)-1))**0.5
    return [(x-mean(z))/std for x in z]


def standardized(zs, zt, T=5.): return soft_target([z_score(s) for s in zs], [z_score(t) for t in zt], T)


def standardized_over_batch(zs, zt, T=5.):
    def over(z):
        cols = [[(x-mean(c))/(sum((x-mean(c))**2 for x in c)/len(c))**0.5 for x in c] for c in columns(z)]
        return columns(cols)
    return soft_target(over(zs), over(zt), T)


# Maps

def attention(xs, xt, p=2):
    def att(x): return scaled([mean([c[i]**p for c in x]) for i in range(len(x[0]))])
    return mean([(a-b)**2 for s, t in zip(xs, xt) for a, b in zip(att(s), att(t))])


def fitnet(xs, xt): return mean([(a-b)**2 for s, t in zip(xs, xt) for cs, ct in zip(s, t) for a, b in zip(cs, ct)])


def boundaries(xs, xt, m=2.):
    def one(a, b):
        if b > 0: return (a-m)**2 if a < m else 0.
        return (a+m)**2 if a > -m else 0.
    return mean([one(a, b) for s, t in zip(xs, xt) for cs, ct in zip(s, t) for a, b in zip(cs, ct)])


def similarity(xs, xt, p=2):
    def rows(x):
        flat = [[v for c in m for v in c] for m in x]
        return [scaled([dot(a, b) for b in flat], p) for a in flat]
    return mean([(a-b)**2 for s, t in zip(rows(xs), rows(xt)) for a, b in zip(s, t)])


def cwd(xs, xt, T=4.):
    return T*T*mean([kl(softmax(ct, T), softmax(cs, T)) for s, t in zip(xs, xt) for cs, ct in zip(s, t)])


def channel_stats(xs, xt, ratio=1., eps=1e-5):
    def std(c): return (sum((x-mean(c))**2 for x in c)/(len(c)-1)+eps)**0.5
    return mean([sum(ratio*(mean(cs)-mean(ct))**2 + (std(cs)-std(ct))**2 for cs, ct in zip(s, t)) for s,
                 t in zip(xs, xt)])


def nst(xs, xt):
    def k(x, y): return mean([dot(scaled(a), scaled(b))**2 for a in x for b in y])
    return mean([k(s, s)+k(t, t)-2*k(s, t) for s, t in zip(xs, xt)])


# Relations (of the channels' means)

embed = lambda xs: [[mean(c) for c in x] for x in xs]
minus = lambda a, b: [x-y for x, y in zip(a, b)]
huber = lambda d: d*d/2 if abs(d) < 1 else abs(d)-0.5


def rkd_distance(xs, xt):
    def relative(e):
        d = [[norm(minus(a, b)) for b in e] for a in e]
        positive = [x for r in d for x in r if x > 0]
        return [x/mean(positive) if positive else 0. for r in d for x in r]
    return mean([huber(a-b) for a, b in zip(relative(embed(xs)), relative(embed(xt)))])


def rkd_angle(xs, xt):
    def angles(e):
        u = [[scaled(minus(a, b)) for a in e] for b in e]
        return [dot(a, c) for r in u for a in r for c in r]
    return mean([huber(a-b) for a, b in zip(angles(embed(xs)), angles(embed(xt)))])


def rkd(xs, xt): return 25*rkd_distance(xs, xt)+50*rkd_angle(xs, xt)


def pkt(xs, xt, eps=1e-7):
    def neighbours(e):
        c = [[(1+dot(scaled(a), scaled(b)))/2 for b in e] for a in e]
        return [[x/sum(r) for x in r] for r in c]
    return mean([p*math.log((p+eps)/(q+eps)) for s, t in zip(neighbours(embed(xs)), neighbours(embed(xt))) for q,
                 p in zip(s, t)])


def cc(xs, xt, gamma=0.4, P=2):
    def kernel(e):
        return [sum(math.exp(-2*gamma)*(2*gamma)**p/math.factorial(p)*dot(scaled(a), scaled(b))**p for p in range(P+1))
                for a in e for b in e]
    return mean([(a-b)**2 for a, b in zip(kernel(embed(xs)), kernel(embed(xt)))])


def edges(x):
    e = embed(x)
    d = [norm(minus(a, b))**2 for a in e for b in e]
    return [v/max(d) if max(d) else 0. for v in d]


def irg(layers_s, layers_t, zs, zt, vertex=0.1, edge=5., transform=5.):
    gaps = [minus(edges(s), edges(t)) for s, t in zip(layers_s, layers_t)]
    square = lambda g: mean([x*x for x in g])
    return vertex*logits(zs, zt) + edge*sum(map(square, gaps)) + transform*sum(square(minus(b, a)) for a,
                                                                               b in zip(gaps, gaps[1:]))
