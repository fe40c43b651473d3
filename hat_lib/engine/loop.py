"""The loop over tokens: decode step, choice of the next token, and again, in one compiled function.

A call of Python costs a token some 1.5 ms of transformers' loop; here a call decodes many. Tokens are chosen as by
transformers' `RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper` and
`MinPLogitsWarper`, in this order, and drawn with uniform numbers from the caller.
"""

from __future__ import annotations

import numpy as np

from hat_lib.engine.arrays import FFN
from hat_lib.engine.compiling import compiled
from hat_lib.engine.kernels import F0, F1, as_float, exp, span
from hat_lib.engine.step import LOWEST, decode_step
from hat_lib.engine.team import meet


@compiled(keep=True)
def decode(t, team, barrier, base, decide, rows, scratch, course):
    """Thread t's part of all steps. With several, each row is the newest token of its own sequence."""
    for step in range(course.steps):
        if decode_step(t, team, barrier, base, decide, rows, scratch):
            return
        if course.choice.given.shape[0]:
            if t == 0:
                rows.ids[:] = course.choice.given[step]
        elif course.ids.shape[0]:
            likeliest(t, team, rows, course.choice, scratch, step)
            if meet(barrier, team):
                return
            if t == 0:
                choose(team, rows, course, scratch, step)
        if t == 0:
            note(rows, course, step)
        if course.steps > 1 and (meet(barrier, team) or course.ended.all()):
            return


@compiled()
def note(rows, course, step):
    """Record what a step ran, steer by it, and go on to the next place."""
    layers = rows.kept.shape[1]
    course.ran[0] = step + 1
    course.exits[step] = rows.exits
    course.kept[step], course.head[step] = rows.kept[0], rows.head[0]
    for other in range(1, rows.kept.shape[0]):
        course.kept[step] += rows.kept[other]
        course.head[step] += rows.head[other]
    rows.kept[:], rows.head[:] = 0, 0
    if course.steps == 1:
        return
    for r in range(rows.ids.shape[0]):
        rows.slot[r] += 1
        rows.position[r] += 1
        if course.gain > F0:
            if not rows.protected[r] and rows.exits[r] == layers:
                ran = F0
                for layer in range(layers):
                    for product in range(FFN):
                        ran += course.shares[product] * course.kept[step, layer, product, r]
                moved = course.offset[r] + (ran / layers - course.asked) * course.gain
                course.offset[r] = min(max(moved, -course.limit), course.limit)
            rows.scale[r] = exp(course.offset[r])
        rows.protected[r] = step + 1 < course.unprotected[r]


@compiled()
def likeliest(t, team, rows, choice, scratch, step):
    """Find the likeliest token of each row in a thread's share of the vocabulary, penalties and ends considered."""
    vocabulary = rows.logits.shape[1]
    v0, v1 = span(vocabulary, t, team, 32), span(vocabulary, t + 1, team, 32)
    for r in range(rows.ids.shape[0]):
        logits, top, best = rows.logits[r], LOWEST, v0
        for v in range(v0, v1):
            score = as_float(logits[v])
            if score > top or choice.penalty != F1:
                score = judged(score, v, r, choice, step)
                if score > top:
                    top, best = score, v
        scratch.best[t, r], scratch.likeliest[t, r] = top, best


@compiled()
def judged(score, v, r, choice, step):
    """A logit after the repetition penalty, and out of reach for a token that would end the text too early."""
    if choice.penalty != F1 and choice.seen[r, v]:
        score = score * choice.penalty if score < F0 else score / choice.penalty
    if step < choice.earliest:
        for stop in choice.stops:
            if v == stop:
                score = LOWEST
    return score


@compiled()
def choose(team, rows, course, scratch, step):
    """Set each row's next token."""
    choice = course.choice
    for r in range(rows.ids.shape[0]):
        best = 0
        for t in range(1, team):
            if scratch.best[t, r] > scratch.best[best, r]:
                best = t
        token = scratch.likeliest[best, r]
        if course.logits.shape[0]:
            course.logits[step, r] = rows.logits[r]
        if course.ended[r]:
            token = choice.pad
        elif choice.sample:
            token = draw(rows.logits[r], scratch.best[best, r], r, choice, step, scratch.scores_of)
        for stop in choice.stops:
            course.ended[r] |= token == stop
        if choice.penalty != F1:
            choice.seen[r, token] = True
        course.ids[step, r] = rows.ids[r] = token


@compiled()
def draw(logits, top, r, choice, step, scores):
    """A token drawn from what temperature, top k, top p and min p leave of a row's logits; ``top`` is the largest."""
    for v in range(logits.shape[0]):
        scores[v] = (judged(as_float(logits[v]), v, r, choice, step) - top) / choice.temperature
    floor = LOWEST
    if 0 < choice.top_k < scores.shape[0]:
        floor = np.partition(scores, scores.shape[0] - choice.top_k)[scores.shape[0] - choice.top_k]
    if choice.top_p < F1:
        floor = max(floor, floor_of_mass(scores, floor, choice.top_p))
    if choice.min_p > F0:
        floor = max(floor, np.float32(np.log(choice.min_p)))
    total = 0.0
    for v in range(scores.shape[0]):
        scores[v] = exp(scores[v]) if scores[v] >= floor else F0
        total += scores[v]
    left, last = choice.uniform[step, r] * total, 0
    for v in range(scores.shape[0]):
        if scores[v] > F0:
            last = v
            left -= scores[v]
            if left < 0:
                return v
    return last


@compiled()
def floor_of_mass(scores, floor, share):
    """The smallest of the largest scores that together have a share of the probability, among those from ``floor``.

    Tokens of less than ``(1 - share) / V`` of it could all be left out, so only the others are sorted.
    """
    total = 0.0
    for score in scores:
        if score >= floor:
            total += exp(score)
    least = max(floor, np.float32(np.log(max((1 - share) * total / scores.shape[0], 1e-37))))
    count = 0
    for score in scores:
        count += score >= least
    likely, n = np.empty(count, np.float32), 0
    for score in scores:
        if score >= least:
            likely[n] = score
            n += 1
    likely.sort()
    mass = 0.0
    for k in range(count - 1, -1, -1):
        mass += exp(likely[k])
        if mass >= share * total:
            return likely[k]
    return least
