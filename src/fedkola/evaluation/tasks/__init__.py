"""Where a stream comes from: the closed table of tasks, and the noise a plan puts into sites."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from fedkola.errors import UnknownName
from fedkola.evaluation.tasks import files, icd10cm
from fedkola.evaluation.tasks.tables import nearest
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan
from fedkola.quality.corrupt import symmetric

TASKS: Mapping[str, Callable[..., Stream]] = {"files": files.load, "icd10cm": icd10cm.load}


def load(plan: Plan) -> Stream:
    """The stream of a plan, with the labels of its noisy sites replaced; the test stays clean.

    A wrong label is drawn from those that reach any site in the same window (from the catalogue
    where that is one label), so that noise never makes knowledge arrive early. ``about`` of a
    noisy site gets ``noise`` (the rate) and ``replaced`` (how many labels). Raises UnknownName for
    a task or a site of the scenario that does not exist, and what the task itself raises.
    """
    if plan.task.name not in TASKS:
        raise UnknownName(
            f"task.name = {plan.task.name!r} is no task; set one of {', '.join(TASKS)}"
        )
    stream = TASKS[plan.task.name](plan.task, seed=plan.run.seed)
    scenario = plan.scenario
    for key, sites in (
        ("noisy", scenario.noisy),
        ("late", scenario.late),
        ("leave", scenario.leave),
    ):
        for site in sites:
            if site not in stream.sites:
                raise UnknownName(
                    f"scenario.{key} names {site!r}, which is no site of this task; nearest is "
                    f"{nearest(site, stream.sites)}; sites are {', '.join(stream.sites)}"
                )
    return _noisy(stream, scenario.noisy, plan.run.seed)


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
        replaced = sum(new != old for new, old in zip(labels, clean.labels, strict=True))
        about[site] |= {"noise": rate, "replaced": replaced}
    return replace(stream, sites=sites, about=about)
