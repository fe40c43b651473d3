"""The loop over tokens: decode step, choice of the next token, and again, in one compiled function.

A call of Python costs a token some 1.5 ms of transformers' loop; here a call decodes many. Tokens are chosen as by
transformers' `RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper` and
`MinPLogitsWarper`, in this order, and drawn with uniform numbers from the caller.
"""

import numpy as np

from hat_lib.engine.arrays import Thread
from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F0, F1, LEAST, as_float, exp, span
from hat_lib.engine.step import decode_step
from hat_lib.engine.team import END, OFF, OVER, clock, meet

OUTSIDE, UNDRAWN = -1, -2
"""in ``Course.ran``, why a call was broken off: an id that is not in the vocabulary, a draw from NaN or infinity"""


@compiled(keep=True)
def decode(t, team, barrier, base, thresholds, rows, shared, course):
    """Thread t's part of all steps. With several, each row is the newest token of its own sequence."""
    thread, choice, vocabulary = Thread(t, team, barrier), course.choice, rows.logits.shape[1]
    v0, v1 = span(vocabulary, t, team, 32), span(vocabulary, t + 1, team, 32)
    weights = np.empty(vocabulary if choice.sample and t == 0 else 0, np.float32)  # of tokens, while one is drawn
    for step in range(course.ran[0], course.steps):  # some of them ran before, in a call that ended early
        if course.ended.all():
            return
        for token in rows.ids:
            if not 0 <= token < base.embed.shape[0]:
                course.ran[0] = OUTSIDE
                return
        if decode_step(thread, base, thresholds, rows, shared, course, step):
            return
        if not course.ids.shape[0]:
            return
        if not choice.given.shape[0]:
            for r in range(rows.ids.shape[0]):
                shared.best[t, r], shared.likeliest[t, r] = likeliest(rows.logits[r], v0, v1, r, choice, step)
            if meet(barrier, team):
                return
        if t == 0:
            course.ran[0] = step + 1
            for r in range(rows.ids.shape[0]):
                if choice.given.shape[0]:
                    rows.ids[r] = choice.given[step, r]
                else:
                    next_token(thread, rows, shared, course, step, r, weights)
            for r in range(rows.ids.shape[0]):
                go_on(rows, course, step, r)
            if clock() >= barrier[END]:
                barrier[OFF] = OVER
        if meet(barrier, team, True) or course.ran[0] < 0 or barrier[OFF]:
            return


@compiled()
def next_token(thread, rows, shared, course, step, r, weights):
    """Choose what follows a row; ``weights [V]`` to work in, if it is drawn."""
    choice, logits, best = course.choice, rows.logits[r], 0
    for other in range(1, thread.team):
        if better(shared.best[other, r], shared.best[best, r]):
            best = other
    token = shared.likeliest[best, r]
    if course.ended[r]:
        token = choice.pad
    elif choice.sample:
        for v in range(weights.shape[0]):
            weights[v] = judged(as_float(logits[v]), v, r, choice, step)
        weigh(weights, shared.best[best, r], choice.temperature)
        restrict(weights, choice.top_k, choice.top_p, choice.min_p)
        token = draw(weights, choice.uniform[step, r])
        if token < 0:
            course.ran[0] = UNDRAWN
    for stop in choice.stops:
        course.ended[r] |= token == stop
    if choice.penalty != F1 and 0 <= token < logits.shape[0]:
        choice.seen[r, token] = True
    if course.logits.shape[0]:
        for v in range(logits.shape[0]):
            course.logits[step, r, v] = logits[v]
    course.ids[step, r] = rows.ids[r] = token


@compiled()
def go_on(rows, course, step, r):
    """Steer a row by what it ran, and go on to its next place."""
    steering, kept = course.steering, course.kept[step]
    if steering.gain > F0:
        if not rows.protected[r] and course.exits[step, r] == kept.shape[1]:
            ran = work(kept, r, steering.shares) + head_work(course.head[step], r, steering.head)
            moved = steering.offset[r] + (ran - steering.asked) * steering.gain
            steering.offset[r] = min(max(moved, -steering.limit), steering.limit)
        course.offsets[step, r] = steering.offset[r]
        rows.scale[r] = exp(steering.offset[r])
    rows.slot[r] += 1
    rows.position[r] += 1
    rows.protected[r] = step + 1 < course.unprotected[r]


@compiled()
def work(kept, r, shares):
    """Work of the layers that row r ran."""
    threads, layers, ran = kept.shape[0], kept.shape[1], F0
    for layer in range(layers):
        for product in range(shares.shape[0]):
            for t in range(threads):
                ran += shares[product] * np.float32(kept[t, layer, product, r])
    return ran


@compiled()
def head_work(read, r, shares):
    """Work of the head that row r ran."""
    ran = F0
    for t in range(read.shape[0]):
        for part in range(shares.shape[0]):
            ran += shares[part] * np.float32(read[t, part, r])
    return ran


@compiled()
def judged(score, v, r, choice, step):
    """A logit after the repetition penalty, and out of reach for a token that would end the text too early."""
    if choice.penalty != F1 and choice.seen[r, v]:
        score = score * choice.penalty if score < F0 else score / choice.penalty
    if step < choice.earliest:
        for stop in choice.stops:
            if v == stop:
                score = LEAST
    return score


@compiled()
def better(score, top):
    """Whether a logit takes the place of the largest so far; the first NaN does, and keeps it."""
    return not score <= top and top == top


@compiled()
def likeliest(logits, v0, v1, r, choice, step):
    """The largest logit of tokens v0 to v1, as `judged`, and its token."""
    top, best = LEAST, v0
    for v in range(v0, v1):
        score = as_float(logits[v])
        if better(score, top) or choice.penalty != F1:
            score = judged(score, v, r, choice, step)
            if better(score, top):
                top, best = score, v
    return top, best


@compiled()
def weigh(scores, top, temperature):
    """Scores become probabilities over that of the likeliest, whose score is ``top``."""
    for v in range(scores.shape[0]):
        scores[v] = exp((scores[v] - top) / temperature)


@compiled()
def restrict(weights, top_k, top_p, min_p):
    """Set to zero the weights of tokens that top k, top p or min p leave out; the largest weight is 1."""
    bar = F0
    if 0 < top_k < weights.shape[0]:
        bar = bar_of(weights, np.float32(top_k), True)
    if top_p < F1:
        bar = max(bar, bar_of(weights, top_p * amount(weights, bar, False), False))
    bar = max(bar, min_p)
    for v in range(weights.shape[0]):
        if weights[v] < bar:
            weights[v] = F0


@compiled(reorder=True)
def amount(weights, bar, count):
    """The sum of the weights from ``bar``, or their number."""
    total = F0
    for v in range(weights.shape[0]):
        one = F1 if count else weights[v]
        total += one if weights[v] >= bar else F0
    return total


@compiled()
def bar_of(weights, enough, count):
    """The largest bar from which weights amount to ``enough``, by bisection, to a trillionth of the largest weight."""
    low, high = F0, F1
    if amount(weights, high, count) >= enough:
        return high
    for _ in range(40):
        middle = (low + high) * np.float32(0.5)
        if amount(weights, middle, count) >= enough:
            low = middle
        else:
            high = middle
    return low


@compiled()
def draw(weights, uniform):
    """A token, with a probability in proportion to its weight; -1 if they are NaN, or all zero."""
    total = 0.0
    for weight in weights:
        total += weight
    if not total > 0:
        return -1
    left, last = uniform * total, 0
    for v in range(weights.shape[0]):
        if weights[v] > F0:
            last, left = v, left - weights[v]
            if left < 0:
                return v
    return last
