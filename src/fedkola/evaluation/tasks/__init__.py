"""Where a stream comes from: the closed table of tasks, and what a plan's scenario does to sites.

The entries of [scenario] compose. ``noisy``, ``release`` and ``access`` change the stream here;
``late``, ``leave`` and ``availability`` change whom a round asks, in
:mod:`fedkola.knowledge.availability`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedkola.errors import UnknownName
from fedkola.evaluation.tasks import (
    cl_text,
    clinc150,
    facts,
    files,
    icd10cm,
    icd_releases,
    medquad,
    realtimeqa,
    situatedqa,
    who_don,
)
from fedkola.evaluation.tasks.tables import nearest
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan
from fedkola.quality.corrupt import symmetric

TASKS: Mapping[str, Callable[..., Stream]] = {
    "facts": facts.load,
    "files": files.load,
    "icd10cm": icd10cm.load,
    "icd-releases": icd_releases.load,
    "who-don": who_don.load,
    "cl-text": cl_text.load,
    "clinc150": clinc150.load,
    "situatedqa": situatedqa.load,
    "realtimeqa": realtimeqa.load,
    "medquad": medquad.load,
}


def load(plan: Plan) -> Stream:
    """The stream of a plan, as its scenario changes it; the test stays as it is.

    *Noise.* A wrong label is drawn from those that reach any site in the same window (from the
    catalogue where that is one label), so that noise never makes knowledge arrive early. ``about``
    of a noisy site gets ``noise`` (the rate) and ``replaced`` (how many labels).
    *Release.* What everybody starts with, window 1, stays; later records reach a site so many
    windows later, at the latest in the last window. Of a record that then arrives twice in one
    window the newer text is kept. ``about`` gets ``release``, the delay.
    *Access.* ``about`` of a site that may not use everything gets ``access``, its scopes.

    Raises UnknownName for a task, or a site or scope of the scenario, that does not exist, and
    what the task itself raises.
    """
    if plan.task.name not in TASKS:
        raise UnknownName(
            f"task.name = {plan.task.name!r} is no task; set one of {', '.join(TASKS)}"
        )
    stream = TASKS[plan.task.name](plan.task, seed=plan.run.seed)
    scenario = plan.scenario
    for key, sites in (
        ("scenario.noisy", scenario.noisy),
        ("scenario.late", scenario.late),
        ("scenario.leave", scenario.leave),
        ("scenario.quit", scenario.quit),
        ("scenario.release", scenario.release),
        ("scenario.access", scenario.access),
        ("algorithm.ranks", plan.algorithm.ranks),
    ):
        for site in sites:
            if site not in stream.sites:
                raise UnknownName(
                    f"{key} names {site!r}, which is no site of this task; nearest is "
                    f"{nearest(site, stream.sites)}; sites are {', '.join(stream.sites)}"
                )
    stream = _noisy(stream, scenario.noisy, plan.run.seed)
    return _restricted(_released(stream, scenario.release), scenario.access)


def _noisy(stream: Stream, rates: Mapping[str, float], seed: int) -> Stream:
    arriving: defaultdict[int, set[str]] = defaultdict(set)
    for data in stream.sites.values():
        for label, window in zip(data.labels, data.windows, strict=True):
            arriving[window].add(label)
    sites, about = dict(stream.sites), {name: dict(told) for name, told in stream.about.items()}
    for site, rate in rates.items():
        clean = stream.sites[site]
        labels = list(clean.labels)
        for window in sorted(set(clean.windows)):
            rows = [i for i, w in enumerate(clean.windows) if w == window]
            codes = arriving[window] if len(arriving[window]) > 1 else stream.catalogue.codes()
            wrong = symmetric(clean.take(rows), rate, sorted(codes), seed)
            for i, label in zip(rows, wrong.labels, strict=True):
                labels[i] = label
        sites[site] = replace(clean, labels=tuple(labels))
        if clean.prompts:
            # Where a text is the answer, a wrong label is a wrong text.
            names = stream.catalogue.texts
            pairs = zip(labels, clean.labels, clean.texts, strict=True)
            texts = tuple(names.get(new, new) if new != old else text for new, old, text in pairs)
            sites[site] = replace(sites[site], texts=texts)
        replaced = sum(new != old for new, old in zip(labels, clean.labels, strict=True))
        about[site] |= {"noise": rate, "replaced": replaced}
    return replace(stream, sites=sites, about=about)


def _released(stream: Stream, delays: Mapping[str, int]) -> Stream:
    last = len(stream.windows)
    sites, about = dict(stream.sites), {name: dict(told) for name, told in stream.about.items()}
    for site, delay in delays.items():
        data = stream.sites[site]
        windows = tuple(w if w == 1 else min(w + delay, last) for w in data.windows)
        newest = {(r, w): i for i, (r, w) in enumerate(zip(data.records, windows, strict=True))}
        kept = sorted(newest.values(), key=lambda i: (windows[i], i))
        sites[site] = replace(data, windows=windows).take(kept)
        about[site] |= {"release": delay}
    return replace(stream, sites=sites, about=about)


def _restricted(stream: Stream, access: Mapping[str, Sequence[str]]) -> Stream:
    known = stream.catalogue.scopes()
    about = {name: dict(told) for name, told in stream.about.items()}
    for site, scopes in access.items():
        for scope in scopes:
            if scope not in known:
                raise UnknownName(
                    f"scenario.access.{site} names {scope!r}, which is no scope of this task; "
                    f"nearest is {nearest(scope, known)}"
                )
        about[site] |= {"access": tuple(scopes)}
    return replace(stream, about=about)
