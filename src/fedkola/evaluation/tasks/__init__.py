"""Where a stream comes from: the closed table of tasks, and what a plan's scenario does to sites.

The entries of [scenario] compose. ``noisy``, ``release`` and ``access`` change the stream here;
``late``, ``leave`` and ``availability`` change whom a round asks, in
:mod:`fedkola.knowledge.availability`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedkola.audit.canary import CanaryExposure
from fedkola.audit.planting import planted
from fedkola.errors import Incompatible, UnknownName
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
from fedkola.plan import Plan, Scenario
from fedkola.quality.corrupt import KINDS, LABEL_NOISES, Known, joined, likest, spelling
from fedkola.types import Dataset

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
    catalogue where that is one label), so that noise never makes knowledge arrive early. Labels
    are alike whose texts are spelt alike; older labels are those that the catalogue says were
    replaced. ``about`` of a noisy site gets ``noise`` (the rate), ``kind`` and ``replaced`` (how
    many records).
    *Release.* What everybody starts with, window 1, stays; later records reach a site so many
    windows later, at the latest in the last window. Of a record that then arrives twice in one
    window the newer text is kept. ``about`` gets ``release``, the delay.
    *Access.* ``about`` of a site that may not use everything gets ``access``, its scopes.
    *Canaries.* ``audit.canaries`` plants made-up secrets, see ``with_canaries``.

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
        ("scenario.liars", scenario.liars),
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
    stream = _noisy(stream, scenario, plan.run.seed)
    stream = _restricted(_released(stream, scenario.release), scenario.access)
    return with_canaries(stream, plan)


def with_canaries(stream: Stream, plan: Plan) -> Stream:
    """The stream with ``audit.canaries`` secrets of each kind at the site with most records.

    Raises Incompatible for an algorithm that learns no text.
    """
    if not plan.audit.canaries:
        return stream
    if plan.algorithm.name != "diloco":
        raise Incompatible(
            f"audit.canaries = {plan.audit.canaries} plants texts for a language model, and "
            f'algorithm.name = "{plan.algorithm.name}" trains none; set audit.canaries = 0'
        )
    site = max(sorted(stream.sites), key=lambda name: len(stream.sites[name]))
    secrets = CanaryExposure(each=plan.audit.canaries).canaries()
    about = {**stream.about.get(site, {}), "canaries": sum(one.repeats for one in secrets)}
    return replace(
        stream,
        sites={**stream.sites, site: planted(stream.sites[site], secrets)},
        about={**stream.about, site: about},
    )


def _noisy(stream: Stream, scenario: Scenario, seed: int) -> Stream:
    if scenario.noise not in KINDS or scenario.noise == "matrix":
        names = ", ".join(sorted(set(KINDS) - {"matrix"}))
        raise UnknownName(f"scenario.noise = {scenario.noise!r} is no noise; set one of {names}")
    if not scenario.noisy:
        return stream
    arriving: defaultdict[int, set[str]] = defaultdict(set)
    for data in stream.sites.values():
        for label, window in zip(data.labels, data.windows, strict=True):
            arriving[window].add(label)
    sites, about = dict(stream.sites), {name: dict(told) for name, told in stream.about.items()}
    for site, rate in scenario.noisy.items():
        clean = stream.sites[site]
        data, more, wrong = clean, clean.take(()), 0
        for window in sorted(set(clean.windows)):
            rows = [i for i, w in enumerate(clean.windows) if w == window]
            codes = arriving[window] if len(arriving[window]) > 1 else stream.catalogue.codes()
            part = clean.take(rows)
            found = KINDS[scenario.noise](
                part, rate, seed, _known(stream, part, scenario, site, sorted(codes))
            )
            data = _put(data, rows, found.data)
            more = joined(more, found.data.take(range(len(rows), len(found.data))))
            wrong += sum(found.wrong)
        if clean.prompts and data.labels != clean.labels and scenario.noise in LABEL_NOISES:
            # Where a text is the answer, a wrong label is a wrong text.
            written = stream.catalogue.texts
            pairs = zip(data.labels, clean.labels, clean.texts, strict=True)
            texts = tuple(written.get(new, new) if new != old else text for new, old, text in pairs)
            data = replace(data, texts=texts)
        sites[site] = joined(data, more)
        about[site] |= {"noise": rate, "kind": scenario.noise, "replaced": wrong}
    return replace(stream, sites=sites, about=about)


def _known(
    stream: Stream, part: Dataset, scenario: Scenario, site: str, codes: Sequence[str]
) -> Known:
    """What the plan's kind of noise draws on, and nothing that takes long for another kind."""
    near: Mapping[str, str] = {}
    features = spelling(part.texts) if scenario.noise == "feature_dependent" else None
    if scenario.noise == "confusable":
        everyone = list(stream.sites.values())
        near = likest(
            spelling([text for data in everyone for text in data.texts]),
            [label for data in everyone for label in data.labels],
            codes,
        )
    return Known(
        codes=tuple(codes),
        likest=near,
        older={heir: label.code for label in stream.catalogue.labels for heir in label.replaced_by},
        features=features,
        target=scenario.target,
        site=site,
    )


def _put(data: Dataset, rows: Sequence[int], part: Dataset) -> Dataset:
    """``data`` with its ``rows`` as in the first rows of ``part``."""
    place = dict(zip(rows, range(len(rows)), strict=True))
    both = joined(data, part)
    return both.take([len(data) + place[i] if i in place else i for i in range(len(data))])


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
